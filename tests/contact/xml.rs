//! What XML does to rewriters, one danger after the other.

use optin_proxy::contact::Kind::{self, ListDiffers};
use optin_proxy::contact::{Policy, Request, Sanitized, Uninspectable, sanitize};

use super::{C, U, UPDATE, entry, inspected, kinds, text};

/// Regression: an element that says that it has no value was given one, and said so still.
#[test]
fn what_was_nil_is_so_no_more_once_it_has_a_value() {
    let around = |node: &str| {
        format!(
            "<Contact xmlns='http://ws.constantcontact.com/ns/1.0/' xmlns:i='http://www.w3.org/2001/XMLSchema-instance'>\
             <OptInSource>{C}</OptInSource><ContactLists><ContactList id='7'>{node}</ContactList></ContactLists></Contact>"
        )
    };
    for (nil, aligned) in [
        ("<OptInSource i:nil='true'/>", "<OptInSource>{}</OptInSource>"),
        ("<OptInSource  i:nil = \"1\" ></OptInSource>", "<OptInSource >{}</OptInSource>"),
        ("<OptInSource i:nil='true'> </OptInSource>", "<OptInSource>{}</OptInSource>"),
        (
            "<OptInSource a='/' i:nil='true' b='\u{e9}'/>",
            "<OptInSource a='/' b='\u{e9}'>{}</OptInSource>",
        ),
        // Neither is nil.
        ("<OptInSource i:nil='false'/>", "<OptInSource i:nil='false'>{}</OptInSource>"),
        ("<OptInSource a=':nil'></OptInSource>", "<OptInSource a=':nil'>{}</OptInSource>"),
    ] {
        let contact = inspected(&around(nil), &UPDATE, &Policy::default());
        assert_eq!(kinds(&contact), [(ListDiffers, true)], "{nil}");
        assert_eq!(text(&contact), around(&aligned.replace("{}", C)), "{nil}");
    }
    // Nothing is declared, and nothing is made of that.
    let body = around("").replacen(
        &format!("<OptInSource>{C}</OptInSource>"),
        "<OptInSource i:nil='true'/>",
        1,
    );
    let contact = inspected(&body, &UPDATE, &Policy::default());
    assert_eq!((kinds(&contact), text(&contact)), (vec![(Kind::Undeclared, false)], body));
}

#[test]
fn only_values_change_whatever_stands_around_them() {
    let body = entry(&[C], &[Some(U), None]);
    let expected = |body: &[u8]| {
        let text: String = body.iter().map(|byte| char::from(*byte)).collect();
        text.replace(U, C).chars().map(|char| char as u8).collect::<Vec<u8>>()
    };
    let wide = |attribute: usize| format!("<entry a='{}' ", "x".repeat(attribute));
    let many = |what: &str, count: usize| {
        (0..count).map(|it| what.replace('#', &it.to_string())).collect::<String>()
    };
    let in_entry =
        |what: &str| body.replacen("<entry ", &format!("<entry {what} "), 1).into_bytes();
    let after_entry = |what: &str| {
        body.replacen("<ContactLists>", &format!("{what}<ContactLists>"), 1).into_bytes()
    };
    let before = |what: &[u8]| [what, body.as_bytes()].concat();
    for (name, body) in [
        (
            "a million bytes of an attribute",
            body.replacen("<entry ", &wide(1_000_000), 1).into_bytes(),
        ),
        ("a million bytes of a comment", after_entry(&format!("<!--{}-->", "x".repeat(1_000_000)))),
        ("100,000 attributes", in_entry(&many("a#='' ", 100_000))),
        ("an attribute twice", in_entry("a='1' a='2'")),
        ("]]> in text", after_entry("<Note>a]]>b</Note>")),
        ("-- in a comment", after_entry("<!-- a -- b -->")),
        ("a control character", after_entry("<Note>\u{1}</Note>")),
        (
            "overlong UTF-8",
            after_entry("<Note>Z</Note>")
                .into_iter()
                .flat_map(|byte| if byte == b'Z' { vec![0xC0, 0xAF] } else { vec![byte] })
                .collect(),
        ),
        ("a DOCTYPE in an instruction", before(b"<?php <!DOCTYPE a> ?>")),
        ("XML 1.1", before(b"<?xml version='1.1'?>")),
        ("windows-1252", {
            let noted = after_entry("<Note>Z</Note>");
            let noted = noted.into_iter().map(|byte| if byte == b'Z' { 0x93 } else { byte });
            [&b"<?xml version='1.0' encoding='windows-1252'?>"[..], &noted.collect::<Vec<u8>>()]
                .concat()
        }),
        ("a namespace with a reference", {
            let name = "http://ws.constantcontact.com/ns/1.0/";
            body.replace(name, "http://ws.constantcontact.com/ns/1&#46;0/").into_bytes()
        }),
        ("a namespace of references with zeros before their numbers", {
            let name = "http://ws.constantcontact.com/ns/1.0/";
            let written: String = name.bytes().map(|byte| format!("&#x{byte:012X};")).collect();
            body.replace(name, &written).into_bytes()
        }),
    ] {
        let Sanitized::Contact(contact) =
            sanitize(&body.clone().into(), &UPDATE, &Policy::default())
        else {
            panic!("{name} is not inspected");
        };
        assert_eq!(kinds(&contact), [(ListDiffers, true)], "{name}");
        assert!(contact.body == expected(&body), "{name}");
    }
}

