//! The plain reader held against the general one.

use super::super::{Bridge, Fit, MAX_DEPTH, Node, plain_text, read_generally};
use super::*;
use crate::contact::policy::plan;
use crate::contact::{Lists, Policy, Undeclared};
use proptest::prelude::*;
use proptest::sample::select;

/// Where the plain reader answers, its answer is the general one's.
fn agree(body: &[u8], own_host: Option<&str>) -> bool {
    let Some(plain) = plain_text(body, None).and_then(|text| read(text, own_host)) else {
        return false;
    };
    let general = read_generally(body, None, own_host).expect("it is plain");
    for policy in policies() {
        // The same is found, in the same places, and the same is done about it.
        let (plan, expected) = (plan(&plain, true, &policy), plan(&general, true, &policy));
        assert_eq!(plan, expected, "{}", body.escape_ascii());
    }
    assert_eq!(one_by_one(plain), general, "{}", body.escape_ascii());
    true
}

fn policies() -> impl Iterator<Item = Policy> {
    let both = [
        (Undeclared::Contact, Lists::Align),
        (Undeclared::Contact, Lists::Strip),
        (Undeclared::FromLists, Lists::Leave),
    ];
    both.into_iter().map(|(undeclared, lists)| Policy { undeclared, lists, ..Policy::default() })
}

/// The same document, with a node of its own in the place of each copy.
fn one_by_one(mut document: Document) -> Document {
    let mut nodes = Vec::new();
    for node in &document.nodes {
        let copies = document.occurrences(node).skip(1).map(|copy| Node {
            contact: node.contact,
            list: Some(copy.number as u32),
            element: node.element.moved_by(copy.offset),
            spelling: node.spelling.clone(),
            slot: node.slot.moved_by(copy.offset),
            fit: Fit::Text(Bridge::None),
            copies: 0,
        });
        let copies: Vec<_> = copies.collect();
        assert!(copies.is_empty() || node.fit == Fit::Text(Bridge::None));
        nodes.push(copies);
    }
    document.nodes = std::mem::take(&mut document.nodes)
        .into_iter()
        .zip(nodes)
        .flat_map(|(node, copies)| std::iter::once(Node { copies: 0, ..node }).chain(copies))
        .collect();
    document
}

#[test]
fn what_clients_send_is_plain() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/in");
    for name in [
        "recipe",
        "reverse",
        "contradictory",
        "equal-copies",
        "echo-undeclared",
        "own-origin",
        "mixed-undeclared",
        "empty-node",
        "removal",
        "two-contacts",
        "line-break-in-attribute",
        "prefixed-empty-node",
        "character-references",
        "rebound-prefix",
        "child-element",
    ] {
        let body = std::fs::read(format!("{folder}/{name}.xml")).expect("it is there");
        assert!(agree(&body, Some("127.0.0.1:8080")), "{name}");
    }
}

