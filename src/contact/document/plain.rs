//! Plain documents: tags, text, references, and an XML declaration at the start. Nothing else.
//!
//! The reader gives up (`None`) at anything that it would have to think about: comments, CDATA,
//! processing instructions, DTDs, references in attributes, odd quoting, whatever is malformed. It
//! never says why; the general reader does. That keeps it small, and both to one answer.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::Event;

use super::general::check_declared_encoding;
use super::scan::{blank, letters, markup, value_end};
use super::walk::{Name, Tag, Walk};
use super::{Document, NAMESPACE, Source, value};

/// How nearly all clients start a document. To take it apart is a fifteenth of the whole time of a short contact.
const USUAL_DECLARATION: &[u8] = br#"<?xml version="1.0" encoding="UTF-8"?>"#;

const LIST_END: &[u8] = b"</ContactList>";

/// The most namespace declarations in scope at once, as in the general reader.
const MAX_BINDINGS: usize = 128;

/// How many digits `text` starts with.
#[inline]
fn digits(text: &[u8]) -> usize {
    // Eight at a time: what is no digit sets the highest bit of its byte, and what is before it does not.
    if let Some(chunk) = text.first_chunk() {
        let digits = u64::from_le_bytes(*chunk) ^ u64::from_le_bytes([b'0'; 8]);
        let others = (digits.wrapping_add(u64::from_le_bytes([0x80 - 10; 8])) | digits)
            & u64::from_le_bytes([0x80; 8]);
        if others != 0 {
            return others.trailing_zeros() as usize / 8;
        }
    }
    text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len())
}

/// What follows `start`, of at least a block, if `text` starts with it. Compared by blocks, since the comparison of what may
/// have any length is a call of the libc.
#[inline]
fn starts_alike<'t>(text: &'t [u8], start: &[u8]) -> Option<&'t [u8]> {
    let (text, rest) = text.split_at_checked(start.len())?;
    let (blocks, others) = (text.as_chunks::<32>().0, start.as_chunks::<32>().0);
    let last = text.last_chunk::<32>()? == start.last_chunk()?;
    (last && blocks.iter().zip(others).all(|(block, other)| block == other)).then_some(rest)
}

/// Reads `text`, or gives up.
pub(super) fn read(text: &str, own_host: Option<&str>) -> Option<Document> {
    let mut reader = Plain {
        text,
        bytes: text.as_bytes(),
        walk: Walk::new(text, text.as_bytes(), 0, own_host),
        bindings: Vec::new(),
        alike: None,
    };
    let mut at = reader.declaration()?;
    while let Some(markup) = reader.character_data(at)? {
        at = match reader.bytes.get(markup + 1)? {
            b'/' => reader.end_tag(markup)?,
            byte if value::is_name_start(*byte) => match reader.at_once(markup) {
                Some(behind) => behind,
                None => reader.start_tag(markup)?,
            },
            _ => return None,
        };
    }
    reader.walk.finish().ok()
}

struct Plain<'t> {
    text: &'t str,
    bytes: &'t [u8],
    walk: Walk<'t>,
    /// The namespace declarations in scope, innermost last.
    bindings: Vec<Binding>,
    /// What the next list is likely to start with.
    alike: Option<Alike<'t>>,
}

/// What lists look like up to the end of their source, or to what follows them, as far as the namespaces in scope stay the
/// same. Those of one contact often differ in their numbers alone, and to see that takes less than to read them: of
/// 1,500 that are all edited, half of all the instructions.
struct Alike<'t> {
    /// From the start of the one that was read to the number at the end of its id.
    head: &'t [u8],
    /// From there on, most often to what follows the list.
    tail: &'t [u8],
    /// Whether nothing else is in the list, and `tail` goes to what follows it.
    is_whole: bool,
    /// Where its source is, in `tail`.
    element: Range<usize>,
    source: Source,
    /// How many sources there were once its own was noted last.
    sources: usize,
}

impl Alike<'_> {
    /// If `text` starts with such a list: where its id ends, and what is behind.
    #[inline]
    fn next<'t>(&self, text: &'t [u8]) -> Option<(usize, &'t [u8])> {
        let number = starts_alike(text, self.head)?;
        let digits = digits(number);
        let behind = starts_alike(number.get(digits..)?, self.tail)?;
        Some((self.head.len() + digits, behind))
    }
}

