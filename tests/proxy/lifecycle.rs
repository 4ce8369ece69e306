//! Start and end of the real program.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::support::binary::{Running, command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{BARE, RECIPE, RECIPE_OUT, answer, no_content, put, refusal};

fn serve(origin: &Origin, more: &[&str]) -> Running {
    let url = origin.url();
    let mut arguments =
        vec!["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--upstream", &url];
    arguments.extend_from_slice(more);
    Running::start(&mut command(&arguments))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_serves_and_stops_when_told() {
    for signal in ["TERM", "INT"] {
        let origin = Origin::start([Reply::Write(no_content())]).await;
        let running = serve(&origin, &[]);
        let mut client = Client::connect(running.address).await;
        assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
        assert_eq!(origin.request().body, RECIPE_OUT);
        running.signal(signal);
        let (status, log) = running.finish();
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(client.is_closed().await, "an idle connection holds nothing up");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_in_flight_is_finished_and_no_other_is_taken() {
    let go_on = Arc::new(Notify::new());
    let paused = Reply::Pause(vec![], Arc::clone(&go_on), answer("200 OK", "", b"whole"));
    let origin = Origin::start([paused]).await;
    let running = serve(&origin, &[]);
    let address = running.address;
    let mut client = Client::connect(address).await;
    client.send(&put(BARE)).await;
    origin.arrived(1).await;
    running.signal("TERM");
    // The listener is closed once the signal is heard.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    go_on.notify_one();
    let answer = client.answer(false).await;
    assert_eq!((answer.status, &answer.body[..]), (200, &b"whole"[..]));
    assert_eq!(answer.field("connection"), Some("close"));
    let (status, _) = running.finish();
    assert_eq!(status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_in_progress_is_finished_too() {
    let go_on = Arc::new(Notify::new());
    let origin = Origin::start([
        Reply::Pause(vec![], Arc::clone(&go_on), refusal()),
        Reply::Write(no_content()),
    ])
    .await;
    let running = serve(&origin, &["--set", "retry.base_delay=20ms"]);
    let mut client = Client::connect(running.address).await;
    client.send(&put(BARE)).await;
    origin.arrived(1).await;
    let address = running.address;
    running.signal("TERM");
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    go_on.notify_one();
    assert_eq!(client.answer(false).await.outcome(), "rescued");
    assert_eq!(running.finish().0.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_at_its_deadline_and_says_what_it_cut() {
    let origin = Origin::start([Reply::Hang]).await;
    let running = serve(&origin, &["--set", "listen.drain_timeout=100ms"]);
    let mut client = Client::connect(running.address).await;
    client.send(&put(BARE)).await;
    origin.arrived(1).await;
    let told = Instant::now();
    running.signal("TERM");
    let (status, log) = running.finish();
    assert!(told.elapsed() >= Duration::from_millis(100));
    assert_eq!(status.code(), Some(0));
    assert!(log.contains("unfinished"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_cuts() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let origin = Origin::start([Reply::Hang]).await;
        let running = serve(&origin, &[]);
        let address = running.address;
        let mut client = Client::connect(address).await;
        client.send(&put(BARE)).await;
        origin.arrived(1).await;
        running.signal("TERM");
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
        running.signal(signal);
        assert_eq!(running.finish().0.code(), Some(code));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_taken_is_a_clear_error() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let output = crate::support::binary::run(&["serve", "--listen", &address], b"");
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains(&address) && output.stderr.contains("--listen"),
        "{}",
        output.stderr
    );
    assert!(output.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_see_readiness_and_metrics() {
    let origin = Origin::start([Reply::Hang]).await;
    let mut running = serve(&origin, &[]);
    let line = running.read_line();
    let admin =
        line.trim_end().strip_suffix(" (admin)").and_then(|it| it.strip_prefix("listening on "));
    let admin = admin.unwrap_or_else(|| panic!("{line:?}")).parse().expect("an address");
    let get = |path: &'static str| async move {
        let asked = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        Client::connect(admin).await.ask(asked.as_bytes()).await
    };
    assert_eq!(get("/livez").await.status, 200);
    assert_eq!(get("/readyz").await.status, 200);
    assert_eq!(get("/nothing").await.status, 404);
    let mut client = Client::connect(running.address).await;
    client.send(&put(RECIPE)).await;
    origin.arrived(1).await;
    let metrics = get("/metrics").await;
    assert!(
        metrics
            .field("content-type")
            .is_some_and(|it| it.starts_with("application/openmetrics-text"))
    );
    let text = String::from_utf8(metrics.body).expect("UTF-8");
    for line in [
        "optin_proxy_mismatches_total{kind=\"list_differs\"} 2",
        "optin_proxy_mismatches_total{kind=\"ambiguous\"} 0",
        "optin_proxy_edits_total 2",
        "optin_proxy_bodies_total{result=\"rewritten\",reason=\"\"} 1",
        "optin_proxy_refusals_total{verdict=\"transient\"} 0",
        "optin_proxy_connections 1",
        "optin_proxy_requests_total 0",
        concat!("optin_proxy_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        assert!(text.lines().any(|it| it == line), "{line}: {text}");
    }
    running.signal("TERM");
    loop {
        let ready = get("/readyz").await.status;
        if ready == 503 {
            break;
        }
        assert_eq!(ready, 200);
    }
    assert_eq!(get("/livez").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_address_that_was_chosen_must_be_had() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--admin", &address];
    let output = crate::support::binary::run(&arguments, b"");
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains(&address) && output.stderr.contains("--admin"),
        "{}",
        output.stderr
    );
}
