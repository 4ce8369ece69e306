//! Pairs of bodies: the shapes that real clients send, and what must come out, byte for byte.

use std::path::PathBuf;

use bytes::Bytes;
use optin_proxy::contact::{Kind, Policy, Request, Sanitized, Uninspectable, sanitize};

use Kind::{Ambiguous, ListDiffers, ListsDisagree, OwnOrigin, RemovalByContact, Undeclared};

/// The proxy's address in `own-origin.xml`.
const OWN_HOST: &str = "127.0.0.1:8080";

enum Expected {
    Findings(&'static [Kind]),
    Uninspectable(Uninspectable),
    NoContact,
}

const fn findings(kinds: &'static [Kind]) -> Expected {
    Expected::Findings(kinds)
}

const fn malformed() -> Expected {
    Expected::Uninspectable(Uninspectable::Malformed)
}

/// File, whether it is a PUT, what is found, and whether `out/` holds what must come out (else the very
/// same bytes must).
const CORPUS: &[(&str, bool, Expected, bool)] = &[
    ("recipe", true, findings(&[ListDiffers, ListDiffers]), true),
    ("reverse", true, findings(&[ListDiffers, ListDiffers]), true),
    ("prefixed", false, findings(&[ListDiffers]), true),
    ("contradictory", true, findings(&[Ambiguous]), false),
    ("equal-copies", true, findings(&[]), false),
    ("echo-undeclared", true, findings(&[Undeclared]), false),
    ("mixed-undeclared", true, findings(&[Undeclared, ListsDisagree]), false),
    ("empty-node", true, findings(&[Undeclared]), false),
    ("own-origin", true, findings(&[OwnOrigin, OwnOrigin, OwnOrigin]), true),
    ("removal", true, findings(&[RemovalByContact]), true),
    ("removal", false, findings(&[]), false),
    ("latin1", true, findings(&[ListDiffers]), true),
    ("raw-ampersand", true, malformed(), false),
    ("byte-order-mark", true, findings(&[ListDiffers]), true),
    ("character-references", true, findings(&[ListDiffers]), true),
    ("comment-in-value", true, findings(&[ListDiffers]), true),
    ("cdata-border", true, findings(&[ListDiffers, ListDiffers]), true),
    ("latin1-without-prolog", true, findings(&[ListDiffers]), true),
    ("line-break-in-attribute", true, findings(&[ListDiffers]), true),
    ("child-element", true, findings(&[ListDiffers]), true),
    ("prefixed-empty-node", true, findings(&[ListDiffers]), true),
    ("two-contacts", true, findings(&[ListDiffers, ListDiffers]), true),
    ("unknown-reference-elsewhere", true, findings(&[ListDiffers]), true),
    ("rebound-prefix", true, findings(&[]), false),
    ("foreign-namespace", true, Expected::NoContact, false),
    ("campaign", true, Expected::NoContact, false),
    ("malformed-two-roots", true, malformed(), false),
    ("malformed-truncated", true, malformed(), false),
    ("malformed-mismatched", true, malformed(), false),
    ("malformed-text-outside", true, malformed(), false),
    ("malformed-bare-less-than", true, malformed(), false),
    ("malformed-unknown-reference-in-value", true, malformed(), false),
    ("malformed-unterminated-cdata", true, malformed(), false),
    ("malformed-empty", true, malformed(), false),
    ("malformed-json", true, malformed(), false),
    ("malformed-bare-ampersand-in-attribute", true, malformed(), false),
    ("doctype", true, Expected::Uninspectable(Uninspectable::Doctype), false),
    ("utf16", true, Expected::Uninspectable(Uninspectable::Encoding), false),
    ("shift-jis", true, Expected::Uninspectable(Uninspectable::Encoding), false),
];

fn file(folder: &str, name: &str) -> Bytes {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let path = root.join(folder).join(format!("{name}.xml"));
    Bytes::from(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

#[test]
fn every_shape_of_the_corpus_comes_out_as_it_must() {
    for (name, update, expected, edited) in CORPUS {
        let body = file("in", name);
        let request = Request { update: *update, own_host: Some(OWN_HOST), charset: None };
        match (sanitize(&body, &request, &Policy::default()), expected) {
            (Sanitized::Contact(contact), Expected::Findings(kinds)) => {
                let found: Vec<Kind> =
                    contact.findings.iter().map(|finding| finding.kind).collect();
                assert_eq!(found, *kinds, "{name}");
                if *edited {
                    let out = file("out", name);
                    let (got, want) = (contact.body.escape_ascii(), out.escape_ascii());
                    assert_eq!(got.to_string(), want.to_string(), "{name}");
                } else {
                    assert_eq!(contact.body.as_ptr(), body.as_ptr(), "{name}: copied for nothing");
                    assert_eq!(contact.body, body, "{name}");
                }
            }
            (Sanitized::Uninspectable(reason), Expected::Uninspectable(expected)) => {
                assert_eq!(reason, *expected, "{name}");
            }
            (Sanitized::NoContact, Expected::NoContact) => {}
            (other, _) => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn every_file_of_the_corpus_is_listed() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/in");
    for file in std::fs::read_dir(root).expect("the corpus is there") {
        let name = file.expect("it can be read").file_name().into_string().expect("ASCII names");
        let name = name.trim_end_matches(".xml");
        assert!(CORPUS.iter().any(|(listed, ..)| *listed == name), "{name} is not in CORPUS");
    }
}