#[test]
fn what_no_reader_here_can_be_sure_of_is_not_touched() {
    let body = entry(&[C], &[Some(U)]);
    let wide = |width: usize| {
        body.bytes()
            .flat_map(|byte| (0..width).map(move |at| if at == 0 { byte } else { 0 }))
            .collect::<Vec<u8>>()
    };
    let declared =
        |encoding: &str| format!("<?xml version='1.0' encoding='{encoding}'?>{body}").into_bytes();
    let namespaces: String = (0..200).map(|it| format!("xmlns:n{it}='u' ")).collect();
    for (name, body, reason) in [
        ("UTF-16 without a mark", wide(2), Uninspectable::Encoding),
        ("UTF-32 without a mark", wide(4), Uninspectable::Encoding),
        ("UTF-7", declared("utf-7"), Uninspectable::Encoding),
        ("ISO-2022-JP", declared("iso-2022-jp"), Uninspectable::Encoding),
        ("EBCDIC", b"\x4C\x6F\xA7\x94\x93".to_vec(), Uninspectable::Encoding),
        (
            "an external entity",
            format!("<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>{body}").into(),
            Uninspectable::Doctype,
        ),
        (
            "a parameter entity",
            format!("<!DOCTYPE a [<!ENTITY % e 'x'> %e;]>{body}").into(),
            Uninspectable::Doctype,
        ),
        (
            "more namespaces than are kept in mind",
            body.replacen("<entry ", &format!("<entry {namespaces}"), 1).into(),
            Uninspectable::Malformed,
        ),
    ] {
        match sanitize(&body.into(), &UPDATE, &Policy::default()) {
            Sanitized::Uninspectable(found) => assert_eq!(found, reason, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    // Each reader of it may take another of the two, so both have to be such that ASCII is ASCII.
    let request = Request { charset: Some("utf-16"), ..UPDATE };
    let found = sanitize(&declared("utf-8").into(), &request, &Policy::default());
    assert!(matches!(found, Sanitized::Uninspectable(Uninspectable::Encoding)));
}

#[test]
fn what_no_xml_may_hold_is_malformed_and_only_four_characters_are_white_space() {
    let body = entry(&[C], &[Some(U)]);
    for (name, body) in [
        ("CDATA behind the root", format!("{body}<![CDATA[x]]>")),
        ("a reference behind the root", format!("{body}&amp;")),
        ("a reference to no character", entry(&[&format!("&#0;{C}")], &[Some(U)])),
    ] {
        let sanitized = sanitize(&body.into(), &UPDATE, &Policy::default());
        let is_malformed = matches!(sanitized, Sanitized::Uninspectable(Uninspectable::Malformed));
        assert!(is_malformed, "{name}: {sanitized:?}");
    }
    let fed = entry(&[&format!("\u{c}{C}")], &[Some(U)]);
    let contact = inspected(&fed, &UPDATE, &Policy::default());
    assert_eq!(kinds(&contact), [(Kind::UnknownValue, false)]);
}
