//! HTTP/2 by prior knowledge, spoken wrongly or with malice.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::support::binary::{Running, command};
use crate::support::clock::{Clock, settle};
use crate::support::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Fate, HEADERS, Http2, RST_STREAM, WINDOW_UPDATE,
    fields,
};
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, CONTACT, answer, refusal};

const WINDOW: u32 = 65_535;
const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/canary"), (":authority", "p")];
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

#[tokio::test]
async fn no_request_can_be_read_in_two_ways_and_none_harms_the_others_of_its_connection() {
    let post = [(":method", "POST"), (":scheme", "http"), (":path", "/up"), (":authority", "p")];
    let with = |more: &[(&'static str, &'static str)]| [&post[..], more].concat();
    let without = |name: &str| post.iter().copied().filter(|it| it.0 != name).collect::<Vec<_>>();
    let refused = [Fate::Reset(PROTOCOL_ERROR), Fate::Answered(400)];
    let (reset, bad, passed) = (&refused[..1], &refused[..], &[Fate::Answered(200)][..]);
    let closed = &[Fate::Closed(PROTOCOL_ERROR)][..];
    let cases = vec![
        // Pseudo-header fields: RFC 9113 section 8.3.
        ("no method", without(":method"), "", reset),
        ("no path", without(":path"), "", reset),
        ("no scheme", without(":scheme"), "", bad),
        ("two methods", with(&[(":method", "GET")]), "", reset),
        ("two paths", with(&[(":path", "/other")]), "", reset),
        ("two authorities", with(&[(":authority", "q")]), "", reset),
        ("an unknown one", with(&[(":foo", "x")]), "", closed),
        ("one of answers", with(&[(":status", "200")]), "", reset),
        ("one behind a field", [&[("x", "y")][..], &post].concat(), "", reset),
        ("a relative path", [&without(":path")[..], &[(":path", "up")]].concat(), "", bad),
        ("no host at all", without(":authority"), "", bad),
        (
            "a user in the authority",
            [&without(":authority")[..], &[(":authority", "user@p")]].concat(),
            "",
            bad,
        ),
        ("an empty path", [&without(":path")[..], &[(":path", "")]].concat(), "", bad),
        (
            "a path with a line break",
            [&without(":path")[..], &[(":path", "/\r\nX: y")]].concat(),
            "",
            bad,
        ),
        (
            "a method with a space",
            [&without(":method")[..], &[(":method", "GET /x")]].concat(),
            "",
            closed,
        ),
        // Fields: RFC 9113 section 8.2.
        ("an upper-case name", with(&[("X-Upper", "y")]), "", closed),
        ("a name with a space", with(&[("x y", "z")]), "", closed),
        ("a name with a colon", with(&[("x:y", "z")]), "", closed),
        ("an empty name", with(&[("", "z")]), "", closed),
        ("a value with a line break", with(&[("x", "y\r\nSmuggled: yes")]), "", closed),
        ("a value with NUL", with(&[("x", "y\0z")]), "", closed),
        ("Connection", with(&[("connection", "close")]), "", reset),
        ("Keep-Alive", with(&[("keep-alive", "timeout=5")]), "", reset),
        ("Proxy-Connection", with(&[("proxy-connection", "close")]), "", reset),
        ("Transfer-Encoding", with(&[("transfer-encoding", "chunked")]), "0\r\n\r\n", reset),
        ("Upgrade", with(&[("upgrade", "h2c")]), "", reset),
        ("TE beyond trailers", with(&[("te", "gzip")]), "", reset),
        ("TE: trailers", with(&[("te", "trailers")]), "", passed),
        ("Host like the authority", with(&[("host", "p")]), "", passed),
        ("two hosts", with(&[("host", "p"), ("host", "p")]), "", bad),
        ("a look-alike", with(&[("content_length", "3")]), "", bad),
        // Lengths: RFC 9113 section 8.1.1.
        ("its length", with(&[("content-length", "3")]), "abc", passed),
        ("more than its length", with(&[("content-length", "3")]), "abcGET /smuggled", reset),
        ("less than its length", with(&[("content-length", "9")]), "abc", reset),
        ("a length without a body", with(&[("content-length", "9")]), "", reset),
        ("two lengths", with(&[("content-length", "3"), ("content-length", "4")]), "abc", reset),
        ("a list of lengths", with(&[("content-length", "3, 3")]), "abc", reset),
        ("a signed length", with(&[("content-length", "+3")]), "abc", reset),
    ];
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b"mine"))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for (name, head, body, fates) in cases {
        let before = origin.requests().len();
        let told = proxy.metric("optin_proxy_malformed_requests_total");
        let mut client = Http2::connect(proxy.address, WINDOW).await;
        let end = if body.is_empty() { END_STREAM } else { 0 };
        client.send(HEADERS, END_HEADERS | end, 1, &fields(&head)).await;
        if !body.is_empty() {
            client.send(DATA, END_STREAM, 1, body.as_bytes()).await;
        }
        let fate = client.fate(1).await;
        assert!(fates.contains(&fate), "{name}: {fate:?}");
        let is_closed = fate == Fate::Closed(PROTOCOL_ERROR);
        while is_closed && proxy.metric("optin_proxy_malformed_requests_total") <= told {
            tokio::task::yield_now().await;
        }
        if !is_closed {
            client.send(HEADERS, END_HEADERS | END_STREAM, 3, &fields(&GET)).await;
            assert_eq!(client.fate(3).await, Fate::Answered(200), "{name}: the canary");
        }
        let arrived = origin.requests().split_off(before);
        let targets: Vec<_> =
            arrived.iter().map(|it| it.head.split(' ').nth(1).expect("a target")).collect();
        let canary = (!is_closed).then_some("/canary");
        let own = (fates == passed).then_some("/up");
        assert_eq!(targets, own.into_iter().chain(canary).collect::<Vec<_>>(), "{name}");
        for request in arrived {
            assert!(!request.head.to_lowercase().contains("smuggled"), "{}", request.head);
            assert_eq!(request.fields("host").len(), 1, "{name}");
            assert!(request.fields("content-length").len() <= 1, "{name}");
            assert!(request.fields("transfer-encoding").is_empty() || !body.is_empty(), "{name}");
        }
    }
}

