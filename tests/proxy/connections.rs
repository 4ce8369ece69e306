//! A connection of a client, from its first byte to its end: silences, halves of heads, what cannot be read.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::support::clock::{Clock, settle};
use crate::support::origin::{Origin, Reply, fields, read_exactly, read_head};
use crate::support::proxy::Proxy;
use crate::support::{CONTACT, GET, answer, no_content};

/// More than the silence after which the proxy keeps a connection without buffers.
const A_WHILE: Duration = Duration::from_millis(100);

async fn origin() -> Origin {
    Origin::start([Reply::Write(no_content())]).await
}

/// Lets the proxy do what it has to do after some time.
async fn pass(clock: &Clock, time: Duration) {
    settle().await;
    clock.advance(time).await;
    settle().await;
}

#[tokio::test]
async fn a_connection_that_was_silent_is_used_again_and_again() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    for silence in [A_WHILE, Duration::from_secs(60), Duration::ZERO, A_WHILE] {
        pass(&clock, silence).await;
        for _ in 0..2 {
            assert_eq!(client.ask(GET).await.status, 204, "after {silence:?}");
        }
    }
    assert_eq!(proxy.metric("optin_proxy_connections"), 1.0);
}

#[tokio::test]
async fn a_silent_connection_is_closed_when_its_keep_alive_time_is_over() {
    let origin = origin().await;
    let settings = ["listen.keep_alive=2m", "limits.header_timeout=30s", "limits.idle_timeout=1h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    // (time until it is closed, whether it was used)
    for (seconds, used) in [(120, true), (30, false)] {
        let mut client = proxy.client().await;
        if used {
            assert_eq!(client.ask(GET).await.status, 204);
            pass(&clock, Duration::from_secs(119)).await;
            assert_eq!(client.ask(GET).await.status, 204, "just in time");
        }
        let silent = Instant::now();
        assert!(clock.until(client.is_closed()).await);
        let lasted = silent.elapsed().as_secs();
        assert!((seconds..seconds + 10).contains(&lasted), "{lasted} s instead of {seconds}");
    }
    assert_eq!(
        proxy.metric("optin_proxy_malformed_requests_total"),
        0.0,
        "nobody did anything wrong"
    );
}

#[tokio::test]
async fn a_head_may_come_in_pieces_with_silences_between_them() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &["limits.header_timeout=30s"]).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    // Not even its first letter tells HTTP/1 from HTTP/2: PUT, PRI.
    let pieces = ["P", "R", "OPFIND /x HT", "TP/1.1\r", "\nHost: p\r\nX-Kept", ": Yes\r\n\r", "\n"];
    for _ in 0..3 {
        for piece in pieces {
            client.send(piece.as_bytes()).await;
            pass(&clock, Duration::from_secs(3)).await;
        }
        assert_eq!(client.answer(false).await.status, 204);
        let head = origin.requests().pop().expect("it arrived").head;
        assert!(head.starts_with("PROPFIND /x HTTP/1.1\r\n") && head.contains("X-Kept: Yes\r\n"));
    }
}

#[tokio::test]
async fn a_head_that_was_begun_ends_in_time_or_gets_408() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &["limits.header_timeout=30s"]).await;
    let clock = Clock::hold();
    for used in [true, false] {
        let mut client = proxy.client().await;
        if used {
            assert_eq!(client.ask(GET).await.status, 204);
        }
        client.send(b"GET / HTTP/1.1\r\nX: ").await;
        let begun = Instant::now();
        // Dripping on does not help.
        for _ in 0..28 {
            client.send(b"x").await;
            pass(&clock, Duration::from_secs(1)).await;
        }
        let answer = clock.until(client.answer(false)).await;
        assert_eq!((answer.status, answer.problem()), (408, "request-head-timeout".to_owned()));
        assert!(answer.field("date").is_some());
        assert!((29..40).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        assert!(client.is_closed().await);
    }
    assert_eq!(origin.requests().len(), 1);
}

