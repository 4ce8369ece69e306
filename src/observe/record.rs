//! What is kept of an exchange once it is over: nothing but what may be known of it.
//!
//! An exchange hands its material over as it is (`Finished`); turning that into text is done off the request
//! path. [`Record`] is the text, through the types of [`super::redact`] alone.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, Uri};
use serde::{Serialize, Serializer};

use super::exchange::{Decision, RequestId, method_name};
use super::redact::{Account, Agent, Id, Value};
use crate::config::Config;
use crate::contact::{Finding, Kind, Source, Written};
use crate::proxy::connect::Target;
use crate::proxy::route::{self, Resource};

/// A contact write's body, and what was found in it.
pub(crate) struct Inspected {
    pub findings: Vec<Finding>,
    /// As it came, which the findings' spans are about. Its content coding is undone.
    pub original: Bytes,
    /// As it was sent on, before its content coding.
    pub sent: Bytes,
    /// By which it was judged.
    pub config: Arc<Config>,
}

impl Inspected {
    /// A body without an edit is the very same bytes.
    fn is_edited(&self) -> bool {
        self.original.as_ptr() != self.sent.as_ptr()
    }
}

/// The material of a record.
pub(crate) struct Finished {
    pub at: SystemTime,
    pub request_id: RequestId,
    pub trace_id: Option<u128>,
    pub method: Method,
    pub uri: Uri,
    pub user_agent: Option<HeaderValue>,
    pub target: Option<Target>,
    pub decision: Option<Decision>,
    pub status: Option<StatusCode>,
    /// Of a contact write, or of a body that may have been one.
    pub outcome: Option<&'static str>,
    pub reason: Option<&'static str>,
    pub problem: Option<&'static str>,
    pub attempts: u32,
    pub transient: u32,
    pub legitimate: bool,
    pub inspected: Option<Arc<Inspected>>,
    pub complete: bool,
    pub duration: Duration,
}

impl Finished {
    /// How much memory of bodies it holds on to, in bytes.
    pub fn held(&self) -> usize {
        self.inspected
            .as_ref()
            .map_or(0, |it| it.original.len() + if it.is_edited() { it.sent.len() } else { 0 })
    }

    /// Whether it belongs into the audit trail: a contact write with a finding or a refusal.
    pub fn is_audited(&self) -> bool {
        self.transient > 0
            || self.legitimate
            || self.inspected.as_ref().is_some_and(|inspected| !inspected.findings.is_empty())
    }

    /// SHA-256 of the body before and after.
    pub fn digests(&self) -> Option<[String; 2]> {
        let inspected = self.inspected.as_ref()?;
        let before = sha256(&inspected.original);
        let after = if inspected.is_edited() { sha256(&inspected.sent) } else { before.clone() };
        Some([before, after])
    }
}

/// In hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in digest(&SHA256, bytes).as_ref() {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// One exchange, as operators see it.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// Counted from 1 since the start of the process.
    pub seq: u64,
    /// When it began.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The client's own, if that looks like an id, else ours.
    pub request_id: Box<str>,
    /// Of the client's `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<Box<str>>,
    /// One of HTTP's own, or `(other)`.
    pub method: Box<str>,
    /// The path with all that may be personal taken out.
    pub route: &'static str,
    /// The account in the path.
    pub account: Option<Box<str>>,
    /// The contact in the path.
    pub contact_id: Option<Box<str>>,
    /// `User-Agent`.
    pub user_agent: Option<Box<str>>,
    /// What a client of the forward proxy asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<Box<str>>,
    /// What it was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<&'static str>,
    /// What the client got; none if it was gone.
    pub status: Option<u16>,
    /// What became of a contact write.
    pub outcome: Option<&'static str>,
    /// Why a body was not inspected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The proxy's own answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<&'static str>,
    /// Attempts upstream.
    pub attempts: u32,
    /// What each refusal was worth, in order.
    pub verdicts: Verdicts,
    /// Findings in all; `findings` may hold fewer.
    pub found: usize,
    /// Findings acted on.
    pub rewritten: usize,
    /// What was found.
    pub findings: Vec<Found>,
    /// Whether the client got all of the answer.
    pub complete: bool,
    /// From the head of the request to the end of the answer.
    pub duration_ms: f64,
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// The list that it stands in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub list_id: Option<Box<str>>,
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