#[tokio::test]
async fn a_client_that_opens_streams_and_resets_them_at_once_is_closed() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    let head = fields(&GET);
    for stream in (1..20_000).step_by(2) {
        client.send(HEADERS, END_HEADERS | END_STREAM, stream, &head).await;
        client.send(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await;
    }
    let fate = client.fate(19_999).await;
    assert!([Fate::Closed(ENHANCE_YOUR_CALM), Fate::Gone].contains(&fate), "{fate:?}");
    while proxy.metric("optin_proxy_connections") > 0.0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(proxy.metric("optin_proxy_malformed_requests_total"), 1.0, "operators hear of it");
    let sent = origin.requests().len();
    assert!(sent < 1_000, "{sent} of 10,000 were passed on");
    assert_eq!(proxy.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await.status, 200);
}

/// MadeYouReset (CVE-2025-8671): it is the server that resets the streams, whose requests go on behind them.
#[tokio::test]
async fn a_client_that_has_its_streams_reset_by_the_proxy_is_closed() {
    let origin = Origin::start([Reply::Hang]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    let head = fields(&GET);
    for stream in (1..20_000).step_by(2) {
        client.send(HEADERS, END_HEADERS | END_STREAM, stream, &head).await;
        // RFC 9113 section 6.9.1: a window beyond its greatest is an error of the stream.
        client.send(WINDOW_UPDATE, 0, stream, &0x7fff_ffff_u32.to_be_bytes()).await;
    }
    let fate = client.fate(19_999).await;
    assert!([Fate::Closed(ENHANCE_YOUR_CALM), Fate::Gone].contains(&fate), "{fate:?}");
    while proxy.metric("optin_proxy_connections") > 0.0 {
        tokio::task::yield_now().await;
    }
    let sent = origin.requests().len();
    assert!(sent < 2_000, "{sent} of 10,000 were passed on");
}

#[tokio::test]
async fn nothing_is_sent_again_for_a_client_that_has_reset_its_stream_or_left() {
    let settings = ["retry.base_delay=1h", "retry.max_delay=1h", "retry.deadline=3h"];
    let head = [(":method", "PUT"), (":scheme", "http"), (":path", CONTACT), (":authority", "p")];
    let refusals = "optin_proxy_refusals_total{verdict=\"transient\"}";
    for in_backoff in [false, true] {
        for resets in [false, true] {
            let go_on = Arc::new(Notify::new());
            let late = Reply::Pause(vec![], Arc::clone(&go_on), refusal());
            let origin = Origin::start([late, Reply::Write(answer("200 OK", "", b"mine"))]).await;
            let proxy = Proxy::before(&origin, &settings).await;
            let mut client = Http2::connect(proxy.address, WINDOW).await;
            client.send(HEADERS, END_HEADERS, 1, &fields(&head)).await;
            client.send(DATA, END_STREAM, 1, BARE).await;
            origin.arrived(1).await;
            if in_backoff {
                go_on.notify_one();
                while proxy.metric(refusals) == 0.0 {
                    tokio::task::yield_now().await;
                }
            }
            if resets {
                client.send(RST_STREAM, 0, 1, &8_u32.to_be_bytes()).await;
            } else {
                drop(client);
                client = Http2::connect(proxy.address, WINDOW).await;
            }
            proxy.finished(1).await;
            go_on.notify_one();
            // The others go on.
            client.send(HEADERS, END_HEADERS | END_STREAM, 3, &fields(&GET)).await;
            assert_eq!(client.fate(3).await, Fate::Answered(200));
            let puts = origin.requests();
            let puts = puts.iter().filter(|it| it.head.starts_with("PUT ")).count();
            assert_eq!(puts, 1, "in backoff: {in_backoff}, resets: {resets}");
        }
    }
}

/// By the program, on whose threads the connection to the API may be quicker than the stream. That the end is not taken for one
/// without that race: `src/proxy/body/tests.rs`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_breaks_off_never_reaches_the_api_as_a_whole_one() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let url = origin.url();
    let serve = ["serve", "--listen", "127.0.0.1:0", "--upstream", &url];
    let running = Running::start(&mut command(&serve));
    let mut client = Http2::connect(running.address, WINDOW).await;
    for stream in (1..400).step_by(4) {
        let (method, path) = if stream % 8 == 1 { ("POST", "/up") } else { ("PUT", CONTACT) };
        let head = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "p")];
        client.send(HEADERS, END_HEADERS, stream, &fields(&head)).await;
        client.send(DATA, 0, stream, &BARE[..BARE.len() / 2]).await;
        // Once this is answered, the upload has begun.
        client.send(HEADERS, END_HEADERS | END_STREAM, stream + 2, &fields(&GET)).await;
        assert_eq!(client.fate(stream + 2).await, Fate::Answered(200));
        client.send(RST_STREAM, 0, stream, &0_u32.to_be_bytes()).await;
    }
    drop(client);
    running.signal("TERM");
    assert_eq!(running.finish().0.code(), Some(0));
    let whole = origin.requests().into_iter().filter(|request| !request.head.starts_with("GET "));
    assert_eq!(whole.count(), 0);
}

