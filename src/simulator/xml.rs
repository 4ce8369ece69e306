//! Just enough XML for a server: a tree out of a body, independent of the proxy's own reading of it.

use std::borrow::Cow;

use encoding_rs::{Encoding, UTF_8};
use quick_xml::NsReader;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::ResolveResult;

/// The deepest nesting that the simulator reads.
const MAX_DEPTH: usize = 100;

/// An element in a namespace.
#[derive(Debug, Default)]
pub(super) struct Element {
    pub namespace: String,
    pub name: String,
    pub id: String,
    pub text: String,
    pub children: Vec<Element>,
}

impl Element {
    pub fn children<'e>(&'e self, name: &'e str) -> impl Iterator<Item = &'e Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    pub fn child<'e>(&'e self, name: &'e str) -> Option<&'e Element> {
        self.children(name).next()
    }

    /// Shows every element, this one first, in the order of the document.
    pub fn visit(&self, see: &mut impl FnMut(&Element)) {
        see(self);
        self.children.iter().for_each(|child| child.visit(see));
    }

    /// The first element of that name, this one included, in the order of the document.
    pub fn find(&self, namespace: &str, name: &str) -> Option<&Element> {
        if self.name == name && self.namespace == namespace {
            return Some(self);
        }
        self.children.iter().find_map(|child| child.find(namespace, name))
    }
}

/// The root element of a document. `None` if it is not well-formed, as far as the reader can tell.
pub(super) fn parse(body: &[u8]) -> Option<Element> {
    let text = declared(body).unwrap_or(UTF_8).decode(body).0;
    let mut reader = NsReader::from_str(legal(&text)?);
    let mut open = vec![Element::default()];
    loop {
        let (resolved, event) = reader.read_resolved_event().ok()?;
        let namespace = match resolved {
            ResolveResult::Bound(namespace) => namespace.as_ref().to_owned(),
            _ => String::new(),
        };
        match event {
            Event::Start(tag) => {
                if open.len() > MAX_DEPTH {
                    return None;
                }
                open.push(element(namespace, &tag)?);
            }
            Event::Empty(tag) => {
                let element = element(namespace, &tag)?;
                open.last_mut()?.children.push(element);
            }
            Event::End(_) => {
                let element = open.pop()?;
                open.last_mut()?.children.push(element);
            }
            Event::Text(text) => open.last_mut()?.text.push_str(&text),
            Event::CData(text) => open.last_mut()?.text.push_str(&text),
            Event::GeneralRef(name) => {
                let reference = format!("&{};", &*name);
                let resolved = quick_xml::escape::unescape(&reference).ok()?;
                open.last_mut()?.text.push_str(legal(&resolved)?);
            }
            Event::DocType(_) => return None,
            Event::Eof => break,
            _ => {}
        }
    }
    let mut document = open.pop()?;
    (open.is_empty() && document.children.len() == 1).then(|| document.children.remove(0))
}

fn element(namespace: String, tag: &BytesStart<'_>) -> Option<Element> {
    let mut element =
        Element { namespace, name: tag.local_name().as_ref().to_owned(), ..Element::default() };
    for attribute in tag.attributes() {
        let attribute = attribute.ok()?;
        let value = quick_xml::escape::unescape(&attribute.value).ok()?;
        let value = legal(&value)?;
        if attribute.key.as_ref() == "id" {
            element.id = value.to_owned();
        }
    }
    Some(element)
}

/// The encoding that a document says it has (XML 1.0 section 4.3.3), where ASCII is enough to read that.
fn declared(body: &[u8]) -> Option<&'static Encoding> {
    let declaration =
        &body.strip_prefix(b"<?xml")?[..memchr::memmem::find(body, b"?>")?.checked_sub(5)?];
    let (_, value) = str::from_utf8(declaration).ok()?.split_once("encoding")?;
    let label = value.split(['"', '\'']).nth(1)?;
    Encoding::for_label(label.as_bytes()).filter(|encoding| encoding.is_ascii_compatible())
}

/// The same text, unless it holds what no document may (XML 1.0 section 2.2): it could not be given back.
fn legal(text: &str) -> Option<&str> {
    let is_char = |char: char| match char {
        '\t' | '\n' | '\r' => true,
        '\u{FFFE}' | '\u{FFFF}' => false,
        char => char >= ' ',
    };
    text.chars().all(is_char).then_some(text)
}

/// Text as it may stand in an element or attribute.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    quick_xml::escape::escape(text)
}
