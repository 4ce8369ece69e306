//! What goes wrong upstream or downstream, and what the client is told.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::support::clock::{Clock, settle};
use crate::support::origin::{Origin, Reply, read_head};
use crate::support::proxy::Proxy;
use crate::support::{
    BARE, CONTACT, CONTACTS, GET, RECIPE, RECIPE_OUT, REFUSAL, answer, no_content, put, request,
};

#[tokio::test]
async fn an_upstream_that_is_down_gives_502_and_says_so() {
    let origin = Origin::start([]).await;
    let url = origin.url();
    drop(origin);
    let proxy = Proxy::start(&url, &[]).await;
    let answer = proxy.ask(&put(RECIPE)).await;
    assert_eq!((answer.status, answer.problem()), (502, "upstream-connection-refused".to_owned()));
    assert_eq!(answer.field("proxy-status"), Some("optin-proxy; error=connection_refused"));
    let json: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert!(
        json["detail"].as_str().is_some_and(|it| it.contains(url.trim_start_matches("http://")))
    );
    assert_eq!(answer.report(), "findings=2, rewritten=2, attempts=1, outcome=rewritten");
}

#[tokio::test]
async fn a_name_that_does_not_resolve_gives_502() {
    let proxy = Proxy::start("http://name.invalid", &[]).await;
    let answer = proxy.ask(GET).await;
    assert_eq!((answer.status, answer.problem()), (502, "upstream-name-unresolved".to_owned()));
    assert_eq!(answer.field("proxy-status"), Some("optin-proxy; error=dns_error"));
}

/// Regression: it was told as out of reach.
#[tokio::test]
async fn an_upstream_that_takes_no_connection_gives_504() {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
    let listener = socket.listen(0).expect("it listens");
    let address = listener.local_addr().expect("bound");
    // The system has room for one that nobody accepts.
    let _first = tokio::net::TcpStream::connect(address).await.expect("room");
    let settings = ["upstream.connect_timeout=50ms"];
    let answer = Proxy::start(&format!("http://{address}"), &settings).await.ask(GET).await;
    assert_eq!((answer.status, answer.problem()), (504, "upstream-connect-timeout".to_owned()));
}

#[tokio::test]
async fn an_upstream_that_hangs_gives_504() {
    let origin = Origin::start([Reply::Hang]).await;
    let proxy = Proxy::before(&origin, &["upstream.response_timeout=50ms"]).await;
    for asked in [GET.to_vec(), put(BARE)] {
        let answer = proxy.ask(&asked).await;
        assert_eq!(
            (answer.status, answer.problem()),
            (504, "upstream-response-timeout".to_owned())
        );
        assert_eq!(answer.field("proxy-status"), Some("optin-proxy; error=http_response_timeout"));
    }
}

