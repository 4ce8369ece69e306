//! What the log says of a request, beside what it must not say (`secrets`).

use std::process::Stdio;
use std::sync::mpsc;

use serde_json::Value;

use crate::support::binary::{Running, command};
use crate::support::client::{Client, closed};
use crate::support::http2::{END_HEADERS, END_STREAM, Fate, HEADERS, Http2, fields};
use crate::support::origin::{Origin, Reply};
use crate::support::{
    BARE, CONTACT, CONTACTS, GET, RECIPE, UNDECLARED, no_content, put, refusal, request,
};

fn serve(origin: &Origin, settings: &[&str]) -> Running {
    let url = origin.url();
    let mut arguments = vec!["serve", "--listen", "127.0.0.1:0", "--upstream", &url];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    Running::start(&mut command(&arguments))
}

/// The lines of requests, once the program has come to its end.
fn stop(running: Running) -> Vec<Value> {
    stop_with(running, "request")
}

/// The lines that say this.
fn stop_with(running: Running, message: &str) -> Vec<Value> {
    running.signal("TERM");
    let (_, log) = running.finish();
    log.lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|line| line["message"] == message)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mismatch_has_all_its_fields_whatever_is_known_of_it() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let running = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    client.ask(&request("POST", CONTACTS, "", UNDECLARED)).await;
    let lines = stop_with(running, "mismatch");
    assert_eq!(lines.len(), 1);
    for field in ["contact_id", "list_id", "user_agent"] {
        assert_eq!(lines[0].get(field), Some(&Value::Null), "{field}");
    }
    assert_eq!((&lines[0]["kind"], &lines[0]["was"]), (&"undeclared".into(), &"".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mismatch_says_what_was_there_and_what_is_and_an_uninspected_body_why() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let running = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    client.ask(&put(RECIPE)).await;
    client.ask(&put(b"<entry>")).await;
    running.signal("TERM");
    let (_, log) = running.finish();
    let lines: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let of =
        |message: &str| lines.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let mismatches = of("mismatch");
    assert_eq!(mismatches.len(), 2);
    for (mismatch, list) in mismatches.iter().zip(["12", "15"]) {
        for (field, value) in [
            ("kind", "list_differs"),
            ("contact_id", "238"),
            ("list_id", list),
            ("was", "ACTION_BY_CUSTOMER"),
            ("now", "ACTION_BY_CONTACT"),
        ] {
            assert_eq!(mismatch[field], value, "{field}");
        }
    }
    let uninspected = of("uninspected");
    assert_eq!(uninspected.len(), 1);
    assert_eq!(uninspected[0]["reason"], "malformed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_refusal_was_not_retried_to_an_end_is_logged() {
    for (reply, settings, said) in [
        (Reply::WriteAndClose(vec![]), &[][..], "retry failed"),
        (Reply::Hang, &["retry.deadline=2s"], "no answer within retry.deadline"),
        (Reply::Hang, &["retry.budget=0", "retry.budget_floor=0"], "retry budget exhausted"),
    ] {
        let origin = Origin::start([Reply::Write(refusal()), reply]).await;
        let running = serve(&origin, &[&["retry.base_delay=0s"], settings].concat());
        let answer = Client::connect(running.address).await.ask(&put(BARE)).await;
        assert_eq!(answer.outcome(), "exhausted", "{said}");
        running.signal("TERM");
        let (_, log) = running.finish();
        assert!(log.contains(said), "{said}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_errors_or_of_nothing_is_empty_where_all_is_well() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    for level in ["off", "error"] {
        let running = serve(&origin, &[&format!("log.level={level}")]);
        assert_eq!(Client::connect(running.address).await.ask(&put(RECIPE)).await.status, 204);
        running.signal("TERM");
        assert_eq!(running.finish().1, "", "{level}");
    }
}

/// Regression: it was logged as one attempt, and CONNECT as none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_a_host_that_is_denied_is_no_attempt() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let running = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    let denied = client.ask(b"GET http://10.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!((denied.status, client.ask(GET).await.status), (403, 204));
    let attempts: Vec<_> = stop(running).iter().map(|line| line["attempts"].clone()).collect();
    assert_eq!(attempts, [0, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_is_told_from_one_that_the_proxy_does_not_wait_for() {
    // The client goes.
    let origin = Origin::start([Reply::Hang, Reply::Write(no_content())]).await;
    let running = serve(&origin, &[]);
    let mut client = Client::connect(running.address).await;
    client.send(GET).await;
    origin.arrived(1).await;
    drop(client);
    assert_eq!(Client::connect(running.address).await.ask(GET).await.status, 204);
    let lines = stop(running);
    assert_eq!(lines.len(), 2);
    let gone = lines.iter().find(|line| line["status"].is_null()).expect("one had no answer");
    assert_eq!((&gone["client_gone"], &gone["cut"]), (&Value::Bool(true), &Value::Null));
    let answered = lines.iter().find(|line| line["status"] == 204).expect("one was answered");
    assert_eq!((&answered["client_gone"], &answered["cut"]), (&Value::Null, &Value::Null));

    // Regression: whatever the proxy cut was logged as the client's doing. At its deadline:
    for http2 in [false, true] {
        let origin = Origin::start([Reply::Hang]).await;
        let settings = ["limits.request_timeout=100ms", "upstream.response_timeout=1h"];
        let running = serve(&origin, &settings);
        if http2 {
            let mut client = Http2::connect(running.address, 65_535).await;
            let head =
                [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "p")];
            client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&head)).await;
            assert!(matches!(client.fate(1).await, Fate::Reset(_)));
        } else {
            assert_eq!(Client::connect(running.address).await.ask(GET).await.status, 0);
        }
        let lines = stop(running);
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["cut"], true, "HTTP/2: {http2}: {}", lines[0]);
        assert_eq!(lines[0]["client_gone"], Value::Null, "HTTP/2: {http2}: {}", lines[0]);
    }

    // At the end of the time to drain, and at once where a second signal says so:
    for twice in [false, true] {
        let origin = Origin::start([Reply::Hang]).await;
        let drain = if twice { "listen.drain_timeout=1h" } else { "listen.drain_timeout=50ms" };
        let running = serve(&origin, &[drain]);
        let mut client = Client::connect(running.address).await;
        client.send(GET).await;
        origin.arrived(1).await;
        if twice {
            running.signal("TERM");
            closed(running.address).await;
        }
        let lines = stop(running);
        assert_eq!(lines.len(), 1);
        let fate = (&lines[0]["cut"], &lines[0]["client_gone"]);
        assert_eq!(fate, (&Value::Bool(true), &Value::Null), "twice: {twice}");
        drop(client);
    }
}

/// Regression: a User-Agent stood there as it was, and could look like fields of ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_field_of_a_line_for_people_can_be_forged_by_a_client() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let running = serve(&origin, &["log.format=human"]);
    let forged = "x\" outcome=\"clean\" status=200 \\\" account=root";
    let fields = format!("User-Agent: {forged}\r\nX-Request-Id: 1 status=200\r\n");
    for target in [CONTACT, "/ws/customers/jo%20status=200/contacts/1%20account=root"] {
        let asked = request("PUT", target, &fields, RECIPE);
        assert_eq!(Client::connect(running.address).await.ask(&asked).await.status, 204);
    }
    running.signal("TERM");
    let (_, log) = running.finish();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("INFO request ")).collect();
    assert_eq!(lines.len(), 2, "{log}");
    for line in lines {
        // All that is the client's stands in quotes of ours, and its own are escaped.
        let (before, quoted) = line.split_once("user_agent=").expect("it is there");
        assert!(
            quoted.starts_with("\"x\\\" outcome=\\\"clean\\\" status=200 \\\\\\\" account=root\""),
            "{line}"
        );
        assert_eq!(before.matches("status=").count(), 1, "{line}");
        assert_eq!(before.matches("outcome=").count(), 1, "{line}");
        assert!(!before.contains("root"), "{line}");
    }
}

