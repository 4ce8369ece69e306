//! The retry: what is sent again, how often, and what the client gets.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use tokio::sync::Notify;

use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{
    BARE, CONTACT, CONTACTS, RECIPE, RECIPE_OUT, REFUSAL, UNDECLARED, answer, no_content, put,
    refusal, request,
};

pub(super) fn refused_then(after: Vec<u8>) -> [Reply; 2] {
    [Reply::Write(refusal()), Reply::Write(after)]
}

#[tokio::test]
async fn a_refusal_that_contradicts_what_was_sent_is_never_seen_by_the_client() {
    let origin = Origin::start(refused_then(no_content())).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&request("PUT", CONTACT, "X-Custom: 1\r\n", RECIPE)).await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.report(), "findings=2, rewritten=2, attempts=2, outcome=rescued");
    let requests = origin.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[0].head, requests[1].head);
    assert_eq!(requests[0].body, RECIPE_OUT);
    assert_eq!(requests[1].body, RECIPE_OUT);
    assert_eq!(proxy.metric("optin_proxy_refusals_total{verdict=\"transient\"}"), 1.0);
    assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"rescued\"}"), 1.0);
}

#[tokio::test]
async fn the_reports_own_case_with_bare_lists_is_cured_by_the_retry_alone() {
    let origin = Origin::start([
        Reply::Write(refusal()),
        Reply::Write(refusal()),
        Reply::Write(no_content()),
    ])
    .await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=3, outcome=rescued");
    assert!(origin.requests().iter().all(|request| request.body == BARE));
}

#[tokio::test]
async fn the_last_refusal_is_relayed_byte_for_byte_when_no_attempt_is_left() {
    let body = [REFUSAL.as_bytes(), b"\r\n\xff\0 "].concat();
    let last =
        answer("400 Not Today", "X-Odd:  two  \r\nSet-Cookie: a\r\nSet-Cookie: b\r\n", &body);
    let origin =
        Origin::start([Reply::Write(refusal()), Reply::Write(refusal()), Reply::Write(last)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.body, body);
    assert_eq!(answer.field("x-odd"), Some("two"));
    assert!(answer.head.contains("Set-Cookie: a\r\nSet-Cookie: b\r\n"), "{}", answer.head);
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=3, outcome=exhausted");
    assert_eq!(origin.requests().len(), 3);
    assert_eq!(proxy.metric("optin_proxy_refusals_total{verdict=\"transient\"}"), 3.0);
    assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"refused\"}"), 2.0);
}

/// Property number one: what the application did not declare is never tried again.
#[tokio::test]
async fn an_update_that_did_not_declare_the_contact_reaches_the_api_exactly_once() {
    let by_owner = include_bytes!("../corpus/in/reverse.xml");
    let unknown =
        String::from_utf8(BARE.to_vec()).expect("UTF-8").replace("BY_CONTACT", "BY_CLIENT");
    for body in [&by_owner[..], UNDECLARED, unknown.as_bytes(), b"<entry>"] {
        let origin = Origin::start([Reply::Write(refusal())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(body)).await;
        assert_eq!((answer.status, answer.outcome()), (400, "refused"));
        assert_eq!(answer.body, REFUSAL.as_bytes());
        assert_eq!(origin.requests().len(), 1);
        assert_eq!(proxy.metric("optin_proxy_refusals_total{verdict=\"legitimate\"}"), 1.0);
    }
}

#[tokio::test]
async fn a_contradictory_declaration_that_names_the_contact_is_retried() {
    let origin = Origin::start(refused_then(no_content())).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let body = include_bytes!("../corpus/in/contradictory.xml");
    assert_eq!(proxy.ask(&put(body)).await.outcome(), "rescued");
}

#[tokio::test]
async fn observing_retries_and_off_does_not() {
    for (mode, requests, outcome) in [("observe", 2, "rescued"), ("off", 1, "(none)")] {
        let origin = Origin::start(refused_then(no_content())).await;
        let proxy = Proxy::before(&origin, &[&format!("sanitize.mode={mode}")]).await;
        let answer = proxy.ask(&put(RECIPE)).await;
        assert_eq!(answer.outcome(), outcome);
        assert_eq!(origin.requests().len(), requests);
        assert!(origin.requests().iter().all(|request| request.body == RECIPE));
    }
}

#[tokio::test]
async fn a_refusal_of_the_contacts_own_act_is_legitimate() {
    let by_contact = REFUSAL.replace("owner", "contact");
    let origin =
        Origin::start([Reply::Write(answer("400 Bad Request", "", by_contact.as_bytes()))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "refused");
    assert_eq!(origin.requests().len(), 1);
}

#[tokio::test]
async fn a_create_is_never_sent_twice() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&request("POST", CONTACTS, "", BARE)).await;
    assert_eq!((answer.status, answer.outcome()), (400, "refused"));
    assert_eq!(origin.requests().len(), 1);
}

