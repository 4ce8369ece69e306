//! `optin-proxy report`, over a trail that is written here line by line.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::binary::run;

fn trail() -> tempfile::NamedTempFile {
    let finding = |kind: &str, list: Option<&str>, changed: bool| json!({ "kind": kind, "list_id": list, "was": "", "now": "", "changed": changed });
    let shop = "Shop/2 <b>\"quoted\"</b>";
    let differs = |list| finding("list_differs", Some(list), true);
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    for (seq, (time, agent, account, outcome, findings)) in [
        (
            "2026-11-24T23:59:59.000Z",
            Some(shop),
            "a",
            "rewritten",
            vec![differs("1"), differs("2")],
        ),
        ("2026-11-25T00:00:00.000Z", Some(shop), "b", "rescued", vec![differs("1"), differs("1")]),
        ("2026-11-25T08:00:00.000Z", None, "a", "refused", vec![]),
        (
            "2026-11-25T09:00:00.000Z",
            Some("=cmd|x"),
            "a",
            "observed",
            vec![finding("undeclared", None, false)],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let line = json!({
            "time": time, "seq": seq + 1, "user_agent": agent, "account": account, "outcome": outcome,
            "findings": findings, "something": { "new": [1, 2] },
        });
        writeln!(file, "{line}").expect("ours");
    }
    let gap = json!({ "event": "gap", "time": "2026-11-25T10:00:00.000Z", "lost": 7, "seq": 5 });
    writeln!(file, "{gap}").expect("ours");
    file
}

fn report(path: &Path, arguments: &[&str]) -> String {
    let output = run(&[&["report", path.to_str().expect("UTF-8")], arguments].concat(), b"");
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    String::from_utf8(output.stdout).expect("text")
}

fn row<'j>(report: &'j Value, by: &str, name: &str) -> &'j Value {
    let rows = report[by].as_array().expect("rows");
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{by} {name}: {report}"))
}

#[test]
fn the_counts_are_those_of_the_lines_by_each_of_five() {
    let file = trail();
    let report: Value =
        serde_json::from_str(&report(file.path(), &["--format", "json"])).expect("JSON");
    let counts = |row: &Value| {
        ["writes", "findings", "changed", "rescued", "refused", "exhausted"]
            .map(|name| row[name].as_u64().expect("a number"))
    };
    assert_eq!(counts(&report["all"]), [4, 5, 4, 1, 1, 0]);
    assert_eq!(report["lost"], 7);
    assert_eq!(report["from"], "2026-11-24T23:59:59.000Z");
    assert_eq!(report["to"], "2026-11-25T10:00:00.000Z");
    let shop = row(&report, "application", "Shop/2 <b>\"quoted\"</b>");
    assert_eq!(counts(shop), [2, 4, 4, 1, 0, 0]);
    assert_eq!(counts(row(&report, "application", "(no User-Agent)")), [1, 0, 0, 0, 1, 0]);
    assert_eq!(counts(row(&report, "account", "a")), [3, 3, 2, 0, 1, 0]);
    assert_eq!(counts(row(&report, "list", "1")), [2, 3, 3, 1, 0, 0], "a write counts once");
    assert_eq!(counts(row(&report, "kind", "list_differs")), [2, 4, 4, 1, 0, 0]);
    assert_eq!(counts(row(&report, "day", "2026-11-24")), [1, 2, 2, 0, 0, 0]);
    assert_eq!(report["application"][0]["name"], shop["name"], "the most findings first");
    assert_eq!(report["day"][0]["name"], "2026-11-24", "days in their order");
}

#[test]
fn what_was_exhausted_is_counted_for_each_and_in_all() {
    let line = json!({
        "time": "2026-11-25T08:00:00.000Z", "seq": 1, "account": "a", "outcome": "exhausted", "findings": [],
    });
    let output = run(&["report", "-", "--format", "json"], line.to_string().as_bytes());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["all"]["exhausted"], 1);
    assert_eq!(row(&report, "account", "a")["exhausted"], 1);
}

