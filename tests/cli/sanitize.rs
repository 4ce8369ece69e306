//! `optin-proxy sanitize`, as a support engineer uses it.

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

#[test]
fn a_diff_shows_what_changes() {
    let output = run(&["sanitize", "--diff"], RECIPE);
    let diff = String::from_utf8(output.stdout).expect("UTF-8");
    let count = |sign: &str| diff.lines().filter(|line| line.starts_with(sign)).count();
    assert_eq!((count("-  "), count("+  ")), (2, 2), "{diff}");
    assert!(!diff.contains('\x1b'));
    assert!(run(&["sanitize", "--diff"], BARE).stdout.is_empty());
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
    for mode in ["observe", "off"] {
        let output = run(&["sanitize", "--set", &format!("sanitize.mode={mode}")], RECIPE);
        assert_eq!(output.stdout, RECIPE);
    }
    assert_eq!(run(&["sanitize", "--set", "sanitize.lists=x"], RECIPE).code, Some(2));
}

#[test]
fn a_file_that_is_not_there_is_a_clear_error() {
    let output = run(&["sanitize", "/nowhere/body.xml"], b"");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("/nowhere/body.xml"), "{}", output.stderr);
}