#[tokio::test]
async fn a_request_with_a_nonce_is_never_sent_twice() {
    for (headers, target) in [
        ("Authorization: OAuth realm=\"x\", oauth_nonce=\"abc\"\r\n", CONTACT.to_owned()),
        ("Authorization: oAUTH realm=\"x\", oauth_nonce=\"abc\"\r\n", CONTACT.to_owned()),
        ("Authorization: oauth\toauth%5Fnonce=\"abc\"\r\n", CONTACT.to_owned()),
        ("", format!("{CONTACT}?oauth_nonce=abc")),
        ("", format!("{CONTACT}?x=1&oauth%5Fnonce=abc")),
        ("", format!("{CONTACT}?%6Fauth%5F%6Eonce=abc")),
    ] {
        let origin = Origin::start([Reply::Write(refusal())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&request("PUT", &target, headers, BARE)).await;
        assert_eq!((answer.status, answer.outcome()), (400, "exhausted"));
        assert_eq!(origin.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_streamed_body_is_never_sent_twice() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let proxy = Proxy::before(&origin, &["sanitize.max_body=100"]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!((answer.status, answer.outcome()), (400, "refused"));
    assert_eq!(origin.request().body, BARE);
}

#[tokio::test]
async fn one_attempt_means_no_retry() {
    let origin = Origin::start(refused_then(no_content())).await;
    let proxy = Proxy::before(&origin, &["retry.max_attempts=1"]).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "exhausted");
    assert_eq!(origin.requests().len(), 1);
}

#[tokio::test]
async fn other_answers_are_returned_untouched_and_not_retried() {
    for (status, text) in [
        ("400 Bad Request", "Error 400: EmailAddress is required"),
        ("403 Forbidden", REFUSAL),
        ("409 Conflict", REFUSAL),
        ("429 Too Many Requests", REFUSAL),
        ("500 Internal Server Error", REFUSAL),
        ("503 Service Unavailable", REFUSAL),
    ] {
        let later = "Retry-After: 0\r\n";
        let origin = Origin::start([Reply::Write(answer(status, later, text.as_bytes()))]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!(answer.field("retry-after"), Some("0"));
        assert_eq!(
            (answer.status.to_string(), answer.outcome()),
            (status[..3].to_owned(), "clean")
        );
        assert_eq!(answer.body, text.as_bytes());
        assert_eq!(origin.requests().len(), 1);
    }
}

#[tokio::test]
async fn the_first_other_answer_is_the_clients_even_if_it_is_an_error() {
    let origin = Origin::start(refused_then(answer("503 Service Unavailable", "", b"later"))).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!((answer.status, &answer.body[..]), (503, &b"later"[..]));
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=2, outcome=clean");
}

#[tokio::test]
async fn a_refusal_is_recognised_in_a_compressed_answer_and_relayed_compressed() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(format!("<html><p>{REFUSAL}</p></html>").as_bytes()).expect("in memory");
    let gzip = encoder.finish().expect("in memory");
    let text = format!("<html><p>{REFUSAL}</p></html>");
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text.as_bytes()).expect("in memory");
    let zlib = encoder.finish().expect("in memory");
    // Without the frame of zlib, as some servers send it under the same name.
    let bare = zlib[2..zlib.len() - 4].to_vec();
    let base64 = |text| STANDARD.decode(text).expect("it was encoded");
    // The same text, as Python's brotli and zstandard pack it.
    let br = base64(
        "G7kAIARC3VL2hNxgfA1BWARCzSzUtEtanVzA3H9rgaQR5JKkuY2dbyA5pDBSEk3d83ELupUiCcEkKWV/nEg/6rK2bZfjvPh70A017QRQSLL\
         wuDpqf0nnQwPz9JNcIPmQMMyGioADn4kaGvgY/WAoGw==",
    );
    let zstd = base64(
        "KLUv/SC6fQQAUoshGmBNdVtDkjWReyK6xRxgJYXU9wR4aQYrgmDxqLlmgIMe4KzFj/rV9+M7qGsZ8rR5qHbhVx6Q/Cq2PKmFW8s376O+ce4\
         z7hiuL2tr3IT9KOnsxo3q7PikLSer33xMdkUCYQ6GAmEg+HKE6j2y2lEpi5ukmua66kzPcRMIFA4ZwgV6BzXX7AQBAAglKCk=",
    );
    for (coding, packed) in
        [("gzip", gzip), ("deflate", zlib), ("deflate", bare), ("br", br), ("zstd", zstd)]
    {
        let headers = format!("Content-Encoding: {coding}\r\nContent-Type: text/html\r\n");
        let refused = Reply::Write(answer("400 Bad Request", &headers, &packed));
        let origin = Origin::start([refused]).await;
        let proxy = Proxy::before(&origin, &["retry.max_attempts=2"]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!(answer.outcome(), "exhausted", "{coding}");
        assert_eq!(answer.field("content-encoding"), Some(coding));
        assert_eq!(answer.body, packed);
        assert_eq!(origin.requests().len(), 2);
    }
}

#[tokio::test]
async fn a_long_answer_is_looked_at_for_64_kib_and_relayed_whole() {
    for (before, retried) in [(60_000, true), (65_536, false)] {
        let text = format!("{} {REFUSAL}{}", ".".repeat(before), ".".repeat(300_000)).into_bytes();
        let origin = Origin::start([Reply::Write(answer("400 Bad Request", "", &text))]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!(origin.requests().len(), if retried { 3 } else { 1 });
        assert_eq!(answer.body, text);
    }
}

/// What is packed tightly is unpacked for 64 KiB, wherever the rest would lead.
#[tokio::test]
async fn a_gzip_bomb_in_a_refusal_is_looked_at_for_64_kib_and_relayed_as_it_is() {
    for (before, retried) in [(60_000, true), (70_000, false)] {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(".".repeat(before).as_bytes()).expect("in memory");
        encoder.write_all(REFUSAL.as_bytes()).expect("in memory");
        for _ in 0..200 {
            encoder.write_all(&[0; 1_000_000]).expect("in memory");
        }
        let bomb = encoder.finish().expect("in memory");
        let headers = "Content-Encoding: gzip\r\n";
        let origin = Origin::start([Reply::Write(answer("400 Bad Request", headers, &bomb))]).await;
        let proxy = Proxy::before(&origin, &["retry.max_attempts=2"]).await;
        let begun = std::time::Instant::now();
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!(origin.requests().len(), if retried { 2 } else { 1 });
        assert!(answer.body == bomb && begun.elapsed() < Duration::from_secs(30));
    }
}

#[tokio::test]
async fn a_retry_that_its_client_does_not_wait_for_has_failed() {
    let origin = Origin::start([Reply::Write(refusal()), Reply::Hang]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = proxy.client().await;
    client.send(&put(BARE)).await;
    origin.arrived(2).await;
    drop(client);
    proxy.finished(1).await;
    // Every attempt beyond the first is in the counts, whatever came of it.
    assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"failed\"}"), 1.0);
    assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"rescued\"}"), 0.0);
    assert_eq!(origin.requests().len(), 2);
}

#[tokio::test]
async fn a_pattern_of_the_operators_own_is_heeded() {
    let other = answer("400 Bad Request", "", b"not for the\n OWNER");
    let origin = Origin::start([Reply::Write(other), Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["retry.pattern=not for the (?<actor>\\w+)"]).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "rescued");
}

#[tokio::test]
async fn a_retry_that_fails_in_transport_yields_the_last_refusal() {
    for reply in [Reply::WriteAndClose(vec![]), Reply::WriteAndClose(b"garbage\r\n\r\n".to_vec())] {
        let origin = Origin::start([Reply::Write(refusal()), reply]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!((answer.status, answer.outcome()), (400, "exhausted"));
        assert_eq!(answer.body, REFUSAL.as_bytes());
        assert_eq!(answer.field("x-kept"), Some("Yes"));
    }
}

/// Regression: a byte behind the request kept hyper from seeing the client's end, and it was sent again.
#[tokio::test]
async fn nothing_is_sent_again_for_a_client_that_has_gone_whatever_it_had_sent_behind() {
    let settings = ["retry.base_delay=1h", "retry.max_delay=1h", "retry.deadline=3h"];
    let clock = Clock::hold();
    for behind in ["", "\r\n", "GET /next HTTP/1.1\r\nHost: p\r\n\r\n"] {
        for resets in [false, true] {
            for in_backoff in [false, true] {
                let go_on = Arc::new(Notify::new());
                let late = Reply::Pause(vec![], Arc::clone(&go_on), refusal());
                let origin = Origin::start([late, Reply::Write(no_content())]).await;
                let proxy = Proxy::before(&origin, &settings).await;
                let mut client = proxy.client().await;
                client.send(&[&put(BARE), behind.as_bytes()].concat()).await;
                origin.arrived(1).await;
                let refusals = "optin_proxy_refusals_total{verdict=\"transient\"}";
                if in_backoff {
                    go_on.notify_one();
                    while proxy.metric(refusals) == 0.0 {
                        tokio::task::yield_now().await;
                    }
                }
                if resets {
                    client.stream.set_zero_linger().expect("a socket");
                }
                drop(client);
                go_on.notify_one();
                clock.until(proxy.finished(1)).await;
                let case = format!("{behind:?}, resets: {resets}, in backoff: {in_backoff}");
                let puts = origin.requests();
                let puts = puts.iter().filter(|it| it.head.starts_with("PUT ")).count();
                assert_eq!(puts, 1, "{case}");
                if in_backoff {
                    // Regression: it was clean.
                    let exhausted = "optin_proxy_contact_writes_total{outcome=\"exhausted\"}";
                    assert_eq!(proxy.metric(exhausted), 1.0, "{case}");
                }
            }
        }
    }
}

/// Regression: a refusal that broke off took the place of the one before it, and the client got nothing whole.
#[tokio::test]
async fn a_retry_whose_refusal_breaks_off_yields_the_last_one_that_came_whole() {
    for text in ["???", REFUSAL] {
        let broken = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\n{text}");
        let broken = Reply::WriteAndClose(broken.into_bytes());
        let origin = Origin::start([Reply::Write(refusal()), broken]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&put(BARE)).await;
        assert_eq!((answer.status, answer.outcome(), answer.broken), (400, "exhausted", false));
        assert_eq!(answer.body, REFUSAL.as_bytes());
        assert_eq!(origin.requests().len(), 2);
        assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"failed\"}"), 1.0);
    }
}

