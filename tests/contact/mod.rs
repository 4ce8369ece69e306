mod charset;
mod corpus;
mod properties;
pub mod reference;
mod refusal;
mod table;
mod xml;

use bytes::Bytes;
use optin_proxy::contact::{Kind, Policy, Request, Sanitized, SanitizedContact, sanitize};

pub const UPDATE: Request<'static> = Request { update: true, own_host: None, charset: None };
pub const CREATE: Request<'static> = Request { update: false, own_host: None, charset: None };

pub const C: &str = "ACTION_BY_CONTACT";
pub const U: &str = "ACTION_BY_CUSTOMER";

/// An entry with these contact-level nodes and these lists; a list with `None` is bare.
pub fn entry(declared: &[&str], lists: &[Option<&str>]) -> String {
    let node = |value: &&str| format!("<OptInSource>{value}</OptInSource>");
    let declared: String = declared.iter().map(node).collect();
    let lists: String = lists
        .iter()
        .enumerate()
        .map(|(id, value)| {
            let source = value.as_ref().map(node).unwrap_or_default();
            format!("<ContactList id=\"http://api/lists/{id}\">{source}</ContactList>")
        })
        .collect();
    format!(
        "<entry xmlns=\"http://www.w3.org/2005/Atom\"><content>\
         <Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\"><EmailAddress>a@example.org</EmailAddress>\
         {declared}<ContactLists>{lists}</ContactLists></Contact></content></entry>"
    )
}

pub fn inspected(body: &str, request: &Request<'_>, policy: &Policy) -> SanitizedContact {
    let body = Bytes::copy_from_slice(body.as_bytes());
    match sanitize(&body, request, policy) {
        Sanitized::Contact(contact) => contact,
        other => panic!("not inspected: {other:?}"),
    }
}

/// Kind and whether it was acted on, of each finding.
pub fn kinds(contact: &SanitizedContact) -> Vec<(Kind, bool)> {
    contact.findings.iter().map(|finding| (finding.kind, finding.acted_on())).collect()
}

pub fn text(contact: &SanitizedContact) -> String {
    String::from_utf8(contact.body.to_vec()).expect("the test's own body is UTF-8")
}
