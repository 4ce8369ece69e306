//! The same as `hyper_rewrite.rs`, and in the least way what optin-proxy is asked beyond the rewrite, as in `httparse_watched.rs`.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, VIA};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use optin_proxy::contact::Policy;
use smallvec::SmallVec;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

use crate::httparse_rewrite::accept;
use crate::hyper_rewrite::{REFUSAL, Upstream};
use crate::watch::{Deadline, Held, KEEP_ALIVE, RESPONSE, Record, Watch};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REPORT: HeaderName = HeaderName::from_static("optin-proxy");

/// Looks at each field, and tells the client's own id and application.
fn looked(fields: &HeaderMap) -> [Option<SmallVec<[u8; 24]>>; 2] {
    let (mut id, mut agent, mut hosts) = (None, None, 0);
    for (name, value) in fields {
        let passes = match name.as_str() {
            "via" => !value.as_bytes().ends_with(b"optin-proxy"),
            "host" => {
                hosts += 1;
                let is_host = |byte: &u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(byte);
                hosts == 1 && value.as_bytes().iter().all(is_host)
            }
            "user-agent" => {
                agent = Some(SmallVec::from_slice(value.as_bytes()));
                true
            }
            "x-request-id" => {
                id = Some(SmallVec::from_slice(value.as_bytes()));
                true
            }
            "connection" => !value.as_bytes().contains(&b','),
            // Nobody sends them here.
            "te" | "expect" | "upgrade" | "keep-alive" | "proxy-connection" => false,
            "proxy-authenticate" | "proxy-authorization" | "transfer-encoding" => false,
            "content_length" | "transfer_encoding" => false,
            _ => true,
        };
        assert!(passes, "what is sent here has nothing that needs more than a look");
    }
    [id, agent]
}

/// What an exchange has until its answer is taken.
struct Exchange {
    watch: Rc<Watch>,
    record: Option<Record>,
    _held: Held,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.watch.keep(self.record.take().unwrap_or_default());
    }
}

/// An answer's body, at whose end the record is kept.
struct Watched {
    body: Either<Full<Bytes>, Incoming>,
    _exchange: Exchange,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Either::Left(text) => Pin::new(text).poll_frame(cx).map_err(|never| match never {}),
            Either::Right(stream) => Pin::new(stream).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What the exchanges of a connection have in common.
struct Connection {
    watch: Rc<Watch>,
    upstream: Upstream,
    policy: Arc<Policy>,
    /// Of the one that is.
    deadline: RefCell<Option<Deadline>>,
    /// How many there were.
    count: Cell<u32>,
}

async fn exchanged(
    connection: Rc<Connection>,
    request: Request<Incoming>,
) -> io::Result<Response<Watched>> {
    let started = Instant::now();
    connection.count.set(connection.count.get() + 1);
    let kept = connection.deadline.take();
    let mut deadline = kept.unwrap_or_else(Deadline::new);
    let answer = ask(&connection, request, started, &mut deadline).await;
    connection.deadline.replace(Some(deadline));
    answer
}

async fn ask(
    Connection { watch, upstream, policy, .. }: &Connection,
    request: Request<Incoming>,
    started: Instant,
    deadline: &mut Deadline,
) -> io::Result<Response<Watched>> {
    let (mut head, body) = request.into_parts();
    let [id, agent] = looked(&head.headers);
    let received = deadline.within(RESPONSE, body.collect()).await?.expect("a body").to_bytes();
    let held = watch.take(received.len());
    let mut record = Record::begun(started);
    record.id = id.unwrap_or_else(|| watch.id());
    record.line.extend_from_slice(head.uri.path().as_bytes());
    record.agent = agent;
    let sent = watch.rewritten(&received, policy, &mut record);
    head.headers.remove(CONNECTION);
    head.headers.insert(HOST, HeaderValue::from_static("api"));
    head.headers.append(VIA, HeaderValue::from_static("1.1 optin-proxy"));
    if sent.len() != received.len() {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(sent.len()));
    }
    let first = Request::from_parts(head.clone(), Full::new(sent.clone()));
    let (mut head_of_answer, mut body) =
        deadline.within(RESPONSE, upstream.ask(first)).await?.map(Either::Right).into_parts();
    if head_of_answer.status == StatusCode::BAD_REQUEST
        && let Either::Right(text) = body
    {
        let text = deadline.within(RESPONSE, text.collect()).await?.expect("a body").to_bytes();
        body = if memchr::memmem::find(&text, REFUSAL).is_some() {
            record.attempts += 1;
            let again = Request::from_parts(head, Full::new(sent));
            let answer = deadline.within(RESPONSE, upstream.ask(again)).await?;
            let (head, body) = answer.into_parts();
            head_of_answer = head;
            Either::Right(body)
        } else {
            Either::Left(Full::new(text))
        };
    }
    record.status = Some(head_of_answer.status.as_u16());
    let fields = &mut head_of_answer.headers;
    looked(fields);
    fields.remove(CONNECTION);
    let id = HeaderValue::from_bytes(&record.id).expect("ASCII");
    let report = HeaderValue::from_maybe_shared(Bytes::from(record.report())).expect("ASCII");
    fields.insert(REQUEST_ID, id);
    fields.insert(REPORT, report);
    let exchange = Exchange { watch: Rc::clone(watch), record: Some(record), _held: held };
    Ok(Response::from_parts(head_of_answer, Watched { body, _exchange: exchange }))
}

async fn serve(
    watch: Rc<Watch>,
    upstream: Upstream,
    policy: Arc<Policy>,
    client: TcpStream,
) -> io::Result<()> {
    let (deadline, count) = (RefCell::default(), Cell::new(0));
    let connection = Rc::new(Connection { watch, upstream, policy, deadline, count });
    let served = Rc::clone(&connection);
    let service = service_fn(move |request| exchanged(Rc::clone(&connection), request));
    let mut builder = server::Builder::new();
    builder.preserve_header_case(true);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(client), service));
    let (mut silence, mut seen) = (pin!(sleep(KEEP_ALIVE)), 0);
    poll_fn(|cx| {
        if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
            return Poll::Ready(ended.map_err(io::Error::other));
        }
        // Who has asked nothing for so long has been silent for it.
        while silence.as_mut().poll(cx).is_ready() {
            if seen == served.count.get() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            seen = served.count.get();
            silence.as_mut().reset(Instant::now() + KEEP_ALIVE);
        }
        Poll::Pending
    })
    .await
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let upstream = Upstream { address, idle: Arc::default() };
    let (policy, watch) = (Arc::<Policy>::default(), Watch::new());
    let serve = |stream| serve(Rc::clone(&watch), upstream.clone(), Arc::clone(&policy), stream);
    accept(listener, serve).await;
}