#[tokio::test]
async fn a_legitimate_refusal_of_a_retry_ends_the_matter() {
    let by_contact = REFUSAL.replace("owner", "contact");
    let by_contact = answer("400 Bad Request", "", by_contact.as_bytes());
    let origin = Origin::start([
        Reply::Write(refusal()),
        Reply::Write(by_contact),
        Reply::Write(no_content()),
    ])
    .await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=2, outcome=refused");
    assert_eq!(origin.requests().len(), 2);
}

#[tokio::test]
async fn a_retry_on_a_stale_connection_is_sent_again_and_is_one_attempt() {
    let origin = Origin::start([
        Reply::Write(refusal()),
        Reply::WriteAndClose(vec![]),
        Reply::Write(no_content()),
    ])
    .await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=2, outcome=rescued");
    assert_eq!(origin.requests().len(), 3);
}

/// Regression: each attempt was, so that the API got twice as many as `retry.max_attempts`.
#[tokio::test]
async fn of_all_attempts_one_is_sent_again_for_a_stale_connection() {
    let script = [Reply::Write(refusal()), Reply::WriteAndClose(vec![])];
    let origin = Origin::start([&script[..], &script, &script].concat()).await;
    let proxy = Proxy::before(&origin, &["retry.max_attempts=5"]).await;
    let answer = proxy.ask(&put(BARE)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=3, outcome=exhausted");
    assert_eq!(origin.requests().len(), 4);

    // Nor does another one take up an attempt: there is none on a connection that was used before.
    let script = [&script[..], &[Reply::Write(refusal()), Reply::Write(no_content())]].concat();
    let origin = Origin::start(script).await;
    let answer = Proxy::before(&origin, &[]).await.ask(&put(BARE)).await;
    assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=3, outcome=rescued");
    let connections: Vec<_> = origin.requests().iter().map(|it| it.connection).collect();
    assert_eq!(connections, [0, 0, 1, 2]);
}
