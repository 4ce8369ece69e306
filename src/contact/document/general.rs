//! Any document, read by quick-xml.
//!
//! quick-xml's event spans tile its input, but it is no well-formedness check: what an edit relies on
//! (balance, one root, no bare markup characters) is checked here beside it.

use std::borrow::Cow;
use std::ops::Range;

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};
use quick_xml::NsReader;
use quick_xml::errors::{IllFormedError, SyntaxError};
use quick_xml::events::attributes::Attributes;
use quick_xml::events::{BytesDecl, BytesStart, Event};
use quick_xml::name::{NamespaceResolver, ResolveResult};

use super::walk::{Name, Tag, Walk};
use super::{Document, NAMESPACE, Uninspectable, is_inspectable_charset, value};

/// How long a reference in a namespace's name is at most, zeros before its number included.
const LONGEST_REFERENCE: usize = 20;

/// Reads `text`, which stands for `bytes` and starts at `base` in the body. Where it is not the same, `charset` is what the body was
/// said to be in.
pub(super) fn read(
    text: &str,
    bytes: &[u8],
    base: usize,
    charset: Option<&str>,
    own_host: Option<&str>,
) -> Result<Document, Uninspectable> {
    let mut reader = NsReader::from_str(text);
    let mut walk = Walk::new(text, bytes, base, own_host);
    let is_masked = text.as_bytes() != bytes;
    walk.legacy = is_masked.then(|| legacy(charset));
    let mut start = 0;
    loop {
        let event = reader.read_event().map_err(|error| reason(&error))?;
        let end = reader.buffer_position() as usize;
        let in_root = !walk.open.is_empty();
        if matches!(event, Event::Start(_) | Event::Empty(_)) {
            check_tag(&text.as_bytes()[start..end])?;
        }
        if is_masked && matches!(event, Event::Start(_) | Event::Empty(_) | Event::End(_)) {
            check_names(&bytes[start..end])?;
        }
        match event {
            Event::Start(tag) => open(&mut walk, text, &tag, start..end, reader.resolver(), false)?,
            Event::Empty(tag) => open(&mut walk, text, &tag, start..end, reader.resolver(), true)?,
            Event::End(_) => walk.end(start..end)?,
            Event::Text(text) if in_root || text.bytes().all(value::is_space) => {}
            Event::CData(_) if in_root => {}
            Event::GeneralRef(name) if in_root && value::is_reference_name(name.as_bytes()) => {}
            Event::Text(_) | Event::CData(_) | Event::GeneralRef(_) => {
                return Err(Uninspectable::Malformed);
            }
            Event::Decl(declaration) => {
                check_declared_encoding(&declaration)?;
                // RFC 7303 section 3: what the message says goes before what the document does.
                if let (true, None, Some(Ok(label))) = (is_masked, charset, declaration.encoding())
                {
                    walk.legacy = Some(legacy(Some(&label)));
                }
            }
            Event::DocType(_) => return Err(Uninspectable::Doctype),
            Event::Comment(_) | Event::PI(_) => {}
            Event::Eof => return walk.finish(),
        }
        start = end;
    }
}

/// What bytes that are not UTF-8 are read as.
fn legacy(label: Option<&str>) -> &'static Encoding {
    let said = label.and_then(|label| Encoding::for_label(label.as_bytes()));
    said.filter(|&encoding| encoding != UTF_8).unwrap_or(WINDOWS_1252)
}

fn open(
    walk: &mut Walk<'_>,
    text: &str,
    tag: &BytesStart<'_>,
    span: Range<usize>,
    namespaces: &NamespaceResolver,
    self_closing: bool,
) -> Result<(), Uninspectable> {
    let qname = tag.name();
    let name = span.start + 1..span.start + 1 + qname.as_ref().len();
    let (local, end) = (name.end - qname.local_name().as_ref().len(), name.end);
    let raw = &text[span.clone()];
    let start = span.start;
    walk.start(
        Tag { span, name, known: Name::of(&text.as_bytes()[local..end]), self_closing },
        || is_ours(&namespaces.resolve_element(qname).0),
        || id_attribute(raw).map(|id| start + id.start..start + id.end),
    )
}

fn is_ours(resolved: &ResolveResult<'_>) -> bool {
    let ResolveResult::Bound(namespace) = resolved else { return false };
    names_schema(namespace.as_ref().as_bytes())
}

/// Whether a namespace's name, in which quick-xml resolves no references, is the contact schema's. Looked at no further than it is
/// that: it is asked of each element that matters, and may be as long as the body.
fn names_schema(name: &[u8]) -> bool {
    let (mut rest, mut expected) = (name, NAMESPACE.as_bytes());
    while let Some((&byte, behind)) = rest.split_first() {
        let (letter, behind) = match byte {
            b'&' => {
                let end = memchr::memchr(b';', &rest[..rest.len().min(LONGEST_REFERENCE)]);
                let Some(end) = end else { return false };
                let Some(letter) = value::reference(&rest[1..end]) else { return false };
                (letter, &rest[end + 1..])
            }
            byte => (char::from(byte), behind),
        };
        match expected.split_first() {
            Some((&next, left)) if char::from(next) == letter => (rest, expected) = (behind, left),
            _ => return false,
        }
    }
    expected.is_empty()
}

/// Refuses what would make a tag mean something else than it seems to: a name that is none (a bare
/// `<` in text), markup in an attribute, an ampersand that starts no reference, a second slash at the end, which would
/// close an element that an edit has opened.
fn check_tag(tag: &[u8]) -> Result<(), Uninspectable> {
    let inside = &tag[1..];
    if inside.ends_with(b"//>") {
        return Err(Uninspectable::Malformed);
    }
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

/// Refuses a tag with a name in which letters of a legacy charset stand: the reader was shown the same letter for all of them, so
/// that it would take names for one another.
fn check_names(tag: &[u8]) -> Result<(), Uninspectable> {
    let mut quote = None;
    for &byte in tag {
        match quote {
            None if !byte.is_ascii() => return Err(Uninspectable::Encoding),
            None if matches!(byte, b'"' | b'\'') => quote = Some(byte),
            Some(opened) if opened == byte => quote = None,
            _ => {}
        }
    }
    Ok(())
}

/// Where the value of the `id` attribute stands in a start tag, quotes excluded.
fn id_attribute(tag: &str) -> Option<Range<usize>> {
    let name = tag.bytes().position(value::is_space)?;
    let attributes = tag[..tag.len() - 1].trim_end_matches('/');
    let mut attributes = Attributes::new(attributes, name);
    let id = attributes
        .with_checks(false)
        .map_while(Result::ok)
        .find(|attribute| attribute.key.as_ref() == "id")?;
    let Cow::Borrowed(value) = id.value else { return None };
    // quick-xml tells no spans of attributes, but hands out slices of its input.
    let start = value.as_ptr() as usize - tag.as_ptr() as usize;
    Some(start..start + value.len())
}

pub(super) fn check_declared_encoding(declaration: &BytesDecl<'_>) -> Result<(), Uninspectable> {
    match declaration.encoding() {
        Some(Ok(label)) if !is_inspectable_charset(&label) => Err(Uninspectable::Encoding),
        _ => Ok(()),
    }
}

fn reason(error: &quick_xml::Error) -> Uninspectable {
    match error {
        quick_xml::Error::Syntax(SyntaxError::UnclosedDoctype)
        | quick_xml::Error::IllFormed(IllFormedError::MissingDoctypeName) => Uninspectable::Doctype,
        _ => Uninspectable::Malformed,
    }
}
