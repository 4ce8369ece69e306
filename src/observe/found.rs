//! A finding, as it is counted and as it is told.

use std::borrow::Cow;

use serde::Serialize;

use super::cause;
use super::redact::{ListNumber, Value};
use crate::contact::{Finding, Kind, Policy, Source, Was, Written};

/// A finding as it is counted.
#[derive(Clone, Copy)]
pub struct Seen {
    /// What it is.
    pub kind: Kind,
    /// Whether it was changed.
    pub changed: bool,
    /// Where such a thing comes from, as far as is known.
    pub cause: &'static str,
}

impl From<&Finding> for Seen {
    fn from(finding: &Finding) -> Self {
        let cause = cause::of(finding.kind, finding.declared, Value::known(&finding.was));
        Self { kind: finding.kind, changed: finding.acted_on(), cause }
    }
}

impl From<&Found> for Seen {
    fn from(found: &Found) -> Self {
        let cause = cause::of(found.kind, found.declared, &found.was);
        Self { kind: found.kind, changed: found.changed, cause }
    }
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// The list that it stands in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub list_id: Option<ListNumber>,
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
        (finding, list_id): (&Finding, Option<ListNumber>),
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
            list_id,
            was,
            now,
            changed: finding.acted_on(),
            declared: finding.declared,
            setting: policy.map_or("", |policy| policy.setting(finding.kind)),
        }
    }
}
