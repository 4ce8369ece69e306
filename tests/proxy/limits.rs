//! Limits, each at its edge: what is within is served, what is beyond is refused at once or waits.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use optin_proxy::proxy::Server;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;

use crate::support::clock::{Clock, settle};
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, CONTACT, GET, RECIPE, answer, no_content, put, request};

#[tokio::test]
async fn requests_beyond_the_limit_get_503_at_once_and_later_ones_are_served() {
    let go_on = Arc::new(Notify::new());
    let paused = Reply::Pause(vec![], Arc::clone(&go_on), answer("200 OK", "", b"late"));
    let origin = Origin::start([paused, Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["limits.max_requests=1"]).await;
    let mut first = proxy.client().await;
    first.send(GET).await;
    origin.arrived(1).await;
    for asked in [GET.to_vec(), put(BARE)] {
        let refused = proxy.ask(&asked).await;
        assert_eq!((refused.status, refused.problem()), (503, "overloaded".to_owned()));
        assert_eq!(refused.field("retry-after"), Some("1"));
    }
    // Who asks whether to send is told at once, and not invited first.
    let mut asking = proxy.client().await;
    let head = format!(
        "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    );
    let refused = asking.ask(head.as_bytes()).await;
    assert_eq!((refused.status, refused.problem()), (503, "overloaded".to_owned()));
    assert!(asking.is_closed().await, "what follows may be the body or the next request");
    assert_eq!(origin.requests().len(), 1, "nothing of them was sent on");
    go_on.notify_one();
    assert_eq!(first.answer(false).await.body, b"late");
    proxy.finished(4).await;
    assert_eq!(proxy.ask(GET).await.status, 204);
}

#[tokio::test]
async fn an_answer_that_is_still_sent_counts_as_in_flight() {
    let go_on = Arc::new(Notify::new());
    let start = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst".to_vec();
    let paused = Reply::Pause(start, Arc::clone(&go_on), b"other".to_vec());
    let origin = Origin::start([paused]).await;
    let proxy = Proxy::before(&origin, &["limits.max_requests=1"]).await;
    let mut first = proxy.client().await;
    first.send(GET).await;
    first.head().await.expect("a head");
    assert_eq!(proxy.ask(GET).await.status, 503);
    go_on.notify_one();
}

#[tokio::test]
async fn a_connection_beyond_the_limit_waits_until_one_ends() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["limits.max_connections=2"]).await;
    let (mut first, mut second) = (proxy.client().await, proxy.client().await);
    for client in [&mut first, &mut second] {
        assert_eq!(client.ask(GET).await.status, 204);
    }
    let mut third = proxy.client().await;
    third.send(GET).await;
    assert_eq!(first.ask(GET).await.status, 204, "those that are in are served");
    assert_eq!(proxy.metric("optin_proxy_connections"), 2.0);
    assert_eq!(origin.requests().len(), 3);
    drop(second);
    assert_eq!(third.answer(false).await.status, 204);
}

#[tokio::test]
async fn a_tunnel_is_a_connection_for_as_long_as_it_is_open() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = server.local_addr().expect("bound");
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let ports = format!("intercept.ports={}", address.port());
    let local = "intercept.allow_private=127.0.0.1";
    let proxy = Proxy::before(&origin, &["limits.max_connections=1", &ports, local]).await;
    let tunnel = proxy.client().await.tunnel(&address.to_string()).await.expect("a tunnel");
    let (far, _) = server.accept().await.expect("the proxy connects");
    let mut waiting = proxy.client().await;
    waiting.send(GET).await;
    assert_eq!(proxy.metric("optin_proxy_connections"), 1.0);
    drop((tunnel, far));
    assert_eq!(waiting.answer(false).await.status, 204);
}

#[tokio::test]
async fn bodies_together_take_no_more_memory_than_the_limit() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let limits = ["sanitize.max_body=1000B", "limits.max_buffered=1000B"];
    let proxy = Proxy::before(&origin, &limits).await;
    let body = |length: usize| put(&vec![b'x'; length]);
    let mut first = proxy.client().await;
    let whole = body(600);
    first.send(&whole[..whole.len() - 1]).await;
    // Until the proxy has read that: only then is there no room for more.
    while proxy.ask(&body(402)).await.status != 503 {
        tokio::task::yield_now().await;
    }
    let refused = proxy.ask(&body(402)).await;
    assert_eq!((refused.status, refused.problem()), (503, "overloaded".to_owned()));
    assert_eq!(proxy.ask(&body(401)).await.status, 204, "it just fits");
    first.send(&whole[whole.len() - 1..]).await;
    assert_eq!(first.answer(false).await.status, 204);
    while proxy.ask(&body(1000)).await.status != 204 {
        tokio::task::yield_now().await;
    }
}

/// Regression: a body of a mebibyte was kept for the record while its kilobyte counted.
#[tokio::test]
async fn what_is_packed_counts_as_what_it_unpacks_to() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    for (room, status) in [(58_500, 503), (80_000, 204)] {
        let room = format!("limits.max_buffered={room}B");
        let proxy = Proxy::before(&origin, &["sanitize.max_body=58500B", &room]).await;
        let note = format!("<Note>{}</Note></Contact>", "x".repeat(58_000 - RECIPE.len()));
        let recipe = String::from_utf8_lossy(RECIPE).replace("</Contact>", &note);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packed.write_all(recipe.as_bytes()).expect("memory");
        let packed = packed.finish().expect("memory");
        assert!(packed.len() < 2_100 && recipe.len() > 57_900);
        let asked = request("PUT", CONTACT, "Content-Encoding: gzip\r\n", &packed);
        assert_eq!(proxy.ask(&asked).await.status, status);
    }
}

