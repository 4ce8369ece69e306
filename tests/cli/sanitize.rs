//! `optin-proxy sanitize`, as a support engineer uses it.

use crate::contact::{C, U, entry};
use crate::support::binary::run;
use crate::support::{BARE, RECIPE, RECIPE_OUT};

const RECIPE_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/in/recipe.xml");
const OWN_ORIGIN: &[u8] = include_bytes!("../corpus/in/own-origin.xml");
const OWN_ORIGIN_OUT: &[u8] = include_bytes!("../corpus/out/own-origin.xml");
const REMOVAL: &[u8] = include_bytes!("../corpus/in/removal.xml");

#[test]
fn xml_in_xml_out_and_findings_on_standard_error() {
    for arguments in [&["sanitize", RECIPE_FILE][..], &["sanitize", "-"], &["sanitize"]] {
        let output = run(arguments, RECIPE);
        assert_eq!(output.code, Some(0));
        assert_eq!(output.stdout, RECIPE_OUT);
        assert!(
            output.stderr.contains("list_differs")
                && output.stderr.contains("2 findings, 2 rewritten")
        );
        assert!(!output.stderr.contains('\x1b'), "no colour where there is no terminal");
    }
}

/// Regression: a line break in a value made two lines of a finding, and a terminal did what stood there.
#[test]
fn what_a_value_holds_is_shown_and_does_nothing_to_a_terminal() {
    let body = entry(&["A\n1:1: forged\u{1b}[2J"], &[]);
    let output = run(&["sanitize", "--check"], body.as_bytes());
    assert_eq!(output.stderr.lines().count(), 2, "{}", output.stderr);
    assert!(output.stderr.contains(r"A\n1:1: forged\u{1b}[2J"), "{}", output.stderr);
    let value = "<OptInSource>\u{1b}[2J</OptInSource>";
    let body = entry(&[C], &[Some(U)]).replace("<ContactLists>", &format!("{value}<ContactLists>"));
    let diff = run(&["sanitize", "--diff", "--set", "sanitize.ambiguous=first"], body.as_bytes());
    let diff = String::from_utf8(diff.stdout).expect("UTF-8");
    assert!(diff.contains(r"\u{1b}[2J") && !diff.contains('\u{1b}'), "{diff}");
}

#[test]
fn the_method_decides_whether_it_is_a_removal() {
    assert_ne!(run(&["sanitize"], REMOVAL).stdout, REMOVAL);
    assert_eq!(run(&["sanitize", "--method", "POST"], REMOVAL).stdout, REMOVAL);
    assert_ne!(run(&["sanitize", "--method", "put"], REMOVAL).stdout, REMOVAL);
}

#[test]
fn the_proxys_own_address_is_the_default_host() {
    assert_eq!(run(&["sanitize"], OWN_ORIGIN).stdout, OWN_ORIGIN_OUT);
    assert_eq!(run(&["sanitize", "--host", "other:80"], OWN_ORIGIN).stdout, OWN_ORIGIN);
    let moved = run(&["sanitize", "--set", "listen.address=127.0.0.1:1"], OWN_ORIGIN);
    assert_eq!(moved.stdout, OWN_ORIGIN);
}

#[test]
fn check_prints_no_xml_and_fails_if_there_is_anything_to_say() {
    for (body, code) in [(RECIPE, 1), (BARE, 0), (&b"<broken"[..], 1), (b"<other/>", 0)] {
        let output = run(&["sanitize", "--check"], body);
        assert_eq!((output.code, &output.stdout[..]), (Some(code), &b""[..]));
    }
}

#[test]
fn json_is_one_object_for_machines() {
    let output = run(&["sanitize", "--format", "json"], RECIPE);
    assert_eq!(output.stdout, RECIPE_OUT);
    let json: serde_json::Value = serde_json::from_str(&output.stderr).expect("JSON");
    assert_eq!(json["rewritten"], 2);
    let finding = &json["findings"][1];
    assert_eq!(finding["kind"], "list_differs");
    assert_eq!((&finding["line"], &finding["column"]), (&24.into(), &11.into()));
    assert_eq!(finding["list_id"], "http://api.constantcontact.com/ws/customers/oakmill/lists/15");
    assert_eq!(
        (&finding["was"], &finding["now"]),
        (&"ACTION_BY_CUSTOMER".into(), &"ACTION_BY_CONTACT".into())
    );
    let output = run(&["sanitize", "--format", "json", "--check"], b"<a>");
    let json: serde_json::Value = serde_json::from_str(&output.stderr).expect("JSON");
    assert_eq!((output.code, &json["uninspectable"]), (Some(1), &"malformed".into()));
}