#[tokio::test]
async fn garbage_from_the_upstream_gives_502() {
    for garbage in
        ["nonsense\r\n\r\n", "HTTP/1.1 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"]
    {
        let origin = Origin::start([Reply::WriteAndClose(garbage.into())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!(
            (answer.status, answer.problem()),
            (502, "upstream-answer-malformed".to_owned()),
            "{garbage}"
        );
        assert_eq!(origin.requests().len(), 1);
    }
}

#[tokio::test]
async fn an_upstream_that_switches_protocols_unasked_gives_502() {
    let reply = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nraw";
    let next = Reply::Write(answer("200 OK", "", b"next"));
    let origin = Origin::start([Reply::Write(reply.to_vec()), next]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    let asked = b"GET /x HTTP/1.1\r\nHost: p\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n";
    let answer = client.ask(asked).await;
    assert_eq!((answer.status, &*answer.problem()), (502, "upstream-answer-malformed"));
    assert_eq!(client.ask(asked).await.body, b"next", "the client's connection is of use still");
}

#[tokio::test]
async fn an_upstream_that_closes_without_an_answer_gives_502_and_gets_no_second_request() {
    for reply in [vec![], b"HTTP/1.1 20".to_vec()] {
        for asked in [GET.to_vec(), put(BARE), request("POST", CONTACTS, "", BARE)] {
            let origin = Origin::start([Reply::WriteAndClose(reply.clone())]).await;
            let proxy = Proxy::before(&origin, &[]).await;
            let answer = proxy.ask(&asked).await;
            assert_eq!(
                (answer.status, answer.problem()),
                (502, "upstream-connection-closed".to_owned())
            );
            assert_eq!(origin.requests().len(), 1, "a fresh connection was not stale");
        }
    }
}

#[tokio::test]
async fn an_upstream_that_resets_is_a_fault_before_its_answer_and_breaks_it_off_within() {
    for (reply, told) in
        [("", 502), ("HTTP/1.1 20", 502), ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", 200)]
    {
        for asked in [GET.to_vec(), put(BARE), request("POST", CONTACTS, "", BARE)] {
            let origin = Origin::start([Reply::WriteAndReset(reply.into())]).await;
            let proxy = Proxy::before(&origin, &["limits.max_requests=1"]).await;
            let answer = proxy.ask(&asked).await;
            // A reset may overtake what was sent before it.
            assert!(answer.status == told || answer.status == 502, "{reply}: {}", answer.status);
            assert_eq!(answer.broken, answer.status == 200, "{reply}");
            assert_eq!(origin.requests().len(), 1, "{reply}");
            // Its place is free again.
            assert_ne!(proxy.ask(GET).await.status, 503);
        }
    }
}

#[tokio::test]
async fn what_comes_behind_an_answer_is_no_answer_to_the_next_request() {
    for behind in ["x", "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"] {
        let first = [answer("200 OK", "", b"first"), behind.into()].concat();
        let second = answer("200 OK", "", b"second");
        let origin = Origin::start([Reply::Write(first), Reply::Write(second)]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let mut client = proxy.client().await;
        assert_eq!(client.ask(GET).await.body, b"first");
        for _ in 0..3 {
            assert_eq!(client.ask(GET).await.body, b"second", "{behind}");
        }
    }
}

#[tokio::test]
async fn an_upstream_whose_head_has_no_end_gives_502() {
    let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(2_000_000));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(5_000));
    for head in [long, many] {
        let origin = Origin::start([Reply::Write(head.into())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(GET).await;
        assert_eq!(
            (answer.status, answer.problem()),
            (502, "upstream-answer-malformed".to_owned())
        );
    }
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_place_in_every_phase() {
    let start = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec();
    let pause = Reply::Pause(start, Arc::new(Notify::new()), vec![]);
    let upload = b"POST /up HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\nhalf";
    let whole = put(BARE);
    for (phase, sent, reply, arrives) in [
        ("before a word", &b""[..], Reply::Hang, false),
        ("in its head", &whole[..30], Reply::Hang, false),
        ("in its body", &whole[..whole.len() - 5], Reply::Hang, false),
        ("in an upload", upload, Reply::Hang, false),
        ("waiting for its answer", &whole, Reply::Hang, true),
        ("in its answer", &whole, pause, true),
    ] {
        for reset in [false, true] {
            let is_answered = matches!(reply, Reply::Pause(..));
            let origin = Origin::start([reply.clone(), Reply::Write(no_content())]).await;
            let limits = ["limits.max_requests=1", "limits.max_connections=1"];
            let proxy = Proxy::before(&origin, &limits).await;
            let mut client = proxy.client().await;
            client.send(sent).await;
            if arrives {
                origin.arrived(1).await;
            }
            if is_answered {
                client.head().await.expect("it began");
            }
            if reset {
                client.stream.set_zero_linger().expect("a socket");
            }
            drop(client);
            let mut next = proxy.client().await;
            next.send(&put(RECIPE)).await;
            // Not whole, it never arrived: then the first reply is this one's.
            if arrives {
                assert_eq!(next.answer(false).await.status, 204, "{phase}, reset: {reset}");
            }
            let requests = 1 + usize::from(arrives);
            origin.arrived(requests).await;
            let bodies: Vec<_> = origin.requests().into_iter().map(|it| it.body).collect();
            assert_eq!(bodies.len(), requests, "{phase}, reset: {reset}: nothing by halves");
            assert_eq!(bodies[requests - 1], RECIPE_OUT, "{phase}, reset: {reset}");
        }
    }
}

/// The upstream closes an idle connection just as the next request is written on it.
#[tokio::test]
async fn a_request_on_a_stale_connection_is_sent_again_if_its_method_is_idempotent() {
    let ok = || Reply::Write(answer("200 OK", "", b""));
    for (asked, status, requests) in [
        (Some(put(RECIPE)), 200, 3),
        (Some(GET.to_vec()), 200, 3),
        (Some(request("DELETE", "/x", "", b"")), 200, 3),
        (Some(b"HEAD /x HTTP/1.1\r\nHost: p\r\n\r\n".to_vec()), 200, 3),
        (Some(request("OPTIONS", "/x", "", b"")), 200, 3),
        // In absolute form, by a client that knows a proxy.
        (None, 200, 3),
        (Some(request("POST", CONTACTS, "", BARE)), 502, 2),
    ] {
        let origin = Origin::start([ok(), Reply::WriteAndClose(vec![]), ok()]).await;
        let ports = format!("intercept.ports={}", origin.address.port());
        let proxy = Proxy::before(&origin, &["intercept.allow_private=127.0.0.1", &ports]).await;
        let mut client = proxy.client().await;
        assert_eq!(client.ask(GET).await.status, 200);
        let asked = match asked {
            None => request("PUT", &format!("{}{CONTACT}?of=it", origin.url()), "", RECIPE),
            Some(asked) => asked,
        };
        let answer = client.ask(&asked).await;
        assert_eq!(answer.status, status);
        let arrived = origin.requests();
        assert_eq!(arrived.len(), requests);
        assert_eq!(arrived[0].connection, arrived[1].connection, "it was used again");
        if requests == 3 {
            assert_eq!((&arrived[1].head, &arrived[1].body), (&arrived[2].head, &arrived[2].body));
            assert_ne!(arrived[1].connection, arrived[2].connection);
        }
        if asked == put(RECIPE) {
            assert_eq!(
                answer.report(),
                "findings=2, rewritten=2, attempts=1, outcome=rewritten",
                "no transition retry"
            );
        }
    }
}

/// Regression: it was sent again on another kept connection, which the upstream had closed as well.
#[tokio::test]
async fn a_request_that_met_a_stale_connection_is_sent_again_on_a_new_one() {
    let go_on = Arc::new(Notify::new());
    let origin = Origin::start([
        Reply::Pause(vec![], Arc::clone(&go_on), no_content()),
        Reply::Pause(vec![], Arc::clone(&go_on), no_content()),
        Reply::WriteAndClose(vec![]),
        Reply::Write(no_content()),
    ])
    .await;
    let proxy = Proxy::before(&origin, &[]).await;
    let (mut one, mut other) = (proxy.client().await, proxy.client().await);
    one.send(GET).await;
    other.send(GET).await;
    origin.arrived(2).await;
    go_on.notify_waiters();
    assert_eq!(one.answer(false).await.status, 204);
    assert_eq!(other.answer(false).await.status, 204);
    settle().await;
    assert_eq!(one.ask(&put(RECIPE)).await.status, 204);
    let connections: Vec<_> = origin.requests().iter().map(|it| it.connection).collect();
    assert!(connections[2] < 2 && connections[3] == 2, "{connections:?}");
}

/// Regression: a part of the request that was written after the interim answer passed for the next request, and it was sent twice.
#[tokio::test]
async fn a_request_that_was_begun_on_a_new_connection_is_not_sent_again_whatever_came_in_the_midst_of_it()
 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(&url, &["sanitize.max_body=32MiB"]).await;
    let padding = "<!-- -->".repeat(2 << 20);
    let large = String::from_utf8(RECIPE.to_vec()).expect("UTF-8") + &padding;
    let mut client = proxy.client().await;
    let asked = put(large.as_bytes());
    let sending = async { client.ask(&asked).await };
    let serving = async {
        let (mut upstream, _) = listener.accept().await.expect("a connection");
        let mut read = Vec::new();
        read_head(&mut upstream, &mut read).await.expect("a request");
        upstream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.expect("open");
        let mut rest = vec![0; 1 << 20];
        while !read.ends_with(b"-->") || read.len() < asked.len() - 2048 {
            let more = upstream.read(&mut rest).await.expect("it goes on");
            assert!(more > 0, "it was broken off");
            read.extend_from_slice(&rest[..more]);
        }
    };
    let (answer, ()) = tokio::join!(sending, serving);
    assert_eq!((answer.status, answer.problem()), (502, "upstream-connection-closed".to_owned()));
}

#[tokio::test]
async fn a_request_is_sent_again_once_only() {
    let ok = Reply::Write(answer("200 OK", "", b"ok"));
    let origin = Origin::start([ok, Reply::WriteAndClose(vec![])]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    assert_eq!(client.ask(GET).await.status, 200);
    assert_eq!(client.ask(GET).await.status, 502);
    assert_eq!(origin.requests().len(), 3);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_seen_to_break_off() {
    for reply in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let origin = Origin::start([Reply::WriteAndClose(reply.into())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert!(answer.broken, "{reply}");
        assert_eq!(answer.status.to_string(), reply[9..12], "{reply}");
        assert_eq!(answer.body, b"half", "{reply}");
    }
}

/// Regression: of an answer that broke off before any of its body, its client got nothing, not even the head.
#[tokio::test]
async fn an_answer_that_breaks_off_at_once_has_its_head() {
    let chunked = "HTTP/1.1 200 OK\r\nX-Kept: Yes\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in ["", "zz\r\nabc\r\n0\r\n\r\n"] {
        let origin = Origin::start([Reply::WriteAndClose([chunked, body].concat().into())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        for asked in [GET.to_vec(), put(BARE)] {
            let answer = proxy.ask(&asked).await;
            assert!(answer.broken, "{body}");
            assert_eq!((answer.status, answer.field("x-kept")), (200, Some("Yes")), "{body}");
        }
    }
}

/// Regression: the name of the coding was dropped, and what it had made went on as if it were the content.
#[tokio::test]
async fn an_answer_in_a_transfer_coding_that_is_not_known_is_none() {
    for coding in ["gzip, chunked", "chunked, chunked", "gzip\r\nTransfer-Encoding: chunked"] {
        let reply = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n");
        let origin = Origin::start([Reply::Write(reply.into_bytes())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(GET).await;
        let expected = (502, "upstream-answer-malformed".to_owned());
        assert_eq!((answer.status, answer.problem()), expected, "{coding}");
    }
}

/// Regression: where both may take the same time, as by default, the API was blamed with 504.
#[tokio::test]
async fn a_client_that_keeps_its_body_back_is_late_and_not_the_api() {
    let clock = Clock::hold();
    for response in ["1m", "10s"] {
        let origin = Origin::start([Reply::Hang]).await;
        let response = format!("upstream.response_timeout={response}");
        let proxy = Proxy::before(&origin, &["limits.idle_timeout=1m", &response]).await;
        let mut client = proxy.client().await;
        client.send(b"POST /x HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\nabc").await;
        let answer = clock.until(client.answer(false)).await;
        assert_eq!((answer.status, answer.problem()), (408, "request-body-timeout".to_owned()));
    }
}

/// Regression: of a 400 to a contact write that broke off, its client got nothing, not even the head.
#[tokio::test]
async fn of_a_refusal_that_breaks_off_the_client_gets_all_that_came() {
    let long = "x".repeat(60_000);
    for (method, target) in [("PUT", CONTACT), ("POST", CONTACTS)] {
        for text in ["half", REFUSAL, &long] {
            for framing in
                ["Content-Length: 61440\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\nf000\r\n"]
            {
                let reply = format!("HTTP/1.1 400 Bad Request\r\n{framing}{text}").into_bytes();
                for (reply, settings) in [
                    (Reply::WriteAndClose(reply.clone()), &["retry.max_attempts=1"][..]),
                    (Reply::WriteAndReset(reply.clone()), &["retry.max_attempts=1"]),
                    (
                        Reply::Pause(reply, Arc::new(Notify::new()), vec![]),
                        &["retry.max_attempts=1", "limits.idle_timeout=50ms"],
                    ),
                ] {
                    let origin = Origin::start([reply]).await;
                    let proxy = Proxy::before(&origin, settings).await;
                    let mut client = proxy.client().await;
                    let answer = client.ask(&request(method, target, "", BARE)).await;
                    assert!(answer.broken, "{method} {framing}");
                    assert_eq!(answer.status, 400);
                    assert!(answer.body == text.as_bytes(), "{method} {framing}");
                }
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_stands_still_is_cut() {
    let origin = Origin::start([Reply::Pause(
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec(),
        Arc::new(Notify::new()),
        vec![],
    )])
    .await;
    let proxy = Proxy::before(&origin, &["limits.idle_timeout=50ms"]).await;
    let answer = proxy.ask(GET).await;
    assert!(answer.broken);
    assert_eq!((answer.status, &*answer.body), (200, &b"half"[..]));
}

#[tokio::test]
async fn a_request_body_that_stands_still_gives_408() {
    let origin = Origin::start([Reply::Hang]).await;
    let proxy = Proxy::before(&origin, &["limits.idle_timeout=50ms"]).await;
    for target in ["/ws/customers/x/contacts/1", "/streamed"] {
        let mut client = proxy.client().await;
        let head = format!("PUT {target} HTTP/1.1\r\nHost: p\r\nContent-Length: 10\r\n\r\nhalf");
        client.send(head.as_bytes()).await;
        let answer = client.answer(false).await;
        assert_eq!(
            (answer.status, answer.problem()),
            (408, "request-body-timeout".to_owned()),
            "{target}"
        );
        assert!(client.is_closed().await, "what is left of it is no new request");
    }
}

#[tokio::test]
async fn an_upload_that_the_upstream_does_not_read_ends_in_504() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(&url, &["upstream.response_timeout=200ms"]).await;
    let mut client = proxy.client().await;
    client.send(b"POST /upload HTTP/1.1\r\nHost: p\r\nContent-Length: 100000000\r\n\r\n").await;
    let (mut reading, mut writing) = client.stream.into_split();
    let uploading =
        tokio::spawn(async move { while writing.write_all(&[0; 65_536]).await.is_ok() {} });
    let _never_read = listener.accept().await.expect("the proxy connects");
    let head = read_head(&mut reading, &mut Vec::new()).await.expect("an answer");
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    uploading.abort();
}

#[tokio::test]
async fn an_upload_that_moves_may_take_longer_than_an_answer() {
    // Regression: a contact write over sanitize.max_body was cut, though its bytes still came.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(
        &url,
        &[
            "sanitize.max_body=1KiB",
            "upstream.response_timeout=60s",
            "limits.idle_timeout=60s",
            "limits.header_timeout=1h",
        ],
    )
    .await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    let head = format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send(head.as_bytes()).await;
    let chunk = [b"800\r\n", &[b'x'; 2048][..], b"\r\n"].concat();
    client.send(&chunk).await;
    let (mut upstream, _) = listener.accept().await.expect("the proxy connects");
    let mut received = Vec::new();
    read_head(&mut upstream, &mut received).await.expect("a head");
    for chunks in 1..=4 {
        while received.iter().filter(|&&byte| byte == b'x').count() < chunks * 2048 {
            assert!(upstream.read_buf(&mut received).await.expect("it comes") > 0, "it was cut");
        }
        clock.advance(Duration::from_secs(40)).await;
        client.send(&chunk).await;
    }
    client.send(b"0\r\n\r\n").await;
    while !received.ends_with(b"\r\n0\r\n\r\n") {
        assert!(upstream.read_buf(&mut received).await.expect("it comes") > 0, "it was cut");
    }
    upstream.write_all(&no_content()).await.expect("a socket");
    assert_eq!(client.answer(false).await.status, 204);
}

#[tokio::test]
async fn a_client_that_stops_reading_is_let_go() {
    let endless =
        [b"HTTP/1.1 200 OK\r\nContent-Length: 90000000\r\n\r\n".to_vec(), vec![b'x'; 90_000_000]]
            .concat();
    let origin = Origin::start([Reply::Write(endless)]).await;
    let proxy = Proxy::before(&origin, &["limits.idle_timeout=100ms"]).await;
    let mut client = proxy.client().await;
    client.send(GET).await;
    proxy.finished(1).await;
    while proxy.metric("optin_proxy_connections") > 0.0 {
        tokio::task::yield_now().await;
    }
}
