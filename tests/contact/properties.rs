//! What holds for every body, over generated documents and over arbitrary bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use optin_proxy::contact::{
    Ambiguous, Bridge, Kind, Lists, Mode, NAMESPACE, Policy, Removal, Request, Sanitized, Source,
    Undeclared, sanitize,
};
use proptest::prelude::*;
use proptest::sample::select;
use roxmltree::Document;

use super::reference::{contacts, opinion, skeleton, sources, value};
use super::{C, U};

/// A value in one of the ways that XML allows to write it.
fn spelled() -> impl Strategy<Value = String> {
    let value = select(vec![
        C,
        C,
        C,
        U,
        U,
        U,
        "",
        "ACTION_BY_CLIENT",
        "action_by_contact",
        "é",
        // What is left of a known value where bytes beyond ASCII are masked.
        "ACTION\u{a0}BY\u{a0}CONTACT",
        "ACTIONzBYzCONTACT",
    ]);
    let space = select(vec!["", "", " ", "\r\n\t", "&#32;", "<![CDATA[ ]]>", "<!-- -->"]);
    (value, space.clone(), space, 0..6usize, 0..17usize).prop_map(
        |(value, before, after, way, at)| {
            let at = at.min(value.len());
            let (head, tail) =
                if value.is_char_boundary(at) { value.split_at(at) } else { (value, "") };
            let value = match way {
                0 if !head.is_empty() => format!("<![CDATA[{head}]]>{tail}"),
                1 if !tail.is_empty() => format!("{head}<![CDATA[ {tail}]]>").replace("[ ", "["),
                2 => format!("{head}<!-- {C} --><?who {U}?>{tail}"),
                3 if tail.is_ascii() && !tail.is_empty() => {
                    format!("{head}&#x{:x};{}", tail.as_bytes()[0], &tail[1..])
                }
                _ => value.to_owned(),
            };
            format!("{before}{value}{after}")
        },
    )
}

#[derive(Debug, Clone, Copy)]
enum Plain {
    Nothing,
    Time,
    AnotherSource,
    NoSource,
}

