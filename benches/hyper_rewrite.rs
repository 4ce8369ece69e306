//! The least that does this proxy's work on hyper: reads a body, makes it consistent, keeps what it sends, and sends that once
//! more if it is refused. No records, limits or deadlines, nothing that tells one protocol from another, and fields as they came.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self as client, SendRequest};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use optin_proxy::contact::{self, Policy, Sanitized, sanitize};
use tokio::net::{TcpListener, TcpStream};

/// What every refusal says that is worth another attempt.
pub const REFUSAL: &[u8] = b"Status transition";

/// What is sent for the body of an update.
pub fn consistent(received: &Bytes, own_host: Option<&str>, policy: &Policy) -> Bytes {
    match sanitize(received, &contact::Request { update: true, own_host, charset: None }, policy) {
        Sanitized::Contact(contact) => contact.body,
        Sanitized::NoContact | Sanitized::Uninspectable(_) => received.clone(),
    }
}

#[derive(Clone)]
pub struct Upstream {
    pub address: SocketAddr,
    pub idle: Arc<Mutex<Vec<SendRequest<Full<Bytes>>>>>,
}

impl Upstream {
    fn idle(&self) -> MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> SendRequest<Full<Bytes>> {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let mut builder = client::Builder::new();
        builder.preserve_header_case(true);
        let (sender, driver) = builder.handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(driver);
        sender
    }

    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let kept = self.idle().pop();
        let mut sender = match kept {
            Some(kept) if kept.is_ready() => kept,
            _ => self.connect().await,
        };
        let answer = sender.send_request(request).await.expect("an answer");
        if sender.is_ready() {
            self.idle().push(sender);
        } else {
            let upstream = self.clone();
            tokio::spawn(async move {
                if sender.ready().await.is_ok() {
                    upstream.idle().push(sender);
                }
            });
        }
        answer
    }

    async fn serve(
        self,
        request: Request<Incoming>,
        policy: Arc<Policy>,
    ) -> Result<Response<Either<Full<Bytes>, Incoming>>, Infallible> {
        let (mut head, body) = request.into_parts();
        let received = body.collect().await.expect("a body").to_bytes();
        head.headers.remove(CONNECTION);
        let own_host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
        let sent = consistent(&received, own_host, &policy);
        if sent.len() != received.len() {
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(sent.len()));
        }
        let first = Request::from_parts(head.clone(), Full::new(sent.clone()));
        let answer = self.ask(first).await;
        if answer.status() != StatusCode::BAD_REQUEST {
            return Ok(answer.map(Either::Right));
        }
        let (refused, text) = answer.into_parts();
        let text = text.collect().await.expect("a body").to_bytes();
        if memchr::memmem::find(&text, REFUSAL).is_none() {
            return Ok(Response::from_parts(refused, Either::Left(Full::new(text))));
        }
        let again = Request::from_parts(head, Full::new(sent));
        Ok(self.ask(again).await.map(Either::Right))
    }
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let (upstream, policy) = (Upstream { address, idle: Arc::default() }, Arc::<Policy>::default());
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let (upstream, policy) = (upstream.clone(), Arc::clone(&policy));
        let service = service_fn(move |request| upstream.clone().serve(request, policy.clone()));
        tokio::spawn(async move {
            let mut builder = server::Builder::new();
            builder.preserve_header_case(true);
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