#[tokio::test]
async fn a_body_of_which_a_quarter_is_here_is_counted_as_announced_until_it_breaks_off() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let limits = ["sanitize.max_body=2000B", "limits.max_buffered=2000B"];
    let mut entrance = None;
    let prepare = |server: &mut Server| entrance = Some(server.entrance());
    let proxy = Proxy::start_with(&origin.url(), &limits, prepare).await;
    let body = |length: usize| put(&vec![b'x'; length]);
    let most_that_fits = async |length: usize| {
        assert_eq!(proxy.ask(&body(length + 1)).await.status, 503, "{length}");
        assert_eq!(proxy.ask(&body(length)).await.status, 204, "{length}");
        settle().await;
    };
    // In memory, so that what was sent has come.
    let mut client = entrance.expect("prepared").connect(16 * 1024).await.expect("it runs");
    let whole = body(1000);
    let (start, rest) = whole.split_at(whole.len() - 750);
    client.write_all(start).await.expect("it listens");
    settle().await;
    most_that_fits(1750).await;
    client.write_all(&rest[..1]).await.expect("it listens");
    settle().await;
    most_that_fits(1000).await;
    drop(client);
    settle().await;
    assert_eq!(proxy.ask(&body(2000)).await.status, 204);
}

#[tokio::test]
async fn a_body_that_drips_for_too_long_gets_408() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let limits = [
        "limits.body_timeout=2m",
        "limits.idle_timeout=1m",
        "limits.header_timeout=1h",
        "limits.min_rate=0B",
    ];
    let proxy = Proxy::before(&origin, &limits).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    let whole = put(BARE);
    let (start, rest) = whole.split_at(whole.len() - 20);
    client.send(start).await;
    for byte in rest.chunks(1).take(12) {
        client.send(byte).await;
        clock.advance(Duration::from_secs(9)).await;
    }
    let began = tokio::time::Instant::now();
    let answer = clock.until(client.answer(false)).await;
    assert_eq!((answer.status, answer.problem()), (408, "request-body-timeout".to_owned()));
    let detail = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(detail.contains("limits.body_timeout"), "{detail}: no silence was as long as a minute");
    assert!(began.elapsed() >= Duration::from_secs(12), "two minutes from the start");
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn an_upload_keeps_its_least_rate_or_gets_408() {
    let limits = ["limits.min_rate=2B", "limits.idle_timeout=1m", "limits.header_timeout=1h"];
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &limits).await;
    let clock = Clock::hold();
    let (mut fast, mut slow) = (proxy.client().await, proxy.client().await);
    for client in [&mut fast, &mut slow] {
        client.send(b"POST /up HTTP/1.1\r\nHost: p\r\nContent-Length: 220\r\n\r\n").await;
    }
    let began = tokio::time::Instant::now();
    for _ in 0..110 {
        fast.send(b"xx").await;
        slow.send(b"x").await;
        assert_eq!(proxy.metric("optin_proxy_requests_total"), 0.0, "neither is cut so far");
        clock.advance(Duration::from_secs(1)).await;
        settle().await;
    }
    assert_eq!(fast.answer(false).await.status, 204);
    let answer = clock.until(slow.answer(false)).await;
    assert_eq!((answer.status, answer.problem()), (408, "request-body-timeout".to_owned()));
    let detail = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(detail.contains("limits.min_rate"), "{detail}");
    // A minute's grace, and half a second for each byte.
    let took = began.elapsed().as_secs();
    assert!((115..120).contains(&took), "{took} s");
}

#[tokio::test]
async fn a_target_may_have_its_length_and_not_a_byte_more() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["limits.max_target=100B"]).await;
    for (length, status) in [(100, 204), (101, 414)] {
        let target = format!("/{}?{}", "p".repeat(50), "q".repeat(length - 52));
        let answer =
            proxy.ask(format!("GET {target} HTTP/1.1\r\nHost: p\r\n\r\n").as_bytes()).await;
        assert_eq!(answer.status, status);
        if status == 414 {
            assert_eq!(answer.problem(), "target-too-long");
        }
    }
}

#[tokio::test]
async fn a_head_beyond_the_limit_gets_431_and_closes() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["limits.max_head=8KiB"]).await;
    let around =
        format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: 50000\r\nX: \r\n\r\n");
    // Whether or not it comes in one piece, and with as much behind it as is read at once.
    for (length, status) in [(8 * 1024, 204), (8 * 1024 + 1, 431)] {
        let field = "x".repeat(length - around.len());
        let head = around.replace("X: ", &format!("X: {field}"));
        for (first, last) in [(head.as_str(), ""), head.split_at(4_000), head.split_at(length - 1)]
        {
            let mut client = proxy.client().await;
            client.send(first.as_bytes()).await;
            client.send(&[last.as_bytes(), &[b'x'; 50_000]].concat()).await;
            assert_eq!(client.answer(false).await.status, status, "{length} bytes");
            assert!(status == 204 || client.is_closed().await);
        }
    }
}

#[tokio::test]
async fn a_head_may_have_so_many_fields_and_no_more() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    for (limit, most) in [("limits.max_headers=100", 100), ("limits.max_headers=7", 7)] {
        let proxy = Proxy::before(&origin, &[limit]).await;
        for (fields, status) in [(most, 204), (most + 1, 431)] {
            let rest = "X: y\r\n".repeat(fields - 1);
            let asked = format!("GET {CONTACT} HTTP/1.1\r\nHost: p\r\n{rest}\r\n");
            assert_eq!(proxy.ask(asked.as_bytes()).await.status, status, "{limit}: {fields}");
        }
    }
}
