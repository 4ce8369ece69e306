//! Messages of every shape come through, in both directions.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as Http;
use hyper_util::rt::TokioExecutor;
use tokio::io::AsyncWriteExt;

use crate::support::http2::{DATA, END_HEADERS, END_STREAM, HEADERS, Http2, RST_STREAM, fields};
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, CONTACT, GET, RECIPE, RECIPE_OUT, answer, no_content, put, request};

#[tokio::test]
async fn head_204_and_304_have_no_body_and_keep_their_length() {
    let cases: [(&[u8], Vec<u8>); 3] = [
        (
            b"HEAD /x HTTP/1.1\r\nHost: p\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n".to_vec(),
        ),
        (GET, b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
        (GET, b"HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n".to_vec()),
    ];
    for (asked, reply) in cases {
        let expected = String::from_utf8(reply.clone()).expect("ASCII");
        let origin =
            Origin::start([Reply::Write(reply), Reply::Write(answer("200 OK", "", b"next"))]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let mut client = proxy.client().await;
        let got = client.ask(asked).await;
        for line in expected.lines().skip(1).filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").expect("a field");
            assert_eq!(got.field(name), Some(value), "{expected}");
        }
        assert_eq!(client.ask(GET).await.body, b"next", "the connection is still in step");
    }
}

#[tokio::test]
async fn interim_answers_are_not_taken_for_the_final_one() {
    let reply = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec();
    let origin = Origin::start([Reply::Write(reply)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(GET).await;
    assert_eq!((answer.status, &answer.body[..]), (200, &b"ok"[..]));
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_comes_through() {
    let reply = b"HTTP/1.1 200 OK\r\n\r\nuntil the end".to_vec();
    let origin = Origin::start([Reply::WriteAndClose(reply)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    assert_eq!(proxy.ask(GET).await.body, b"until the end");
}

#[tokio::test]
async fn trailers_of_an_answer_reach_a_client_that_asked_for_them() {
    let reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n";
    let origin = Origin::start([Reply::Write(reply.to_vec())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer =
        proxy.ask(b"GET / HTTP/1.1\r\nHost: p\r\nTE: trailers\r\nConnection: TE\r\n\r\n").await;
    assert_eq!(answer.trailers.to_ascii_lowercase(), "x-sum: 1\r\n");
    let arrived = &origin.requests()[0];
    assert_eq!(
        (arrived.fields("te"), arrived.fields("connection")),
        (vec!["trailers"], vec!["te"])
    );
    let plain = proxy.ask(GET).await;
    assert_eq!((plain.trailers.as_str(), &plain.body[..]), ("", &b"ok"[..]));
}

/// An answer whose trailers are partly for the connection that it comes on.
const TRAILED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Connection, Keep-Alive, X-Own\r\n\r\n\
    2\r\nok\r\n0\r\nConnection: close, X-Own\r\nKeep-Alive: timeout=1\r\nX-Own: 1\r\nX-Sum: 1\r\n\r\n";

/// Regression: over HTTP/1 they were passed on, and over HTTP/2, which forbids them, the answer was reset.
#[tokio::test]
async fn trailers_that_are_the_connections_end_here() {
    let origin = Origin::start([Reply::Write(TRAILED.to_vec())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let asked = b"GET / HTTP/1.1\r\nHost: p\r\nTE: trailers\r\nConnection: TE\r\n\r\n";
    let trailers = proxy.ask(asked).await.trailers.to_ascii_lowercase();
    assert_eq!(trailers, "x-sum: 1\r\n");
    let mut client = Http2::connect(proxy.address, 65_535).await;
    let asked = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "p")];
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&asked)).await;
    let mut kinds = Vec::new();
    while !matches!(kinds.last(), Some((_, END_STREAM | RST_STREAM))) {
        let frame = client.next().await.expect("a frame");
        let ends = if frame.kind == RST_STREAM { RST_STREAM } else { frame.flags & END_STREAM };
        kinds.push((frame.kind, ends));
    }
    assert_eq!(kinds, [(HEADERS, 0), (DATA, 0), (HEADERS, END_STREAM)]);
}

/// Regression: behind trailers whose end has no CR, a request was lost, and its body taken for one.
#[tokio::test]
async fn nothing_behind_the_trailers_of_a_request_is_read_as_a_request() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b"ok"))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let hidden = request("PUT", CONTACT, "", b"DELETE /evil HTTP/1.1\r\nHost: p\r\n\r\n");
    let ends = ["X-T: 1\r\n\r\n", "X-T: 1\r\n\n", "\n", "X-T: 1\r\n\nno field\r\n\r\n"];
    for (sent, end) in (1..).zip(ends.into_iter().cycle()).take(2 * ends.len()) {
        let path = if sent > ends.len() { CONTACT } else { "/a" };
        let chunked = format!(
            "PUT {path} HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n{end}"
        );
        let mut client = proxy.client().await;
        client.send(&[chunked.as_bytes(), &hidden].concat()).await;
        let answer = client.answer(false).await;
        assert_eq!(
            (answer.status, answer.field("connection")),
            (200, Some("close")),
            "{chunked:?}"
        );
        client.stream.shutdown().await.expect("it is open");
        assert!(client.is_closed().await);
        assert_eq!(origin.requests().len(), sent, "{chunked:?}");
    }
}

/// Regression: clients of HTTP/2 were told a length that they take for a mistake (RFC 9110 section 8.6).
#[tokio::test]
async fn an_answer_without_content_has_no_length() {
    let with_length = b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n".to_vec();
    let origin = Origin::start([Reply::WriteAndClose(with_length)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let client: Http<_, Full<Bytes>> =
        Http::builder(TokioExecutor::new()).http2_only(true).build_http();
    let target = format!("http://{}/x", proxy.address).parse().expect("a URL");
    let answer = client.get(target).await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.headers().get("content-length")), (204, None));
}

#[tokio::test]
async fn chunked_requests_are_inspected_and_framed_by_length() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let (first, second) = RECIPE.split_at(700);
    let asked = [
        format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n{:x};ext=1\r\n", first.len()).as_bytes(),
        first,
        format!("\r\n{:x}\r\n", second.len()).as_bytes(),
        second,
        b"\r\n0\r\nX: y\r\n\r\n",
    ]
    .concat();
    assert_eq!(proxy.ask(&asked).await.outcome(), "rewritten");
    let arrived = origin.request();
    assert_eq!(arrived.body, RECIPE_OUT);
    assert_eq!(arrived.fields("content-length"), [RECIPE_OUT.len().to_string()]);
    assert!(arrived.fields("transfer-encoding").is_empty() && arrived.fields("trailer").is_empty());
}

#[tokio::test]
async fn http_1_0_clients_are_served() {
    let chunked =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n".to_vec();
    let origin = Origin::start([Reply::Write(chunked)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(b"GET /x HTTP/1.0\r\n\r\n").await;
    assert_eq!(answer.body, b"ok");
    assert_eq!(answer.field("transfer-encoding"), None);
    let arrived = origin.request();
    assert!(arrived.head.starts_with("GET /x HTTP/1.1\r\n"));
    assert_eq!(arrived.fields("host"), [origin.address.to_string()]);
    assert_eq!(arrived.fields("via"), ["1.0 optin-proxy"]);
    // Regression: it was told that the connection, whose end is the answer's, stays.
    let answer = proxy.ask(b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
    assert_eq!((answer.field("connection"), &answer.body[..]), (Some("close"), &b"ok"[..]));
}

/// Regression: hyper takes it that a GET has no content, so its chunks were lost.
#[tokio::test]
async fn a_request_has_its_content_whatever_its_method() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for method in ["GET", "HEAD", "OPTIONS", "DELETE", "REPORT"] {
        let head = format!("{method} /x HTTP/1.1\r\nHost: p\r\n");
        for framed in [
            "Content-Length: 5\r\n\r\nhello",
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ] {
            assert_eq!(proxy.ask((head.clone() + framed).as_bytes()).await.status, 204);
            let arrived = origin.requests().pop().expect("a request");
            assert_eq!(arrived.body, b"hello", "{method} {framed}");
        }
        proxy.ask(format!("{head}\r\n").as_bytes()).await;
        let arrived = origin.requests().pop().expect("a request");
        assert!(arrived.fields("transfer-encoding").is_empty() && arrived.body.is_empty());
    }
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_order() {
    let replies = ["a", "b", "c"].map(|text| Reply::Write(answer("200 OK", "", text.as_bytes())));
    let origin = Origin::start(replies).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    client.send(&[put(BARE), GET.to_vec(), put(RECIPE)].concat()).await;
    for expected in ["a", "b", "c"] {
        assert_eq!(client.answer(false).await.body, expected.as_bytes());
    }
    assert_eq!(origin.requests()[2].body, RECIPE_OUT);
}

#[tokio::test]
async fn http_2_clients_are_served_by_prior_knowledge() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "Keep-Alive: x\r\n", b"ok"))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let client: Http<_, Full<Bytes>> =
        Http::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = http::Request::builder()
        .method("PUT")
        .uri(format!("http://{}{CONTACT}?x=1", proxy.address))
        .body(Full::new(Bytes::from_static(RECIPE)))
        .expect("a request");
    let answer = client.request(request).await.expect("an answer");
    assert_eq!(answer.version(), http::Version::HTTP_2);
    assert_eq!(
        answer.headers()["optin-proxy"],
        "findings=2, rewritten=2, attempts=1, outcome=rewritten"
    );
    assert!(!answer.headers().contains_key("keep-alive"));
    assert_eq!(answer.into_body().collect().await.expect("a body").to_bytes(), "ok");
    let arrived = origin.request();
    assert!(
        arrived.head.starts_with(&format!("PUT {CONTACT}?x=1 HTTP/1.1\r\n")),
        "{}",
        arrived.head
    );
    assert_eq!(arrived.fields("host"), [origin.address.to_string()]);
    assert_eq!(arrived.fields("via"), ["2 optin-proxy"]);
    assert_eq!(arrived.body, RECIPE_OUT);
}

#[tokio::test]
async fn ids_under_the_authority_of_an_http_2_client_are_restored() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let client: Http<_, Full<Bytes>> =
        Http::builder(TokioExecutor::new()).http2_only(true).build_http();
    let body = include_str!("../corpus/in/own-origin.xml")
        .replace("127.0.0.1:8080", &proxy.address.to_string());
    let request = http::Request::builder()
        .method("PUT")
        .uri(format!("http://{}{CONTACT}", proxy.address))
        .body(Full::from(body))
        .expect("a request");
    client.request(request).await.expect("an answer");
    let out = include_str!("../corpus/out/own-origin.xml")
        .replace("127.0.0.1:8080", &proxy.address.to_string());
    assert_eq!(origin.request().body, out.as_bytes());
}

#[tokio::test]
async fn a_truncated_body_never_reaches_the_upstream_as_a_whole_one() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    let whole = put(RECIPE);
    client.send(&whole[..whole.len() - 1]).await;
    drop(client);
    proxy.finished(1).await;
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn a_transfer_coding_beside_chunked_is_refused_rather_than_forgotten() {
    let origin = Origin::start([]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let asked = "PUT /x HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    let answer = proxy.ask(asked.as_bytes()).await;
    assert_eq!((answer.status, answer.problem()), (501, "transfer-coding-unknown".to_owned()));
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn several_hosts_are_refused() {
    let origin = Origin::start([]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n").await;
    assert_eq!((answer.status, answer.problem()), (400, "several-hosts".to_owned()));
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn a_request_without_a_host_or_with_what_is_none_is_refused() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for (version, host, status) in [
        ("1.1", "", 400),
        ("1.0", "", 204),
        ("1.1", "Host:\r\n", 204),
        ("1.1", "Host: proxy.local:8080\r\n", 204),
        ("1.1", "Host: [::1]:8080\r\n", 204),
        ("1.1", "Host: a, b\r\n", 400),
        ("1.1", "Host: a,b\r\n", 400),
        ("1.1", "Host: a/b\r\n", 400),
        ("1.1", "Host: a:65535\r\n", 204),
        ("1.1", "Host: a:65536\r\n", 400),
        ("1.1", "Host: a:\r\n", 204),
        ("1.1", "Host: a:00080\r\n", 204),
        ("1.1", "Host: a:99999\r\n", 400),
        ("1.1", "Host: a:8_0\r\n", 400),
        ("1.1", "Host: user@a\r\n", 400),
        ("1.0", "Host: a b\r\n", 400),
    ] {
        let answer = proxy.ask(format!("GET /x HTTP/{version}\r\n{host}\r\n").as_bytes()).await;
        assert_eq!(answer.status, status, "{version} {host}");
        if status == 400 {
            assert_eq!(answer.problem(), "host-malformed");
        }
    }
}

#[tokio::test]
async fn an_answer_of_the_proxys_own_to_head_has_no_body_on_http_2_either() {
    let origin = Origin::start([]).await;
    let url = origin.url();
    drop(origin);
    let proxy = Proxy::start(&url, &[]).await;
    let client: Http<_, Full<Bytes>> =
        Http::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = http::Request::head(format!("http://{}/x", proxy.address))
        .body(Full::default())
        .expect("a request");
    let answer = client.request(request).await.expect("an answer");
    assert_eq!(answer.status(), 502);
    assert!(answer.into_body().collect().await.expect("a body").to_bytes().is_empty());
}

/// Regression: a length beside chunks came through, and the client took a part for the whole.
#[tokio::test]
async fn an_answer_is_framed_in_one_way_whatever_the_origin_said_beside_it() {
    let chunks = "2\r\nok\r\n0\r\n\r\n";
    for length in ["1", "2", "200"] {
        for fields in [
            format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"),
            format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
        ] {
            let reply = format!("HTTP/1.1 200 OK\r\n{fields}\r\n{chunks}").into_bytes();
            let next = Reply::Write(answer("200 OK", "", b"next"));
            let origin = Origin::start([Reply::WriteAndClose(reply), next]).await;
            let proxy = Proxy::before(&origin, &[]).await;
            let mut client = proxy.client().await;
            let got = client.ask(GET).await;
            assert_eq!(got.field("content-length"), None, "{}", got.head);
            assert_eq!((&got.body[..], got.broken), (&b"ok"[..], false));
            assert_eq!(client.ask(GET).await.body, b"next");
        }
    }
    for lengths in
        [&["002"][..], &["002", "2"], &["2", "002"], &["2", "2"], &["2, 2"], &["2,2", "2"]]
    {
        let lines: String = lengths.iter().map(|it| format!("Content-Length: {it}\r\n")).collect();
        let reply = format!("HTTP/1.1 200 OK\r\n{lines}\r\nok").into_bytes();
        let origin = Origin::start([Reply::Write(reply)]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let got = proxy.ask(GET).await;
        assert_eq!(got.field("content-length"), Some("2"), "{lengths:?}");
        assert_eq!(got.head.to_lowercase().matches("content-length").count(), 1, "{lengths:?}");
    }
}

#[tokio::test]
async fn a_trailer_field_is_announced_to_who_gets_it_only() {
    let reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n";
    let origin = Origin::start([Reply::Write(reply.to_vec())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    assert_eq!(proxy.ask(GET).await.field("trailer"), None);
    let asked = b"GET / HTTP/1.1\r\nHost: p\r\nTE: trailers\r\nConnection: TE\r\n\r\n";
    assert_eq!(proxy.ask(asked).await.field("trailer"), Some("X-Sum"));
}

/// Regression: an answer that was looked at was framed by its length, and lost its trailers.
#[tokio::test]
async fn the_trailers_of_a_refusal_reach_a_client_that_takes_trailers() {
    let by_chunks = "HTTP/1.1 400 Bad Request\r\nTrailer: X-T\r\nTransfer-Encoding: chunked\r\n\r\n\
                     5\r\nhello\r\n0\r\nX-T: kept\r\n\r\n";
    let origin = Origin::start([Reply::Write(by_chunks.into())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let asked = request("PUT", CONTACT, "TE: trailers\r\nConnection: TE\r\n", RECIPE);
    let answer = proxy.ask(&asked).await;
    assert_eq!((answer.status, &*answer.body), (400, &b"hello"[..]));
    assert!(answer.trailers.to_lowercase().contains("x-t: kept"), "{answer:?}");
}
