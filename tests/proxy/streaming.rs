//! What is no contact write flows: nothing is held back, nothing is kept.

use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::support::CONTACT;
use crate::support::origin::{Origin, Reply, read_head};
use crate::support::proxy::Proxy;

#[tokio::test]
async fn an_upload_reaches_the_upstream_while_it_is_still_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(&upstream, &[]).await;
    let mut client = proxy.client().await;
    client.send(b"POST /ws/customers/x/activities HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\nfirst").await;
    let (mut stream, _) = listener.accept().await.expect("the proxy connects");
    let mut buffer = Vec::new();
    read_head(&mut stream, &mut buffer).await.expect("a head");
    while buffer.len() < 5 {
        stream.read_buf(&mut buffer).await.expect("it comes");
    }
    assert_eq!(buffer, b"first");
    client.send(b"other").await;
    while buffer.len() < 10 {
        stream.read_buf(&mut buffer).await.expect("it comes");
    }
    assert_eq!(buffer, b"firstother");
}

#[tokio::test]
async fn the_start_of_an_answer_reaches_the_client_while_the_rest_is_still_to_come() {
    let go_on = Arc::new(Notify::new());
    let origin = Origin::start([Reply::Pause(
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst".to_vec(),
        Arc::clone(&go_on),
        b"other".to_vec(),
    )])
    .await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    client.send(b"GET / HTTP/1.1\r\nHost: p\r\n\r\n").await;
    client.head().await.expect("a head");
    assert_eq!(client.bytes(5).await.as_deref(), Some(&b"first"[..]));
    go_on.notify_one();
    assert_eq!(client.bytes(5).await.as_deref(), Some(&b"other"[..]));
}

#[tokio::test]
async fn a_body_over_the_limit_streams_on_from_where_it_was_looked_at() {
    let origin = Origin::start([Reply::Write(crate::support::no_content())]).await;
    let proxy = Proxy::before(&origin, &["sanitize.max_body=1KiB"]).await;
    let body: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
    for chunked in [false, true] {
        let mut asked = format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\n").into_bytes();
        if chunked {
            asked.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            for chunk in body.chunks(1000) {
                asked.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                asked.extend_from_slice(chunk);
                asked.extend_from_slice(b"\r\n");
            }
            asked.extend_from_slice(b"0\r\n\r\n");
        } else {
            asked.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
            asked.extend_from_slice(&body);
        }
        assert_eq!(proxy.ask(&asked).await.outcome(), "uninspected");
        let arrived = origin.requests().pop().expect("it arrived");
        assert!(arrived.body == body, "chunked: {chunked}");
        assert_eq!(arrived.fields("transfer-encoding").is_empty(), !chunked);
    }
}