/// RFC 9112 section 2.2. Regression: they were taken for a head that is late, and what was asked next seemed answered by 408.
#[tokio::test]
async fn empty_lines_begin_no_head() {
    let origin = origin().await;
    let settings = ["listen.keep_alive=2m", "limits.header_timeout=30s"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    for lines in ["\r\n", "\r\n\n\r\n"] {
        let mut client = proxy.client().await;
        assert_eq!(client.ask(&[GET, lines.as_bytes()].concat()).await.status, 204);
        pass(&clock, Duration::from_secs(60)).await;
        assert_eq!(client.ask(&[lines.as_bytes(), GET].concat()).await.status, 204);
        client.send(lines.as_bytes()).await;
        let silent = Instant::now();
        assert!(clock.until(client.is_closed()).await);
        assert!((119..140).contains(&silent.elapsed().as_secs()), "{:?}", silent.elapsed());
    }
    assert_eq!(proxy.metric("optin_proxy_malformed_requests_total"), 0.0);
}

/// Regression: each of them put the end off, so that five clients could keep all others out.
#[tokio::test]
async fn empty_lines_put_no_end_off() {
    let origin = origin().await;
    let settings = ["listen.keep_alive=2m", "limits.header_timeout=30s"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    for (asks, limit) in [(false, 30), (true, 120)] {
        let mut client = proxy.client().await;
        if asks {
            assert_eq!(client.ask(GET).await.status, 204);
        }
        let since = Instant::now();
        while since.elapsed().as_secs() < limit - 10 {
            client.send(b"\r\n").await;
            pass(&clock, Duration::from_secs(7)).await;
        }
        assert!(clock.until(client.is_closed()).await);
        assert!((limit - 1..limit + 20).contains(&since.elapsed().as_secs()), "{since:?}");
    }
}

#[tokio::test]
async fn what_is_no_request_gets_a_problem_document_and_is_counted() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let fields = "X: y\r\n".repeat(200);
    let target = "x".repeat(70_000);
    for (asked, status, problem) in [
        ("GET / HTTP/1.1\r\nno field\r\n\r\n".to_owned(), 400, "request-malformed"),
        // A TLS ClientHello.
        ("\x16\x03\x01\x02\0\x01\0\x01\u{7f}\x03\x03".to_owned(), 400, "request-malformed"),
        (format!("GET / HTTP/1.1\r\n{fields}\r\n"), 431, "head-too-long"),
        (format!("GET / HTTP/1.1\r\nX: {target}\r\n\r\n"), 431, "head-too-long"),
    ] {
        for used in [false, true] {
            let before = proxy.metric("optin_proxy_malformed_requests_total");
            let mut client = proxy.client().await;
            if used {
                assert_eq!(client.ask(GET).await.status, 204);
            }
            // The answer may come before all of it was taken.
            let _ = client.stream.write_all(asked.as_bytes()).await;
            let answer = client.answer(false).await;
            assert_eq!((answer.status, answer.problem()), (status, problem.to_owned()));
            assert_eq!(answer.field("connection"), Some("close"));
            assert!(client.is_closed().await, "{problem}");
            assert_eq!(proxy.metric("optin_proxy_malformed_requests_total"), before + 1.0);
        }
    }
    let raised = Proxy::before(&origin, &["limits.max_head=1MiB", "limits.max_target=1MiB"]).await;
    let answer = raised.ask(format!("GET /{target} HTTP/1.1\r\nHost: p\r\n\r\n").as_bytes()).await;
    assert_eq!((answer.status, answer.problem()), (414, "target-too-long".to_owned()));
}

#[tokio::test]
async fn an_answer_before_the_upload_ended_makes_no_request_of_what_is_left_of_it() {
    // Answers at once, whatever else is to come.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(&url, &[]).await;
    let clock = Clock::hold();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while let Some(head) = read_head(&mut stream, &mut buffer).await {
                    let length = fields(&head, "content-length").first().map(|it| it.parse());
                    seen.lock().unwrap().push(head);
                    stream.write_all(&answer("200 OK", "", b"early")).await.expect("it is read");
                    let length = length.unwrap_or(Ok(0)).expect("a length");
                    if read_exactly(&mut stream, &mut buffer, length).await.is_none() {
                        return;
                    }
                }
            });
        }
    });
    let smuggled = b"GET /smuggled HTTP/1.1\r\nHost: p\r\n\r\n";
    let length = smuggled.len() + 4;
    let mut client = proxy.client().await;
    let head = format!("POST /up HTTP/1.1\r\nHost: p\r\nContent-Length: {length}\r\n\r\nhalf");
    client.send(head.as_bytes()).await;
    assert_eq!(client.answer(false).await.body, b"early");
    pass(&clock, A_WHILE).await;
    let _ = client.stream.write_all(smuggled).await;
    // Whether the proxy closes the connection or reads it to its end: no answer comes to what is none.
    let _ = client.stream.shutdown().await;
    assert!(client.is_closed().await);
    assert_eq!(proxy.ask(GET).await.body, b"early");
    let heads = heads.lock().unwrap();
    assert!(heads[0].starts_with("POST /up ") && heads[1].starts_with("GET /x "), "{heads:?}");
}

