//! Where the opt-in sources stand: spans of raw bytes, found by quick-xml's namespace-aware reader.
//!
//! quick-xml's event spans tile its input, but it is no well-formedness check: what an edit relies on
//! (balance, one root, no bare markup characters) is checked here beside it.

use std::ops::Range;

use encoding_rs::Encoding;
use quick_xml::NsReader;
use quick_xml::events::attributes::Attributes;
use quick_xml::events::{BytesDecl, BytesStart, Event};
use quick_xml::name::{NamespaceResolver, ResolveResult};

use super::edit::{Bridge, Edit};
use super::{ID_ORIGIN, NAMESPACE, Source, Uninspectable, value};

/// The deepest nesting of elements that is inspected.
pub const MAX_DEPTH: usize = 256;

const UTF8_BOM: &[u8] = b"\xEF\xBB\xBF";

/// The parts of a body that the policy judges, each list in the order of the document.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub contacts: Vec<Contact>,
    pub lists: Vec<List>,
    pub nodes: Vec<Node>,
    pub times: Vec<Time>,
    pub own_ids: Vec<OwnId>,
}

/// A `Contact` element.
#[derive(Debug)]
pub(super) struct Contact {
    /// Its start tag, and the qualified name in it.
    pub tag: Range<usize>,
    pub name: String,
    /// Written as `<Contact/>`.
    pub self_closing: bool,
    /// Some `ContactList` stands in it.
    pub holds_list: bool,
}

/// A `ContactLists/ContactList` of a contact.
#[derive(Debug)]
pub(super) struct List {
    pub contact: usize,
    /// The value of its `id`: the raw bytes.
    pub id: Option<Range<usize>>,
}

/// An `OptInSource` that counts: a child of a `Contact` or of one of its lists.
#[derive(Debug)]
pub(super) struct Node {
    pub contact: usize,
    /// The list that it is a child of; `None` at contact level.
    pub list: Option<usize>,
    /// The whole element.
    pub element: Range<usize>,
    pub spelling: Spelling,
    slot: Slot,
}

/// What an `OptInSource` says, before any alias is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spelling {
    Empty,
    Known(Source),
    /// Anything else. Where the node has child elements, the text between its tags as it stands.
    Other(Box<str>),
}

/// An `OptInTime` of a list.
#[derive(Debug)]
pub(super) struct Time {
    pub list: usize,
    pub element: Range<usize>,
}

/// An id under the proxy's own origin.
#[derive(Debug)]
pub(super) struct OwnId {
    pub list: Option<usize>,
    /// The raw bytes of the origin: scheme and authority.
    pub origin: Range<usize>,
    /// The same as text.
    pub written: Box<str>,
    bridge: Bridge,
}

impl OwnId {
    /// The edit that puts the API's own origin back.
    pub fn restored(&self) -> Edit {
        Edit { span: self.origin.clone(), with: ID_ORIGIN.into(), bridge: self.bridge }
    }
}

/// The place in a node where its value is written.
#[derive(Debug)]
enum Slot {
    /// Over these bytes, white space around them excluded.
    Text(Range<usize>, Bridge),
    /// `<OptInSource/>`: over its `/>`, which becomes an end tag of that name.
    SelfClosing(Range<usize>, String),
}

impl Node {
    /// The edit that makes this node say `source`.
    pub fn set(&self, source: Source) -> Edit {
        match &self.slot {
            Slot::Text(span, bridge) => {
                Edit { span: span.clone(), with: source.as_str().into(), bridge: *bridge }
            }
            Slot::SelfClosing(slash, name) => Edit {
                span: slash.clone(),
                with: format!(">{source}</{name}>").into(),
                bridge: Bridge::None,
            },
        }
    }
}

impl Contact {
    /// The edit that declares `source`, as the contact's first child: the order of its children is
    /// not enforced (API-V1: "Where OptInSource stands").
    pub fn declare(&self, source: Source) -> Edit {
        let prefix = self.name.strip_suffix("Contact").unwrap_or_default();
        let node = format!("<{prefix}OptInSource>{source}</{prefix}OptInSource>");
        let end = self.tag.end;
        let (span, with) = if self.self_closing {
            (end - "/>".len()..end, format!(">{node}</{}>", self.name))
        } else {
            (end..end, node)
        };
        Edit { span, with: with.into(), bridge: Bridge::None }
    }
}

