//! The domain: where a contact body states who opted in, what of it is inconsistent, and how to mend
//! that without touching any other byte.
//!
//! Everything here is a pure function over bytes: no HTTP, no async, no log. The way through it:
//!
//! 1. [`document`] finds the spans of the `OptInSource` nodes and ids, or says why it cannot;
//! 2. [`policy`] compares them with the application's declaration, and plans [`findings`] and edits, as
//!    [`settings`] say;
//! 3. [`edit`] splices the edits into the raw bytes;
//! 4. [`refusal`] judges the API's answer to what was sent.
//!
//! ```
//! use bytes::Bytes;
//! use optin_proxy::contact::{Policy, Request, Sanitized, sanitize};
//!
//! let body = Bytes::from_static(br#"<Contact xmlns="http://ws.constantcontact.com/ns/1.0/">
//!   <OptInSource>ACTION_BY_CONTACT</OptInSource>
//!   <ContactLists><ContactList id="7"><OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList></ContactLists>
//! </Contact>"#);
//! let request = Request { update: true, own_host: None, charset: None };
//! let Sanitized::Contact(contact) = sanitize(&body, &request, &Policy::default()) else { panic!() };
//! assert_eq!(contact.findings.len(), 1);
//! assert!(!contact.body.windows(18).any(|text| text == b"ACTION_BY_CUSTOMER"));
//! ```

pub mod document;
pub mod edit;
pub mod findings;
pub mod policy;
pub mod refusal;
pub mod settings;
mod value;

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use edit::{Bridge, Edit, Edits, Span, With};
pub use findings::{Finding, Findings, Kind, Place, Was, Written};
pub use settings::{Ambiguous, Lists, Mode, Policy, Removal, Undeclared};

/// The namespace of the v1 contact schema (API-V1: "Where a contact is written").
pub const NAMESPACE: &str = "http://ws.constantcontact.com/ns/1.0/";

/// The origin that ids carry in the API's own documents, over https too (API-V1: "Answers,
/// authentication, limits").
pub const ID_ORIGIN: &str = "http://api.constantcontact.com";

/// Who acted: the two values of `OptInSource` that the API accepts in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// The subscriber acts, now. Claims consent.
    #[serde(rename = "ACTION_BY_CONTACT")]
    Contact,
    /// The account's owner acts ("by owner" in the API's errors). Claims nothing.
    #[serde(rename = "ACTION_BY_CUSTOMER")]
    Customer,
}

impl Source {
    /// The value as it stands in XML.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Contact => "ACTION_BY_CONTACT",
            Self::Customer => "ACTION_BY_CUSTOMER",
        }
    }

    fn from_bytes(value: &[u8]) -> Option<Self> {
        match value {
            b"ACTION_BY_CONTACT" => Some(Self::Contact),
            b"ACTION_BY_CUSTOMER" => Some(Self::Customer),
            _ => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a body was passed on without being looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Uninspectable {
    /// No balanced XML with exactly one root element, or a reference in a value that nothing resolves.
    Malformed,
    /// It has a document type declaration. Nothing is ever expanded or fetched.
    Doctype,
    /// Its character encoding is neither UTF-8 nor a single-byte superset of ASCII.
    Encoding,
    /// It is longer than `sanitize.max_body`.
    TooLarge,
    /// Elements are nested deeper than [`document::MAX_DEPTH`].
    Depth,
    /// Its content coding is not one that the proxy decodes, or does not decode.
    ContentEncoding,
}

impl Uninspectable {
    /// All reasons, in the order of SPEC section 1.
    pub const ALL: [Self; 6] = [
        Self::Malformed,
        Self::Doctype,
        Self::Encoding,
        Self::TooLarge,
        Self::Depth,
        Self::ContentEncoding,
    ];

    /// The reason's name in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Doctype => "doctype",
            Self::Encoding => "encoding",
            Self::TooLarge => "too_large",
            Self::Depth => "depth",
            Self::ContentEncoding => "content_encoding",
        }
    }
}

impl fmt::Display for Uninspectable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the rewrite has to know of the request around the body.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// A PUT: only an update can remove somebody from all lists.
    pub update: bool,
    /// The `Host` under which the client reached this proxy as its base URL. Ids under it are the
    /// application's echo of the proxy's own origin.
    pub own_host: Option<&'a str>,
    /// The `charset` parameter of the request's Content-Type, if any.
    pub charset: Option<&'a str>,
}

/// What became of a body.
#[derive(Debug)]
pub enum Sanitized {
    /// No `Contact` in it: none of our business.
    NoContact,
    /// Not looked at, and why.
    Uninspectable(Uninspectable),
    /// A contact write, with what was found and the body to send.
    Contact(SanitizedContact),
}

/// A contact write after inspection.
#[derive(Debug)]
pub struct SanitizedContact {
    /// The body to send. Where nothing was edited, the very same `Bytes` that came in.
    pub body: Bytes,
    /// What was inconsistent, in the order of the document's contacts.
    pub findings: Findings,
    /// What was edited, in the order of the body: [`edit::pieces`] makes the one of the other.
    pub edits: Edits,
    /// The body to send states ACTION_BY_CONTACT at contact level, alone or among others.
    pub claims_contact: bool,
}

/// Inspects a contact write and makes its `OptInSource`s consistent as `policy` says.
///
/// Time and memory are linear in the body's length. [`Uninspectable::TooLarge`] and
/// [`Uninspectable::ContentEncoding`] are the caller's to find out: this function takes the whole,
/// decoded body.
pub fn sanitize(body: &Bytes, request: &Request<'_>, policy: &Policy) -> Sanitized {
    let document = match document::read(body, request.charset, request.own_host) {
        Ok(document) => document,
        Err(reason) => return Sanitized::Uninspectable(reason),
    };
    if document.contacts.is_empty() {
        return Sanitized::NoContact;
    }
    let plan = policy::plan(&document, request.update, policy);
    Sanitized::Contact(SanitizedContact {
        body: edit::apply(body, &plan.edits),
        edits: plan.edits,
        findings: plan.findings,
        claims_contact: plan.claims_contact,
    })
}
