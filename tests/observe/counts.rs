//! What is counted: the series of `/metrics`, the dashboard's sums, and what its watchers are told.

use super::{ask, get, json, serve};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{BARE, GET, RECIPE, UNDECLARED, no_content, put, refusal, request};

async fn origin() -> Origin {
    Origin::start([Reply::Write(no_content())]).await
}

/// All series, once this one is among them.
async fn metrics_with(admin: std::net::SocketAddr, series: &str) -> String {
    loop {
        let metrics = String::from_utf8(get(admin, "/metrics").await.body).expect("text");
        if metrics.lines().any(|line| line == series) {
            return metrics;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_counted_by_kind_bodies_by_result_and_writes_by_outcome() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let audit = format!("audit.path={}", folder.path().join("audit.jsonl").display());
    let (running, admin) = serve(&origin, &[&audit]);
    let own = b"<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'>\
                <id>http://proxy.local:8080/x</id><OptInSource>X</OptInSource></Contact>";
    let mut client = Client::connect(running.address).await;
    for body in [
        RECIPE,
        BARE,
        UNDECLARED,
        b"<entry>",
        include_bytes!("../corpus/in/removal.xml"),
        include_bytes!("../corpus/in/contradictory.xml"),
        include_bytes!("../corpus/in/mixed-undeclared.xml"),
        own,
    ] {
        assert_eq!(client.ask(&put(body)).await.status, 204);
    }
    // Each but the clean one and the one that is no XML has a line.
    metrics_with(admin, "optin_proxy_requests_total 8").await;
    let metrics = metrics_with(admin, "optin_proxy_audit_lines_total 6").await;
    for series in [
        "mismatches_total{kind=\"list_differs\"} 2",
        "mismatches_total{kind=\"undeclared\"} 2",
        "mismatches_total{kind=\"ambiguous\"} 1",
        "mismatches_total{kind=\"lists_disagree\"} 1",
        "mismatches_total{kind=\"removal_by_contact\"} 1",
        "mismatches_total{kind=\"unknown_value\"} 1",
        "mismatches_total{kind=\"own_origin\"} 1",
        "bodies_total{result=\"clean\",reason=\"\"} 1",
        "bodies_total{result=\"rewritten\",reason=\"\"} 3",
        "bodies_total{result=\"observed\",reason=\"\"} 3",
        "contact_writes_total{outcome=\"clean\"} 1",
        "contact_writes_total{outcome=\"rewritten\"} 3",
        "contact_writes_total{outcome=\"uninspected\"} 1",
    ] {
        assert!(metrics.contains(&format!("\noptin_proxy_{series}\n")), "{series}: {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_so_at_this_time_is_told_as_it_changes() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let setting = format!("intercept.ca_dir={}", folder.path().display());
    let (_running, admin) = serve(&origin, &[&setting]);
    let metrics = metrics_with(admin, "optin_proxy_draining 0").await;
    for series in ["enforcing 1", "ca_not_after_seconds 0"] {
        assert!(metrics.contains(&format!("\noptin_proxy_{series}\n")), "{series}: {metrics}");
    }
    // Its authority is made at its first use.
    assert_eq!(get(admin, "/ca.pem").await.status, 200);
    assert_eq!(ask(admin, "POST", "/drain", "", "").await.status, 200);
    let metrics = metrics_with(admin, "optin_proxy_draining 1").await;
    assert!(!metrics.contains("\noptin_proxy_ca_not_after_seconds 0\n"), "{metrics}");
}

#[tokio::test]
async fn a_body_without_a_contact_and_the_time_that_a_request_took_are_counted() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    proxy.ask(&put(include_bytes!("../corpus/in/campaign.xml"))).await;
    proxy.finished(1).await;
    let bodies = "optin_proxy_bodies_total{result=\"no_contact\",reason=\"\"}";
    assert_eq!(proxy.metric(bodies), 1.0);
    assert_eq!(proxy.metric("optin_proxy_request_duration_seconds_count"), 1.0);
    assert!(proxy.metric("optin_proxy_request_duration_seconds_sum") > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboards_sums_tell_what_did_not_go_well_apart() {
    let origin = Origin::start([
        Reply::Write(refusal()),
        Reply::Write(refusal()),
        Reply::Write(no_content()),
        Reply::WriteAndClose(vec![]),
    ])
    .await;
    let (running, admin) = serve(&origin, &["retry.max_attempts=1"]);
    let mut client = Client::connect(running.address).await;
    for asked in [put(BARE), put(UNDECLARED), put(b"<entry>"), request("POST", "/x", "", b"")] {
        client.ask(&asked).await;
    }
    let totals = loop {
        let totals = json(admin, "/api/stats").await["totals"].take();
        if totals["requests"] == 4 {
            break totals;
        }
    };
    for name in ["exhausted", "refused", "uninspected", "problems"] {
        assert_eq!(totals[name], 1, "{name}: {totals}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_rush_who_watches_is_told_of_some_exchanges_and_of_how_many_more_there_were() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &[]);
    let mut watching = Client::connect(admin).await;
    let asked = format!("GET /api/events HTTP/1.1\r\nHost: {admin}\r\n\r\n");
    watching.send(asked.as_bytes()).await;
    watching.head().await.expect("an answer");
    let mut client = Client::connect(running.address).await;
    for _ in 0..2000 {
        assert_eq!(client.ask(GET).await.status, 204);
    }
    let mut told = String::new();
    while !told.contains("\"requests\":2000,") {
        let byte = watching.bytes(1).await.expect("it goes on");
        told.push(char::from(byte[0]));
    }
    let exchanges = told.matches("event: exchange\n").count() as u64;
    let skipped: u64 = told
        .split("event: skipped\ndata: ")
        .skip(1)
        .map(|event| event.lines().next().expect("a line").parse::<u64>().expect("a number"))
        .sum();
    assert_eq!(exchanges + skipped, 2000);
}