/// Regression: each was looked for from the start of the body, 25,000 of them for seconds.
#[test]
fn findings_are_where_their_line_and_column_say_in_whatever_order_they_come() {
    let body = "<é xmlns='http://ws.constantcontact.com/ns/1.0/'><id>http://h/</id>\n\
        <Contact><OptInSource>X</OptInSource> é<id>http://h/</id><OptInSource>Y</OptInSource></Contact>\n\
        <id>http://h/a</id></é>";
    let output = run(&["sanitize", "--host", "h", "--format", "json"], body.as_bytes());
    let json: serde_json::Value = serde_json::from_str(&output.stderr).expect("JSON");
    let findings = json["findings"].as_array().expect("findings");
    let mut places = findings
        .iter()
        .map(|it| {
            let number = |name: &str| it[name].as_u64().expect("a number");
            (it["kind"].as_str().expect("a kind"), number("line"), number("column"))
        })
        .collect::<Vec<_>>();
    places.sort_unstable();
    assert_eq!(
        places,
        [
            ("ambiguous", 2, 1),
            ("own_origin", 1, 54),
            ("own_origin", 2, 44),
            ("own_origin", 3, 5),
            ("unknown_value", 2, 10),
            ("unknown_value", 2, 58),
        ]
    );
}

#[test]
fn a_diff_shows_what_changes() {
    let output = run(&["sanitize", "--diff"], RECIPE);
    let diff = String::from_utf8(output.stdout).expect("UTF-8");
    let count = |sign: &str| diff.lines().filter(|line| line.starts_with(sign)).count();
    assert_eq!((count("-  "), count("+  ")), (2, 2), "{diff}");
    assert!(!diff.contains('\x1b'));
    assert!(run(&["sanitize", "--diff"], BARE).stdout.is_empty());
    let checked = run(&["sanitize", "--diff", "--check"], RECIPE);
    assert_eq!((checked.code, checked.stdout), (Some(1), diff.into_bytes()));
}

#[test]
fn what_cannot_be_inspected_comes_out_unchanged_with_the_reason() {
    let long = vec![b'x'; 3 << 20];
    for (body, reason) in
        [(&b"<a>"[..], "malformed"), (b"<!DOCTYPE a><a/>", "doctype"), (&long, "too_large")]
    {
        let output = run(&["sanitize"], body);
        assert_eq!(output.code, Some(0));
        assert!(output.stdout == body, "{reason}");
        assert!(output.stderr.contains(reason), "{}", output.stderr);
    }
}

#[test]
fn the_configuration_is_heeded() {
    let strip = run(&["sanitize", "--set", "sanitize.lists=strip"], RECIPE);
    assert_eq!(String::from_utf8_lossy(&strip.stdout).matches("OptInSource>").count(), 2);
    for (mode, said) in
        [("observe", "2 findings, 0 rewritten"), ("off", "sanitize.mode is \"off\"")]
    {
        let output = run(&["sanitize", "--set", &format!("sanitize.mode={mode}")], RECIPE);
        assert_eq!(output.stdout, RECIPE);
        assert!(output.stderr.contains(said), "{}", output.stderr);
    }
    assert_eq!(run(&["sanitize", "--set", "sanitize.lists=x"], RECIPE).code, Some(2));
}

#[test]
fn a_file_that_is_not_there_is_a_clear_error() {
    let output = run(&["sanitize", "/nowhere/body.xml"], b"");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("/nowhere/body.xml"), "{}", output.stderr);
}

/// Body, settings, body that must come out, findings with whether each was acted on.
type Row = (String, &'static [&'static str], String, &'static [(&'static str, bool)]);

