//! What was found in a body.

use std::fmt;
use std::iter::{once, repeat_n};

use serde::Serialize;

use super::edit::Span;
use super::{ID_ORIGIN, Source};

/// What kind of inconsistency a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A list source differs from the declaration. Counted per node.
    ListDiffers,
    /// No declaration, or an empty one. Counted per contact.
    Undeclared,
    /// Declarations that contradict each other. Counted per contact.
    Ambiguous,
    /// Nothing declared, and the lists differ among themselves. Counted per contact.
    ListsDisagree,
    /// A removal that declares ACTION_BY_CONTACT. Counted per contact.
    RemovalByContact,
    /// A value that is not one of the two. Counted per node.
    UnknownValue,
    /// An id under the proxy's own origin. Counted per id.
    OwnOrigin,
}

impl Kind {
    /// All kinds, in the order of SPEC section 1.
    pub const ALL: [Self; 7] = [
        Self::ListDiffers,
        Self::Undeclared,
        Self::Ambiguous,
        Self::ListsDisagree,
        Self::RemovalByContact,
        Self::UnknownValue,
        Self::OwnOrigin,
    ];

    /// The kind's name in logs, metrics and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ListDiffers => "list_differs",
            Self::Undeclared => "undeclared",
            Self::Ambiguous => "ambiguous",
            Self::ListsDisagree => "lists_disagree",
            Self::RemovalByContact => "removal_by_contact",
            Self::UnknownValue => "unknown_value",
            Self::OwnOrigin => "own_origin",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One inconsistency, wherever it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// What was there.
    pub was: Was,
    /// What was done.
    pub now: Written,
    /// What its contact declares, or what a setting filled in: what it was held against.
    pub declared: Option<Source>,
}

impl Finding {
    /// Whether an edit was made for it.
    pub fn acted_on(&self) -> bool {
        self.now != Written::Nothing
    }
}

/// Where a finding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The raw bytes of the `id` of the list that it stands in.
    pub list_id: Option<Span>,
    /// Where in the body: the offset of its first byte.
    pub at: u32,
}

/// All that was found in a body, in the order of its contacts. Of a contact with 1,500 lists, nearly all findings are alike,
/// so each is kept once for as many as follow one another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    rows: Vec<(Finding, usize)>,
    places: Vec<Place>,
}

impl Findings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Finding> {
        self.rows.iter().flat_map(|(finding, count)| repeat_n(finding, *count))
    }

    /// Where each of them stands.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Those that are alike, and how many there are in a row.
    pub fn rows(&self) -> &[(Finding, usize)] {
        &self.rows
    }

    /// The same, and where each of them stands.
    pub(crate) fn into_parts(self) -> (Vec<(Finding, usize)>, Vec<Place>) {
        (self.rows, self.places)
    }

    pub(super) fn push(&mut self, finding: Finding, place: Place) {
        self.extend(finding, once(place));
    }

    /// Adds the same finding in several places.
    pub(super) fn extend(&mut self, finding: Finding, places: impl Iterator<Item = Place>) {
        let before = self.places.len();
        self.places.extend(places);
        let more = self.places.len() - before;
        match self.rows.last_mut() {
            Some((last, count)) if *last == finding => *count += more,
            _ => self.rows.push((finding, more)),
        }
    }

    /// Makes room in so many places.
    pub(super) fn reserve(&mut self, places: usize) {
        self.places.reserve_exact(places);
    }

    /// Changes what is told of them.
    pub(super) fn rows_mut(&mut self) -> impl Iterator<Item = &mut Finding> {
        self.rows.iter_mut().map(|(finding, _)| finding)
    }
}

/// A value as the client wrote it. Not to be logged as it is: [`Was::Other`] is the client's own text.
#[derive(Clone, PartialEq, Eq)]
pub enum Was {
    /// No value: no node, or an empty one.
    Empty,
    /// One of the two known values.
    Known(Source),
    /// Several at once.
    Several,
    /// Some other value.
    Other(Box<str>),
    /// The proxy's own origin.
    OwnOrigin(Box<str>),
}

impl fmt::Debug for Was {
    /// Leaves the client's own text out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Known(source) => write!(f, "Known({source})"),
            Self::Several => f.write_str("Several"),
            Self::Other(_) => f.write_str("Other(..)"),
            Self::OwnOrigin(_) => f.write_str("OwnOrigin(..)"),
        }
    }
}

/// What an edit left in the place of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Nothing: it was left as it was.
    Nothing,
    /// This value.
    Value(Source),
    /// The node was removed.
    Removed,
    /// The API's origin was put back.
    ApiOrigin,
}

impl Written {
    /// As it is shown: the value, or what was done in its place.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::Value(source) => source.as_str(),
            Self::Removed => "removed",
            Self::ApiOrigin => ID_ORIGIN,
        }
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
