use std::convert::Infallible;
use std::future::pending;

use http::{Request, Response};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::mpsc;

use super::*;

/// Regression: hyper takes a stream that was reset without an error for one that has ended, and the API got a part for the whole.
#[tokio::test]
async fn an_upload_by_http2_whose_stream_is_reset_has_not_ended() {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (tell, mut told) = mpsc::channel(1);
    let service = service_fn(move |request: Request<Incoming>| {
        let body = Streaming::new(request.into_body(), Side::Downstream, Duration::MAX).http2(true);
        let reading = tokio::spawn(body.collect());
        tell.try_send(reading).expect("one at a time");
        pending::<Result<Response<Body>, Infallible>>()
    });
    let server = http2::Builder::new(TokioExecutor::new());
    tokio::spawn(server.serve_connection(TokioIo::new(ours), service));
    let (client, connection) = h2::client::handshake(theirs).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("it is open");
    for reset in [None, Some(h2::Reason::NO_ERROR), Some(h2::Reason::CANCEL)] {
        let request = Request::post("http://p/").body(()).expect("a request");
        let (_answer, mut stream) = client.send_request(request, false).expect("it is open");
        stream.send_data(Bytes::from_static(b"a part"), false).expect("there is a window");
        let reading = told.recv().await.expect("it arrives");
        match reset {
            Some(reason) => stream.send_reset(reason),
            None => stream.send_data(Bytes::from_static(b" and the rest"), true).expect("open"),
        }
        let read = reading.await.expect("it does not panic").map(|body| body.to_bytes());
        match reset {
            Some(reason) => assert!(read.is_err(), "{reason:?}: {read:?}"),
            None => assert_eq!(read.expect("it ended"), "a part and the rest"),
        }
    }
}