#[tokio::test]
async fn a_head_that_goes_on_and_on_is_no_room_for_memory() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    client.send(HEADERS, END_STREAM, 1, &fields(&GET)).await;
    let more = fields(&[("x", "y")]).repeat(1_000);
    for _ in 0..1_000 {
        client.send(CONTINUATION, 0, 1, &more).await;
    }
    let fate = client.fate(1).await;
    assert!(matches!(fate, Fate::Closed(_) | Fate::Gone), "{fate:?}");
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn a_head_beyond_the_limit_is_refused() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let proxy = Proxy::before(&origin, &["limits.max_head=8KiB"]).await;
    for (count, fate) in [(60, Fate::Answered(200)), (80, Fate::Answered(431))] {
        let long = "y".repeat(100);
        let head = [&GET[..], &vec![("x", long.as_str()); count]].concat();
        let mut client = Http2::connect(proxy.address, WINDOW).await;
        client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&head)).await;
        assert_eq!(client.fate(1).await, fate, "{count} fields");
    }
}

#[tokio::test]
async fn a_client_that_grants_no_window_does_not_hold_its_request() {
    // Regression: nothing noticed, and with max_requests such streams the proxy served nobody.
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b"never taken"))]).await;
    let settings = ["limits.idle_timeout=1m", "limits.header_timeout=1h", "limits.max_requests=1"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = Http2::connect(proxy.address, 0).await;
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&GET)).await;
    assert_eq!(client.fate(1).await, Fate::Answered(200));
    let begun = Instant::now();
    assert_eq!(proxy.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await.status, 503);
    let fate = clock.until(client.fate(1)).await;
    assert!(matches!(fate, Fate::Reset(_)), "{fate:?}");
    assert!((60..70).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert_eq!(proxy.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await.status, 200);
}

