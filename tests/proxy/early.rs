//! Answers that come before the request has ended.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::support::client::Client;
use crate::support::clock::{Clock, settle};
use crate::support::origin::{Origin, Reply, read_head};
use crate::support::proxy::Proxy;
use crate::support::{BARE, GET, answer, no_content, put, request};

/// Of an upload of so many bytes, all but the last.
fn all_but_one(method: &str, path: &str, length: usize) -> Vec<u8> {
    let mut upload = request(method, path, "", &vec![b'x'; length]);
    upload.pop();
    upload
}

/// A proxy before a server of the test's own.
async fn before_a_listener() -> (TcpListener, Proxy) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    (listener, Proxy::start(&url, &[]).await)
}

/// Regression: the connection was closed without a word, and the next request on it lost.
#[tokio::test]
async fn an_answer_before_the_body_was_read_says_that_its_connection_closes() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let settings = ["sanitize.uninspectable=reject", "sanitize.max_body=100KiB"];
    let proxy = Proxy::before(&origin, &settings).await;
    let contact = "/ws/customers/u/contacts/1";
    for (upload, status) in [
        (all_but_one("TRACE", "/x", 20), 405),
        (all_but_one("GET", "http://127.0.0.1/x", 200_000), 403),
        (all_but_one("PUT", contact, 200_000), 413),
    ] {
        let mut client = proxy.client().await;
        let answer = client.ask(&upload).await;
        assert_eq!((answer.status, answer.field("connection")), (status, Some("close")));
        client.send(b"x").await;
        client.stream.shutdown().await.expect("it is open");
        assert!(client.is_closed().await);
    }
    // Of these, all was read.
    let mut client = proxy.client().await;
    for (body, status) in [(&b"<a>"[..], 415), (BARE, 204)] {
        let answer = client.ask(&put(body)).await;
        assert_eq!((answer.status, answer.field("connection")), (status, None));
    }
    assert_eq!(client.ask(GET).await.status, 204);
}

/// Regression: after a megabyte, or if it was about to send more, it was reset, and saw nothing of its answer.
#[tokio::test]
async fn a_client_that_sends_all_before_it_reads_gets_the_refusal() {
    let proxy = Proxy::start("http://127.0.0.1:1", &["sanitize.uninspectable=reject"]).await;
    for length in [1_100_000, 3_000_000, 20_000_000] {
        for _ in 0..4 {
            let mut client = proxy.client().await;
            client.send(&put(&vec![b'x'; length])).await;
            assert_eq!(client.answer(false).await.status, 413);
        }
    }
}

#[tokio::test]
async fn a_client_that_sends_on_is_listened_to_for_five_seconds_and_a_silent_one_for_one() {
    let proxy = Proxy::start("http://127.0.0.1:1", &[]).await;
    let clock = Clock::hold();
    for (sends_on, seconds) in [(true, 5..=7), (false, 1..=3)] {
        let mut client = proxy.client().await;
        let refused = client.ask(&all_but_one("TRACE", "/x", 1_000)).await;
        assert_eq!(refused.status, 405);
        let begun = Instant::now();
        while proxy.metric("optin_proxy_connections") > 0.0 {
            if sends_on {
                let _ = client.stream.write_all(b"x").await;
            }
            settle().await;
            clock.advance(Duration::from_millis(500)).await;
        }
        assert!(seconds.contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    }
}

/// Regression: who had been answered and sent on held a stop for the whole of his five seconds.
#[tokio::test]
async fn a_stop_waits_for_a_second_for_a_client_that_has_been_answered_and_sends_on() {
    let mut proxy = Proxy::start("http://127.0.0.1:1", &[]).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    assert_eq!(client.ask(&all_but_one("TRACE", "/x", 1_000)).await.status, 405);
    let (begun, stopped) = (Instant::now(), proxy.stop());
    while !stopped.is_finished() {
        let _ = client.stream.write_all(b"x").await;
        settle().await;
        clock.advance(Duration::from_millis(250)).await;
    }
    assert_eq!(stopped.await.expect("no panic"), 0, "none is cut");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// Regression: the upload that could not be written any more was looked at first, and told as a fault of the API.
#[tokio::test]
async fn an_answer_of_an_api_that_reads_no_further_reaches_the_client() {
    let (listener, proxy) = before_a_listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // With something unread, its end is a reset.
            let _ = read_head(&mut stream, &mut Vec::new()).await;
            let refusal = answer("401 Unauthorized", "Connection: close\r\n", b"no");
            stream.write_all(&refusal).await.expect("it is read");
        }
    });
    for length in [100_000, 300_000, 900_000, 5_000_000] {
        for _ in 0..5 {
            let (reading, mut writing) = proxy.client().await.stream.into_split();
            let upload = request("POST", "/activities", "", &vec![b'x'; length]);
            // Kept, since who closes its half has given up.
            let sending = tokio::spawn(async move { (writing.write_all(&upload).await, writing) });
            let mut client = Client::over(tokio::io::join(reading, tokio::io::sink()));
            let answer = client.answer(false).await;
            assert_eq!((answer.status, &answer.body[..]), (401, &b"no"[..]), "{length}");
            drop(sending);
        }
    }
}

/// What cannot be written is no answer: if none comes, that is told.
#[tokio::test]
async fn an_api_that_reads_no_further_and_says_nothing_is_at_fault() {
    let (listener, proxy) = before_a_listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 10]).await;
        }
    });
    let mut client = proxy.client().await;
    client.send(&request("POST", "/activities", "", &vec![b'x'; 5_000_000])).await;
    let answer = client.answer(false).await;
    assert_eq!((answer.status, answer.problem()), (502, "upstream-connection-closed".to_owned()));
}