/// An update with so many lists, each of which differs.
fn differing(lists: usize) -> Vec<u8> {
    let list = "<ContactList id=\"http://x/lists/1\"><OptInSource/></ContactList>";
    let (before, after) =
        BARE.split_at(memchr::memmem::find(BARE, b"<ContactList ").expect("it is there"));
    [before, list.repeat(lists).as_bytes(), after].concat()
}

/// Regression: the thread that writes the log slept while lines came, and what a megabyte had no room for was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_finding_and_each_request_has_its_line_however_many_there_are_at_once() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let mut running = Running::start(command(&arguments).args(["--upstream", &origin.url()]));
    let admin = running.admin();
    let asked = put(&differing(10_000));
    let mut client = Client::connect(running.address).await;
    for _ in 0..3 {
        assert_eq!(client.ask(&asked).await.status, 204);
    }
    // What is counted is logged.
    let mut operator = Client::connect(admin).await;
    let stats = b"GET /api/stats HTTP/1.1\r\nHost: localhost\r\n\r\n";
    while !String::from_utf8_lossy(&operator.ask(stats).await.body).contains("\"requests\":3,") {}
    running.signal("TERM");
    let (status, log) = running.finish();
    assert_eq!(status.code(), Some(0));
    let of = |message| log.lines().filter(|line| line.contains(message)).count();
    assert_eq!(of("\"message\":\"mismatch\""), 30_000);
    assert_eq!(of("\"message\":\"request\""), 3);
}