/// Pieces that, put together at random, often make a document, and often nearly one.
fn pieces() -> impl Strategy<Value = String> {
    let piece = select(vec![
        "<c:Contact xmlns:c='http://ws.constantcontact.com/ns/1.0/'>",
        "</c:Contact>",
        "<Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\" id=\"http://own/1\">",
        "</Contact>",
        "<ContactLists>",
        "</ContactLists>",
        "<ContactList id='7'>",
        "</ContactList >",
        "<ContactList/>",
        "<OptInSource>",
        "</OptInSource>",
        "<OptInSource />",
        "ACTION_BY_CONTACT",
        "ACTION_BY_CUSTOMER",
        "<c:OptInSource>",
        "</c:OptInSource>",
        "<c:ContactLists>",
        "</c:ContactLists>",
        "<c:ContactList xmlns:c='http://ws.constantcontact.com/ns/1.0/' id='a' id='b'>",
        "</c:ContactList>",
        "<OptInTime>",
        "</OptInTime>",
        "<id>http://own",
        "<id>",
        "</id>",
        "<a xmlns=''>",
        "</a>",
        "<a>",
        "<b x=\"1\"y='2'>",
        "<b x = '1'>",
        "<b x>",
        "<b x=1>",
        "<b id=''>",
        "</b>",
        "<b x='>'/>",
        "<a:b:c/>",
        "<:a/>",
        "<a: />",
        "<x xmlns:xml='u'/>",
        "<x xmlns:='u'/>",
        "<x xmlnsy='u'/>",
        "<x xmlns:p=''>",
        "</x>",
        "&amp;",
        "&#65;",
        "&;",
        "& ",
        "<!-- -->",
        "<![CDATA[x]]>",
        "<?p?>",
        "<?xml version='1.0'?>",
        "<?xml version='1.0' encoding='utf-16'?>",
        "<!DOCTYPE a>",
        " ",
        "\n",
        "text",
        "\u{e9}",
        "<\u{e9}>",
        "</\u{e9}>",
        ">",
        "<",
        "/>",
        "'",
        "\"",
        "<a/ >",
        "< a>",
        "</ a>",
        "<a\t>",
        "]]>",
        "\0",
    ]);
    prop::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

/// Balanced documents of elements that matter.
fn tree() -> impl Strategy<Value = String> {
    let leaf =
        select(vec!["", " ", "ACTION_BY_CONTACT", "\u{e9}", "&amp;", "http://own/x", "<e/>"]);
    let tree = leaf.prop_map(str::to_owned);
    tree.prop_recursive(7, 60, 4, |inner| {
        let name = select(vec![
            "Contact", "ContactLists", "ContactList", "OptInSource", "OptInTime", "id", "c:Contact",
            "c:ContactLists", "c:ContactList", "c:OptInSource", "d:OptInSource", "other",
        ]);
        let attributes = select(vec![
            "", "", "", " id='http://own/1'", " xmlns='http://ws.constantcontact.com/ns/1.0/'",
            " xmlns:c=\"http://ws.constantcontact.com/ns/1.0/\"", " xmlns:c='u'", " xmlns=''", "\n a='b' ",
        ]);
        (name, attributes, prop::collection::vec(inner, 0..4)).prop_map(|(name, attributes, inner)| {
            format!("<{name}{attributes}>{}</{name}>", inner.concat())
        })
    })
    .prop_map(|inner| {
        format!("<r xmlns='http://ws.constantcontact.com/ns/1.0/' xmlns:c='http://ws.constantcontact.com/ns/1.0/'>{inner}</r>")
    })
}

/// Lists as clients write them, and nearly so.
fn lists() -> impl Strategy<Value = String> {
    let id = select(vec![
        " id=\"http://api.constantcontact.com/ws/customers/oakmill/lists/1\"",
        " id='7'",
        " id=\"http://OWN/1\"",
        " id=' https://own'",
        " id='ftps://own'",
        " id=\"it's\"",
        " id=\"a\" ",
        " id='a' x='b'",
        " x='b' id='a'",
        " id='a' id='b'",
        " id='a' xmlns='u'",
        " id = 'a'",
        "  id='a'",
        " id='&amp;'",
        " id='",
        " id=a",
        "",
        "/",
        " id='a'/",
        " id='a&",
        " id=a7a",
        ">",
        " id='>'",
    ]);
    let member = select(vec![
        "<OptInSource>ACTION_BY_CONTACT</OptInSource>",
        "<OptInSource>ACTION_BY_CUSTOMER</OptInSource>",
        "<OptInSource>ACTION_BY_CUSTOMER </OptInSource>",
        "<OptInSource>ACTION_BY_CUSTOMERS</OptInSource>",
        "<OptInSource>ACTION_BY_CUSTOMER</OptInSource >",
        "<OptInSource >ACTION_BY_CUSTOMER</OptInSource>",
        "<OptInSource>ACTION_BY_SYSTEM</OptInSource>",
        "<OptInSource/>",
        "<OptInSource></OptInSource>",
        "<OptInSource xmlns='u'>ACTION_BY_CONTACT</OptInSource>",
        "<c:OptInSource>ACTION_BY_CONTACT</c:OptInSource>",
        "<OptInTime>2012-01-17T15:02:33.110Z</OptInTime>",
        "<OptInTime></OptInTime>",
        "<OptInTime/>",
        "<OptInTime>&#65;</OptInTime>",
        "<OptInTime>& </OptInTime>",
        "<OptInSource><Name>x</Name></OptInSource>",
        "<id>http://own<Name>x</Name></id>",
        "<OptInTime><a/></OptInTime>",
        "<OptInTime>x</OptInTimes>",
        "<OptInTimes>x</OptInTimes>",
        "<OptInSource>",
        "<link xmlns='http://www.w3.org/2005/Atom' href='/1' rel='self'/>",
        "<link xmlns='u'></link>",
        "<link xmlns='u'>",
        "</link>",
        "<id>http://own/1</id>",
        "<Name>x</Name>",
        "<Name></Name>",
        "<Name>&lt;</Name>",
        "<Name>x</Nam>",
        "<Name>x</Name >",
        "<:a>x</:a>",
        "<a:>x</a:>",
        "<1>x</1>",
        "<ContactList id='b'></ContactList>",
        "<ContactLists><ContactList id='b'></ContactList></ContactLists>",
        "text",
        "&amp;",
        " ",
        "\n\t",
        "\u{b}",
        "]]>",
        "",
    ]);
    let end = select(vec![
        "</ContactList>",
        "</ContactList>",
        "</ContactList>\r\n",
        "</ContactList >",
        "</ContactLists>",
        "",
    ]);
    let prefix = select(vec!["", "", "c:"]);
    let list = (prefix, id, prop::collection::vec(member, 0..4), end).prop_map(
        |(prefix, id, members, end)| {
            format!(
                "<{prefix}ContactList{id}>{}{}",
                members.concat(),
                end.replacen("</", &format!("</{prefix}"), 1)
            )
        },
    );
    let around = select(vec![
        (
            "<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><ContactLists>",
            "</ContactLists></Contact>",
        ),
        (
            "<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><ContactLists xmlns='u'>",
            "</ContactLists></Contact>",
        ),
        ("<Contact><ContactLists>", "</ContactLists></Contact>"),
        (
            "<c:Contact xmlns:c='http://ws.constantcontact.com/ns/1.0/' xmlns='u'><c:ContactLists>",
            "</c:ContactLists></c:Contact>",
        ),
        (
            "<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><x><ContactLists>",
            "</ContactLists></x></Contact>",
        ),
        (
            "<Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><OptInSource><ContactLists>",
            "</ContactLists></OptInSource></Contact>",
        ),
    ]);
    (around, prop::collection::vec(list, 0..4))
        .prop_map(|((start, end), lists)| format!("{start}{}{end}", lists.concat()))
}

/// Lists that differ in little, and what may come between them. The host is `own`, or `10.0.0.12`.
fn lists_alike() -> impl Strategy<Value = String> {
    // Most often the first of two.
    let one = || (0..3_usize).prop_map(|it| it.saturating_sub(1));
    let starts = prop::collection::vec(
        select(vec![
            "<ContactList id=\"http://api.constantcontact.com/ws/lists/",
            "<ContactList id='http://api.constantcontact.com/ws/lists/",
            "<ContactList id='http://own/lists/",
            "<ContactList id='  http://own/lists/",
            "<ContactList id='http://own",
            "<ContactList id='http://",
            "<ContactList id=' http://own/",
            "<ContactList id='          ",
            "<ContactList id='https://10.0.0.1",
            "<ContactList id='http://10.0.0.",
            "<ContactList id='http://10.0.0.12/",
            "<ContactList id='",
        ]),
        2,
    );
    let number = select(vec![
        "1",
        "2",
        "12",
        "012",
        "1234567890123456789012",
        "",
        "1a",
        "a",
        "1/",
        "&",
        "&#49;",
        "<",
    ]);
    let tails = prop::collection::vec(
        select(vec![
            "'><OptInSource>ACTION_BY_CONTACT</OptInSource></ContactList>",
            "'> <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>",
            "'><OptInSource>ACTION_BY_CUSTOMER</OptInSource><OptInTime>1</OptInTime></ContactList>",
            "'><OptInSource>ACTION_BY_CUSTOMER</OptInSource><OptInTime>2</OptInTime> </ContactList>",
            "'><OptInSource>ACTION_BY_CUSTOMER</OptInSource><OptInSource>ACTION_BY_CONTACT</OptInSource></ContactList>",
            "'><OptInSource>ACTION_BY_CUSTOMER</OptInSource><Name>x</Name></ContactList>",
            "'><OptInTime>1</OptInTime><OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>",
            "'></ContactList>",
            "'/>",
        ]),
        2,
    );
    let between = select(vec![
        "",
        "",
        "",
        "\n",
        "<x xmlns='u'/>",
        "<x xmlns='u'>",
        "</x>",
        "</c:ContactLists><c:ContactLists>",
        "</c:ContactLists><c:ContactLists xmlns='u'>",
        "</c:ContactLists><c:ContactLists xmlns='http://ws.constantcontact.com/ns/1.0/'>",
        "</c:ContactLists></c:Contact><c:Contact><c:ContactLists>",
    ]);
    // The lists have no prefix: they count where the default namespace is the contact's.
    let outer = select(vec!["u", "http://ws.constantcontact.com/ns/1.0/"]);
    let list = (one(), number, one(), between);
    let lists = prop::collection::vec(list, 2..8);
    (outer, starts, tails, lists).prop_map(|(outer, starts, tails, lists)| {
        let mut body = format!(
            "<r xmlns='{outer}' xmlns:c='http://ws.constantcontact.com/ns/1.0/'><c:Contact><c:ContactLists>"
        );
        for (start, number, tail, between) in lists {
            let (start, tail) = (starts[start], tails[tail]);
            let quote = if start.contains('"') { "\"" } else { "'" };
            body.extend([start, number, &tail.replacen('\'', quote, 1), between]);
        }
        body + "</c:ContactLists></c:Contact></r>"
    })
}

/// How often the source of each node stands again, in lists that are written `a`, `A` (the same, with another number), and
/// in others.
fn copies(lists: &str) -> Vec<u32> {
    let source = "<OptInSource>ACTION_BY_CUSTOMER</OptInSource>";
    let list = |kind| match kind {
        'a' => format!("<ContactList id='http://api/lists/7'>{source}</ContactList>\n"),
        'A' => format!("<ContactList id='http://api/lists/1234'>{source}</ContactList>\n"),
        't' => format!(
            "<ContactList id='http://api/lists/7'>{source}<OptInTime>1</OptInTime></ContactList>"
        ),
        'd' => format!("<ContactList id='http://api/lists/7'>{source}{source}</ContactList>\n"),
        '-' => "<ContactList id='http://api/lists/7'></ContactList>\n".to_owned(),
        _ => "</ContactLists></Contact><Contact><ContactLists>".to_owned(),
    };
    let lists: String = lists.chars().map(list).collect();
    let body = format!(
        "<r xmlns='{NAMESPACE}'><Contact><ContactLists>{lists}</ContactLists></Contact></r>"
    );
    assert!(agree(body.as_bytes(), Some("own")));
    read(&body, Some("own")).expect("it is plain").nodes.iter().map(|node| node.copies).collect()
}

#[test]
fn lists_that_differ_in_their_numbers_alone_are_told_as_one() {
    assert_eq!(copies("a"), [0]);
    assert_eq!(copies("aAaA"), [3]);
    assert_eq!(copies("tttt"), [3]);
    // What is read of the one with a time is what the others begin with.
    assert_eq!(copies("aAtAaa"), [1, 3]);
    for (between, nodes) in [("-", 2), ("|", 2), ("d", 4)] {
        let copies = copies(&format!("aA{between}Aaa"));
        assert_eq!((copies[0], copies.last(), copies.len()), (1, Some(&2), nodes), "{between}");
    }
}

#[test]
fn both_readers_find_the_same_depth_too_deep() {
    let lists = "<ContactLists><ContactList id='7'><OptInSource>ACTION_BY_CONTACT</OptInSource>\
                 <OptInTime>x</OptInTime></ContactList><Name>x</Name></ContactLists>";
    for depth in MAX_DEPTH - 5..MAX_DEPTH + 2 {
        for inside in ["", "<Name>x</Name>", lists] {
            let (start, end) = ("<a>".repeat(depth - 1), "</a>".repeat(depth - 1));
            let contact = "Contact xmlns='http://ws.constantcontact.com/ns/1.0/'";
            let body = format!("{start}<{contact}>{inside}</Contact>{end}");
            let fits = read_generally(body.as_bytes(), None, None).is_ok();
            assert_eq!(agree(body.as_bytes(), None), fits, "{depth} {inside}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_plain_reader_agrees_with_the_general_one_on_anything(body in pieces()) {
        agree(body.as_bytes(), Some("own"));
        agree(format!("<r>{body}</r>").as_bytes(), Some("own"));
    }

    #[test]
    fn the_plain_reader_agrees_with_the_general_one_on_documents(body in tree()) {
        prop_assert!(agree(body.as_bytes(), Some("own")), "gave up: {}", body);
    }

    #[test]
    fn the_plain_reader_agrees_with_the_general_one_on_lists(body in lists()) {
        agree(body.as_bytes(), Some("own"));
    }

    #[test]
    fn the_plain_reader_agrees_with_the_general_one_on_lists_alike(body in lists_alike()) {
        for own in ["own", "10.0.0.12"] {
            agree(body.as_bytes(), Some(own));
        }
        agree(body.as_bytes(), None);
    }

    #[test]
    fn the_plain_reader_agrees_with_the_general_one_on_bytes(body in prop::collection::vec(any::<u8>(), 0..60)) {
        agree(&body, None);
    }
}
