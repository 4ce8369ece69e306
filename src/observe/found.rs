//! A finding, as it is counted and as it is told.

use std::borrow::Cow;

use serde::Serialize;
use smol_str::SmolStr;

use super::cause;
use super::redact::{Id, Value};
use crate::contact::{Finding, Kind, Policy, Source, Span, Was, Written};

/// A finding as it is counted.
#[derive(Clone, Copy)]
pub enum Seen<'f> {
    /// As it was made, and the list that it stands in.
    Bare(&'f Finding, Option<Id<'f>>),
    /// In words.
    InWords(&'f Found),
}

impl<'f> Seen<'f> {
    /// What it is.
    pub fn kind(self) -> Kind {
        match self {
            Self::Bare(finding, _) => finding.kind,
            Self::InWords(found) => found.kind,
        }
    }

    /// Whether it was changed.
    pub fn changed(self) -> bool {
        match self {
            Self::Bare(finding, _) => finding.acted_on(),
            Self::InWords(found) => found.changed,
        }
    }

    /// The number of the list that it stands in.
    pub fn list_id(self) -> Option<&'f [u8]> {
        match self {
            Self::Bare(_, list_id) => list_id.map(|id| id.as_bytes()),
            Self::InWords(found) => found.list_id.as_ref().map(|id| id.as_bytes()),
        }
    }

    /// Where such a thing comes from, as far as is known.
    pub fn cause(self) -> &'static str {
        match self {
            Self::Bare(finding, _) => {
                cause::of(finding.kind, finding.declared, Value::known(&finding.was))
            }
            Self::InWords(found) => cause::of(found.kind, found.declared, &found.was),
        }
    }
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// The list that it stands in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub list_id: Option<SmolStr>,
    /// What was there.
    pub was: Cow<'static, str>,
    /// What is there now.
    pub now: Cow<'static, str>,
    /// Whether it was changed.
    pub changed: bool,
    /// The declaration that it was held against.
    pub declared: Option<Source>,
    /// The setting that decided.
    pub setting: &'static str,
}

impl Found {
    /// `policy`: what it was made by.
    pub(super) fn new(
        (finding, list_id): (&Finding, Option<Id<'_>>),
        policy: Option<&Policy>,
    ) -> Self {
        let was = match &finding.was {
            Was::OwnOrigin(_) => Cow::Owned(Value(&finding.was).as_str().to_owned()),
            was => Cow::Borrowed(Value::known(was)),
        };
        let now = match finding.now {
            Written::Nothing => was.clone(),
            written => Cow::Borrowed(written.as_str()),
        };
        Self {
            kind: finding.kind,
            list_id: list_id.map(|id| id.as_str().into()),
            was,
            now,
            changed: finding.acted_on(),
            declared: finding.declared,
            setting: policy.map_or("", |policy| policy.setting(finding.kind)),
        }
    }
}

/// A list's number: the end of its id.
pub(super) fn list_number(id: Span, original: &[u8]) -> Id<'_> {
    let id = &original[id.range()];
    // It is a few bytes long: no search that has to be called pays.
    let end = id.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    let start = id[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    Id(&id[start..end])
}
