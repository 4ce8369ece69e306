//! A proxy of hyper's server and hyper-util's pooled client that passes on what comes, and does nothing else.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

pub type AnyBody = http_body_util::Either<Full<Bytes>, Incoming>;

pub async fn serve<S, F>(listener: TcpListener, service: S)
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Result<Response<AnyBody>, Infallible>> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder.http1().timer(TokioTimer::new()).preserve_header_case(true);
            let _ = builder.serve_connection(TokioIo::new(stream), service_fn(service)).await;
        });
    }
}

pub async fn pass_through(listener: TcpListener, upstream: SocketAddr) {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<HttpConnector, Incoming> = Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .http1_preserve_header_case(true)
        .build(connector);
    let pass_on = move |mut request: Request<Incoming>| {
        request.headers_mut().remove(CONNECTION);
        let path = request.uri().path_and_query().expect("a path").as_str();
        let uri: Uri = format!("http://{upstream}{path}").parse().expect("a URI");
        *request.uri_mut() = uri;
        let answer = client.request(request);
        async move { Ok(answer.await.expect("an answer").map(AnyBody::Right)) }
    };
    serve(listener, pass_on).await;
}
