//! Where the opt-in sources stand: spans of raw bytes.
//!
//! Two readers answer that, and agree (a property test holds them to it). `plain.rs` reads what nearly all
//! clients send, tags and text, several times faster than any general tokenizer; at the first thing
//! that is not plain it gives up. `general.rs` then reads everything on quick-xml's namespace-aware
//! reader, and it alone says why a document cannot be inspected.

mod general;
mod plain;
mod scan;
mod walk;

use encoding_rs::{EUC_JP, Encoding, UTF_8};

use super::edit::{Bridge, Edit, Span, With};
use super::{ID_ORIGIN, NAMESPACE, Source, Uninspectable, value};

/// The deepest nesting of elements that is inspected.
pub const MAX_DEPTH: usize = 256;

const UTF8_BOM: &[u8] = b"\xEF\xBB\xBF";

/// The parts of a body that the policy judges, each list in the order of the document. All spans are
/// of the body's bytes.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Document {
    pub contacts: Vec<Contact>,
    pub lists: Vec<List>,
    pub nodes: Vec<Node>,
    pub times: Vec<Time>,
    pub own_ids: Vec<OwnId>,
}

/// A `Contact` element.
#[derive(Debug, PartialEq)]
pub(super) struct Contact {
    /// Its start tag, and the qualified name in it.
    pub tag: Span,
    pub name: String,
    /// Written as `<Contact/>`.
    pub self_closing: bool,
    /// Some `ContactList` stands in it.
    pub holds_list: bool,
}

/// A `ContactLists/ContactList` of a contact.
#[derive(Debug, PartialEq)]
pub(super) struct List {
    pub contact: u32,
    /// The value of its `id`.
    pub id: Option<Span>,
}

/// An `OptInSource` that counts: a child of a `Contact` or of one of its lists.
#[derive(Debug, PartialEq)]
pub(super) struct Node {
    pub contact: u32,
    /// The list that it is a child of; `None` at contact level.
    pub list: Option<u32>,
    /// The whole element.
    pub element: Span,
    pub spelling: Spelling,
    /// Over these bytes a value is written.
    pub slot: Span,
    pub fit: Fit,
    /// In so many of the lists that follow its own, it stands again: the same bytes, as far behind the list's id.
    pub copies: u32,
}

/// What an `OptInSource` says, before any alias is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spelling {
    Empty,
    Known(Source),
    /// Anything else. Where the node has child elements, the text between its tags as it stands.
    Other(Box<str>),
}

/// What has to go with a value so that it fits in its slot.
#[derive(Debug, PartialEq)]
pub(super) enum Fit {
    /// Perhaps the border of a CDATA section.
    Text(Bridge),
    /// The slot goes from within the start tag to the end of the element: what is left of its attributes, the start
    /// tag's end, and an end tag of this name.
    Tag(Box<TagFit>),
}

/// What is left of a tag when it is opened for a value.
#[derive(Debug, PartialEq)]
pub(super) struct TagFit {
    pub attributes: Box<str>,
    pub name: Box<str>,
}

// There are thousands in a long body, and all are looked through.
const _: () = assert!(size_of::<Node>() <= 72);

/// An `OptInTime` of a list.
#[derive(Debug, PartialEq)]
pub(super) struct Time {
    pub list: u32,
    pub element: Span,
}

/// An id under the proxy's own origin.
#[derive(Debug, PartialEq)]
pub(super) struct OwnId {
    pub list: Option<u32>,
    /// Its origin: scheme and authority.
    pub origin: Span,
    /// The same as text.
    pub written: Box<str>,
    bridge: Bridge,
}

impl OwnId {
    /// The edit that puts the API's own origin back.
    pub fn restored(&self) -> Edit {
        Edit { span: self.origin, with: With::Text(ID_ORIGIN.into()), bridge: self.bridge }
    }
}

impl Document {
    /// Where a list-level node stands: in its own list, and in those of its copies.
    #[inline]
    pub fn occurrences(&self, node: &Node) -> impl Iterator<Item = Occurrence<'_>> + Clone {
        let own = node.list.map_or(0, |list| list as usize);
        let lists = if node.list.is_some() { own..own + 1 + node.copies as usize } else { 0..0 };
        let id_end = |list: &List| list.id.map_or(0, |id| id.range().end as u32);
        let first = self.lists.get(own).map_or(0, id_end);
        self.lists[lists].iter().zip(own..).map(move |(list, number)| {
            let offset = id_end(list) - first;
            Occurrence { list, number, offset }
        })
    }
}

