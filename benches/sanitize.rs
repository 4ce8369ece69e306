#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]
//! The rewrite beside quick-xml's bare event loop over the same bytes.
//!
//! `cargo bench --bench sanitize` prints divan's figures, then the ratios: the two are measured in turn,
//! many times over, and the medians compared, since this kind of machine is never quiet.

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use optin_proxy::contact::{Policy, Request, Sanitized, sanitize};
use quick_xml::events::Event;
use quick_xml::{NsReader, Reader};

/// An update with this many lists, echoed with their source.
fn update(lists: usize, declared: &str, echoed: &str) -> Bytes {
    let mut body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <entry xmlns=\"http://www.w3.org/2005/Atom\">\n\
         \x20 <link href=\"/ws/customers/oakmill/contacts/1904\" rel=\"edit\"/>\n\
         \x20 <id>http://api.constantcontact.com/ws/customers/oakmill/contacts/1904</id>\n\
         \x20 <title type=\"text\">Contact: tilda.brandt@example.org</title>\n\
         \x20 <updated>2013-05-06T09:41:00.000Z</updated>\n\
         \x20 <author><name>Constant Contact</name></author>\n\
         \x20 <content type=\"application/vnd.ctct+xml\">\n\
         \x20   <Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\">\n\
         \x20     <Status>Do Not Mail</Status>\n\
         \x20     <EmailAddress>tilda.brandt@example.org</EmailAddress>\n\
         \x20     <EmailType>HTML</EmailType>\n\
         \x20     <FirstName>Tilda</FirstName>\n\
         \x20     <MiddleName/>\n\
         \x20     <LastName>Brandt</LastName>\n\
         \x20     <JobTitle>Luthier</JobTitle>\n\
         \x20     <CompanyName>Brandt Instruments</CompanyName>\n\
         \x20     <HomePhone/>\n\
         \x20     <WorkPhone>555 0123 456</WorkPhone>\n\
         \x20     <Addr1>12 Mill Lane</Addr1>\n\
         \x20     <Addr2/>\n\
         \x20     <City>Oakville</City>\n\
         \x20     <StateCode>MA</StateCode>\n\
         \x20     <CountryCode>us</CountryCode>\n\
         \x20     <PostalCode>02451</PostalCode>\n\
         \x20     <Note>Signed up again at the counter, asked for the spring newsletter and the workshop dates only.</Note>\n\
         \x20     <CustomField1/>\n\
         \x20     <OptInSource>{declared}</OptInSource>\n\
         \x20     <ContactLists>\n"
    );
    for list in 0..lists {
        let _ = writeln!(
            body,
            "<ContactList id=\"http://api.constantcontact.com/ws/customers/o/lists/{list}\">\
             <OptInSource>{echoed}</OptInSource></ContactList>"
        );
    }
    body.push_str("      </ContactLists>\n    </Contact>\n  </content>\n</entry>\n");
    Bytes::from(body)
}

const C: &str = "ACTION_BY_CONTACT";
const U: &str = "ACTION_BY_CUSTOMER";

const CASES: [(&str, usize, &str, &str); 3] = [
    ("8 lists, all differ", 8, C, U),
    ("8 lists, clean", 8, U, U),
    ("1500 lists, all differ", 1500, C, U),
];

fn case(name: &str) -> Bytes {
    let case = CASES.iter().find(|(title, ..)| *title == name).expect("one of CASES");
    update(case.1, case.2, case.3)
}

fn rewrite(body: &Bytes, policy: &Policy) -> Sanitized {
    let request = Request { update: true, own_host: Some("127.0.0.1:8080"), charset: None };
    sanitize(body, &request, policy)
}

/// What quick-xml does by itself, nothing resolved and nothing kept.
fn bare(body: &[u8]) -> usize {
    let mut reader = Reader::from_str(std::str::from_utf8(body).expect("UTF-8"));
    let mut events = 0;
    while !matches!(reader.read_event().expect("XML"), Event::Eof) {
        events += 1;
    }
    events
}

/// The same with namespaces, which the rewrite cannot do without.
fn bare_with_namespaces(body: &[u8]) -> usize {
    let mut reader = NsReader::from_str(std::str::from_utf8(body).expect("UTF-8"));
    let mut events = 0;
    while !matches!(reader.read_event().expect("XML"), Event::Eof) {
        events += 1;
    }
    events
}

const NAMES: [&str; 3] = [CASES[0].0, CASES[1].0, CASES[2].0];

#[divan::bench(args = NAMES)]
fn optin_proxy(bencher: Bencher<'_, '_>, name: &str) {
    let (body, policy) = (case(name), Policy::default());
    bencher.counter(BytesCount::new(body.len())).bench(|| rewrite(black_box(&body), &policy));
}

#[divan::bench(args = NAMES)]
fn quick_xml(bencher: Bencher<'_, '_>, name: &str) {
    let body = case(name);
    bencher.counter(BytesCount::new(body.len())).bench(|| bare(black_box(&body)));
}

#[divan::bench(args = NAMES)]
fn quick_xml_with_namespaces(bencher: Bencher<'_, '_>, name: &str) {
    let body = case(name);
    bencher.counter(BytesCount::new(body.len())).bench(|| bare_with_namespaces(black_box(&body)));
}

/// The median time of each function over rounds in which all take their turn.
fn medians<const N: usize>(
    mut functions: [&mut dyn FnMut(); N],
    rounds: usize,
    each: u32,
) -> [f64; N] {
    let mut times: [Vec<Duration>; N] = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for _ in 0..rounds {
        for (function, times) in functions.iter_mut().zip(&mut times) {
            let start = Instant::now();
            for _ in 0..each {
                function();
            }
            times.push(start.elapsed() / each);
        }
    }
    times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    })
}

fn main() {
    divan::main();
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    println!(
        "\n{:<26}{:>8}{:>14}{:>12}{:>12}",
        "", "bytes", "optin-proxy", "of bare", "of bare+ns"
    );
    let policy = Policy::default();
    let mut linear = Vec::new();
    for (name, lists, ..) in CASES {
        let body = case(name);
        if let Sanitized::Contact(contact) = rewrite(&body, &policy) {
            assert_eq!(
                contact.edits.is_empty(),
                contact.body.as_ptr() == body.as_ptr(),
                "same bytes"
            );
        }
        let each = if lists > 100 { 4 } else { 200 };
        let [ours, plain, namespaces] = medians(
            [
                &mut || drop(black_box(rewrite(black_box(&body), &policy))),
                &mut || _ = black_box(bare(black_box(&body))),
                &mut || _ = black_box(bare_with_namespaces(black_box(&body))),
            ],
            400,
            each,
        );
        let speed = body.len() as f64 / ours / 1e6;
        println!(
            "{name:<26}{:>8}{speed:>9.0} MB/s{:>12.2}{:>12.2}",
            body.len(),
            plain / ours,
            namespaces / ours
        );
        linear.push(ours / body.len() as f64);
    }
    println!("\ntime per byte, 1500 lists over 8: {:.2}", linear[2] / linear[0]);
}