/// SPEC section 1's table through the program: every row with every setting. The details are held by
/// the domain's own tests.
#[test]
fn every_row_of_the_table_holds_under_every_setting() {
    let rows: Vec<Row> = vec![
        (entry(&[C], &[Some(U)]), &[], entry(&[C], &[Some(C)]), &[("list_differs", true)]),
        (entry(&[C], &[Some("")]), &[], entry(&[C], &[Some(C)]), &[("list_differs", true)]),
        (
            entry(&[C], &[Some(U)]),
            &["lists=strip"],
            entry(&[C], &[None]),
            &[("list_differs", true)],
        ),
        (
            entry(&[C], &[Some(U)]),
            &["lists=leave"],
            entry(&[C], &[Some(U)]),
            &[("list_differs", false)],
        ),
        (entry(&[], &[Some(C)]), &[], entry(&[], &[Some(C)]), &[("undeclared", false)]),
        (
            entry(&[""], &[Some(C)]),
            &["undeclared=from-lists"],
            entry(&[C], &[Some(C)]),
            &[("undeclared", true)],
        ),
        (
            entry(&[""], &[None]),
            &["undeclared=customer"],
            entry(&[U], &[None]),
            &[("undeclared", true)],
        ),
        (
            entry(&[""], &[None]),
            &["undeclared=contact"],
            entry(&[C], &[None]),
            &[("undeclared", true)],
        ),
        (entry(&[C, U], &[None]), &[], entry(&[C, U], &[None]), &[("ambiguous", false)]),
        (
            entry(&[C, U], &[None]),
            &["ambiguous=first"],
            entry(&[C, C], &[None]),
            &[("ambiguous", true)],
        ),
        (
            entry(&[C, U], &[None]),
            &["ambiguous=last"],
            entry(&[U, U], &[None]),
            &[("ambiguous", true)],
        ),
        (
            entry(&[C, U], &[None]),
            &["ambiguous=customer"],
            entry(&[U, U], &[None]),
            &[("ambiguous", true)],
        ),
        (
            entry(&[U, ""], &[None]),
            &["ambiguous=contact"],
            entry(&[C, C], &[None]),
            &[("ambiguous", true)],
        ),
        (
            entry(&[], &[Some(C), Some(U)]),
            &[],
            entry(&[], &[Some(C), Some(U)]),
            &[("undeclared", false), ("lists_disagree", false)],
        ),
        (
            entry(&[""], &[Some(C), Some(U)]),
            &["undeclared=customer"],
            entry(&[U], &[Some(U), Some(U)]),
            &[("undeclared", true), ("lists_disagree", true), ("list_differs", true)],
        ),
        (entry(&[C], &[]), &[], entry(&[U], &[]), &[("removal_by_contact", true)]),
        (entry(&[C], &[]), &["removal=leave"], entry(&[C], &[]), &[("removal_by_contact", false)]),
        (entry(&["X"], &[None]), &[], entry(&["X"], &[None]), &[("unknown_value", false)]),
        (
            entry(&["X"], &[None]),
            &["aliases.X=ACTION_BY_CONTACT"],
            entry(&[C], &[None]),
            &[("unknown_value", true)],
        ),
        (
            entry(&[U], &[None]).replace("http://api/", "http://127.0.0.1:8080/"),
            &[],
            entry(&[U], &[None]).replace("http://api/", "http://api.constantcontact.com/"),
            &[("own_origin", true)],
        ),
        (
            entry(&[U], &[None]).replace("http://api/", "http://127.0.0.1:8080/"),
            &["restore_ids=false"],
            entry(&[U], &[None]).replace("http://api/", "http://127.0.0.1:8080/"),
            &[("own_origin", false)],
        ),
        (
            entry(&[C], &[Some(U)]),
            &["mode=observe"],
            entry(&[C], &[Some(U)]),
            &[("list_differs", false)],
        ),
        (entry(&[C], &[Some(U)]), &["mode=off"], entry(&[C], &[Some(U)]), &[]),
    ];
    for (body, settings, expected, findings) in rows {
        let settings: Vec<String> =
            settings.iter().map(|it| format!("--set=sanitize.{it}")).collect();
        let mut arguments = vec!["sanitize", "--format", "json"];
        arguments.extend(settings.iter().map(String::as_str));
        let output = run(&arguments, body.as_bytes());
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{settings:?}");
        let json: serde_json::Value = serde_json::from_str(&output.stderr).expect("JSON");
        let found: Vec<_> = json["findings"].as_array().expect("a list").iter().collect();
        let found: Vec<_> = found
            .iter()
            .map(|it| (it["kind"].as_str().expect("a kind"), it["rewritten"] == true))
            .collect();
        assert_eq!(found, findings, "{settings:?} {body}");
    }
}
