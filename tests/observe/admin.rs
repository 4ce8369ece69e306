//! The listener for operators.

use super::{ask, exchanges, get, json, serve};
use crate::support::binary::{Running, command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{
    BARE, CONTACT, CONTACTS, RECIPE, RECIPE_OUT, no_content, put, refusal, request,
};

async fn origin() -> Origin {
    Origin::start([Reply::Write(no_content())]).await
}

fn problem(answer: &crate::support::client::Answer) -> String {
    assert_eq!(answer.field("content-type"), Some("application/problem+json"), "{answer:?}");
    let json: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert_eq!(json["status"], answer.status);
    json["type"].as_str().expect("a type").rsplit(':').next().expect("a name").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_is_promised_is_there_and_no_page_may_run_or_load_anything_else() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &[]);
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/dashboard.js", "text/javascript; charset=utf-8"),
        ("/dashboard.css", "text/css; charset=utf-8"),
        ("/livez", "text/plain; charset=utf-8"),
        ("/readyz", "text/plain; charset=utf-8"),
        ("/config", "application/json"),
        ("/api/stats", "application/json"),
        ("/api/exchanges", "application/json"),
        ("/ca.pem", "application/x-pem-file"),
        ("/ca.der", "application/pkix-cert"),
        ("/ca.p12", "application/x-pkcs12"),
        ("/ca.jks", "application/octet-stream"),
        ("/ca.bundle", "application/x-pem-file"),
    ] {
        let answer = get(admin, path).await;
        assert_eq!((answer.status, answer.field("content-type")), (200, Some(content_type)));
        assert!(!answer.body.is_empty(), "{path}");
        let policy = answer.field("content-security-policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"));
        for unsafe_word in ["unsafe", "*", "http"] {
            assert!(!policy.contains(unsafe_word), "{policy}");
        }
        assert_eq!(answer.field("x-content-type-options"), Some("nosniff"));
        let head = ask(admin, "HEAD", path, "", "").await;
        assert_eq!((head.status, head.body.len()), (200, 0));
    }
    let page = String::from_utf8(get(admin, "/").await.body).expect("text");
    for other in ["src=\"http", "href=\"http", "<script>", "style=\""] {
        assert!(!page.contains(other), "{other}");
    }
    for (method, path, allowed) in [
        ("GET", "/reload", "POST"),
        ("GET", "/quitquitquit", "POST"),
        ("POST", "/mode", "PUT"),
        ("DELETE", "/api/exchanges", "GET, HEAD"),
    ] {
        let answer = ask(admin, method, path, "", "").await;
        assert_eq!((answer.status, answer.field("allow")), (405, Some(allowed)), "{path}");
    }
    // Nor is any of it to be had through the proxy itself.
    let mut client = Client::connect(running.address).await;
    let absolute = format!("GET http://{admin}/config HTTP/1.1\r\nHost: {admin}\r\n\r\n");
    assert_eq!(client.ask(absolute.as_bytes()).await.status, 403);
    let tunnel = Client::connect(running.address).await.tunnel(&admin.to_string()).await;
    assert_eq!(tunnel.expect_err("it is refused").status, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn this_listener_is_not_to_be_had_through_the_proxy_whatever_is_allowed() {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let admin = free.local_addr().expect("bound");
    drop(free);
    let (ports, admin) = (format!("intercept.ports={}", admin.port()), admin.to_string());
    let mut serving = command(&["serve", "--listen", "127.0.0.1:0", "--admin", &admin]);
    serving.args(["--set", &ports, "--set", "intercept.allow_private=127.0.0.0/8"]);
    let running = Running::start(&mut serving);
    let tunnel = Client::connect(running.address).await.tunnel(&admin).await;
    assert_eq!(tunnel.expect_err("it is refused").status, 403);
    let asked = format!(
        "POST http://{admin}/quitquitquit HTTP/1.1\r\nHost: {admin}\r\nContent-Length: 0\r\n\r\n"
    );
    assert_eq!(Client::connect(running.address).await.ask(asked.as_bytes()).await.status, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_is_seen_with_what_was_found_and_done_and_nothing_of_the_contact() {
    let origin = Origin::start([
        Reply::Write(no_content()),
        Reply::Write(refusal()),
        Reply::Write(no_content()),
        Reply::Write(no_content()),
    ])
    .await;
    let (running, admin) = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    let own = "0d5f1f6e-8e9b-4d3a-9f0e-3b7a1c2d4e5f";
    let fields = format!(
        "X-Request-Id: {own}\r\nUser-Agent: Shop/2\r\n\
         traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"
    );
    let first = client.ask(&request("PUT", CONTACT, &fields, RECIPE)).await;
    assert_eq!(first.field("x-request-id"), Some(own));
    let second = client.ask(&put(BARE)).await;
    let third = client.ask(b"GET /x HTTP/1.1\r\nHost: p\r\nX-Request-Id: jane.roe\r\n\r\n").await;
    let ours = third.field("x-request-id").expect("an id").to_owned();
    assert!(ours.len() == 16 && ours.bytes().all(|it| it.is_ascii_hexdigit()), "{ours}");
    // What the client sent is passed on as it was; nothing is added towards the API.
    let sent = origin.requests();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    assert!(sent[0].head.contains(own) && sent[0].head.contains(traceparent));
    assert!(!sent[1].head.to_ascii_lowercase().contains("x-request-id"));
    assert!(!sent[1].head.to_ascii_lowercase().contains("traceparent"));

    let kept = exchanges(admin, 3).await;
    let [get, rescued, rewritten] = &kept[..] else { panic!("{kept:?}") };
    assert_eq!((&get["request_id"], &get["outcome"]), (&ours.into(), &().into()));
    assert_eq!(rescued["request_id"], second.field("x-request-id").expect("an id"));
    assert_eq!(rescued["outcome"], "rescued");
    assert_eq!(rescued["verdicts"], serde_json::json!(["transient"]));
    assert_eq!(rescued["attempts"], 2);
    assert_eq!(rewritten["request_id"], own);
    assert_eq!(rewritten["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(rewritten["account"], "joesflowers");
    assert_eq!(rewritten["contact_id"], "238");
    assert_eq!(rewritten["user_agent"], "Shop/2");
    assert_eq!((&rewritten["found"], &rewritten["rewritten"]), (&2.into(), &2.into()));
    assert_eq!(
        rewritten["findings"][0],
        serde_json::json!({
            "kind": "list_differs", "list_id": "12", "was": "ACTION_BY_CUSTOMER", "now": "ACTION_BY_CONTACT",
            "changed": true, "declared": "ACTION_BY_CONTACT", "setting": "sanitize.lists=align",
        })
    );
    assert!(!format!("{kept:?}").contains("example.com"), "an address of the contact's");

    assert_eq!(json(admin, &format!("/api/exchanges/{own}")).await, *rewritten);
    let missing = super::get(admin, "/api/exchanges/0").await;
    assert_eq!((missing.status, problem(&missing)), (404, "not-found".to_owned()));
    let of = |query: &'static str| async move {
        let found = json(admin, &format!("/api/exchanges?{query}")).await;
        found["exchanges"].as_array().expect("an array").len()
    };
    assert_eq!(of("outcome=rescued").await, 1);
    assert_eq!(of("kind=list_differs").await, 1);
    assert_eq!(of("kind=ambiguous").await, 0);
    assert_eq!(of("limit=2").await, 2);
    assert_eq!(of("before=2").await, 1);
    for wrong in ["limit=x", "colour=red"] {
        let answer = super::get(admin, &format!("/api/exchanges?{wrong}")).await;
        assert_eq!((answer.status, problem(&answer)), (400, "query-malformed".to_owned()));
    }

    let stats = json(admin, "/api/stats").await;
    let totals = &stats["totals"];
    for (name, count) in [
        ("requests", 3),
        ("writes", 2),
        ("findings", 2),
        ("rewritten", 1),
        ("rescued", 1),
        ("refused", 0),
        ("exhausted", 0),
        ("uninspected", 0),
        ("problems", 0),
    ] {
        assert_eq!(totals[name], count, "{name}");
    }
    let shop = &stats["applications"][0];
    assert_eq!(shop["user_agent"], "Shop/2");
    assert_eq!(shop["kinds"][0]["kind"], "list_differs");
    assert_eq!(shop["kinds"][0]["findings"], 2);
    assert_eq!(shop["kinds"][0]["request_id"], own);
    assert!(
        shop["kinds"][0]["cause"].as_str().is_some_and(|it| it.contains("puts everything back"))
    );
    assert_eq!(shop["lists"][0], serde_json::json!({ "list_id": "12", "findings": 1 }));
    let minutes = stats["minutes"].as_array().expect("an array");
    let sum: u64 = minutes.iter().map(|it| it["requests"].as_u64().expect("a number")).sum();
    assert_eq!(sum, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_is_told_of_each_exchange_and_of_the_counts() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &[]);
    let mut watching = Client::connect(admin).await;
    let asked = format!("GET /api/events HTTP/1.1\r\nHost: {admin}\r\n\r\n");
    watching.send(asked.as_bytes()).await;
    let head = watching.head().await.expect("an answer");
    assert!(head.contains("200 OK") && head.contains("text/event-stream"), "{head}");
    Client::connect(running.address).await.ask(&put(RECIPE)).await;
    let mut told = String::new();
    while !(told.contains("event: exchange\ndata: {\"seq\":1,")
        && told.contains("\"requests\":1,\"rescued\":0,\"rewritten\":1"))
    {
        let byte = watching.bytes(1).await.expect("it goes on");
        told.push(char::from(byte[0]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_watch_than_leaves_room_for_probes() {
    let origin = origin().await;
    let (_running, admin) = serve(&origin, &[]);
    let asked = format!("GET /api/events HTTP/1.1\r\nHost: {admin}\r\n\r\n");
    let mut watching = Vec::new();
    for _ in 0..16 {
        let mut client = Client::connect(admin).await;
        client.send(asked.as_bytes()).await;
        assert!(client.head().await.expect("an answer").contains("200 OK"));
        watching.push(client);
    }
    let refused = get(admin, "/api/events").await;
    assert_eq!((refused.status, problem(&refused)), (503, "too-many-watchers".to_owned()));
    assert_eq!(get(admin, "/livez").await.status, 200);
    drop(watching);
    loop {
        let mut client = Client::connect(admin).await;
        client.send(asked.as_bytes()).await;
        if client.head().await.expect("an answer").contains("200 OK") {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_turns_readiness_closes_connections_after_their_answer_and_leaves_the_process() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    assert_eq!(client.ask(&put(RECIPE)).await.field("connection"), None);
    assert_eq!(get(admin, "/readyz").await.status, 200);
    assert_eq!(ask(admin, "POST", "/drain", "", "").await.status, 200);
    let ready = get(admin, "/readyz").await;
    assert_eq!((ready.status, &ready.body[..]), (503, &b"draining\n"[..]));
    for mut client in [client, Client::connect(running.address).await] {
        let answer = client.ask(&put(RECIPE)).await;
        assert_eq!((answer.status, answer.field("connection")), (204, Some("close")));
        assert!(client.is_closed().await);
    }
    assert_eq!(json(admin, "/api/stats").await["state"]["draining"], true);
    running.signal("TERM");
    assert_eq!(running.finish().0.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quitquitquit_finishes_what_is_in_flight_and_ends() {
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let held = Reply::Pause(Vec::new(), std::sync::Arc::clone(&gate), no_content());
    let origin = Origin::start([held]).await;
    let (running, admin) = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    client.send(&put(RECIPE)).await;
    origin.arrived(1).await;
    assert_eq!(ask(admin, "POST", "/quitquitquit", "", "").await.status, 200);
    gate.notify_one();
    assert_eq!(client.answer(false).await.status, 204);
    assert_eq!(running.finish().0.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mode_and_level_change_at_once_until_the_next_reload() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &["log.level=warn"]);
    let mut client = Client::connect(running.address).await;
    let answer = ask(admin, "PUT", "/mode", "", "observe").await;
    assert_eq!(answer.status, 200);
    assert!(String::from_utf8_lossy(&answer.body).contains("sanitize.mode is \\\"observe\\\""));
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
    assert_eq!(origin.requests()[0].body, RECIPE);
    assert_eq!(json(admin, "/config").await["sanitize"]["mode"], "observe");
    assert_eq!(ask(admin, "PUT", "/log-level", "", "debug").await.status, 200);
    assert_eq!(json(admin, "/config").await["log"]["level"], "debug");
    for (path, word) in [("/mode", "loud"), ("/log-level", ""), ("/mode", "enforce observe")] {
        let answer = ask(admin, "PUT", path, "", word).await;
        assert_eq!((answer.status, problem(&answer)), (400, "value-unknown".to_owned()));
        assert!(String::from_utf8_lossy(&answer.body).contains("one of `"), "{answer:?}");
    }
    let answer = ask(admin, "POST", "/reload", "", "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
    assert_eq!(origin.requests()[1].body, RECIPE_OUT);
    running.signal("TERM");
    let (_, log) = running.finish();
    assert!(log.contains("\"message\":\"changed\""), "debug shows more than warn: {log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_of_a_bad_file_says_why_and_changes_nothing() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("proxy.toml");
    std::fs::write(&file, format!("[upstream]\nurl = '{}'\n", origin.url())).expect("ours");
    let path = file.to_str().expect("UTF-8");
    let arguments = ["serve", "-c", path, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();
    std::fs::write(&file, "[upstream]\nurll = 'x'\n").expect("ours");
    let answer = ask(admin, "POST", "/reload", "", "").await;
    assert_eq!((answer.status, problem(&answer)), (422, "not-done".to_owned()));
    let why = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(why.contains("did you mean `upstream.url`?"), "{why}");
    assert_eq!(json(admin, "/api/stats").await["state"]["config_fault"], true);
    assert_eq!(get(admin, "/readyz").await.status, 200, "the last good one is in force");
    assert_eq!(Client::connect(running.address).await.ask(&put(RECIPE)).await.status, 204);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_host_or_origin_is_refused_and_nothing_is_done() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &[]);
    for (host, field) in [
        ("evil.example", ""),
        ("localhost", "Origin: http://evil.example\r\n"),
        ("localhost", "Origin: null\r\n"),
        ("localhost", "Sec-Fetch-Site: cross-site\r\n"),
    ] {
        for (method, path) in [
            ("POST", "/quitquitquit"),
            ("POST", "/drain"),
            ("POST", "/reload"),
            ("PUT", "/mode"),
            ("PUT", "/log-level"),
            ("GET", "/api/exchanges"),
            ("GET", "/api/events"),
            ("GET", "/config"),
        ] {
            let asked = format!(
                "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n{field}\r\n"
            );
            let answer = Client::connect(admin).await.ask(asked.as_bytes()).await;
            assert_eq!(answer.status, 403, "{method} {path} {host} {field}");
        }
    }
    assert_eq!(get(admin, "/readyz").await.status, 200);
    assert_eq!(json(admin, "/config").await["sanitize"]["mode"], "enforce");
    let answer = Client::connect(running.address).await.ask(&put(RECIPE)).await;
    assert_eq!(answer.field("connection"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_a_token_nothing_is_changed_without_it_and_it_is_shown_nowhere() {
    let origin = origin().await;
    let (_running, admin) = serve(&origin, &["admin.token=correct-horse-battery"]);
    let refused = ask(admin, "POST", "/drain", "", "").await;
    assert_eq!((refused.status, problem(&refused)), (401, "token-required".to_owned()));
    assert_eq!(refused.field("www-authenticate"), Some("Bearer realm=\"optin-proxy\""));
    let wrong = ask(admin, "POST", "/drain", "Authorization: Bearer wrong\r\n", "").await;
    assert_eq!(wrong.status, 401);
    assert_eq!(get(admin, "/readyz").await.status, 200);
    let config = get(admin, "/config").await;
    assert_eq!(config.status, 200, "this machine may look");
    let config = String::from_utf8_lossy(&config.body).into_owned();
    assert!(config.contains("\"token\":\"(hidden)\"") && !config.contains("horse"), "{config}");
    let right = "Authorization: Bearer correct-horse-battery\r\n";
    assert_eq!(ask(admin, "POST", "/drain", right, "").await.status, 200);
    assert_eq!(get(admin, "/readyz").await.status, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_that_cannot_be_used_is_no_readiness() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("ca.pem"), "left behind").expect("ours");
    let setting = format!("intercept.ca_dir={}", folder.path().display());
    let (_running, admin) = serve(&origin, &[&setting]);
    let ready = get(admin, "/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.starts_with(b"certificate authority: "), "{ready:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_last_exchanges_are_kept() {
    let origin = origin().await;
    let (running, admin) = serve(&origin, &["admin.exchanges=3"]);
    let mut client = Client::connect(running.address).await;
    for number in 1..=5 {
        let target = format!("{CONTACTS}/{number}");
        client.ask(&request("PUT", &target, "", RECIPE)).await;
    }
    let kept = exchanges(admin, 5).await;
    let contacts: Vec<_> = kept.iter().map(|it| it["contact_id"].as_str().expect("one")).collect();
    assert_eq!(contacts, ["5", "4", "3"]);
    assert_eq!(json(admin, "/api/stats").await["totals"]["requests"], 5);
}

/// Regression: connections that were silent, or never ended their heads, kept probes out for half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_silent_make_room_for_a_probe() {
    let origin = Origin::start([]).await;
    let (_running, admin) = serve(&origin, &[]);
    let mut silent = Vec::new();
    for number in 0..80 {
        let mut client = Client::connect(admin).await;
        if number % 2 == 0 {
            client.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n").await;
        } else {
            assert_eq!(client.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 200);
        }
        silent.push(client);
    }
    assert_eq!(get(admin, "/livez").await.status, 200);
    // Those that were not the oldest are served still.
    let last = silent.last_mut().expect("one");
    assert_eq!(last.ask(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_answers_are_counted_by_their_problem_and_the_mode_can_be_alerted_on() {
    let origin = Origin::start([Reply::WriteAndClose(vec![])]).await;
    let (running, admin) = serve(&origin, &["sanitize.mode=observe"]);
    let mut client = Client::connect(running.address).await;
    assert_eq!(client.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await.status, 502);
    let denied = b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(client.ask(denied).await.status, 403);
    let metrics = String::from_utf8(get(admin, "/metrics").await.body).expect("text");
    for series in [
        "optin_proxy_problems_total{problem=\"upstream-connection-closed\"} 1",
        "optin_proxy_problems_total{problem=\"target-denied\"} 1",
        // Regression: it was told as forwarded.
        "optin_proxy_forward_targets_total{decision=\"refused\"} 1",
        "optin_proxy_forward_targets_total{decision=\"forwarded\"} 0",
        "optin_proxy_enforcing 0",
        "optin_proxy_draining 0",
    ] {
        assert!(metrics.contains(series), "{series}: {metrics}");
    }
}