/// Finds the opt-in sources of `body`, and its ids under `own_host`.
pub(super) fn read(
    body: &[u8],
    charset: Option<&str>,
    own_host: Option<&str>,
) -> Result<Document, Uninspectable> {
    if has_wide_characters(body) || !charset.is_none_or(is_inspectable_charset) {
        return Err(Uninspectable::Encoding);
    }
    // quick-xml swallows a byte order mark without counting it in its positions.
    let base = if body.starts_with(UTF8_BOM) { UTF8_BOM.len() } else { 0 };
    match std::str::from_utf8(&body[base..]) {
        Ok(text) => Walk::new(text, base, own_host).run(),
        // Some legacy charset. Markup is ASCII in all that are inspected, so the reader may see any
        // letter in the place of bytes beyond ASCII: spans stay the same, and an edit touches none.
        Err(_) => {
            let masked: String = body[base..]
                .iter()
                .map(|&byte| if byte.is_ascii() { byte as char } else { '_' })
                .collect();
            Walk::new(&masked, base, own_host).run()
        }
    }
}

/// UTF-16, UTF-32 or EBCDIC, by the first bytes (XML 1.0 appendix F.1).
fn has_wide_characters(body: &[u8]) -> bool {
    let starts: [&[u8]; 5] = [b"\xFE\xFF", b"\xFF\xFE", b"\x00", b"<\x00", b"\x4C\x6F\xA7\x94"];
    starts.iter().any(|start| body.starts_with(start))
}

/// Whether every ASCII byte of a text in this charset is that ASCII character. Multi-byte charsets
/// other than UTF-8 are out: their second bytes can look like markup.
fn is_inspectable_charset(label: &str) -> bool {
    Encoding::for_label(label.as_bytes()).is_some_and(|encoding| {
        encoding == encoding_rs::UTF_8
            || (encoding.is_single_byte() && encoding.is_ascii_compatible())
    })
}

/// An element that is open.
struct Open {
    kind: Element,
    contact: Option<usize>,
    list: Option<usize>,
    /// Where it starts, and where its content does.
    start: usize,
    content: usize,
    has_children: bool,
    /// It stands in an element that an edit may replace as a whole: nothing in it is looked at, so
    /// that edits never overlap.
    sealed: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Element {
    Contact,
    Lists,
    List,
    Source,
    Time,
    Id,
    Other,
}

/// One pass over a text.
struct Walk<'t> {
    text: &'t str,
    /// Where `text` starts in the body.
    base: usize,
    own_host: Option<&'t str>,
    open: Vec<Open>,
    roots: usize,
    found: Document,
}

impl<'t> Walk<'t> {
    fn new(text: &'t str, base: usize, own_host: Option<&'t str>) -> Self {
        // Where the client used the API's own name, its ids need no restoring.
        let own_host = own_host.filter(|host| !ID_ORIGIN.ends_with(&format!("//{host}")));
        Self {
            text,
            base,
            own_host,
            open: Vec::with_capacity(16),
            roots: 0,
            found: Document::default(),
        }
    }

    fn run(mut self) -> Result<Document, Uninspectable> {
        let mut reader = NsReader::from_str(self.text);
        let mut start = 0;
        loop {
            let event = reader.read_event().map_err(|error| reason(&error))?;
            let end = reader.buffer_position() as usize;
            match event {
                Event::Start(tag) => self.start(&tag, start..end, reader.resolver())?,
                Event::Empty(tag) => self.empty(&tag, start..end, reader.resolver())?,
                Event::End(_) => self.end(start..end)?,
                Event::Text(text) => {
                    self.outside_root_only(|| text.bytes().all(value::is_space))?;
                }
                Event::CData(_) => self.outside_root_only(|| false)?,
                Event::GeneralRef(name) => {
                    let is_reference = value::is_reference_name(name.as_bytes());
                    self.outside_root_only(|| false)?;
                    if !is_reference {
                        return Err(Uninspectable::Malformed);
                    }
                }
                Event::Decl(declaration) => check_declared_encoding(&declaration)?,
                Event::DocType(_) => return Err(Uninspectable::Doctype),
                Event::Comment(_) | Event::PI(_) => {}
                Event::Eof => break,
            }
            start = end;
        }
        if !self.open.is_empty() || self.roots != 1 {
            return Err(Uninspectable::Malformed);
        }
        Ok(self.found)
    }

    /// Character data may stand outside the root element only if `allowed`.
    fn outside_root_only(&self, allowed: impl FnOnce() -> bool) -> Result<(), Uninspectable> {
        if self.open.is_empty() && !allowed() {
            return Err(Uninspectable::Malformed);
        }
        Ok(())
    }

    fn start(
        &mut self,
        tag: &BytesStart<'_>,
        span: Range<usize>,
        namespaces: &NamespaceResolver,
    ) -> Result<(), Uninspectable> {
        let open = self.enter(tag, span, namespaces, false)?;
        self.open.push(open);
        Ok(())
    }

