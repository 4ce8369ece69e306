//! What an intermediary owes both sides: RFC 9110 section 7.6, and every byte that it need not touch.

use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{CONTACT, CONTACTS, GET, RECIPE, REFUSAL, answer, no_content, request};

async fn origin() -> Origin {
    Origin::start([Reply::Write(answer("200 OK", "", b"ok"))]).await
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent_but_for_host_and_via() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let fields = "User-Agent: Some/1.0\r\naUTHORIZATION: Basic Zm9v\r\nCookie: a=1\r\nX-Empty:\r\n\
                  X-Twice: 1\r\nX-Twice: 2\r\nX-Bytes: caf\u{e9}\r\nAccept-Encoding: gzip\r\n";
    let target = "/a//b/../c/%7euser%2F;x=%zz?q=a+b&c=%0d%0a&&=";
    let asked: Vec<u8> = format!("GET {target} HTTP/1.1\r\nHost: proxy.local:8080\r\n{fields}\r\n")
        .chars()
        .map(|char| char as u8)
        .collect();
    assert_eq!(proxy.ask(&asked).await.status, 200);
    let host = origin.address;
    let expected =
        format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{fields}via: 1.1 optin-proxy\r\n\r\n");
    assert_eq!(origin.request().head, expected);
}

#[tokio::test]
async fn hop_by_hop_fields_end_here_on_the_way_up() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let fields = "Connection: close, X-Nominated, Authorization, Content-Length, Content-Type, Content-Encoding\r\n\
                  X-Nominated: 1\r\nContent-Encoding: br\r\n\
                  Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\n\
                  TE: deflate, gzip;q=0.3\r\nUpgrade: websocket\r\nAuthorization: Basic eQ==\r\n";
    proxy.ask(&request("PUT", CONTACT, fields, RECIPE)).await;
    let arrived = origin.request();
    for gone in [
        "connection",
        "x-nominated",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "upgrade",
        "transfer-encoding",
    ] {
        assert!(arrived.fields(gone).is_empty(), "{gone}: {}", arrived.head);
    }
    // No client can strip these by nomination.
    assert_eq!(arrived.fields("authorization"), ["Basic eQ=="]);
    assert_eq!(arrived.fields("content-length").len(), 1);
    assert_eq!(arrived.fields("content-type"), ["application/atom+xml"]);
    assert_eq!(arrived.fields("content-encoding"), ["br"]);
}

#[tokio::test]
async fn a_field_that_a_connection_names_alone_goes_with_it_whatever_it_is_called() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    for name in ["Close", "Keep-Alive", "X-Kept"] {
        let fields = format!("Connection: {name}\r\nX-Other: 1\r\n{name}: 1\r\n");
        proxy.ask(&request("GET", "/x", &fields, b"")).await;
        let arrived = origin.requests().pop().expect("a request");
        assert!(arrived.fields(&name.to_ascii_lowercase()).is_empty(), "{}", arrived.head);
        assert_eq!(arrived.fields("x-other"), ["1"]);
    }
}

