//! Plain documents: tags, text, references, and an XML declaration at the start. Nothing else.
//!
//! The reader gives up (`None`) at anything that it would have to think about: comments, CDATA,
//! processing instructions, DTDs, references in attributes, odd quoting, whatever is malformed. It
//! never says why; the general reader does. That keeps it small, and both to one answer.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::Event;

use super::general::check_declared_encoding;
use super::walk::{Name, Tag, Walk};
use super::{Document, NAMESPACE, value};

/// The most namespace declarations in scope at once, as in the general reader.
const MAX_BINDINGS: usize = 128;

/// The names of tags of which a list has one each, as nearly all clients write them, and their lengths. Lists are many,
/// and to know these at a glance is a tenth of the whole time.
#[inline]
fn repeated(tag: &[u8]) -> Option<(usize, Name)> {
    // What ends the name is looked at, and is not part of it.
    if tag.starts_with(b"OptInSource>") {
        Some(("OptInSource".len(), Name::OptInSource))
    } else if tag.starts_with(b"ContactList ") {
        Some(("ContactList".len(), Name::ContactList))
    } else if tag.starts_with(b"OptInTime>") {
        Some(("OptInTime".len(), Name::OptInTime))
    } else {
        None
    }
}

/// Reads `text`, or gives up.
pub(super) fn read(text: &str, own_host: Option<&str>) -> Option<Document> {
    let mut reader = Plain {
        text,
        bytes: text.as_bytes(),
        walk: Walk::new(text, text.as_bytes(), 0, own_host),
        bindings: Vec::new(),
    };
    let mut at = reader.declaration()?;
    while let Some(markup) = reader.character_data(at)? {
        at = match reader.bytes.get(markup + 1)? {
            b'/' => reader.end_tag(markup)?,
            byte if value::is_name_start(*byte) => reader.start_tag(markup)?,
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
        loop {
            let rest = &self.bytes[at..];
            // Tags often stand side by side: a look costs less than a search.
            if in_root && rest.first() == Some(&b'<') {
                return Some(Some(at));
            }
            let found = memchr::memchr2(b'<', b'&', rest);
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
        while self.bindings.last().is_some_and(|binding| binding.depth >= self.walk.open.len()) {
            self.bindings.pop();
        }
        Some(end)
    }

    /// Passes a start tag with whatever attributes it has.
    #[inline]
    fn start_tag(&mut self, start: usize) -> Option<usize> {
        let (mut local, mut at) = (start + 1, start + 1);
        let known = repeated(&self.bytes[at..]);
        if let Some((length, _)) = known {
            at += length;
        } else {
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
        }
        let name = start + 1..at;
        if !matches!(self.bytes[at], b'>' | b'/' | b' ' | b'\t' | b'\r' | b'\n') {
            return None;
        }
        let known = known.map_or_else(|| Name::of(&self.bytes[local..at]), |(_, name)| name);
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
        let is_ours = || {
            let binding = bindings.iter().rev().find(|it| &bytes[it.prefix.clone()] == prefix);
            binding.is_some_and(|binding| binding.is_ours)
        };
        self.walk.start(tag, is_ours, || id).ok()?;
        if self_closing {
            while self.bindings.last().is_some_and(|it| it.depth >= self.walk.open.len()) {
                self.bindings.pop();
            }
        }
        Some(at + 1)
    }

    /// Passes one attribute: a name, `=`, and a quoted value without markup or references.
    #[inline]
    fn attribute(&mut self, start: usize, id: &mut Option<Range<usize>>) -> Option<usize> {
        let length = self.bytes[start..]
            .iter()
            .position(|&byte| !value::is_name_byte(byte) && byte != b':')?;
        let name = start..start + length;
        let quote = *self.bytes.get(name.end + 1)?;
        if length == 0 || self.bytes[name.end] != b'=' || !matches!(quote, b'"' | b'\'') {
            return None;
        }
        let from = name.end + 2;
        let value = from..from + memchr::memchr3(quote, b'<', b'&', &self.bytes[from..])?;
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
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{plain_text, read_generally};
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    /// Where the plain reader answers, its answer is the general one's.
    fn agree(body: &[u8], own_host: Option<&str>) -> bool {
        let Some(plain) = plain_text(body, None).and_then(|text| read(text, own_host)) else {
            return false;
        };
        let general = read_generally(body, None, own_host);
        assert_eq!(Ok(plain), general, "{}", body.escape_ascii());
        true
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
        fn the_plain_reader_agrees_with_the_general_one_on_bytes(body in prop::collection::vec(any::<u8>(), 0..60)) {
            agree(&body, None);
        }
    }
}