    fn empty(
        &mut self,
        tag: &BytesStart<'_>,
        span: Range<usize>,
        namespaces: &NamespaceResolver,
    ) -> Result<(), Uninspectable> {
        let open = self.enter(tag, span.clone(), namespaces, true)?;
        match open.kind {
            Element::Source => {
                let slash = self.in_body(span.end - "/>".len()..span.end);
                let slot = Slot::SelfClosing(slash, tag.name().as_ref().to_owned());
                self.node(&open, span.end, Spelling::Empty, slot);
            }
            Element::Time => self.time(&open, span.end),
            _ => {}
        }
        Ok(())
    }

    /// Notes a start tag and what kind of element it opens.
    fn enter(
        &mut self,
        tag: &BytesStart<'_>,
        span: Range<usize>,
        namespaces: &NamespaceResolver,
        self_closing: bool,
    ) -> Result<Open, Uninspectable> {
        if self.open.len() == MAX_DEPTH {
            return Err(Uninspectable::Depth);
        }
        check_tag(self.text[span.clone()].as_bytes())?;
        let (parent, contact, list, sealed) = match self.open.last_mut() {
            Some(parent) => {
                parent.has_children = true;
                let sealed =
                    parent.sealed || matches!(parent.kind, Element::Source | Element::Time);
                (parent.kind, parent.contact, parent.list, sealed)
            }
            None => {
                self.roots += 1;
                (Element::Other, None, None, false)
            }
        };
        let mut open = Open {
            kind: Element::Other,
            contact,
            list,
            start: span.start,
            content: span.end,
            has_children: false,
            sealed,
        };
        if sealed {
            return Ok(open);
        }
        let name = tag.name();
        let ours = || is_ours(&namespaces.resolve_element(name).0);
        match name.local_name().as_ref() {
            "Contact" if ours() => {
                open.kind = Element::Contact;
                open.contact = Some(self.found.contacts.len());
                open.list = None;
                self.found.contacts.push(Contact {
                    tag: self.in_body(span.clone()),
                    name: name.as_ref().to_owned(),
                    self_closing,
                    holds_list: false,
                });
            }
            "ContactLists" if parent == Element::Contact && ours() => open.kind = Element::Lists,
            "ContactList" if ours() => {
                if let Some(contact) = contact {
                    self.found.contacts[contact].holds_list = true;
                    if parent == Element::Lists {
                        open.kind = Element::List;
                        open.list = Some(self.found.lists.len());
                        self.found.lists.push(List { contact, id: None });
                    }
                }
            }
            "OptInSource" if matches!(parent, Element::Contact | Element::List) && ours() => {
                open.kind = Element::Source;
            }
            "OptInTime" if parent == Element::List && ours() => open.kind = Element::Time,
            "id" => open.kind = Element::Id,
            _ => {}
        }
        if (open.kind == Element::List || self.own_host.is_some())
            && let Some(id) = id_attribute(&self.text[span.clone()])
        {
            let id = span.start + id.start..span.start + id.end;
            if open.kind == Element::List
                && let Some(list) = self.found.lists.last_mut()
            {
                list.id = Some(id.start + self.base..id.end + self.base);
            }
            self.own_id(&open, id);
        }
        Ok(open)
    }

    fn end(&mut self, tag: Range<usize>) -> Result<(), Uninspectable> {
        let Some(open) = self.open.pop() else { return Err(Uninspectable::Malformed) };
        let content = open.content..tag.start;
        match open.kind {
            Element::Source if open.has_children => {
                let trimmed = value::trimmed(self.text[content.clone()].as_bytes());
                let span = content.start + trimmed.start..content.start + trimmed.end;
                let spelling = Spelling::Other(self.text[span.clone()].into());
                self.node(&open, tag.end, spelling, Slot::Text(self.in_body(span), Bridge::None));
            }
            Element::Source => {
                let raw = self.text[content.clone()].as_bytes();
                let value = value::read(raw, content.start).ok_or(Uninspectable::Malformed)?;
                let spelling = match Source::from_bytes(&value.text) {
                    Some(source) => Spelling::Known(source),
                    None if value.text.is_empty() => Spelling::Empty,
                    None => Spelling::Other(String::from_utf8_lossy(&value.text).into()),
                };
                let slot = Slot::Text(self.in_body(value.span), value.bridge);
                self.node(&open, tag.end, spelling, slot);
            }
            Element::Time => self.time(&open, tag.end),
            Element::Id if self.own_host.is_some() && !open.has_children => {
                self.own_id(&open, content);
            }
            _ => {}
        }
        Ok(())
    }