#[tokio::test]
async fn hop_by_hop_fields_end_here_on_the_way_down_and_all_else_stays() {
    let fields = "Connection: X-Nominated\r\nX-Nominated: 1\r\nKeep-Alive: timeout=5\r\n\
                  Proxy-Authenticate: Basic\r\nServer: Apache\r\nX-ODD-Case: Yes\r\nVia: 1.0 cache\r\n\
                  Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n";
    let origin = Origin::start([Reply::Write(answer("200 Fine", fields, b"ok"))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(b"GET / HTTP/1.1\r\nHost: p\r\n\r\n").await;
    for gone in ["connection", "x-nominated", "keep-alive", "proxy-authenticate"] {
        assert_eq!(answer.field(gone), None, "{gone}");
    }
    for kept in [
        "Server: Apache",
        "X-ODD-Case: Yes",
        "Via: 1.0 cache",
        "Set-Cookie: a=1\r\nSet-Cookie: b=2",
    ] {
        assert!(answer.head.contains(kept), "{kept}: {}", answer.head);
    }
    assert!(answer.head.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn the_vendor_learns_no_client_address() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    proxy.ask(b"GET / HTTP/1.1\r\nHost: p\r\nVia: 1.0 inner\r\n\r\n").await;
    let arrived = origin.request();
    assert_eq!(arrived.fields("via"), ["1.0 inner", "1.1 optin-proxy"]);
    for name in
        ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "forwarded", "x-real-ip"]
    {
        assert!(arrived.fields(name).is_empty());
    }
    assert!(!arrived.head.contains("Host: p\r\n"));
}

#[tokio::test]
async fn a_location_under_the_upstreams_origin_comes_back_as_the_proxys() {
    for (location, expected) in [
        (
            "http://{own}/ws/customers/x/contacts/1?a=b#c",
            "http://p:81/ws/customers/x/contacts/1?a=b#c",
        ),
        ("HTTPS://{own}/x", "http://p:81/x"),
        ("http://{own}", "http://p:81"),
        ("//{own}/x", "http://p:81/x"),
        ("//elsewhere.example/x", ""),
        ("http://127.0.0.1:1/x", ""),
        ("http://127.0.0.1/x", ""),
        ("http://{own}.evil.example/x", ""),
        ("http://user@{own}/x", ""),
        ("http://elsewhere.example/x", ""),
        ("/relative", ""),
        ("ftp://x", ""),
    ] {
        let origin = Origin::start_knowing(|address| {
            let location = location.replace("{own}", &address.to_string());
            let fields = format!("Location: {location}\r\nContent-Location: {location}\r\n");
            [Reply::Write(answer("201 Created", &fields, b""))]
        })
        .await;
        let proxy = Proxy::before(&origin, &[]).await;
        let asked = format!("POST {CONTACTS} HTTP/1.1\r\nHost: p:81\r\nContent-Length: 0\r\n\r\n");
        let answer = proxy.ask(asked.as_bytes()).await;
        let own = location.replace("{own}", &origin.address.to_string());
        let expected = if expected.is_empty() { own.as_str() } else { expected };
        assert_eq!(answer.field("location"), Some(expected));
        assert_eq!(answer.field("content-location"), Some(expected));
    }
}

#[tokio::test]
async fn an_absolute_form_target_counts_more_than_host() {
    let origin = origin().await;
    let ports = format!("intercept.ports={}", origin.address.port());
    let proxy = Proxy::before(&origin, &["intercept.allow_private=127.0.0.1", &ports]).await;
    let asked = format!("GET http://{}/x?y HTTP/1.1\r\nHost: elsewhere\r\n\r\n", origin.address);
    assert_eq!(proxy.ask(asked.as_bytes()).await.status, 200);
    let request = origin.request();
    assert!(request.head.starts_with("GET /x?y HTTP/1.1\r\n"));
    assert_eq!(request.fields("host"), [origin.address.to_string()]);
}

#[tokio::test]
async fn an_absolute_form_client_has_no_ids_of_the_proxys_own() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let ports = format!("intercept.ports={}", origin.address.port());
    let proxy = Proxy::before(&origin, &["intercept.allow_private=127.0.0.1", &ports]).await;
    let own = origin.address.to_string();
    let body = include_str!("../corpus/in/own-origin.xml").replace("127.0.0.1:8080", &own);
    let target = format!("http://{own}{CONTACT}");
    let answer = proxy.ask(&request("PUT", &target, "", body.as_bytes())).await;
    assert_eq!(answer.outcome(), "clean");
    assert_eq!(origin.request().body, body.as_bytes());
}

#[tokio::test]
async fn expect_is_answered_here_before_the_body_and_goes_no_further() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    let head =
        String::from_utf8(request("PUT", CONTACT, "Expect: 100-Continue\r\n", b"")).expect("ASCII");
    client
        .send(
            head.replace("Content-Length: 0", &format!("Content-Length: {}", RECIPE.len()))
                .as_bytes(),
        )
        .await;
    let interim = client.head().await.expect("an interim answer");
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    client.send(RECIPE).await;
    assert_eq!(client.answer(false).await.outcome(), "rewritten");
    assert!(origin.request().fields("expect").is_empty());
}

#[tokio::test]
async fn a_body_that_is_refused_for_its_length_is_not_asked_for() {
    let origin = Origin::start([]).await;
    let proxy = Proxy::before(&origin, &["sanitize.uninspectable=reject"]).await;
    let mut client = proxy.client().await;
    let head = format!(
        "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
    );
    client.send(head.as_bytes()).await;
    assert_eq!(client.answer(false).await.status, 413, "at once, without a 100");
}

/// Regression: a value with a byte beyond ASCII was not read at all, and hid what else stood in it.
#[tokio::test]
async fn what_is_no_text_in_a_list_hides_nothing_beside_it() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let asked =
        b"GET /x HTTP/1.1\r\nHost: p\r\nConnection: X-Nominated, \xff\r\nX-Nominated: 1\r\n\r\n";
    assert_eq!(proxy.ask(asked).await.status, 200);
    assert!(origin.request().fields("x-nominated").is_empty(), "{}", origin.request().head);
    let looped = b"GET /x HTTP/1.1\r\nHost: p\r\nVia: 1.1 optin-proxy, 1.0 x (\xe9)\r\n\r\n";
    assert_eq!(proxy.ask(looped).await.status, 508);
}

