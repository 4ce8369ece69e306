//! The other commands, through the real binary.

use crate::support::binary::{Running, command, on_one_cpu, run};
use crate::support::client::Client;

#[test]
fn the_demo_shows_both_faults_and_ends_well() {
    let first = run(&["demo"], b"");
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let text = String::from_utf8(first.stdout).expect("UTF-8");
    let row = |title: &str| -> Vec<usize> {
        let line = text.lines().find(|line| line.starts_with(title)).expect(title);
        line[40..].split_whitespace().map(|cell| cell.parse().expect("a number")).collect()
    };
    let (echoed, bare, owner) = (
        row("re-subscribed, old list sources echoed"),
        row("re-subscribed, lists bare"),
        row("owner's update of an active contact"),
    );
    // sent, refused straight, refused by proxy, rewritten, rescued
    assert!(echoed[1] * 2 > echoed[0], "most of the inconsistent ones are refused: {text}");
    assert_eq!((echoed[2], echoed[3]), (0, echoed[0]), "{text}");
    assert!(bare[1] > 0 && bare[4] > 0, "only a retry cures these: {text}");
    assert_eq!((bare[2], bare[3]), (0, 0), "{text}");
    assert_eq!(owner[1..], [0, 0, 0, 0], "{text}");
    assert!(text.contains("-          <OptInSource>ACTION_BY_CUSTOMER"), "a diff: {text}");

    let table = |text: &str| {
        text.lines().filter(|line| !line.contains(" in ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let second = on_one_cpu(|| run(&["demo"], b""));
    let second = String::from_utf8(second.stdout).expect("UTF-8");
    assert_eq!(table(&second), table(&text), "deterministic, and the same on one CPU");
}

#[test]
fn the_demo_makes_as_many_updates_as_it_is_told_to() {
    let output = run(&["demo", "--updates", "7"], b"");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.contains("7 updates each way"), "{text}");
    let sent = |title: &str| -> usize {
        let line = text.lines().find(|line| line.starts_with(title)).expect(title);
        line[40..].split_whitespace().next().expect("a cell").parse().expect("a number")
    };
    let sent = [
        "re-subscribed, old list sources echoed",
        "re-subscribed, lists bare",
        "owner's update of an active contact",
    ]
    .map(sent);
    assert_eq!(sent.iter().sum::<usize>(), 7, "{text}");
}

#[test]
fn the_demo_fails_if_a_proxied_update_does() {
    let output = run(&["demo", "--set", "sanitize.mode=off", "--updates", "30"], b"");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("did not end well"), "{}", output.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_stays_up_if_told_to() {
    use std::io::{BufRead, BufReader};
    let mut child = command(&["demo", "--stay", "--updates", "3"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let address = loop {
        let line = lines.next().expect("more").expect("UTF-8");
        if let Some((_, rest)) = line.split_once("http://127.0.0.1:") {
            let port = rest.split('/').next().expect("a port");
            break format!("127.0.0.1:{port}").parse().expect("an address");
        }
    };
    let answer = Client::connect(address)
        .await
        .ask(b"GET /ws/customers/joesflowers/lists HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    assert_eq!(answer.status, 401);
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}

#[test]
fn usage_is_explained_and_wrong_usage_is_exit_status_2() {
    let help = run(&["--help"], b"");
    assert_eq!(help.code, Some(0));
    let text = String::from_utf8(help.stdout).expect("UTF-8");
    for name in ["serve", "demo", "sanitize", "check", "simulate", "completions"] {
        assert!(text.contains(&format!("  {name}")), "{text}");
    }
    let version = run(&["--version"], b"");
    let expected = concat!("optin-proxy ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(version.stdout, expected.as_bytes());
    for arguments in
        [&[][..], &["nonsense"], &["serve", "--nonsense"], &["simulate", "--flake-rate", "2"]]
    {
        assert_eq!(run(arguments, b"").code, Some(2), "{arguments:?}");
    }
}

#[test]
fn completions_are_printed_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&["completions", shell], b"");
        assert_eq!(output.code, Some(0));
        assert!(String::from_utf8_lossy(&output.stdout).contains("optin-proxy"), "{shell}");
    }
}

#[test]
fn a_reader_that_stops_reading_is_no_failure() {
    use std::process::Stdio;
    for arguments in [&["completions", "bash"][..], &["check"], &["demo", "--updates", "1"]] {
        let mut child = command(arguments).stdout(Stdio::piped()).spawn().expect("it starts");
        drop(child.stdout.take());
        assert_eq!(child.wait().expect("it ends").code(), Some(0), "{arguments:?}");
    }
}

/// It once ended with 0, so that `report --verify | head` took any trail for whole.
#[test]
fn a_reader_that_stops_reading_does_not_change_the_verdict() {
    let trail = tempfile::NamedTempFile::new().expect("a file");
    let lines =
        [1, 3].map(|seq| format!("{{\"time\":\"2026-11-25T00:00:00.000Z\",\"seq\":{seq}}}\n"));
    std::fs::write(trail.path(), lines.concat()).expect("ours");
    let trail = trail.path().to_str().expect("UTF-8");
    let body = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/in/recipe.xml");
    for arguments in [
        &["report", "--verify", trail][..],
        &["report", "--verify", "--format", "csv", trail],
        &["sanitize", "--check", "--diff", body],
        &["doctor", "--set", "upstream.url=http://127.0.0.1:1"],
        &["demo", "--set", "sanitize.mode=off", "--updates", "30"],
        &["demo", "--stay", "--set", "sanitize.mode=off", "--updates", "30"],
    ] {
        assert_eq!(unread(arguments), Some(1), "{arguments:?}");
    }
}

/// The exit status where nobody reads what is said.
fn unread(arguments: &[&str]) -> Option<i32> {
    use std::process::Stdio;
    let mut child = command(arguments);
    let child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("it starts");
    drop((child.stdout.take(), child.stderr.take()));
    child.wait().expect("it ends").code()
}

#[test]
fn the_simulator_says_where_it_is_and_whose_account_it_has() {
    let mut running = Running::start(&mut command(&["simulate", "--listen", "127.0.0.1:0"]));
    let said: String = (0..3).map(|_| running.read_line()).collect();
    assert!(said.contains("joesflowers") && said.contains("APIKEY%joesflowers:secret"), "{said}");
    running.signal("TERM");
    assert_eq!(running.finish().0.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthcheck_says_whether_the_proxy_is_ready_and_why_not() {
    let mut serving = command(&["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let mut running = Running::start(&mut serving);
    let admin = running.admin().to_string();
    let ready = run(&["healthcheck", "--admin", &admin], b"");
    assert_eq!((ready.code, &ready.stdout[..]), (Some(0), &b"ready\n"[..]), "{}", ready.stderr);
    // Bound to all addresses, it is asked on one.
    let port = admin.rsplit(':').next().expect("a port");
    let ready = run(&["healthcheck", "--admin", &format!("0.0.0.0:{port}")], b"");
    assert_eq!(ready.code, Some(0), "{}", ready.stderr);
    // Where it listens may be said as for the proxy itself.
    let configured = format!("admin.address={admin}");
    let ready = run(&["healthcheck", "--set", &configured], b"");
    assert_eq!(ready.code, Some(0), "{}", ready.stderr);
    let drain = b"POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    let address = admin.parse().expect("an address");
    assert_eq!(Client::connect(address).await.ask(drain).await.status, 200);
    let draining = run(&["healthcheck", "--set", &configured], b"");
    assert_eq!(draining.code, Some(1));
    assert!(draining.stderr.contains("says 503"), "{}", draining.stderr);
    assert_eq!(unread(&["healthcheck", "--set", &configured]), Some(1));
    drop(running);
    let none = run(&["healthcheck", "--admin", &admin], b"");
    assert_eq!(none.code, Some(1));
    assert!(
        none.stderr.contains("no answer at") && none.stderr.contains("admin.address"),
        "{}",
        none.stderr
    );
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("man");
    let written = run(&["manual", place.to_str().expect("UTF-8")], b"");
    assert_eq!(written.code, Some(0), "{}", written.stderr);
    for name in
        ["optin-proxy", "optin-proxy-serve", "optin-proxy-healthcheck", "optin-proxy-report"]
    {
        let page = std::fs::read_to_string(place.join(format!("{name}.1"))).expect("a page");
        assert!(page.contains(".TH"), "{page}");
    }
}