#[tokio::test]
async fn a_stop_ends_silent_connections_at_once_and_lets_a_head_come_to_its_end() {
    let origin = origin().await;
    let mut proxy = Proxy::before(&origin, &[]).await;
    let clock = Clock::hold();
    let (mut silent, mut begun) = (proxy.client().await, proxy.client().await);
    for client in [&mut silent, &mut begun] {
        assert_eq!(client.ask(GET).await.status, 204);
    }
    let (first, rest) = GET.split_at(10);
    begun.send(first).await;
    // Long enough that nothing can be on its way.
    pass(&clock, A_WHILE).await;
    pass(&clock, Duration::from_secs(2)).await;
    let running = proxy.stop();
    assert!(silent.is_closed().await);
    begun.send(rest).await;
    assert_eq!(begun.answer(false).await.status, 204);
    assert!(begun.is_closed().await);
    assert_eq!(running.await.expect("it ends"), 0);
}

#[tokio::test]
async fn a_request_that_was_on_its_way_when_the_proxy_was_told_to_stop_is_served() {
    let origin = origin().await;
    let mut proxy = Proxy::before(&origin, &[]).await;
    let clock = Clock::hold();
    let mut busy = proxy.client().await;
    assert_eq!(busy.ask(GET).await.field("connection"), None);
    let running = proxy.stop();
    pass(&clock, Duration::from_millis(500)).await;
    let answer = busy.ask(GET).await;
    assert_eq!((answer.status, answer.field("connection")), (204, Some("close")));
    assert_eq!(running.await.expect("it ends"), 0);
}

#[tokio::test]
async fn a_request_that_drips_on_for_too_long_in_all_is_ended() {
    let origin = origin().await;
    let settings = [
        "limits.request_timeout=10m",
        "limits.idle_timeout=1m",
        "limits.min_rate=0B",
        "upstream.response_timeout=1h",
        "limits.header_timeout=1h",
    ];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    // Neither the first request of its connection, nor in the time of the one before.
    assert_eq!(client.ask(GET).await.status, 204);
    client.send(b"POST /up HTTP/1.1\r\nHost: p\r\nContent-Length: 1000\r\n\r\n").await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(599) {
        client.send(b"x").await;
        pass(&clock, Duration::from_secs(1)).await;
    }
    assert_eq!(proxy.metric("optin_proxy_connections"), 1.0, "it may take its ten minutes");
    assert!(clock.until(client.is_closed()).await);
    assert!(begun.elapsed() < Duration::from_secs(620), "{:?}", begun.elapsed());
    while proxy.metric("optin_proxy_connections") > 0.0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_body_in_pieces_of_any_size_arrives_as_it_was_sent() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    let sizes = [1, 16 * 1024 - 1, 16 * 1024, 16 * 1024 + 1, 3, 100_000, 2];
    let turned = |first| sizes.into_iter().cycle().skip(first).take(sizes.len()).collect();
    let bodies: Vec<Vec<usize>> = (0..sizes.len()).map(turned).collect();
    for (sizes, is_announced) in bodies.iter().flat_map(|sizes| [(sizes, false), (sizes, true)]) {
        let framing = match is_announced {
            false => "Transfer-Encoding: chunked".to_owned(),
            true => format!("Content-Length: {}", sizes.iter().sum::<usize>()),
        };
        let head = format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\n{framing}\r\n\r\n");
        client.send(head.as_bytes()).await;
        let mut sent = Vec::new();
        for size in sizes {
            let piece: Vec<u8> =
                (sent.len()..sent.len() + size).map(|at| (at % 251) as u8).collect();
            let (start, end) = match is_announced {
                false => (format!("{size:x}\r\n"), "\r\n"),
                true => (String::new(), ""),
            };
            client.send(&[start.as_bytes(), &piece, end.as_bytes()].concat()).await;
            sent.extend(piece);
        }
        if !is_announced {
            client.send(b"0\r\n\r\n").await;
        }
        assert_eq!(client.answer(false).await.status, 204);
        let arrived = origin.requests().pop().expect("it arrived").body;
        assert!(arrived == sent, "{sizes:?}, announced: {is_announced}");
    }
}