/// Where a list-level node stands.
#[derive(Clone, Copy)]
pub(super) struct Occurrence<'d> {
    pub list: &'d List,
    /// The list's position in the document.
    pub number: usize,
    /// How much further on than the node itself.
    pub offset: u32,
}

impl Node {
    /// The edit that makes this node say `source`.
    #[inline]
    pub fn set(&self, source: Source) -> Edit {
        let (with, bridge) = match &self.fit {
            Fit::Text(bridge) => (With::Value(source), *bridge),
            Fit::Tag(tag) => {
                let TagFit { attributes, name } = &**tag;
                let text = format!("{attributes}>{source}</{name}>");
                (With::Text(text.into()), Bridge::None)
            }
        };
        Edit { span: self.slot, with, bridge }
    }
}

impl Contact {
    /// The edit that declares `source`, as the contact's first child: the order of its children is
    /// not enforced (API-V1: "Where OptInSource stands").
    pub fn declare(&self, source: Source) -> Edit {
        let prefix = self.name.strip_suffix("Contact").unwrap_or_default();
        let node = format!("<{prefix}OptInSource>{source}</{prefix}OptInSource>");
        let end = self.tag.range().end;
        let (span, with) = if self.self_closing {
            (end - "/>".len()..end, format!(">{node}</{}>", self.name))
        } else {
            (end..end, node)
        };
        Edit { span: Span::new(span), with: With::Text(with.into()), bridge: Bridge::None }
    }
}

/// Finds the opt-in sources of `body`, and its ids under `own_host`.
pub(super) fn read(
    body: &[u8],
    charset: Option<&str>,
    own_host: Option<&str>,
) -> Result<Document, Uninspectable> {
    if let Some(text) = plain_text(body, charset)
        && let Some(document) = plain::read(text, own_host)
    {
        return Ok(document);
    }
    read_generally(body, charset, own_host)
}

/// The text of a body, if it may be plain.
fn plain_text<'b>(body: &'b [u8], charset: Option<&str>) -> Option<&'b str> {
    if !charset.is_none_or(is_inspectable_charset)
        || body.starts_with(UTF8_BOM)
        || body.len() > Span::LONGEST_BODY
    {
        return None;
    }
    simdutf8::basic::from_utf8(body).ok()
}

/// The same as [`read`], by the general reader alone.
fn read_generally(
    body: &[u8],
    charset: Option<&str>,
    own_host: Option<&str>,
) -> Result<Document, Uninspectable> {
    if body.len() > Span::LONGEST_BODY {
        return Err(Uninspectable::TooLarge);
    }
    if has_wide_characters(body) || !charset.is_none_or(is_inspectable_charset) {
        return Err(Uninspectable::Encoding);
    }
    // quick-xml swallows a byte order mark without counting it in its positions.
    let base = if body.starts_with(UTF8_BOM) { UTF8_BOM.len() } else { 0 };
    let bytes = &body[base..];
    match std::str::from_utf8(bytes) {
        Ok(text) => general::read(text, bytes, base, charset, own_host),
        // Some legacy charset. Markup is ASCII in all that are inspected, so the reader may see a
        // letter in the place of bytes beyond ASCII, which it refuses in names. Spans stay the same, and values
        // are read from the body itself.
        Err(_) => {
            let masked: String = bytes
                .iter()
                .map(|&byte| if byte.is_ascii() { byte as char } else { 'z' })
                .collect();
            general::read(&masked, bytes, base, charset, own_host)
        }
    }
}

/// UTF-16, UTF-32 or EBCDIC, by the first bytes (XML 1.0 appendix F.1).
fn has_wide_characters(body: &[u8]) -> bool {
    let starts: [&[u8]; 5] = [b"\xFE\xFF", b"\xFF\xFE", b"\x00", b"<\x00", b"\x4C\x6F\xA7\x94"];
    starts.iter().any(|start| body.starts_with(start))
}

/// Whether every ASCII byte of a text in this charset is that ASCII character. Other multi-byte charsets are out: their second
/// bytes can look like markup.
fn is_inspectable_charset(label: &str) -> bool {
    Encoding::for_label(label.as_bytes()).is_some_and(|encoding| {
        [UTF_8, EUC_JP].contains(&encoding)
            || (encoding.is_single_byte() && encoding.is_ascii_compatible())
    })
}