/// `xmlns="..."` or `xmlns:prefix="..."`
struct Binding {
    /// Empty for the default namespace.
    prefix: Range<usize>,
    is_ours: bool,
    /// How many elements are open around the one that declares it.
    depth: usize,
}

impl<'t> Plain<'t> {
    /// Passes an XML declaration, if there is one at the very start.
    fn declaration(&self) -> Option<usize> {
        if !self.bytes.starts_with(b"<?xml") {
            return Some(0);
        }
        if self.bytes.starts_with(USUAL_DECLARATION) {
            return Some(USUAL_DECLARATION.len());
        }
        let end = memchr::memmem::find(self.bytes, b"?>")? + b"?>".len();
        match Reader::from_str(&self.text[..end]).read_event() {
            Ok(Event::Decl(declaration)) => {
                check_declared_encoding(&declaration).ok().map(|()| end)
            }
            _ => None,
        }
    }

    /// Passes text up to the next `<`; `Some(None)` at the end of the document.
    #[inline]
    fn character_data(&self, mut at: usize) -> Option<Option<usize>> {
        let in_root = !self.walk.open.is_empty();
        // Between two tags there is often nothing but some white space: to step over it costs less than a search.
        if in_root {
            at += blank(&self.bytes[at..]);
            if self.bytes.get(at) == Some(&b'<') {
                return Some(Some(at));
            }
        }
        loop {
            let rest = &self.bytes[at..];
            let found = markup(rest);
            let text = &rest[..found.unwrap_or(rest.len())];
            if !in_root && !text.iter().copied().all(value::is_space) {
                return None;
            }
            let Some(found) = found else { return Some(None) };
            if rest[found] == b'<' {
                return Some(Some(at + found));
            }
            let name = &rest[found + 1..];
            let end = memchr::memchr(b';', name)?;
            if !in_root || !value::is_reference_name(&name[..end]) {
                return None;
            }
            at += found + 1 + end + 1;
        }
    }

    /// Passes an end tag, if it is that of the innermost element.
    #[inline]
    fn end_tag(&mut self, start: usize) -> Option<usize> {
        let name = &self.bytes[self.walk.open.last()?.name.clone()];
        let rest = self.bytes[start + 2..].strip_prefix(name)?;
        let spaces = rest.iter().position(|&byte| !value::is_space(byte))?;
        if rest[spaces] != b'>' {
            return None;
        }
        let end = start + 2 + name.len() + spaces + 1;
        self.walk.end(start..end).ok()?;
        self.unbind();
        Some(end)
    }

    /// Passes an element as nearly all clients write it, with what is in it, or leaves it to the others. They are nearly
    /// all of a contact, and what is not opened need not be closed: a third of the time.
    #[inline]
    fn at_once(&mut self, start: usize) -> Option<usize> {
        let tag = &self.bytes[start + 1..];
        if tag.starts_with(b"ContactList id=") {
            self.list(start)
        } else if tag.starts_with(b"OptIn") {
            let (contact, list) = self.walk.whose_list()?;
            self.member(contact, list, start)
        } else {
            self.field(start)
        }
    }

    /// Passes `<ContactList id="...">`, and what is in it up to its end or to something that is not plain. Passes as many
    /// as are like one before.
    #[inline]
    fn list(&mut self, start: usize) -> Option<usize> {
        let contact = self.walk.whose_lists()?;
        if let Some(behind) = self.lists_alike(contact, start) {
            return Some(behind);
        }
        let from = start + b"<ContactList id=\"".len();
        let quote = *self.bytes.get(from - 1)?;
        let id = from..from + value_end(&self.bytes[from..], quote)?;
        let is_quoted = matches!(quote, b'"' | b'\'') && self.bytes[id.end] == quote;
        let content = id.end + b"\">".len();
        if !is_quoted || self.bytes.get(content - 1) != Some(&b'>') || !self.is_ours(b"") {
            return None;
        }
        let list = self.walk.whole_list(contact, start, id.clone());
        let at = content + blank(&self.bytes[content..]);
        let Some((source, end)) = self.source(contact, list, at) else {
            return Some(self.members(contact, list, start, content, at).0);
        };
        let sources = self.walk.sources();
        let (behind, is_closed) = self.members(contact, list, start, content, end);
        self.alike = self.walk.number_of(id).map(|number| {
            let is_whole = is_closed && self.bytes[end..behind].trim_ascii_start() == LIST_END;
            let to = if is_whole { behind + blank(&self.bytes[behind..]) } else { end };
            let element = at - number.end..end - number.end;
            let (head, tail) = (&self.bytes[start..number.start], &self.bytes[number.end..to]);
            Alike { head, tail, is_whole, element, source, sources }
        });
        Some(behind)
    }

