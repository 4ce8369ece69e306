//! Splicing: every byte outside the edits is the client's own.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

/// One replacement of raw bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// The bytes that go; empty for an insertion.
    pub span: Range<usize>,
    /// What comes in their place.
    pub with: Cow<'static, str>,
    /// What has to follow, so that CDATA sections stay balanced.
    pub bridge: Bridge,
}

impl Edit {
    fn len(&self) -> usize {
        self.with.len() + self.bridge.as_str().len()
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
    let removed: usize = edits.iter().map(|edit| edit.span.len()).sum();
    let added: usize = edits.iter().map(Edit::len).sum();
    let mut spliced = Vec::with_capacity(body.len() - removed + added);
    let mut kept = 0;
    for edit in edits {
        spliced.extend_from_slice(&body[kept..edit.span.start]);
        spliced.extend_from_slice(edit.with.as_bytes());
        spliced.extend_from_slice(edit.bridge.as_str().as_bytes());
        kept = edit.span.end;
    }
    spliced.extend_from_slice(&body[kept..]);
    spliced.into()
}
