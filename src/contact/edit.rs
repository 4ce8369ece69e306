//! Splicing: every byte outside the edits is the client's own.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use super::Source;

/// A range of a body's bytes. Half the size of `Range<usize>`, and `Copy`: a body of 1,500 lists has
/// thousands of them, and what they weigh is a fifth of the time that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// The longest body that spans can reach into, in bytes.
    pub const LONGEST_BODY: usize = u32::MAX as usize;

    /// The span of `range`, which ends at [`Span::LONGEST_BODY`] or before.
    #[inline]
    pub(crate) fn new(range: Range<usize>) -> Self {
        Self { start: range.start as u32, end: range.end as u32 }
    }

    /// The same as a range.
    #[inline]
    pub fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// The span of as many bytes, so many further on.
    #[inline]
    pub(super) fn moved_by(self, offset: u32) -> Self {
        Self { start: self.start + offset, end: self.end + offset }
    }

    /// Where it starts.
    #[inline]
    pub fn start(self) -> usize {
        self.start as usize
    }
}

/// One replacement of raw bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// The bytes that go; empty for an insertion.
    pub span: Span,
    /// What comes in their place.
    pub with: With,
    /// What has to follow, so that CDATA sections stay balanced.
    pub bridge: Bridge,
}

impl Edit {
    /// How much memory its text takes beside the edit itself, in bytes.
    pub(crate) fn owned(&self) -> usize {
        if let With::Text(Cow::Owned(text)) = &self.with { text.len() } else { 0 }
    }

    fn len(&self) -> usize {
        self.with.as_str().len() + self.bridge.as_str().len()
    }
}

/// What an edit writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum With {
    /// A value by itself.
    Value(Source),
    /// Anything else.
    Text(Cow<'static, str>),
}

impl With {
    /// The same as text.
    #[inline]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Value(source) => source.as_str(),
            Self::Text(text) => text,
        }
    }
}

/// What follows a replacement whose two ends stand on different sides of a CDATA section's border, so
/// that the white space around the value can stay where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bridge {
    /// Both ends on the same side.
    #[default]
    None,
    /// It starts inside a CDATA section and ends outside.
    CloseCdata,
    /// It starts outside a CDATA section and ends inside.
    OpenCdata,
}

impl Bridge {
    pub(super) fn between(starts_in_cdata: bool, ends_in_cdata: bool) -> Self {
        match (starts_in_cdata, ends_in_cdata) {
            (true, false) => Self::CloseCdata,
            (false, true) => Self::OpenCdata,
            _ => Self::None,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::CloseCdata => "]]>",
            Self::OpenCdata => "<![CDATA[",
        }
    }
}

/// The body with all edits made. Without edits, the very same `Bytes`.
///
/// `edits` do not overlap and are sorted by their start.
pub(super) fn apply(body: &Bytes, edits: &[Edit]) -> Bytes {
    if edits.is_empty() {
        return body.clone();
    }
    let removed: usize = edits.iter().map(|edit| edit.span.range().len()).sum();
    let added: usize = edits.iter().map(Edit::len).sum();
    let mut spliced = Vec::with_capacity(body.len() - removed + added);
    pieces(body, edits, |piece| spliced.extend_from_slice(piece));
    spliced.into()
}

/// The pieces of the body with all edits made, in order: the client's own bytes, and what was written between
/// them.
///
/// `edits` are those that were made in this `body`.
pub fn pieces<'a>(body: &'a [u8], edits: &'a [Edit], mut piece: impl FnMut(&'a [u8])) {
    let mut kept = 0;
    for edit in edits {
        let span = edit.span.range();
        piece(&body[kept..span.start]);
        // Each by itself: what is as long as the compiler knows is copied without a call.
        match &edit.with {
            With::Value(Source::Contact) => piece(Source::Contact.as_str().as_bytes()),
            With::Value(Source::Customer) => piece(Source::Customer.as_str().as_bytes()),
            With::Text(text) => piece(text.as_bytes()),
        }
        if edit.bridge != Bridge::None {
            piece(edit.bridge.as_str().as_bytes());
        }
        kept = span.end;
    }
    piece(&body[kept..]);
}