    /// Passes lists that are like one before, if there is any: one after the other, if nothing else is in them.
    #[inline]
    fn lists_alike(&mut self, contact: u32, start: usize) -> Option<usize> {
        let mut alike = self.alike.take()?;
        let (mut first, mut at) = (None, start);
        while let Some((length, behind)) = alike.next(&self.bytes[at..]) {
            let id = at + b"<ContactList id=\"".len()..at + length;
            let list = self.walk.list_alike(contact, id);
            first.get_or_insert((list, at + length));
            at = self.bytes.len() - behind.len();
            if !alike.is_whole {
                break;
            }
        }
        let passed = first.map(|(list, id_end)| {
            if !self.walk.extend_newest(alike.sources, contact, list) {
                let element = id_end + alike.element.start..id_end + alike.element.end;
                self.walk.list_source(contact, list, alike.source, element);
                alike.sources = self.walk.sources();
                self.walk.extend_newest(alike.sources, contact, list + 1);
            }
            match alike.is_whole {
                true => at,
                false => self.members(contact, list, start, id_end + b"\">".len(), at).0,
            }
        });
        self.alike = Some(alike);
        passed
    }

    /// Passes the members of a list up to its end or to something that is not plain, and tells whether it is closed.
    #[inline]
    fn members(
        &mut self,
        contact: u32,
        list: u32,
        start: usize,
        content: usize,
        mut at: usize,
    ) -> (usize, bool) {
        loop {
            at += blank(&self.bytes[at..]);
            if self.bytes[at..].starts_with(LIST_END) {
                return (at + LIST_END.len(), true);
            }
            let Some(behind) = self.member(contact, list, at) else {
                let name = start + 1..start + b"<ContactList".len();
                self.walk.open_list(contact, list, name, content);
                return (at, false);
            };
            at = behind;
        }
    }

    /// Passes a list's source or time, if it has no prefix and nothing but one of the two values or text is in it.
    #[inline]
    fn member(&mut self, contact: u32, list: u32, start: usize) -> Option<usize> {
        if let Some((_, end)) = self.source(contact, list, start) {
            return Some(end);
        }
        let text = self.bytes[start..].strip_prefix(b"<OptInTime>")?;
        let behind = text[markup(text)?..].strip_prefix(b"</OptInTime>")?;
        let end = self.bytes.len() - behind.len();
        self.is_ours(b"").then(|| {
            self.walk.list_time(list, start..end);
            end
        })
    }

    /// Passes a list's source, and tells what it is.
    #[inline]
    fn source(&mut self, contact: u32, list: u32, start: usize) -> Option<(Source, usize)> {
        // In two steps: what is longer than 32 bytes is compared by a call, which musl's libc does byte by byte.
        let rest = self.bytes[start..].strip_prefix(b"<OptInSource>ACTION_BY_C")?;
        let source = if rest.starts_with(b"USTOMER</OptInSource>") {
            Source::Customer
        } else {
            rest.starts_with(b"ONTACT</OptInSource>").then_some(Source::Contact)?
        };
        let length = "<OptInSource></OptInSource>".len() + source.as_str().len();
        self.is_ours(b"").then(|| {
            self.walk.list_source(contact, list, source, start..start + length);
            (source, start + length)
        })
    }

    /// Passes `<Name>text</Name>`, if the name is none that matters.
    #[inline]
    fn field(&mut self, start: usize) -> Option<usize> {
        let rest = &self.bytes[start + 1..];
        let begun = letters(rest);
        let others = |&byte: &u8| byte == b':' || !value::is_name_byte(byte);
        let length = begun + rest[begun..].iter().position(others)?;
        let name = &rest[..length];
        if rest[length] != b'>' || Name::of(name) != Name::Other {
            return None;
        }
        let text = &rest[length + 1..];
        let end = markup(text)?;
        let behind = text[end..].strip_prefix(b"</")?.strip_prefix(name)?.strip_prefix(b">")?;
        self.walk.leaf().then(|| self.bytes.len() - behind.len())
    }

    /// Whether the innermost declaration of a prefix names the contact schema.
    #[inline]
    fn is_ours(&self, prefix: &[u8]) -> bool {
        is_ours(self.bytes, &self.bindings, prefix)
    }