    fn node(&mut self, open: &Open, end: usize, spelling: Spelling, slot: Slot) {
        // A Source is only ever opened inside a Contact.
        let Some(contact) = open.contact else { return };
        let element = self.in_body(open.start..end);
        self.found.nodes.push(Node { contact, list: open.list, element, spelling, slot });
    }

    fn time(&mut self, open: &Open, end: usize) {
        let Some(list) = open.list else { return };
        let element = self.in_body(open.start..end);
        self.found.times.push(Time { list, element });
    }

    /// Notes an id if its value is `http(s)://` and the own host, then `/` or its end.
    fn own_id(&mut self, open: &Open, content: Range<usize>) {
        let (Some(host), raw) = (self.own_host, self.text[content.clone()].as_bytes()) else {
            return;
        };
        let Some(value) = value::read(raw, content.start) else { return };
        let Some(length) = own_origin(&value.text, host) else { return };
        if let Some((origin, bridge)) = value.head(raw, content.start, length) {
            let origin = self.in_body(origin);
            let written = String::from_utf8_lossy(&value.text[..length]).into();
            self.found.own_ids.push(OwnId { list: open.list, origin, written, bridge });
        }
    }

    fn in_body(&self, span: Range<usize>) -> Range<usize> {
        span.start + self.base..span.end + self.base
    }
}

/// The length of the origin at the start of `value`, if it is the own one.
fn own_origin(value: &[u8], host: &str) -> Option<usize> {
    let scheme = ["http://", "https://"].into_iter().find(|scheme| {
        value.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme.as_bytes()))
    })?;
    let length = scheme.len() + host.len();
    let authority = value.get(scheme.len()..length)?;
    let ends = matches!(value.get(length), None | Some(b'/'));
    (authority.eq_ignore_ascii_case(host.as_bytes()) && ends).then_some(length)
}

fn is_ours(resolved: &ResolveResult<'_>) -> bool {
    let ResolveResult::Bound(namespace) = resolved else { return false };
    let name = namespace.as_ref();
    // quick-xml resolves no references in a namespace's name.
    name == NAMESPACE
        || (name.contains('&')
            && value::read(name.as_bytes(), 0)
                .is_some_and(|name| *name.text == *NAMESPACE.as_bytes()))
}

/// Refuses what would make a tag mean something else than it seems to: a name that is none (a bare
/// `<` in text), markup in an attribute, an ampersand that starts no reference.
fn check_tag(tag: &[u8]) -> Result<(), Uninspectable> {
    let inside = &tag[1..];
    if !inside.first().copied().is_some_and(value::is_name_start) {
        return Err(Uninspectable::Malformed);
    }
    for at in memchr::memchr2_iter(b'<', b'&', inside) {
        let rest = &inside[at + 1..];
        let reference = inside[at] == b'&'
            && memchr::memchr(b';', rest).is_some_and(|end| value::is_reference_name(&rest[..end]));
        if !reference {
            return Err(Uninspectable::Malformed);
        }
    }
    Ok(())
}

/// Where the value of the `id` attribute stands in a start tag, quotes excluded.
fn id_attribute(tag: &str) -> Option<Range<usize>> {
    // Most tags have none: a look for the two letters is cheaper than reading attributes.
    memchr::memmem::find(tag.as_bytes(), b"id")?;
    let name = tag.find(|char: char| char.is_ascii() && value::is_space(char as u8))?;
    let attributes = tag[..tag.len() - 1].trim_end_matches('/');
    let mut attributes = Attributes::new(attributes, name);
    let id = attributes
        .with_checks(false)
        .map_while(Result::ok)
        .find(|attribute| attribute.key.as_ref() == "id")?;
    let std::borrow::Cow::Borrowed(value) = id.value else { return None };
    let start = value.as_ptr() as usize - tag.as_ptr() as usize;
    Some(start..start + value.len())
}

fn check_declared_encoding(declaration: &BytesDecl<'_>) -> Result<(), Uninspectable> {
    match declaration.encoding() {
        Some(Ok(label)) if !is_inspectable_charset(&label) => Err(Uninspectable::Encoding),
        _ => Ok(()),
    }
}

fn reason(error: &quick_xml::Error) -> Uninspectable {
    use quick_xml::errors::{IllFormedError, SyntaxError};
    match error {
        quick_xml::Error::Syntax(SyntaxError::UnclosedDoctype)
        | quick_xml::Error::IllFormed(IllFormedError::MissingDoctypeName) => Uninspectable::Doctype,
        _ => Uninspectable::Malformed,
    }
}