#[tokio::test]
async fn a_stop_lets_streams_come_to_their_end_and_takes_no_others() {
    let go_on = Arc::new(Notify::new());
    let paused = Reply::Pause(vec![], Arc::clone(&go_on), answer("200 OK", "", b"whole"));
    let origin = Origin::start([paused]).await;
    let mut proxy = Proxy::before(&origin, &[]).await;
    let _clock = Clock::hold();
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&GET)).await;
    origin.arrived(1).await;
    let running = proxy.stop();
    // GOAWAY with the largest id: it is to stop.
    let goaway = client.next().await.expect("a frame");
    assert_eq!((goaway.kind, goaway.code()), (crate::support::http2::GOAWAY, 0));
    go_on.notify_one();
    assert_eq!(client.fate(1).await, Fate::Answered(200));
    while client.next().await.is_some() {}
    assert_eq!(running.await.expect("it ends"), 0);
}

/// Regression: it held up every stop until `listen.drain_timeout`.
#[tokio::test]
async fn a_client_that_has_asked_nothing_and_answers_no_pings_does_not_hold_up_a_stop() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let settings = ["listen.drain_timeout=1h", "limits.header_timeout=1h"];
    let mut proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let _silent = Http2::connect(proxy.address, WINDOW).await;
    while proxy.metric("optin_proxy_connections") == 0.0 {
        tokio::task::yield_now().await;
    }
    let (running, begun) = (proxy.stop(), Instant::now());
    assert_eq!(clock.until(running).await.expect("it ends"), 0);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_stream_that_takes_too_long_in_all_is_reset() {
    let go_on = Arc::new(Notify::new());
    let start = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec();
    let origin = Origin::start([Reply::Pause(start, go_on, vec![])]).await;
    let settings =
        ["limits.request_timeout=10m", "limits.idle_timeout=1h", "limits.header_timeout=1h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&GET)).await;
    assert_eq!(client.fate(1).await, Fate::Answered(200));
    let begun = Instant::now();
    let fate = clock.until(client.fate(1)).await;
    assert!(matches!(fate, Fate::Reset(_)), "{fate:?}");
    let lasted = begun.elapsed();
    assert!(lasted >= Duration::from_secs(590) && lasted < Duration::from_secs(620), "{lasted:?}");
}

/// Regression: hyper and h2 drop what is not written yet once a body fails, the head too.
#[tokio::test]
async fn of_a_refusal_that_breaks_off_a_client_gets_what_it_takes_in_a_moment_and_then_sees_it_break()
 {
    let broken = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\nhalf".to_vec();
    let origin = Origin::start([Reply::WriteAndClose(broken)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let clock = Clock::hold();
    // It takes two bytes, and says so.
    let mut client = Http2::connect(proxy.address, 2).await;
    let head = [(":method", "PUT"), (":scheme", "http"), (":path", CONTACT), (":authority", "p")];
    client.send(HEADERS, END_HEADERS, 1, &fields(&head)).await;
    client.send(DATA, END_STREAM, 1, BARE).await;
    let answer = client.next().await.expect("a frame");
    assert_eq!((answer.kind, answer.status()), (HEADERS, 400));
    for (content, before_more) in [(b"ha", 99), (b"lf", 0)] {
        let frame = client.next().await.expect("a frame");
        assert_eq!((frame.kind, &*frame.payload), (DATA, &content[..]));
        clock.advance(Duration::from_millis(before_more)).await;
        client.send(WINDOW_UPDATE, 0, 1, &2_u32.to_be_bytes()).await;
    }
    let last = clock.until(client.next()).await.expect("a frame");
    assert_eq!(last.kind, RST_STREAM);
}

/// RFC 9113 section 8.2.3. Regression: an origin got several `Cookie` fields, of which many read one.
#[tokio::test]
async fn cookies_that_a_client_took_apart_are_put_together() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    let head = [&GET[..], &[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2; c=3")]].concat();
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&head)).await;
    assert_eq!(client.fate(1).await, Fate::Answered(200));
    assert_eq!(origin.requests()[0].fields("cookie"), ["a=1; b=2; c=3"]);
}

/// Regression: whoever answered to pings had a connection for ever.
#[tokio::test]
async fn a_connection_without_streams_ends_after_its_keep_alive_and_not_while_there_is_one() {
    let clock = Clock::hold();
    for keep_alive in [30, 0] {
        let go_on = Arc::new(Notify::new());
        let whole = answer("200 OK", "", b"");
        let origin = Origin::start([Reply::Pause(vec![], Arc::clone(&go_on), whole)]).await;
        let setting = format!("listen.keep_alive={keep_alive}s");
        let proxy = Proxy::before(&origin, &[&setting, "upstream.response_timeout=1h"]).await;
        let mut client = Http2::connect(proxy.address, WINDOW).await;
        client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&GET)).await;
        clock.until(origin.arrived(1)).await;
        {
            // Pings come and are answered, and nothing else happens.
            let mut fate = std::pin::pin!(client.fate(1));
            for _ in 0..120 {
                clock.advance(Duration::from_secs(1)).await;
                tokio::select! {
                    biased;
                    fate = &mut fate => panic!("{fate:?}"),
                    () = settle() => {}
                }
            }
        }
        // It takes others meanwhile.
        client.send(HEADERS, END_HEADERS | END_STREAM, 3, &fields(&GET)).await;
        clock.until(origin.arrived(2)).await;
        for stream in [1, 3] {
            go_on.notify_one();
            assert_eq!(clock.until(client.fate(stream)).await, Fate::Answered(200));
        }
        let silent_since = Instant::now();
        let end = clock.until(client.fate(5)).await;
        assert_eq!(end, Fate::Gone, "in order, and not for an error");
        let after = silent_since.elapsed().as_secs() + 1;
        assert!((keep_alive..keep_alive + 15).contains(&after), "{after} s");
    }
}