#[derive(Debug, Clone)]
enum Part {
    Source(String),
    EmptySource,
    Lists(Vec<(Vec<String>, bool)>),
    /// As most clients write them, most of them alike: a number, what else is in the list, and its source.
    Plain(Vec<(u32, Plain, &'static str)>),
    Noise(&'static str),
}

fn part() -> impl Strategy<Value = Part> {
    let noise = select(vec![
        "<@Note>OptInSource: ACTION_BY_CONTACT, caf\u{e9} &amp; more</@Note>",
        "<!-- <@OptInSource>ACTION_BY_CONTACT</@OptInSource> -->",
        "<@Note><![CDATA[<@OptInSource>ACTION_BY_CONTACT</@OptInSource>]]></@Note>",
        "<?keep <@OptInSource>ACTION_BY_CONTACT</@OptInSource>?>",
        "<f:OptInSource xmlns:f='urn:f'>ACTION_BY_CONTACT</f:OptInSource>",
        "<@Deeper><@OptInSource>ACTION_BY_CONTACT</@OptInSource></@Deeper>",
        "<@City name=\"<@OptInSource>\u{fc}\"/>",
        "  some text\r\n",
        "<@EmailAddress\n a='>'>x@example.org</@EmailAddress>",
        "<@Confirmed/>",
        "<@id> http://proxy:1/x</@id>",
        "<@link id='http://proxy:1' href='http://proxy:1/y'/>",
    ]);
    use Plain::{AnotherSource, NoSource, Nothing, Time};
    let plain = select(vec![Nothing, Nothing, Nothing, Nothing, Time, AnotherSource, NoSource]);
    prop_oneof![
        3 => spelled().prop_map(Part::Source),
        1 => Just(Part::EmptySource),
        3 => prop::collection::vec((prop::collection::vec(spelled(), 0..2), any::<bool>()), 0..4)
            .prop_map(Part::Lists),
        3 => prop::collection::vec((0..2000_u32, plain, select(vec![U, U, U, C])), 0..8).prop_map(Part::Plain),
        4 => noise.prop_map(Part::Noise),
    ]
}

/// A document, and how it is to be encoded.
fn document() -> impl Strategy<Value = Bytes> {
    let contact = (prop::collection::vec(part(), 0..6), any::<bool>());
    (prop::collection::vec(contact, 1..3), 0..3usize).prop_map(|(contacts, encoding)| {
        let mut text = String::from("<feed xmlns='http://www.w3.org/2005/Atom'>\r\n");
        for (parts, prefixed) in contacts {
            let prefix = if prefixed { "c:" } else { "" };
            let declaration = if prefixed { "xmlns:c" } else { "xmlns" };
            text.push_str(&format!("<entry><{prefix}Contact {declaration}=\"{NAMESPACE}\">"));
            for part in parts {
                text.push_str(&write(&part).replace('@', prefix));
            }
            text.push_str(&format!("</{prefix}Contact></entry>"));
        }
        text.push_str("</feed>\n");
        // Markup is not allowed in an attribute's value.
        let text = text.replace("name=\"<", "name=\"");
        match encoding {
            0 => Bytes::from(text),
            1 => Bytes::from(format!("\u{FEFF}{text}")),
            _ => {
                let prolog = "<?xml version='1.0' encoding='ISO-8859-1'?>";
                prolog
                    .chars()
                    .chain(text.chars())
                    .map(|char| char as u8)
                    .collect::<Vec<u8>>()
                    .into()
            }
        }
    })
}

fn write(part: &Part) -> String {
    match part {
        Part::Source(value) => {
            format!("<@OptInSource id='http://proxy:1/s'>{value}</@OptInSource>")
        }
        Part::EmptySource => "<@OptInSource />".to_owned(),
        Part::Noise(noise) => (*noise).to_owned(),
        Part::Plain(lists) => {
            let mut text = String::from("<@ContactLists>");
            for (number, what, source) in lists {
                let source = format!("<@OptInSource>{source}</@OptInSource>");
                let content = match what {
                    Plain::Nothing => source,
                    Plain::Time => source + "<@OptInTime>2010</@OptInTime>",
                    Plain::AnotherSource => format!("{source}<@OptInSource>{C}</@OptInSource>"),
                    Plain::NoSource => String::new(),
                };
                text.push_str(&format!(
                    "<@ContactList id=\"http://api.constantcontact.com/ws/lists/{number}\">{content}</@ContactList>\n"
                ));
            }
            text + "</@ContactLists>"
        }
        Part::Lists(lists) => {
            let mut text = String::from("<@ContactLists>");
            for (sources, timed) in lists {
                text.push_str("<@ContactList id='https://PROXY:1/7'>");
                for value in sources {
                    text.push_str(&format!(
                        "<@OptInSource id='http://proxy:1'>{value}</@OptInSource>"
                    ));
                }
                if *timed {
                    text.push_str("<@OptInTime id='http://proxy:1/'>2010</@OptInTime>");
                }
                text.push_str("</@ContactList>");
            }
            text + "</@ContactLists>"
        }
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        select(vec![Lists::Align, Lists::Strip, Lists::Leave]),
        select(vec![
            Undeclared::Leave,
            Undeclared::FromLists,
            Undeclared::Customer,
            Undeclared::Contact,
        ]),
        select(vec![
            Ambiguous::Leave,
            Ambiguous::First,
            Ambiguous::Last,
            Ambiguous::Customer,
            Ambiguous::Contact,
        ]),
        select(vec![Removal::Customer, Removal::Leave]),
        select(vec![Mode::Enforce, Mode::Enforce, Mode::Observe]),
        any::<bool>(),
    )
        .prop_map(|(lists, undeclared, ambiguous, removal, mode, alias)| {
            let aliases = if alias {
                BTreeMap::from([("ACTION_BY_CLIENT".to_owned(), Source::Contact)])
            } else {
                BTreeMap::new()
            };
            Policy { mode, lists, undeclared, ambiguous, removal, keep_own_ids: false, aliases }
        })
}

/// The text of a document, whatever its encoding: as another parser wants it, and with ids restored
/// (the second opinion is about sources only).
fn decoded(body: &[u8]) -> String {
    restored(&raw_text(body))
}

fn restored(text: &str) -> String {
    let mut text = text.to_owned();
    for (before, own) in
        [("id='", "http://proxy:1"), ("id='", "https://PROXY:1"), ("id> ", "http://proxy:1")]
    {
        text = text
            .replace(&format!("{before}{own}"), &format!("{before}http://api.constantcontact.com"));
    }
    text
}

fn raw_text(body: &[u8]) -> String {
    match std::str::from_utf8(body) {
        Ok(text) => text.trim_start_matches('\u{FEFF}').to_owned(),
        Err(_) => body.iter().map(|&byte| byte as char).collect(),
    }
}

fn request(update: bool) -> Request<'static> {
    Request { update, own_host: Some("proxy:1"), charset: None }
}

/// The bytes in which something may change: sources and times within contacts, and ids.
fn may_change(body: &[u8]) -> Vec<Range<usize>> {
    let text = raw_text(body);
    // From the text's offsets to the body's: a byte-order mark is not in the text, and where a byte is a
    // character, the text may take two for it.
    let at = |offset: usize| match std::str::from_utf8(body) {
        Ok(whole) => offset + whole.len() - text.len(),
        Err(_) => text[..offset].chars().count(),
    };
    let document = Document::parse(&text).expect("the generator writes XML");
    let mut ranges = Vec::new();
    for node in document.descendants().filter(|node| node.is_element()) {
        if ["OptInSource", "OptInTime"].iter().any(|name| node.has_tag_name((NAMESPACE, *name)))
            || node.tag_name().name() == "id"
        {
            ranges.push(node.range());
        }
        ranges.extend(node.attributes().filter(|it| it.name() == "id").map(|it| it.range_value()));
    }
    ranges.into_iter().map(|range| at(range.start)..at(range.end)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_default_policy_does_what_a_second_opinion_says(body in document(), update: bool) {
        let Sanitized::Contact(contact) = sanitize(&body, &request(update), &Policy::default()) else {
            return Err(TestCaseError::fail("not inspected"));
        };
        let (before, after) = (decoded(&body), decoded(&contact.body));
        let before = Document::parse(&before).expect("the generator writes XML");
        let after = Document::parse(&after).expect("still XML");
        let expected = opinion(&before, update);

        let mut found = BTreeMap::new();
        for finding in contact.findings.iter().filter(|finding| finding.kind != Kind::OwnOrigin) {
            *found.entry(finding.kind.as_str()).or_insert(0) += 1;
        }
        prop_assert_eq!(found, expected.findings);

        let said: Vec<_> = contacts(&after)
            .flat_map(|contact| { let (declared, listed) = sources(contact); declared.into_iter().chain(listed) })
            .map(|node| value(node).unwrap_or_default())
            .collect();
        let must_say: Vec<_> = contacts(&before)
            .flat_map(|contact| { let (declared, listed) = sources(contact); declared.into_iter().chain(listed) })
            .map(|node| expected.values[&node.id().get_usize()].clone())
            .collect();
        prop_assert_eq!(said, must_say);
        prop_assert_eq!(skeleton(&before, false), skeleton(&after, false));
    }

    #[test]
    fn the_default_policy_never_claims_more_consent_than_was_declared(body in document(), update: bool) {
        let Sanitized::Contact(contact) = sanitize(&body, &request(update), &Policy::default()) else {
            return Err(TestCaseError::fail("not inspected"));
        };
        let (before, after) = (decoded(&body), decoded(&contact.body));
        let before = Document::parse(&before).expect("the generator writes XML");
        let after = Document::parse(&after).expect("still XML");
        for (before, after) in contacts(&before).zip(contacts(&after)) {
            let values = |nodes: Vec<roxmltree::Node<'_, '_>>| nodes.into_iter().map(value).collect::<Vec<_>>();
            let declared = values(sources(before).0);
            let one_declaration = !declared.is_empty() && declared.iter().all(|value| value.as_deref() == Some(C));
            let claims = |nodes: (Vec<_>, Vec<_>)| {
                nodes.0.into_iter().chain(nodes.1).filter(|node| value(*node).as_deref() == Some(C)).count()
            };
            if claims(sources(after)) > claims(sources(before)) {
                prop_assert!(one_declaration);
            }
        }
    }

    #[test]
    fn under_any_policy_the_result_has_nothing_left_to_act_on(body in document(), update: bool, policy in any_policy()) {
        let Sanitized::Contact(once) = sanitize(&body, &request(update), &policy) else {
            return Err(TestCaseError::fail("not inspected"));
        };
        let Sanitized::Contact(twice) = sanitize(&once.body, &request(update), &policy) else {
            return Err(TestCaseError::fail("no longer inspectable"));
        };
        prop_assert!(twice.edits.is_empty());
        prop_assert!(twice.findings.iter().all(|finding| !finding.acted_on()));
        prop_assert_eq!(twice.body.as_ptr(), once.body.as_ptr());
        prop_assert_eq!(twice.claims_contact, once.claims_contact);
        if policy.mode == Mode::Observe {
            prop_assert_eq!(&once.body, &body);
        }
        if once.edits.is_empty() {
            prop_assert_eq!(once.body.as_ptr(), body.as_ptr());
            prop_assert!(once.findings.iter().all(|finding| !finding.acted_on()));
        }
    }

    #[test]
    fn under_any_policy_all_but_sources_and_times_stays(body in document(), update: bool, policy in any_policy()) {
        let Sanitized::Contact(contact) = sanitize(&body, &request(update), &policy) else {
            return Err(TestCaseError::fail("not inspected"));
        };
        let (before, after) = (decoded(&body), decoded(&contact.body));
        let before = Document::parse(&before).expect("the generator writes XML");
        let after = Document::parse(&after).expect("still XML");
        prop_assert_eq!(skeleton(&before, true), skeleton(&after, true));
        if update && policy.removal == Removal::Customer && policy.mode == Mode::Enforce {
            for contact in contacts(&after) {
                let (declared, _) = sources(contact);
                let declared: Vec<_> = declared.into_iter().map(value).collect();
                let removal = !contact.descendants().any(|node| node.has_tag_name((NAMESPACE, "ContactList")));
                let by_contact = !declared.is_empty() && declared.iter().all(|value| value.as_deref() == Some(C));
                prop_assert!(!(removal && by_contact));
            }
        }
    }

    #[test]
    fn under_any_policy_each_byte_outside_sources_times_and_ids_is_the_clients_own(body in document(), update: bool, policy in any_policy()) {
        let Sanitized::Contact(contact) = sanitize(&body, &request(update), &policy) else {
            return Err(TestCaseError::fail("not inspected"));
        };
        let may_change = may_change(&body);
        let (mut before, mut after) = (0, 0);
        for (span, with, bridge) in contact.edits.iter() {
            let span = span.range();
            // A contact without a declaration may be given one.
            let is_new = span.is_empty() && with.as_str().starts_with('<') && policy.undeclared != Undeclared::Leave;
            let is_allowed = is_new || may_change.iter().any(|range| range.start <= span.start && span.end <= range.end);
            prop_assert!(is_allowed, "{:?} is in none of {:?}", span, may_change);
            // What stands between two edits is the same, and where the one before it ended.
            let kept = &body[before..span.start];
            prop_assert_eq!(&contact.body[after..after + kept.len()], kept);
            after += kept.len();
            prop_assert!(contact.body[after..].starts_with(with.as_str().as_bytes()));
            after += with.as_str().len();
            let bridge = ["]]>", "<![CDATA["].into_iter().find(|it| bridge != Bridge::None && contact.body[after..].starts_with(it.as_bytes()));
            after += bridge.map_or(0, str::len);
            before = span.end;
        }
        prop_assert_eq!(&contact.body[after..], &body[before..]);
    }

    #[test]
    fn arbitrary_bytes_are_passed_on_or_refused_but_never_panic(
        body in prop::collection::vec(any::<u8>(), 0..40),
        // Of what markup is made of, so that the readers do not stop at the first byte.
        markup in prop::collection::vec(select(b"<>/&;#!?-[]\"'= \n:xmlnsaContOpIdS9\xe9".to_vec()), 0..400),
        within: bool,
        update: bool,
        policy in any_policy(),
    ) {
        let (start, end) = match within {
            true => (&b"<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><OptInSource>"[..], &b"</OptInSource></Contact>"[..]),
            false => (&b"<"[..], &b""[..]),
        };
        let body = [start, &markup, &body, end].concat();
        let _ = sanitize(&body.into(), &request(update), &policy);
    }

    #[test]
    fn damaged_documents_never_panic_and_never_get_worse(
        body in document(),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0..3usize, select(vec!["", "<", ">", "&", "]]>", "<![CDATA[", "\"", "/>", "<!--", "\0", "<!DOCTYPE x>", "</c:Contact>"])), 1..4),
        policy in any_policy(),
    ) {
        let mut damaged = body.to_vec();
        for (at, length, inserted) in cuts {
            let at = at.index(damaged.len() + 1);
            let end = (at + length).min(damaged.len());
            damaged.splice(at..end, inserted.bytes());
        }
        let damaged = Bytes::from(damaged);
        if let Sanitized::Contact(once) = sanitize(&damaged, &request(true), &policy) {
            let again = sanitize(&once.body, &request(true), &policy);
            prop_assert!(matches!(again, Sanitized::Contact(twice) if twice.edits.is_empty()));
        }
    }
}
