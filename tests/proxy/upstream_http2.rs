//! Upstreams that speak HTTP/2: what they retire, refuse, and are told.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::server::TlsStream;

use crate::support::http2::{END_HEADERS, END_STREAM, GOAWAY, HEADERS, Http2, RST_STREAM};
use crate::support::proxy::Proxy;
use crate::support::tls::Authority;
use crate::support::{CONTACTS, RECIPE, put, request};

/// An origin that does so with each of its connections, and a proxy before it.
async fn before<F>(
    settings: &[&str],
    serve: impl Fn(TlsStream<TcpStream>) -> F + Send + 'static,
) -> Proxy
where
    F: Future<Output = ()> + Send + 'static,
{
    let authority = Authority::new();
    let acceptor = authority.acceptor("localhost", &["h2"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            tokio::spawn(serve(stream));
        }
    });
    let ca_file = format!("upstream.ca_file={}", authority.file().display());
    Proxy::start(&url, &[&[&*ca_file], settings].concat()).await
}

/// How an upstream says that it has not looked at a request.
#[derive(Clone, Copy, Debug)]
enum Unprocessed {
    /// It retires the connection, whose last stream is the one before.
    Retired,
    /// It refuses the stream alone.
    Refused,
    /// It says nothing, and closes the connection.
    Closed,
}

const PLANTED: &[u8] = b"planted-in-goaway";

/// Answers requests, but for these by number, over all of its connections; how many have come is counted.
async fn answer_but(
    refused: &[usize],
    how: Unprocessed,
    stream: TlsStream<TcpStream>,
    come: &AtomicUsize,
) {
    let mut server = Http2::accept(stream).await;
    while let Some(stream) = server.request().await {
        let number = come.fetch_add(1, Ordering::Relaxed);
        match how {
            _ if !refused.contains(&number) => {
                server.send(HEADERS, END_HEADERS | END_STREAM, stream, &[0x89]).await;
            }
            Unprocessed::Retired => {
                let last = stream.saturating_sub(2).to_be_bytes();
                server.send(GOAWAY, 0, 0, &[&last[..], &[0; 4], PLANTED].concat()).await;
            }
            Unprocessed::Refused => {
                server.send(RST_STREAM, 0, stream, &7_u32.to_be_bytes()).await;
            }
            Unprocessed::Closed => return,
        }
    }
}

/// Regression: it was 502, and said that the request may have been applied.
#[tokio::test]
async fn what_an_upstream_says_it_has_not_looked_at_is_sent_again_once_if_it_is_idempotent() {
    let create = request("POST", CONTACTS, "", RECIPE);
    for how in [Unprocessed::Retired, Unprocessed::Refused, Unprocessed::Closed] {
        for (refused, asked, status, in_all) in [
            (&[1][..], put(RECIPE), 204, 3),
            (&[1, 2], put(RECIPE), 502, 3),
            (&[1], create.clone(), 502, 2),
        ] {
            let come = Arc::new(AtomicUsize::default());
            let counted = Arc::clone(&come);
            let proxy = before(&[], move |stream| {
                let come = Arc::clone(&counted);
                async move { answer_but(refused, how, stream, &come).await }
            })
            .await;
            let mut client = proxy.client().await;
            assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
            let answer = client.ask(&asked).await;
            assert_eq!(answer.status, status, "{how:?} {refused:?}");
            assert_eq!(come.load(Ordering::Relaxed), in_all, "{how:?} {refused:?}");
            if status == 502 {
                assert_eq!(answer.problem(), "upstream-connection-closed");
                let told = String::from_utf8(answer.body).expect("JSON");
                let is_sure = !matches!(how, Unprocessed::Closed);
                assert_eq!(told.contains("It was not applied"), is_sure, "{told}");
                assert!(!told.contains("planted") && !told.contains("docs.rs"), "{told}");
            }
            // Its next one goes through.
            assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
        }
    }
}

/// Regression: the API was blamed, with 502, since HTTP/2 tells only that the stream was reset.
#[tokio::test]
async fn a_client_that_stops_in_its_body_is_told_so() {
    let proxy = before(&["limits.idle_timeout=100ms"], |stream| async {
        let mut server = Http2::accept(stream).await;
        while server.request().await.is_some() {}
    })
    .await;
    let begun =
        b"POST /ws/customers/x/activities HTTP/1.1\r\nHost: p\r\nContent-Length: 100\r\n\r\nstart";
    let answer = proxy.ask(begun).await;
    assert_eq!((answer.status, answer.problem()), (408, "request-body-timeout".to_owned()));
}

/// Answers with the names that a request has, over HTTP/2.
async fn echo_names(stream: TlsStream<TcpStream>) {
    let echo = |request: http::Request<hyper::body::Incoming>| async move {
        let authority = request.uri().authority().map(ToString::to_string);
        let field = |name| request.headers().get(name).cloned();
        let seen = format!("{authority:?} {:?} {:?}", field("host"), field("te"));
        let _ = request.into_body().collect().await;
        Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(seen))))
    };
    let _ = http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), hyper::service::service_fn(echo))
        .await;
}

const NAMED: &[u8] =
    b"GET http://api.constantcontact.com/x HTTP/1.1\r\nHost: api.constantcontact.com\r\n\r\n";

/// Regression: the name was gone with the connection that handed the request back, and the next one was asked by the upstream's.
#[tokio::test]
async fn a_request_that_a_retired_connection_hands_back_keeps_the_name_of_its_host() {
    let connections = Arc::new(AtomicUsize::default());
    let retired = Arc::new(Notify::new());
    let told = Arc::clone(&retired);
    let proxy = before(&[], move |stream| {
        let number = connections.fetch_add(1, Ordering::Relaxed);
        let told = Arc::clone(&told);
        async move {
            if number > 0 {
                return echo_names(stream).await;
            }
            let mut server = Http2::accept(stream).await;
            let begun = server.request().await.expect("the first one");
            server.send(GOAWAY, 0, 0, &[&begun.to_be_bytes()[..], &[0; 4]].concat()).await;
            told.notify_one();
            // The one that was begun is not over.
            while server.request().await.is_some() {}
        }
    })
    .await;
    let mut first = proxy.client().await;
    first.send(NAMED).await;
    retired.notified().await;
    let seen = String::from_utf8(proxy.ask(NAMED).await.body).expect("text");
    assert_eq!(seen, "Some(\"api.constantcontact.com\") None None");
}

/// Regression: `:authority` was the upstream's beside the client's `Host`, and `TE` was dropped.
#[tokio::test]
async fn the_authority_is_the_host_that_the_client_named_and_te_arrives() {
    let proxy = before(&[], echo_names).await;
    let seen = String::from_utf8(proxy.ask(NAMED).await.body).expect("text");
    assert_eq!(seen, "Some(\"api.constantcontact.com\") None None");
    let by_base_url = b"GET /x HTTP/1.1\r\nHost: p\r\nTE: trailers\r\nConnection: TE\r\n\r\n";
    let seen = String::from_utf8(proxy.ask(by_base_url).await.body).expect("text");
    assert!(seen.starts_with("Some(\"localhost:"), "{seen}");
    assert!(seen.ends_with(" None Some(\"trailers\")"), "{seen}");
}
