//! The value of an element or attribute as XML means it, with the way back to the raw bytes.

use std::borrow::Cow;
use std::ops::Range;

use super::edit::Bridge;

/// XML white space: the four characters of XML 1.0 section 2.3, no others.
pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// The part of `raw` without the white space around it; empty and at the start if there is no other.
pub(super) fn trimmed(raw: &[u8]) -> Range<usize> {
    match raw.iter().position(|&byte| !is_space(byte)) {
        Some(first) => {
            let last = raw.iter().rposition(|&byte| !is_space(byte)).unwrap_or(first);
            first..last + 1
        }
        None => 0..0,
    }
}

/// A value without the white space around it, and where it stands.
#[derive(Debug)]
pub(super) struct Value<'a> {
    /// The text with references, CDATA and comments resolved.
    pub text: Cow<'a, [u8]>,
    /// The raw bytes that make up `text`; empty at the start of the content if there is no text.
    pub span: Range<usize>,
    /// What has to follow a text written over `span`.
    pub bridge: Bridge,
}

impl Value<'_> {
    /// The raw bytes of the first `count` bytes of [`Self::text`], if they are all of a kind that can
    /// be replaced by plain text.
    pub fn head(&self, raw: &[u8], base: usize, count: usize) -> Option<(Range<usize>, Bridge)> {
        if let Cow::Borrowed(_) = self.text {
            return Some((self.span.start..self.span.start + count, Bridge::None));
        }
        let (mut first, mut last, mut passed) = (None, None, 0);
        letters(raw, |letter| {
            if first.is_none() && is_space(letter.byte) {
                return;
            }
            passed += 1;
            if passed == count {
                last = Some(letter.clone());
            }
            first.get_or_insert(letter);
        })?;
        let (first, last) = (first?, last?);
        let span = base + first.raw.start..base + last.raw.end;
        Some((span, Bridge::between(first.cdata, last.cdata)))
    }
}

/// The value in `raw`, which stands at `base` in the document and holds no child element.
///
/// `None` if a reference in it resolves to nothing: no DTD is ever read, so only character references
/// and the five predefined entities do (XML 1.0 section 4.6).
pub(super) fn read(raw: &[u8], base: usize) -> Option<Value<'_>> {
    if memchr::memchr2(b'<', b'&', raw).is_none() {
        let span = trimmed(raw);
        return Some(Value {
            text: Cow::Borrowed(&raw[span.clone()]),
            span: base + span.start..base + span.end,
            bridge: Bridge::None,
        });
    }
    let (mut text, mut length) = (Vec::new(), 0);
    let (mut first, mut last) = (None, None);
    letters(raw, |letter| {
        let is_space = is_space(letter.byte);
        if is_space && first.is_none() {
            return;
        }
        text.push(letter.byte);
        if !is_space {
            length = text.len();
            first.get_or_insert_with(|| letter.clone());
            last = Some(letter);
        }
    })?;
    let (Some(first), Some(last)) = (first, last) else {
        return Some(Value { text: Cow::Borrowed(&[]), span: base..base, bridge: Bridge::None });
    };
    text.truncate(length);
    Some(Value {
        text: Cow::Owned(text),
        span: base + first.raw.start..base + last.raw.end,
        bridge: Bridge::between(first.cdata, last.cdata),
    })
}

/// One byte of a resolved text and the raw bytes that it came from.
#[derive(Clone)]
struct Letter {
    byte: u8,
    raw: Range<usize>,
    cdata: bool,
}

/// Resolves content byte by byte. The rare way: only values with a reference, CDATA, comment or
/// processing instruction come here.
fn letters(raw: &[u8], mut each: impl FnMut(Letter)) -> Option<()> {
    let mut at = 0;
    while let Some(&byte) = raw.get(at) {
        let rest = &raw[at..];
        if rest.starts_with(b"<![CDATA[") {
            let start = at + b"<![CDATA[".len();
            let end = start + memchr::memmem::find(&raw[start..], b"]]>")?;
            for (at, &byte) in (start..end).zip(&raw[start..end]) {
                each(Letter { byte, raw: at..at + 1, cdata: true });
            }
            at = end + b"]]>".len();
        } else if rest.starts_with(b"<!--") {
            at += b"<!--".len();
            at += memchr::memmem::find(&raw[at..], b"-->")? + b"-->".len();
        } else if rest.starts_with(b"<?") {
            at += memchr::memmem::find(rest, b"?>")? + b"?>".len();
        } else if byte == b'&' {
            let end = at + memchr::memchr(b';', rest)?;
            let resolved = reference(&raw[at + 1..end])?;
            let mut utf8 = [0; 4];
            for byte in resolved.encode_utf8(&mut utf8).bytes() {
                each(Letter { byte, raw: at..end + 1, cdata: false });
            }
            at = end + 1;
        } else {
            each(Letter { byte, raw: at..at + 1, cdata: false });
            at += 1;
        }
    }
    Some(())
}

/// What `&name;` stands for, without a DTD.
pub(super) fn reference(name: &[u8]) -> Option<char> {
    match name {
        b"lt" => Some('<'),
        b"gt" => Some('>'),
        b"amp" => Some('&'),
        b"apos" => Some('\''),
        b"quot" => Some('"'),
        _ => {
            let digits = std::str::from_utf8(name.strip_prefix(b"#")?).ok()?;
            let (digits, radix) = match digits.strip_prefix('x') {
                Some(hex) => (hex, 16),
                None => (digits, 10),
            };
            // from_str_radix would take a sign.
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            let code = u32::from_str_radix(digits, radix).ok()?;
            char::from_u32(code).filter(|&char| is_xml_char(char))
        }
    }
}

/// Production `Char` of XML 1.0 section 2.2.
fn is_xml_char(char: char) -> bool {
    matches!(char, '\t' | '\n' | '\r' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..)
}

/// Whether what follows an `&` is a reference's name and its `;`, as far as XML's grammar goes.
pub(super) fn is_reference_name(name: &[u8]) -> bool {
    match name {
        [b'#', b'x', hex @ ..] => !hex.is_empty() && hex.iter().all(u8::is_ascii_hexdigit),
        [b'#', digits @ ..] => !digits.is_empty() && digits.iter().all(u8::is_ascii_digit),
        [first, rest @ ..] => is_name_start(*first) && rest.iter().copied().all(is_name_byte),
        [] => false,
    }
}

/// Whether a name may start with this byte. Bytes beyond ASCII pass: which of them are letters is
/// nothing that an edit depends on.
#[inline]
pub(super) fn is_name_start(byte: u8) -> bool {
    NAME[byte as usize] & STARTS != 0
}

/// Whether a name may go on with this byte.
#[inline]
pub(super) fn is_name_byte(byte: u8) -> bool {
    NAME[byte as usize] != 0
}

const STARTS: u8 = 2;

/// What each byte may do in a name: nothing, go on, or start. A table, since every byte of every name
/// is asked about.
const NAME: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | b':' | 0x80.. => STARTS | 1,
            b'0'..=b'9' | b'-' | b'.' => 1,
            _ => 0,
        };
        byte += 1;
    }
    table
};
