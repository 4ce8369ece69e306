//! The budget of retries: what pays into it, what it is spent on, and who is told when it is spent.

use crate::support::client::Client;
use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, GET, REFUSAL, answer, no_content, put, refusal};

/// One retry a second, and of each update.
const ONE_A_SECOND: [&str; 4] =
    ["retry.budget=0", "retry.budget_floor=1", "retry.max_attempts=2", "retry.deadline=1h"];

/// Ten clients, each of which has sent an update.
async fn ten_updates(proxy: &Proxy) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = proxy.client().await;
        client.send(&put(BARE)).await;
        clients.push(client);
    }
    clients
}

#[tokio::test]
async fn the_budget_holds_under_a_storm_and_every_client_gets_its_refusal() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let proxy = Proxy::before(&origin, &["retry.budget_floor=1"]).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let address = proxy.address;
        clients.spawn(async move { Client::connect(address).await.ask(&put(BARE)).await });
    }
    for answer in clients.join_all().await {
        assert_eq!((answer.status, answer.outcome()), (400, "exhausted"));
        assert_eq!(answer.body, REFUSAL.as_bytes());
    }
    let retries = origin.requests().len() - 100;
    assert!(retries <= 20 + 10, "{retries} retries");
    assert!(retries >= 10, "{retries} retries: the floor is always allowed");
}

/// Regression: a retry counted when its wait began, so that those of two windows could reach the API in one.
#[tokio::test]
async fn the_budget_is_of_what_the_api_gets_within_ten_seconds_however_long_it_was_waited_for() {
    let later = answer("400 Bad Request", "Retry-After: 60\r\n", REFUSAL.as_bytes());
    let script = std::iter::repeat_n(Reply::Write(later), 10).chain([Reply::Write(refusal())]);
    let origin = Origin::start(script).await;
    let proxy =
        Proxy::before(&origin, &[&ONE_A_SECOND[..], &["retry.base_delay=0s"]].concat()).await;
    let clock = Clock::hold();
    let mut clients = ten_updates(&proxy).await;
    clock.until(origin.arrived(20)).await;
    // A minute after the first refusals, and the moment after their retries.
    for client in &mut clients {
        assert_eq!(client.answer(false).await.outcome(), "exhausted");
        client.send(&put(BARE)).await;
    }
    for client in &mut clients {
        assert_eq!(client.answer(false).await.outcome(), "exhausted");
    }
    assert_eq!(origin.requests().len(), 30);
}

/// Regression: who left before a retry had taken it from the others.
#[tokio::test]
async fn a_client_that_leaves_takes_nothing_of_the_budget() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let proxy =
        Proxy::before(&origin, &[&ONE_A_SECOND[..], &["retry.base_delay=2s"]].concat()).await;
    let clock = Clock::hold();
    let leaving = ten_updates(&proxy).await;
    while proxy.metric("optin_proxy_refusals_total{verdict=\"transient\"}") < 10.0 {
        tokio::task::yield_now().await;
    }
    drop(leaving);
    proxy.finished(10).await;
    let mut patient = proxy.client().await;
    patient.send(&put(BARE)).await;
    assert_eq!(clock.until(patient.answer(false)).await.outcome(), "exhausted");
    assert_eq!(origin.requests().len(), 12);
}

#[tokio::test]
async fn requests_of_every_kind_pay_into_the_budget() {
    let mut script = vec![Reply::Write(no_content()); 10];
    script.extend([Reply::Write(refusal()), Reply::Write(no_content())]);
    let origin = Origin::start(script).await;
    let proxy = Proxy::before(&origin, &["retry.budget_floor=0"]).await;
    let _clock = Clock::hold();
    for _ in 0..10 {
        assert_eq!(proxy.ask(GET).await.status, 204);
    }
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "rescued");
}

#[tokio::test]
async fn a_retry_for_which_nothing_is_left_is_counted() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let proxy = Proxy::before(&origin, &["retry.budget_floor=0", "retry.budget=0"]).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "exhausted");
    assert_eq!(proxy.metric("optin_proxy_retry_budget_exhausted_total"), 1.0);
}