/// Regression: each line was written by the request that it was about, which stood still with whoever read the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_costs_lines_and_no_request() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    for read_again in [true, false] {
        let (unread, begin) = mpsc::channel();
        let arguments = [
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--upstream",
            &origin.url(),
        ];
        let mut running = Running::start_read_late(&mut command(&arguments), Stdio::null(), begin);
        let admin = running.admin();
        let mut client = Client::connect(running.address).await;
        // Some 30 KB each, beyond what a pipe and the proxy's own memory hold.
        let asked = put(&differing(100));
        for _ in 0..500 {
            assert_eq!(client.ask(&asked).await.status, 204);
        }
        let mut operator = Client::connect(admin).await;
        let mut get = async |path: &str| {
            let asked = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            operator.ask(asked.as_bytes()).await.body
        };
        // What is counted is logged.
        while serde_json::from_slice::<Value>(&get("/api/stats").await).expect("JSON")["totals"]["requests"]
            != 500
        {}
        let metrics = String::from_utf8(get("/metrics").await).expect("text");
        let lost =
            metrics.lines().find_map(|line| line.strip_prefix("optin_proxy_log_lost_total "));
        let lost: u64 = lost.expect("it is counted").parse().expect("a number");
        assert!(lost > 0);
        if read_again {
            drop(unread);
            // Whoever reads again is told of what is missing.
            running.signal("TERM");
            let (status, log) = running.finish();
            assert_eq!(status.code(), Some(0));
            let lines: Vec<Value> =
                log.lines().map(|line| serde_json::from_str(line).expect("whole lines")).collect();
            let said: u64 = lines.iter().filter_map(|line| line["lines"].as_u64()).sum();
            // Those of the end may be among them.
            assert!((lost..lost + 5).contains(&said), "{said} of {lost}");
            assert_eq!(lines.last().expect("the last")["message"], "stopped");
        } else {
            // The end does not wait for it either.
            running.signal("TERM");
            let ended = std::thread::spawn(move || running.wait());
            assert_eq!(ended.join().expect("it ends").code(), Some(0));
            drop(unread);
        }
    }
}

/// A reader that has gone for good is told nothing again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_whose_reader_has_gone_is_counted_and_no_more() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let url = origin.url();
    let mut serve = command(&["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let mut running = Running::start_unread(serve.args(["--upstream", &url]));
    let admin = running.admin();
    let lost = async || {
        let asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        let metrics = Client::connect(admin).await.ask(asked).await.body;
        let metrics = String::from_utf8(metrics).expect("text");
        let mut lines = metrics.lines();
        let lost = lines.find_map(|line| line.strip_prefix("optin_proxy_log_lost_total "));
        lost.expect("it is there").parse::<u64>().expect("a number")
    };
    for _ in 0..10 {
        assert_eq!(Client::connect(running.address).await.ask(GET).await.status, 204);
    }
    while lost().await < 10 {}
    for _ in 0..200 {
        lost().await;
    }
    // The requests', those of the start, and perhaps one notice.
    let lost = lost().await;
    assert!(lost < 16, "{lost}");
    running.signal("TERM");
    assert_eq!(running.wait().code(), Some(0));
}
