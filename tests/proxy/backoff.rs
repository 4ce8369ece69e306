//! When a retry is sent: waits between the attempts, `Retry-After`, and the deadline.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::retry::refused_then;
use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, REFUSAL, answer, no_content, put, refusal};

#[tokio::test]
async fn a_retry_without_an_answer_ends_at_the_deadline_with_the_last_refusal() {
    let origin = Origin::start([Reply::Write(refusal()), Reply::Hang]).await;
    let settings =
        ["retry.deadline=1h", "upstream.response_timeout=2h", "limits.request_timeout=24h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    let asked = Instant::now();
    client.send(&put(BARE)).await;
    clock.until(origin.arrived(2)).await;
    let answer = clock.until(client.answer(false)).await;
    assert_eq!((answer.status, answer.outcome()), (400, "exhausted"));
    assert_eq!(answer.body, REFUSAL.as_bytes());
    assert_eq!(origin.requests().len(), 2);
    assert!((3600..3700).contains(&asked.elapsed().as_secs()), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn each_wait_is_twice_the_one_before_up_to_the_longest_and_jittered_by_half() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let settings = [
        "retry.base_delay=2500s",
        "retry.max_delay=7500s",
        "retry.max_attempts=5",
        "retry.deadline=24h",
        "limits.request_timeout=24h",
    ];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    client.send(&put(BARE)).await;
    clock.until(origin.arrived(1)).await;
    for (number, longest) in [(2, 2_500), (3, 5_000), (4, 7_500), (5, 7_500)] {
        let before = Instant::now();
        clock.until(origin.arrived(number)).await;
        let waited = before.elapsed().as_secs();
        assert!((longest / 2 - 500..longest + 500).contains(&waited), "{number}: {waited} s");
    }
    assert_eq!(clock.until(client.answer(false)).await.outcome(), "exhausted");
}

/// Regression: beyond the deadline, a refusal whose body came behind its head was taken for none.
#[tokio::test]
async fn a_refusal_is_judged_even_if_no_time_is_left_for_a_retry() {
    let by_owner = include_bytes!("../corpus/in/reverse.xml");
    for (body, outcome) in [(BARE, "exhausted"), (&by_owner[..], "refused")] {
        let (head, text) = {
            let whole = refusal();
            let border = whole.len() - REFUSAL.len();
            (whole[..border].to_vec(), whole[border..].to_vec())
        };
        let go_on = Arc::new(Notify::new());
        let origin = Origin::start([Reply::Pause(head, Arc::clone(&go_on), text)]).await;
        let proxy = Proxy::before(&origin, &["retry.deadline=0s"]).await;
        let mut client = proxy.client().await;
        client.send(&put(body)).await;
        origin.arrived(1).await;
        // Time for the head to get to the proxy by itself.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        go_on.notify_one();
        let answer = client.answer(false).await;
        assert_eq!((answer.status, answer.outcome()), (400, outcome));
        assert_eq!(answer.body, REFUSAL.as_bytes());
        assert_eq!(origin.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_backoff_beyond_the_deadline_is_not_begun() {
    let origin = Origin::start(refused_then(no_content())).await;
    let settings = ["retry.base_delay=1h", "retry.max_delay=1h"];
    let proxy = Proxy::before(&origin, &settings).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "exhausted");
    assert_eq!(origin.requests().len(), 1);
}

#[tokio::test]
async fn retry_after_is_honoured_and_ends_the_matter_beyond_the_deadline() {
    let far = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3600));
    let past = httpdate::fmt_http_date(SystemTime::now() - Duration::from_secs(3600));
    // Regression: what is more than 64 bits can count was taken for nonsense.
    let endless = "9".repeat(25);
    for (value, requests) in
        [("0", 2), ("11", 1), (&far, 1), (&past, 2), (&endless, 1), ("nonsense", 2), ("+11", 2)]
    {
        let headers = format!("Retry-After: {value}\r\n");
        let refused = answer("400 Bad Request", &headers, REFUSAL.as_bytes());
        let origin = Origin::start([Reply::Write(refused), Reply::Write(no_content())]).await;
        let proxy = Proxy::before(&origin, &[]).await;
        let outcome = if requests == 2 { "rescued" } else { "exhausted" };
        assert_eq!(proxy.ask(&put(BARE)).await.outcome(), outcome, "{value}");
        assert_eq!(origin.requests().len(), requests, "{value}");
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_the_backoff() {
    let origin = Origin::start(refused_then(no_content())).await;
    let settings = ["retry.base_delay=1h", "retry.max_delay=1h", "retry.deadline=2h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let mut client = proxy.client().await;
    client.send(&put(BARE)).await;
    while proxy.metric("optin_proxy_refusals_total{verdict=\"transient\"}") == 0.0 {
        tokio::task::yield_now().await;
    }
    drop(client);
    // The request is over, long before the hour is.
    proxy.finished(1).await;
    assert_eq!(origin.requests().len(), 1);
}

/// Regression: it took the place of the refusal before it, and the client got a part of it long after the deadline.
#[tokio::test]
async fn a_retry_whose_refusal_dawdles_in_its_body_ends_at_the_deadline_with_the_last_one_that_came_whole()
 {
    let clock = Clock::hold();
    for text in ["", REFUSAL] {
        let begun = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\n{text}");
        let dawdling = Reply::Pause(begun.into_bytes(), Arc::default(), Vec::new());
        let origin = Origin::start([Reply::Write(refusal()), dawdling]).await;
        let settings = ["retry.deadline=1h", "limits.idle_timeout=10h"];
        let proxy = Proxy::before(&origin, &settings).await;
        let mut client = proxy.client().await;
        let asked = Instant::now();
        client.send(&put(BARE)).await;
        let answer = clock.until(client.answer(false)).await;
        assert_eq!((answer.status, answer.outcome(), answer.broken), (400, "exhausted", false));
        assert_eq!(answer.body, REFUSAL.as_bytes());
        assert!((3600..3700).contains(&asked.elapsed().as_secs()), "{:?}", asked.elapsed());
        assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"failed\"}"), 1.0);
    }
}

#[tokio::test]
async fn no_two_waits_are_alike_so_that_clients_refused_together_do_not_come_back_together() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let settings = [
        "retry.base_delay=2000s",
        "retry.max_delay=2000s",
        "retry.max_attempts=12",
        "retry.deadline=24h",
        "limits.request_timeout=24h",
    ];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    client.send(&put(BARE)).await;
    clock.until(origin.arrived(1)).await;
    let mut waits = Vec::new();
    for number in 2..=12 {
        let before = Instant::now();
        clock.until(origin.arrived(number)).await;
        waits.push(before.elapsed().as_secs());
    }
    waits.sort_unstable();
    // Each is anywhere between 1000 s and 2000 s.
    assert!(waits[10] - waits[0] > 250, "{waits:?}");
}

#[tokio::test]
async fn the_time_in_retry_after_is_waited_for() {
    let later = answer("400 Bad Request", "Retry-After: 5000\r\n", REFUSAL.as_bytes());
    let origin = Origin::start([Reply::Write(later), Reply::Write(no_content())]).await;
    let settings = ["retry.deadline=24h", "limits.request_timeout=24h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    client.send(&put(BARE)).await;
    clock.until(origin.arrived(1)).await;
    let before = Instant::now();
    clock.until(origin.arrived(2)).await;
    let waited = before.elapsed().as_secs();
    assert!((4_500..20_000).contains(&waited), "{waited} s");
    assert_eq!(clock.until(client.answer(false)).await.outcome(), "rescued");
}

#[tokio::test]
async fn the_deadline_counts_from_the_first_attempt_and_not_from_its_refusal() {
    let go_on = Arc::new(Notify::new());
    let late = Reply::Pause(vec![], Arc::clone(&go_on), refusal());
    let origin = Origin::start([late, Reply::Hang]).await;
    let settings =
        ["retry.deadline=5000s", "limits.request_timeout=24h", "upstream.response_timeout=20h"];
    let proxy = Proxy::before(&origin, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await;
    let asked = Instant::now();
    client.send(&put(BARE)).await;
    origin.arrived(1).await;
    clock.advance(Duration::from_secs(3000)).await;
    go_on.notify_one();
    origin.arrived(2).await;
    let answer = clock.until(client.answer(false)).await;
    assert_eq!((answer.status, answer.outcome()), (400, "exhausted"));
    let waited = asked.elapsed().as_secs();
    assert!((5000..7500).contains(&waited), "{waited} s");
}