    /// Passes a start tag with whatever attributes it has.
    #[inline]
    fn start_tag(&mut self, start: usize) -> Option<usize> {
        let (mut local, mut at) = (start + 1, start + 1 + letters(&self.bytes[start + 1..]));
        loop {
            let byte = *self.bytes.get(at)?;
            if byte == b':' {
                match at == start + 1 {
                    true => return None,
                    false if local == start + 1 => local = at + 1,
                    false => {}
                }
            } else if !value::is_name_byte(byte) {
                break;
            }
            at += 1;
        }
        let name = start + 1..at;
        if !matches!(self.bytes[at], b'>' | b'/' | b' ' | b'\t' | b'\r' | b'\n') {
            return None;
        }
        let known = Name::of(&self.bytes[local..at]);
        let mut id = None;
        let self_closing = loop {
            match self.bytes.get(at)? {
                b'>' => break false,
                b'/' => {
                    at += 1;
                    if self.bytes.get(at) != Some(&b'>') {
                        return None;
                    }
                    break true;
                }
                byte if value::is_space(*byte) => at += 1,
                // What precedes an attribute is white space, also behind another attribute.
                _ if !value::is_space(self.bytes[at - 1]) => return None,
                _ => at = self.attribute(at, &mut id)?,
            }
        };
        let span = start..at + 1;
        let tag = Tag { span, name: name.clone(), known, self_closing };
        let prefix = &self.bytes[name.start..(local - 1).max(name.start)];
        let (bytes, bindings) = (self.bytes, &self.bindings);
        self.walk.start(tag, || is_ours(bytes, bindings, prefix), || id).ok()?;
        if self_closing {
            self.unbind();
        }
        Some(at + 1)
    }

    /// Passes one attribute: a name, `=`, and a quoted value without markup or references.
    #[inline]
    fn attribute(&mut self, start: usize, id: &mut Option<Range<usize>>) -> Option<usize> {
        let rest = &self.bytes[start..];
        let begun = letters(rest);
        let length = begun + rest[begun..].iter().position(|&byte| !value::is_name_byte(byte))?;
        let name = start..start + length;
        let quote = *self.bytes.get(name.end + 1)?;
        if length == 0 || self.bytes[name.end] != b'=' || !matches!(quote, b'"' | b'\'') {
            return None;
        }
        let from = name.end + 2;
        let value = from..from + value_end(&self.bytes[from..], quote)?;
        if self.bytes[value.end] != quote {
            return None;
        }
        let end = value.end + 1;
        match &self.text[name.clone()] {
            // The general reader takes the first of several.
            "id" => *id = id.take().or(Some(value)),
            declaration if declaration.starts_with("xmlns") => self.bind(name, value)?,
            _ => {}
        }
        Some(end)
    }

    /// What ended ends what it declared.
    #[inline]
    fn unbind(&mut self) {
        while self.bindings.last().is_some_and(|binding| binding.depth >= self.walk.open.len()) {
            self.bindings.pop();
            self.alike = None;
        }
    }

    fn bind(&mut self, name: Range<usize>, value: Range<usize>) -> Option<()> {
        let prefix = match &self.text[name.start + "xmlns".len()..name.end] {
            "" => name.end..name.end,
            // Bound once and for all, or not prefixes at all.
            ":xml" | ":xmlns" | ":" => return None,
            prefixed if prefixed.starts_with(':') => name.start + "xmlns:".len()..name.end,
            // An attribute whose name only starts like a declaration.
            _ => return Some(()),
        };
        let namespace = &self.text[value];
        // Namespaces that only those two prefixes may have.
        if self.bindings.len() == MAX_BINDINGS
            || namespace.starts_with("http://www.w3.org/XML/")
            || namespace.starts_with("http://www.w3.org/2000/xmlns")
        {
            return None;
        }
        let is_ours = namespace == NAMESPACE;
        self.bindings.push(Binding { prefix, is_ours, depth: self.walk.open.len() });
        self.alike = None;
        Some(())
    }
}

/// Whether the innermost of `bindings` for a prefix names the contact schema.
#[inline]
fn is_ours(bytes: &[u8], bindings: &[Binding], prefix: &[u8]) -> bool {
    let binding = bindings.iter().rev().find(|binding| &bytes[binding.prefix.clone()] == prefix);
    binding.is_some_and(|binding| binding.is_ours)
}

#[cfg(test)]
mod tests;