/// A proxy that lets clients through to a host which sends back what it gets, and the head that asks for that.
async fn before_echo(settings: &[&str]) -> (Proxy, Vec<u8>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let target = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let port = format!("intercept.ports={}", target.port());
    let settings = [&["intercept.allow_private=127.0.0.1", &*port], settings].concat();
    let proxy = Proxy::start("http://127.0.0.1:1", &settings).await;
    (proxy, fields(&[(":method", "CONNECT"), (":authority", &target.to_string())]))
}

/// Regression: it was cut at `limits.request_timeout`, as if it were an answer.
#[tokio::test]
async fn a_tunnel_lasts_as_long_as_something_passes_through_it() {
    let settings = ["limits.request_timeout=5s", "listen.keep_alive=30s"];
    let (proxy, connect) = before_echo(&settings).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    let clock = Clock::hold();
    client.send(HEADERS, END_HEADERS, 1, &connect).await;
    assert_eq!(clock.until(client.fate(1)).await, Fate::Answered(200));
    for second in 0..100 {
        clock.advance(Duration::from_secs(1)).await;
        client.send(DATA, 0, 1, b"x").await;
        let back = clock.until(client.next()).await.expect("it is open");
        assert_eq!((back.kind, &*back.payload), (DATA, &b"x"[..]), "after {second} s");
    }
}

#[tokio::test]
async fn a_tunnel_whose_client_takes_nothing_ends_with_its_idle_time() {
    let settings = ["intercept.tunnel_idle_timeout=30s", "limits.idle_timeout=20s"];
    let (proxy, connect) = before_echo(&settings).await;
    let mut client = Http2::connect(proxy.address, 0).await;
    let clock = Clock::hold();
    client.send(HEADERS, END_HEADERS, 1, &connect).await;
    assert_eq!(clock.until(client.fate(1)).await, Fate::Answered(200));
    client.send(DATA, 0, 1, b"comes back").await;
    let end = clock.until(client.fate(1)).await;
    assert!(matches!(end, Fate::Reset(_)), "{end:?}");
}

/// Regression: one connection could hold 200 tunnels, whatever `limits.max_connections` said.
#[tokio::test]
async fn each_tunnel_counts_as_a_connection() {
    // One place is kept for the next connection.
    let (proxy, connect) = before_echo(&["limits.max_connections=4"]).await;
    let mut client = Http2::connect(proxy.address, WINDOW).await;
    for (stream, status) in [(1, 200), (3, 200), (5, 503)] {
        client.send(HEADERS, END_HEADERS, stream, &connect).await;
        assert_eq!(client.fate(stream).await, Fate::Answered(status), "stream {stream}");
    }
    assert_eq!(proxy.metric("optin_proxy_connections"), 3.0);
    client.send(RST_STREAM, 0, 1, &8_u32.to_be_bytes()).await;
    while proxy.metric("optin_proxy_connections") > 2.0 {
        tokio::task::yield_now().await;
    }
    client.send(HEADERS, END_HEADERS, 7, &connect).await;
    assert_eq!(client.fate(7).await, Fate::Answered(200));
}