/// Refusals of one exchange: so many transient ones, and perhaps a legitimate one at the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Verdicts {
    /// How many were transient.
    pub transient: u32,
    /// The last answer was a legitimate one.
    pub legitimate: bool,
}

impl Verdicts {
    /// Whether there was a refusal at all.
    pub const fn any(self) -> bool {
        self.transient > 0 || self.legitimate
    }
}

impl Serialize for Verdicts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let transient = (0..self.transient).map(|_| "transient");
        serializer.collect_seq(transient.chain(self.legitimate.then_some("legitimate")))
    }
}

pub(super) fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_millis(*time))
}

impl Record {
    /// Puts the material into words.
    pub(super) fn new(finished: &Finished) -> Self {
        let text = |shown: &dyn std::fmt::Display| shown.to_string().into_boxed_str();
        let resource = Resource::of(finished.uri.path());
        let account = resource.map(|resource| text(&Account(resource.account)));
        let contact_id = resource.and_then(|resource| resource.contact_id());
        let agent = finished.user_agent.as_ref().and_then(|agent| agent.to_str().ok());
        let findings = finished.inspected.as_ref().map_or(&[][..], |it| &it.findings);
        Self {
            seq: 0,
            time: finished.at,
            request_id: text(&finished.request_id),
            trace_id: finished.trace_id.map(|id| format!("{id:032x}").into()),
            method: method_name(&finished.method).into(),
            route: route::template(finished.uri.path()),
            account,
            contact_id: contact_id.map(|id| text(&Id(id))),
            user_agent: agent.map(|agent| text(&Agent(agent))),
            authority: finished.target.as_ref().map(|target| text(target)),
            decision: finished.decision.map(Decision::as_str),
            status: finished.status.map(|status| status.as_u16()),
            outcome: finished.outcome,
            reason: finished.reason,
            problem: finished.problem,
            attempts: finished.attempts,
            verdicts: Verdicts { transient: finished.transient, legitimate: finished.legitimate },
            found: findings.len(),
            rewritten: findings.iter().filter(|finding| finding.acted_on()).count(),
            findings: finished
                .inspected
                .as_ref()
                .map(|it| findings.iter().map(|finding| Found::new(finding, it)).collect())
                .unwrap_or_default(),
            complete: finished.complete,
            duration_ms: finished.duration.as_micros() as f64 / 1000.0,
        }
    }
}

impl Found {
    fn new(finding: &Finding, inspected: &Inspected) -> Self {
        let was = shown(&Value(&finding.was));
        let now = match finding.now {
            Written::Nothing => was.clone(),
            written => shown(&written),
        };
        Self {
            kind: finding.kind,
            list_id: list_id(finding, &inspected.original)
                .map(|id| Id(&id).to_string().into_boxed_str()),
            was,
            now,
            changed: finding.acted_on(),
            declared: finding.declared,
            setting: inspected.config.sanitize.policy.setting(finding.kind),
        }
    }
}

/// Its text, without a copy of those that nearly all are.
fn shown(value: &dyn std::fmt::Display) -> Cow<'static, str> {
    let text = value.to_string();
    let known = ["", Source::Contact.as_str(), Source::Customer.as_str()];
    match known.into_iter().find(|known| *known == text) {
        Some(known) => Cow::Borrowed(known),
        None => Cow::Owned(text),
    }
}

/// A list's number: the end of its id.
pub(super) fn list_id(finding: &Finding, original: &[u8]) -> Option<String> {
    let id = String::from_utf8_lossy(&original[finding.list_id?.range()]);
    id.trim_end_matches('/').rsplit('/').next().map(str::to_owned)
}
