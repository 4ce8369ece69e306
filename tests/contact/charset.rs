//! Bodies that are not UTF-8.

use optin_proxy::contact::Kind::{Ambiguous, UnknownValue};
use optin_proxy::contact::{Policy, Request, Sanitized, Source, Uninspectable, sanitize};

use super::{C, CREATE, U, UPDATE, entry, kinds};

/// A text's characters as the bytes of ISO-8859-1.
fn latin(text: &str) -> bytes::Bytes {
    text.chars().map(|char| char as u8).collect::<Vec<u8>>().into()
}

#[test]
fn the_charset_of_the_header_counts() {
    let body = bytes::Bytes::from(entry(&[C], &[Some(U)]));
    for (charset, inspected) in [
        ("utf-8", true),
        ("US-ASCII", true),
        ("iso-8859-15", true),
        ("windows-1251", true),
        ("EUC-JP", true),
        ("utf-16", false),
        ("Shift_JIS", false),
        ("iso-2022-jp", false),
        ("cp037", false),
    ] {
        let request = Request { charset: Some(charset), ..UPDATE };
        let sanitized = sanitize(&body, &request, &Policy::default());
        assert_eq!(matches!(sanitized, Sanitized::Contact(_)), inspected, "{charset}");
    }
}

/// Regression: bytes beyond ASCII were masked by underscores, which made a known value of this one.
#[test]
fn a_value_with_other_bytes_in_it_is_unknown() {
    let body = entry(&["ACTION\u{a0}BY\u{a0}CONTACT"], &[Some(U)]);
    let body = latin(&body);
    let Sanitized::Contact(contact) = sanitize(&body, &UPDATE, &Policy::default()) else {
        panic!("it can be inspected")
    };
    assert_eq!(kinds(&contact), [(UnknownValue, false)]);
    assert_eq!(contact.body, body);
    assert!(!contact.claims_contact);
}

/// A name beyond ASCII in a legacy charset can be told from no other such name. Regression: a prefix that stood for another
/// namespace took the place of the schema's, so that a contradiction passed for a declaration.
#[test]
fn names_that_cannot_be_read_are_not_guessed() {
    let schema = "http://ws.constantcontact.com/ns/1.0/";
    let plain = entry(&[C], &[Some(U)]);
    for body in [
        format!("<\u{e9}:Contact xmlns:\u{e9}='{schema}'/>"),
        format!(
            "<Contact xmlns='{schema}' xmlns:z='{schema}' xmlns:\u{e9}='urn:x'><OptInSource>{C}</OptInSource><z:OptInSource>{U}</z:OptInSource><ContactLists><ContactList><OptInSource>{U}</OptInSource></ContactList></ContactLists></Contact>"
        ),
        plain.replace("<ContactLists>", "<Caf\u{e9}></Caf\u{e8}><ContactLists>"),
        plain.replace("<ContactLists>", "<Cafz></Caf\u{e8}><ContactLists>"),
        plain.replace("<ContactLists>", "<ContactLists \u{e9}='x'>"),
    ] {
        let body = latin(&body);
        let sanitized = sanitize(&body, &UPDATE, &Policy::default());
        assert!(
            matches!(sanitized, Sanitized::Uninspectable(Uninspectable::Encoding)),
            "{sanitized:?}"
        );
    }
    // In a value of an attribute they are nobody's name.
    let body = plain.replace("<ContactLists>", "<ContactLists x='\u{e9}\"' y=\"'\u{e9}\">");
    let body = latin(&body);
    let sanitized = sanitize(&body, &UPDATE, &Policy::default());
    assert!(matches!(sanitized, Sanitized::Contact(_)), "{sanitized:?}");
}

/// Regression: letters beyond ASCII were all one, so that other values passed for equal ones, and an alias was known by none.
#[test]
fn values_are_compared_as_what_their_charset_makes_of_them() {
    let mut policy = Policy::default();
    policy.aliases.insert("S\u{ed}".into(), Source::Contact);
    let kinds_of = |declared: &[&str], charset| {
        let request = Request { charset, ..UPDATE };
        let body = latin(&entry(declared, &[None]));
        let Sanitized::Contact(contact) = sanitize(&body, &request, &policy) else {
            panic!("{declared:?} can be inspected")
        };
        kinds(&contact)
    };
    let unknown = (UnknownValue, false);
    for charset in [None, Some("iso-8859-1"), Some("utf-8")] {
        let differ = kinds_of(&["\u{e9}", "\u{e8}"], charset);
        assert_eq!(differ, [(Ambiguous, false), unknown, unknown], "{charset:?}");
        assert_eq!(kinds_of(&["\u{e9}", "&#233;"], charset), [unknown, unknown], "{charset:?}");
        assert_eq!(kinds_of(&["S\u{ed}"], charset), [(UnknownValue, true)], "{charset:?}");
    }
    // A soft hyphen, in the charset of the message.
    assert_eq!(kinds_of(&["S\u{ed}"], Some("iso-8859-5")), [unknown]);
    assert_eq!(kinds_of(&["\u{e9}", "&#x449;"], Some("iso-8859-5")), [unknown, unknown]);
    // Two bytes that would be one letter in UTF-8 are two.
    assert_eq!(kinds_of(&["\u{c3}\u{a9}", "&#xe9;&#xff;\u{ff}"], None).len(), 3);
}

#[test]
fn what_the_document_declares_counts_where_the_message_says_nothing() {
    let mut policy = Policy::default();
    policy.aliases.insert("\u{449}".into(), Source::Contact);
    let body = format!("<?xml version='1.0' encoding='ISO-8859-5'?>{}", entry(&["\u{e9}"], &[]));
    for (charset, is_alias) in [(None, true), (Some("iso-8859-1"), false)] {
        let request = Request { charset, ..CREATE };
        let Sanitized::Contact(contact) = sanitize(&latin(&body), &request, &policy) else {
            panic!("it can be inspected")
        };
        assert_eq!(kinds(&contact), [(UnknownValue, is_alias)], "{charset:?}");
    }
}

/// Regression: the letters behind it were looked at first, as a name's.
#[test]
fn a_bare_angle_bracket_among_letters_of_a_legacy_charset_is_malformed() {
    let body =
        entry(&[C], &[Some(U)]).replace("<ContactLists>", "Caf\u{e9} < cr\u{e8}me<ContactLists>");
    let sanitized = sanitize(&latin(&body), &UPDATE, &Policy::default());
    assert!(
        matches!(sanitized, Sanitized::Uninspectable(Uninspectable::Malformed)),
        "{sanitized:?}"
    );
}