#[test]
fn people_get_a_table_spreadsheets_a_csv_and_neither_runs_what_a_client_wrote() {
    let file = trail();
    let table = report(file.path(), &[]);
    assert!(table.starts_with("4 contact writes with a finding or a refusal, 2026-11-24T23"));
    for title in ["application ", "account ", "list ", "kind ", "day "] {
        assert!(table.lines().any(|line| line.starts_with(title)), "{title}: {table}");
    }
    let csv = report(file.path(), &["--format", "csv"]);
    assert!(csv.contains("application,\"Shop/2 <b>\"\"quoted\"\"</b>\",2,4,4,1,0,0\r\n"), "{csv}");
    assert!(csv.contains("application,\"'=cmd|x\",1,1,0,0,0,0\r\n"), "{csv}");
    let html = report(file.path(), &["--format", "html"]);
    assert!(html.contains("Shop/2 &lt;b&gt;&quot;quoted&quot;&lt;/b&gt;"), "{html}");
    for other in ["<b>", "<script", "http://", "https://", "url("] {
        assert!(!html.contains(other), "{other}");
    }
    assert!(html.contains("<svg"));
}

#[test]
fn a_pipe_is_read_too_and_what_is_no_trail_is_a_clear_error() {
    let content = std::fs::read(trail().path()).expect("ours");
    let output = run(&["report", "-", "--format", "json"], &content);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["all"]["writes"], 4);

    let output = run(&["report", "-"], b"hello\nworld\n");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("no audit trail"), "{}", output.stderr);
    let output = run(&["report", "-"], &[b"hello\n", &content[..]].concat());
    assert_eq!(output.code, Some(0));
    assert!(output.stderr.contains("1 lines are none of an audit trail"), "{}", output.stderr);
    let output = run(&["report", "/nowhere"], b"");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("/nowhere: "), "{}", output.stderr);
}

/// Regression: a pipe was opened twice, and what the first look had taken was missing.
#[test]
fn a_pipe_with_a_name_is_read_from_its_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipe = folder.path().join("pipe");
    assert!(
        std::process::Command::new("mkfifo").arg(&pipe).status().expect("it is there").success()
    );
    let content = std::fs::read(trail().path()).expect("ours");
    let writing = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::write(pipe, content)
    });
    let read: Value = serde_json::from_str(&report(&pipe, &["--format", "json"])).expect("JSON");
    writing.join().expect("no panic").expect("it is read");
    assert_eq!(read["all"]["writes"], 4);
}

#[test]
fn names_beyond_twenty_thousand_are_counted_together() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    for seq in 1..=20_005 {
        let line = json!({
            "time": "2026-11-25T08:00:00.000Z", "seq": seq, "account": format!("a{seq}"), "findings": [],
        });
        writeln!(file, "{line}").expect("ours");
    }
    let read: Value =
        serde_json::from_str(&report(file.path(), &["--format", "json"])).expect("JSON");
    assert_eq!(read["all"]["writes"], 20_005);
    assert_eq!(row(&read, "account", "(others)")["writes"], 5);
}

#[test]
fn a_line_longer_than_what_is_read_at_once_is_one_line() {
    let finding = r#"{"kind":"list_differs","list_id":"1","was":"a","now":"b","changed":true}"#;
    let many = vec![finding; 40_000].join(",");
    let line = format!(r#"{{"time":"2026-11-25T08:00:00Z","seq":1,"findings":[{many}]}}"#);
    assert!(line.len() > 2 * 1024 * 1024);
    let last = r#"{"time":"2026-11-25T08:00:01Z","seq":2,"findings":[]}"#;
    let output = run(&["report", "-", "--format", "json"], format!("{line}\n{last}").as_bytes());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["all"]["findings"], 40_000);
    assert_eq!(report["all"]["writes"], 2, "the last one has no line break");
}

#[test]
fn a_trail_is_not_overwritten_by_its_report() {
    let (trail, other) = (trail(), tempfile::NamedTempFile::new().expect("a file"));
    let before = std::fs::read(trail.path()).expect("ours");
    let [trail_path, other_path] = [&trail, &other].map(|it| it.path().to_str().expect("UTF-8"));
    for of in [trail_path, other_path] {
        let output = run(&["report", "-o", trail_path, of], b"");
        assert_eq!(output.code, Some(2), "{}", output.stderr);
        assert!(output.stderr.contains("name another file behind -o"), "{}", output.stderr);
        assert_eq!(std::fs::read(trail.path()).expect("ours"), before);
    }
    // Nor is what may be evidence, though its first line is none any more.
    std::fs::write(trail.path(), [b"broken\n", &*before].concat()).expect("ours");
    assert_eq!(run(&["report", "-o", trail_path, trail_path], b"").code, Some(2));
    // What was there before is a report.
    for _ in 0..2 {
        assert_eq!(run(&["report", "-o", other_path, trail_path], b"").code, Some(0));
    }
}