#[tokio::test]
async fn an_expectation_that_was_met_here_does_not_go_on_beside_another() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let fields = "Expect: x\r\nExpect: 100-continue\r\n";
    let mut client = proxy.client().await;
    client.send(&request("PUT", CONTACT, fields, RECIPE)).await;
    assert!(client.head().await.expect("an interim answer").starts_with("HTTP/1.1 100"));
    assert_eq!(client.answer(false).await.status, 200);
    assert!(origin.request().fields("expect").is_empty(), "{}", origin.request().head);
}

#[tokio::test]
async fn an_answer_keeps_its_id_or_gets_the_requests_if_that_is_one() {
    let theirs = answer("200 OK", "X-Request-Id: theirs\r\n", b"");
    let origin = Origin::start([Reply::Write(theirs), Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    assert_eq!(proxy.ask(GET).await.field("x-request-id"), Some("theirs"));
    for (length, kept) in [(7, false), (8, true), (64, true), (65, false)] {
        let id = "a".repeat(length);
        let asked = format!("GET / HTTP/1.1\r\nHost: p\r\nX-Request-Id: {id}\r\n\r\n");
        let answer = proxy.ask(asked.as_bytes()).await;
        assert_eq!(answer.field("x-request-id") == Some(&*id), kept, "{length}");
    }
}

#[tokio::test]
async fn a_method_that_is_not_served_is_told_which_are() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let refused = proxy.ask(b"TRACE / HTTP/1.1\r\nHost: p\r\n\r\n").await;
    assert_eq!(
        refused.field("allow"),
        Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT")
    );
    assert!(origin.requests().is_empty());
}

fn names(head: &str) -> Vec<&str> {
    head.lines().skip(1).filter_map(|line| line.split_once(':')).map(|(name, _)| name).collect()
}

/// Regression: the last field came into the place of each that was taken out.
#[tokio::test]
async fn fields_stay_in_their_order_whichever_are_taken_out() {
    let fields = "Connection: close\r\nX-b: 1\r\nKeep-Alive: timeout=5\r\nx-A: 2\r\nX-C: 3\r\nX-C: 4\r\nDate: x\r\n";
    let refusal = answer("400 Bad Request", fields, REFUSAL.as_bytes());
    let origin = Origin::start([Reply::WriteAndClose(refusal)]).await;
    let proxy = Proxy::before(&origin, &["retry.max_attempts=1"]).await;
    let more = "Connection: close\r\nExpect: 100-continue\r\nX-b: 1\r\nDigest: x\r\nx-A: 2\r\nX-C: 3\r\nX-C: 4\r\n";
    let mut client = proxy.client().await;
    client.send(&request("PUT", CONTACT, more, RECIPE)).await;
    assert!(client.head().await.expect("a head").starts_with("HTTP/1.1 100"));
    let answered = client.answer(false).await;
    assert_eq!(answered.status, 400);
    let asked = &origin.requests()[0].head;
    let kept = ["X-b", "x-A", "X-C", "X-C"];
    let own = ["Host", "Content-Type", "Content-Length"];
    assert_eq!(names(asked), [&own[..], &kept, &["via"]].concat());
    let answered = names(&answered.head);
    assert_eq!(answered[..6], [&["Content-Length"][..], &kept, &["Date"]].concat());
}

/// Regression: so it was where a length took the place of chunks, or was not passed on.
#[tokio::test]
async fn fields_stay_in_their_order_where_the_framing_changes() {
    let reply = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nX-A: 1\r\noptin-proxy: x\r\nX-B: 2\r\nX-C: 3\r\n\r\n";
    let origin = Origin::start([Reply::WriteAndClose(reply.to_vec())]).await;
    let proxy = Proxy::before(&origin, &["log.report_header=false"]).await;
    let asked = format!(
        "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\n\r\n\
         {:x}\r\n",
        RECIPE.len()
    );
    let asked = [asked.as_bytes(), RECIPE, b"\r\n0\r\nX-T: 1\r\n\r\n"].concat();
    let answered = proxy.ask(&asked).await;
    let kept = ["X-A", "X-B", "X-C"];
    let asked = &origin.requests()[0].head;
    assert_eq!(names(asked)[..4], [&["Host"][..], &kept].concat(), "{asked}");
    assert_eq!(names(&answered.head)[..3], kept, "{}", answered.head);
}
