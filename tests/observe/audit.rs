//! The audit trail: what stands in it, what holds it together, and what a disk that fails costs.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{exchanges, get, json};
use crate::support::binary::{Output, Running, command, run};
use crate::support::client::{Client, closed};
use crate::support::origin::{Origin, Reply};
use crate::support::{
    BARE, CONTACT, CONTACTS, RECIPE, RECIPE_OUT, UNDECLARED, no_content, put, refusal, request,
};

pub(super) fn start(origin: &Origin, path: &Path, settings: &[&str]) -> (Running, SocketAddr) {
    let url = origin.url();
    let audit = format!("audit.path={}", path.display());
    let mut arguments = vec!["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    arguments.extend(["--upstream", &url, "--set", "retry.base_delay=0s", "--set", &audit]);
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();
    (running, admin)
}

pub(super) fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("it is there");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

pub(super) fn verify(paths: &[&Path]) -> Output {
    let mut arguments = vec!["report", "--verify"];
    arguments.extend(paths.iter().map(|path| path.to_str().expect("UTF-8")));
    run(&arguments, b"")
}

pub(super) async fn origin() -> Origin {
    Origin::start([Reply::Write(no_content())]).await
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends this many updates, each of which is worth a line.
pub(super) async fn send(running: &Running, count: usize) {
    let mut client = Client::connect(running.address).await;
    for _ in 0..count {
        assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
    }
}

pub(super) fn stop(running: Running) -> String {
    running.signal("TERM");
    let (status, log) = running.finish();
    assert_eq!(status.code(), Some(0), "{log}");
    log
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_for_each_write_with_a_finding_or_a_refusal_and_for_nothing_else() {
    let origin = Origin::start([
        Reply::Write(no_content()),
        Reply::Write(no_content()),
        Reply::Write(no_content()),
        Reply::Write(refusal()),
        Reply::Write(no_content()),
        Reply::Write(no_content()),
    ])
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    let mut client = Client::connect(running.address).await;
    let fields = "User-Agent: Shop/2 (jane.roe@example.org)\r\n";
    let first = client.ask(&request("PUT", CONTACT, fields, RECIPE)).await;
    client.ask(&put(BARE)).await;
    client.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await;
    client.ask(&put(BARE)).await;
    client.ask(&put(UNDECLARED)).await;
    stop(running);

    let written = lines(&path);
    let [rewritten, rescued, undeclared] = &written[..] else { panic!("{written:?}") };
    assert_eq!(rewritten["request_id"], first.field("x-request-id").expect("an id"));
    assert_eq!(rewritten["account"], "joesflowers");
    assert_eq!(rewritten["contact_id"], "238");
    assert_eq!(rewritten["user_agent"], "Shop/2 (e-mail address)");
    assert_eq!(rewritten["status"], 204);
    assert_eq!(rewritten["outcome"], "rewritten");
    let findings = rewritten["findings"].as_array().expect("an array");
    assert_eq!(findings.len(), 2);
    assert_eq!(findings[0]["was"], "ACTION_BY_CUSTOMER");
    assert_eq!(findings[0]["now"], "ACTION_BY_CONTACT");
    assert_eq!(findings[0]["declared"], "ACTION_BY_CONTACT");
    assert_eq!(findings[0]["setting"], "sanitize.lists=align");
    assert_eq!(rewritten["sha256_before"], sha256(RECIPE));
    assert_eq!(rewritten["sha256_after"], sha256(RECIPE_OUT));
    assert_eq!(rescued["outcome"], "rescued");
    assert_eq!(rescued["verdicts"], serde_json::json!(["transient"]));
    assert_eq!(rescued["sha256_before"], rescued["sha256_after"]);
    assert_eq!(undeclared["findings"][0]["kind"], "undeclared");
    assert_eq!(undeclared["findings"][0]["declared"], Value::Null);
    assert_eq!(undeclared["findings"][0]["changed"], false);

    let text = std::fs::read_to_string(&path).expect("it is there");
    let mut before = "0".repeat(64);
    for (number, line) in text.lines().enumerate() {
        assert_eq!(written[number]["seq"], number + 1);
        assert_eq!(written[number]["prev"], before);
        before = sha256(line.as_bytes());
    }
    for personal in ["example.com", "jane.roe", "EmailAddress"] {
        assert!(!text.contains(personal), "{personal}");
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&path).expect("it is there").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    let verified = verify(&[&path]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    assert!(verified.stderr.contains(&before), "the hash to write down: {}", verified.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_names_the_verdict_what_was_declared_and_the_list() {
    let origin = Origin::start([Reply::Write(refusal()), Reply::Write(no_content())]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    let mut client = Client::connect(running.address).await;
    client.ask(&request("POST", CONTACTS, "", BARE)).await;
    client.ask(&put(include_bytes!("../corpus/in/removal.xml"))).await;
    let own = b"<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'>\
                <OptInSource>ACTION_BY_CUSTOMER</OptInSource>\
                <ContactLists><ContactList id='http://proxy.local:8080/ws/lists/7'/></ContactLists></Contact>";
    client.ask(&put(own)).await;
    stop(running);
    let written = lines(&path);
    let [created, removed, listed] = &written[..] else { panic!("{written:?}") };
    assert_eq!(created["outcome"], "refused");
    assert_eq!(created["verdicts"], serde_json::json!(["legitimate"]));
    assert_eq!(removed["findings"][0]["declared"], "ACTION_BY_CONTACT");
    assert_eq!(listed["findings"][0]["list_id"], "7");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_out_added_or_changed_shows() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 5).await;
    stop(running);
    let whole = std::fs::read_to_string(&path).expect("it is there");
    let lines: Vec<&str> = whole.lines().collect();
    let forged = lines[2].replace("\"status\":204", "\"status\":400");
    assert_ne!(forged, lines[2]);
    let spoiled = folder.path().join("spoiled.jsonl");
    for (what, changed, place) in [
        ("taken out", [lines[0], lines[1], lines[3], lines[4]].to_vec(), ":3: "),
        ("changed", [lines[0], lines[1], &forged, lines[3], lines[4]].to_vec(), ":4: "),
        ("doubled", [lines[0], lines[1], lines[1], lines[2]].to_vec(), ":3: "),
        ("swapped", [lines[0], lines[2], lines[1], lines[3]].to_vec(), ":2: "),
        ("an empty one", [lines[0], "", lines[1]].to_vec(), ":2: "),
        ("foreign", [lines[0], "{\"hello\":1}", lines[1]].to_vec(), ":2: "),
    ] {
        std::fs::write(&spoiled, changed.join("\n") + "\n").expect("ours");
        let verified = verify(&[&spoiled]);
        assert_eq!(verified.code, Some(1), "{what}");
        let first = verified.stderr.lines().find(|line| line.contains("spoiled.jsonl:"));
        assert!(first.is_some_and(|line| line.contains(place)), "{what}: {}", verified.stderr);
    }
    // Without its beginning, it is what is left where old files were deleted: said, and no fault.
    std::fs::write(&spoiled, lines[2..].join("\n") + "\n").expect("ours");
    let verified = verify(&[&spoiled]);
    assert_eq!(verified.code, Some(0));
    assert!(verified.stderr.contains("lines before 3 are in files that were not named"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_lines_which_are_counted_and_shown_and_no_request() {
    let origin = origin().await;
    let (running, admin) = start(&origin, Path::new("/dev/full"), &[]);
    send(&running, 3).await;
    loop {
        let metrics = String::from_utf8(get(admin, "/metrics").await.body).expect("text");
        if metrics.contains("optin_proxy_audit_lost_total{reason=\"disk\"} 3") {
            assert!(metrics.contains("optin_proxy_audit_lines_total 0"));
            break;
        }
        tokio::task::yield_now().await;
    }
    let state = &json(admin, "/api/stats").await["state"];
    assert_eq!(state["audit_lost"], 3);
    let fault = state["audit"]["fault"].as_str().expect("a fault");
    assert!(fault.contains("cannot be written") && fault.contains("space"), "{fault}");
    assert_eq!(exchanges(admin, 3).await.len(), 3);
    let log = stop(running);
    let said = log.lines().filter(|line| line.contains("the audit trail")).count();
    assert_eq!(said, 1, "once a minute at most: {log}");
}

/// Regression: the signal that comes with the limit of a file's size ended the process; and with one line that did not fit, all
/// that were to be written with it were lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_may_not_grow_takes_what_fits_and_the_rest_is_lost() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let audit = format!("audit.path={}", path.display());
    let url = origin.url();
    let arguments =
        ["serve", "--listen", "127.0.0.1:0", "--upstream", &url, "--admin", "127.0.0.1:0"];
    let program =
        command(&[&arguments[..], &["--set", &audit, "--set", "log.level=error"]].concat());
    let mut shell = Command::new("sh");
    // In blocks of 512 bytes; the log is a pipe.
    shell.args(["-c", "ulimit -f 32; exec \"$0\" \"$@\""]);
    shell.arg(program.get_program()).args(program.get_args());
    let mut running = Running::start(&mut shell);
    let admin = running.admin();
    send(&running, 100).await;
    exchanges(admin, 100).await;
    stop(running);
    let size = std::fs::metadata(&path).expect("it is there").len();
    let written = lines(&path).len();
    assert!((14 * 1024..=16 * 1024).contains(&size), "{size} bytes, {written} lines");
    let verified = verify(&[&path]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_left_of_a_line_is_taken_away_and_the_gap_is_told() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 2).await;
    stop(running);
    let mut torn = std::fs::read(&path).expect("it is there");
    torn.extend_from_slice(b"{\"time\":\"2026-01-01T00:00:00Z\",\"requ");
    std::fs::write(&path, torn).expect("ours");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 1).await;
    stop(running);
    let written = lines(&path);
    assert_eq!(written.len(), 4);
    assert_eq!((&written[2]["event"], &written[2]["lost"]), (&"gap".into(), &1.into()));
    assert_eq!(written[3]["outcome"], "rewritten");
    let verified = verify(&[&path]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    assert!(String::from_utf8_lossy(&verified.stdout).contains("1 lines were lost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_write_one_trail_one_after_the_other() {
    // As when one takes over from another: both are there for a while.
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (first, _) = start(&origin, &path, &[]);
    send(&first, 2).await;
    let (second, second_admin) = start(&origin, &path, &[]);
    send(&second, 2).await;
    exchanges(second_admin, 2).await;
    let fault = json(second_admin, "/api/stats").await["state"]["audit"]["fault"].clone();
    assert!(fault.as_str().is_some_and(|fault| fault.contains("another process")), "{fault}");
    send(&first, 1).await;
    stop(first);
    // The other one may have begun by now, with both of its own.
    assert!([3, 5].contains(&lines(&path).len()), "{:?}", lines(&path));
    stop(second);
    assert_eq!(lines(&path).len(), 5);
    let verified = verify(&[&path]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_moved_away_is_begun_anew_and_the_chain_goes_on() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (path, moved) = (folder.path().join("audit.jsonl"), folder.path().join("moved"));
    let (running, _) = start(&origin, &path, &["audit.fsync=0s"]);
    send(&running, 1).await;
    while std::fs::read(&path).expect("it is there").is_empty() {
        tokio::task::yield_now().await;
    }
    std::fs::rename(&path, &moved).expect("ours");
    // It is looked for once a second.
    while !path.exists() {
        send(&running, 1).await;
    }
    stop(running);
    let verified = verify(&[&path, &moved]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

/// Regression: who waited for the trail took it over when the file was moved away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_the_trail_does_not_begin_one_in_its_place() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (path, moved) = (folder.path().join("audit.jsonl"), folder.path().join("moved"));
    let (first, _) = start(&origin, &path, &["audit.fsync=0s"]);
    send(&first, 1).await;
    while std::fs::read(&path).expect("it is there").is_empty() {
        tokio::task::yield_now().await;
    }
    let (second, _) = start(&origin, &path, &[]);
    send(&second, 1).await;
    std::fs::rename(&path, &moved).expect("ours");
    while !path.exists() {
        send(&first, 1).await;
    }
    stop(first);
    stop(second);
    let verified = verify(&[&moved, &path]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}

/// Regression: a file without a line's end was emptied.
#[test]
fn a_file_that_is_no_trail_is_left_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notes.json");
    for precious in ["{\"precious\": 1}", "a\nb\n", "\u{0}\u{1}\u{2}"] {
        std::fs::write(&path, precious).expect("ours");
        let audit = format!("audit.path={}", path.display());
        let output = run(&["serve", "--listen", "127.0.0.1:0", "--set", &audit], b"");
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains("something else than an audit trail"), "{}", output.stderr);
        assert_eq!(std::fs::read_to_string(&path).expect("it is there"), precious);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_lost_is_told_though_no_line_follows() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 1).await;
    stop(running);
    let mut torn = std::fs::read(&path).expect("it is there");
    torn.extend_from_slice(b"{\"time\":\"2026-01-01T00:00:00Z\",\"requ");
    std::fs::write(&path, torn).expect("ours");
    stop(start(&origin, &path, &[]).0);
    let written = lines(&path);
    assert_eq!((written.len(), &written[1]["lost"]), (2, &1.into()));
}

/// Regression: what was cut at the deadline left its record too late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_end_cuts_is_recorded_too() {
    for (signals, timeout, code) in [(1, "1s", 0), (2, "1h", 143)] {
        let origin = Origin::start([Reply::Hang]).await;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("audit.jsonl");
        let drain = format!("listen.drain_timeout={timeout}");
        let (running, _) = start(&origin, &path, &[&drain]);
        let mut clients = Vec::new();
        for count in 1..=3 {
            let mut client = Client::connect(running.address).await;
            client.send(&put(RECIPE)).await;
            clients.push(client);
            origin.arrived(count).await;
        }
        for number in 0..signals {
            if number > 0 {
                // The first one has been heard.
                closed(running.address).await;
            }
            running.signal("TERM");
        }
        let (status, log) = running.finish();
        assert_eq!(status.code(), Some(code), "{log}");
        assert_eq!(log.matches("\"message\":\"request\"").count(), 3, "{log}");
        let written = lines(&path);
        assert_eq!(written.len(), 3);
        assert!(written.iter().all(|line| line["status"] == Value::Null), "{written:?}");
        assert_eq!(verify(&[&path]).code, Some(0));
    }
}

/// A pipe that nobody reads takes some lines and no more, as a disk that hangs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_costs_lines_beyond_the_queue_and_neither_a_request_nor_the_end() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status().expect("it is there");
    assert!(made.success());
    let (running, admin) = start(&origin, &path, &[]);
    // Some 300 KB a line: the queue holds 16 MiB of them.
    let list = "<ContactList id=\"http://api.constantcontact.com/ws/customers/joesflowers/lists/21\">\
                <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>";
    let recipe = std::str::from_utf8(RECIPE).expect("UTF-8");
    let (start, end) = recipe.split_once("</ContactLists>").expect("lists");
    let body = [start, &list.repeat(1_500), "</ContactLists>", end].concat();
    let mut client = Client::connect(running.address).await;
    let mut sent = 0;
    let lost = loop {
        assert_eq!(client.ask(&put(body.as_bytes())).await.status, 204);
        sent += 1;
        // Each is in the trail's queue, or lost, before the next one comes.
        let stats = loop {
            let stats = json(admin, "/api/stats").await;
            if stats["totals"]["requests"] == sent {
                break stats;
            }
            tokio::task::yield_now().await;
        };
        match stats["state"]["audit_lost"].as_u64().expect("a number") {
            0 => {}
            lost => break lost,
        }
    };
    let metrics = String::from_utf8(get(admin, "/metrics").await.body).expect("text");
    let queue = format!("optin_proxy_audit_lost_total{{reason=\"queue\"}} {lost}");
    assert!(metrics.contains(&queue), "{metrics}");
    assert_eq!(origin.requests().len(), sent);
    assert!((40..80).contains(&sent), "16 MiB of lines are some {sent} of them");
    let log = stop(running);
    assert!(log.contains("lines of the audit trail are lost for want of room"), "{log}");
    assert!(log.contains("the end came before these lines"), "{log}");
}

#[test]
fn a_trail_that_cannot_be_opened_keeps_the_proxy_from_starting() {
    let arguments =
        ["serve", "--listen", "127.0.0.1:0", "--set", "audit.path=/nowhere/to/be/found.jsonl"];
    let output = run(&arguments, b"");
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains("audit.path: /nowhere") && output.stderr.contains("choose another"),
        "{}",
        output.stderr
    );
}
