//! What is kept of an exchange once it is over: nothing but what may be known of it.
//!
//! An exchange hands its material over as it is (`Finished`); turning that into text is done off the request
//! path. [`Record`] is the text, through the types of [`super::redact`], but for a target, which has been found to be a host.

use std::borrow::Cow;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use smol_str::{SmolStr, ToSmolStr};

use super::clocks::Clocks;
use super::finished::{Finished, Part};
use super::found::{Found, Rows};
use super::ids::Trace;
use super::redact::{Account, Agent, Id};
use crate::contact::Kind;
use crate::proxy::route::{self, Resource};

/// What a client of the forward proxy was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The API, opened.
    Intercepted,
    /// A blind tunnel.
    Tunneled,
    /// A plain request, passed on.
    Forwarded,
    /// Nothing, by the rules.
    Refused,
    /// Nothing, since it could not be done.
    Failed,
}

impl Decision {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Intercepted => "intercepted",
            Self::Tunneled => "tunneled",
            Self::Forwarded => "forwarded",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// What became of a body that may be a contact write's (SPEC section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is none.
    NoContact,
    /// Nothing was found.
    Clean,
    /// It was changed.
    Rewritten,
    /// What was found was left alone.
    Observed,
    /// Nobody looked.
    Uninspected,
    /// A retry had an answer that is no error.
    Rescued,
    /// The API refused it, and rightly so.
    Refused,
    /// It refused it though it ought not to have, to the end.
    Exhausted,
}

impl Outcome {
    /// All of them, each at its own number.
    pub const ALL: [Self; 8] = [
        Self::NoContact,
        Self::Clean,
        Self::Rewritten,
        Self::Observed,
        Self::Uninspected,
        Self::Rescued,
        Self::Refused,
        Self::Exhausted,
    ];

    /// Its name in the header, the log and the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoContact => "no_contact",
            Self::Clean => "clean",
            Self::Rewritten => "rewritten",
            Self::Observed => "observed",
            Self::Uninspected => "uninspected",
            Self::Rescued => "rescued",
            Self::Refused => "refused",
            Self::Exhausted => "exhausted",
        }
    }
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
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
    pub request_id: SmolStr,
    /// Of the client's `traceparent`; one of ours, where spans are exported and it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<SmolStr>,
    /// The same, for who exports spans.
    #[serde(skip)]
    #[cfg_attr(not(feature = "otel"), expect(dead_code, reason = "it is theirs"))]
    pub(super) trace: Option<Trace>,
    /// One of HTTP's own, or `(other)`.
    pub method: &'static str,
    /// The path with all that may be personal taken out.
    pub route: &'static str,
    /// The account in the path.
    pub account: Option<SmolStr>,
    /// The contact in the path.
    pub contact_id: Option<SmolStr>,
    /// `User-Agent`.
    pub user_agent: Option<SmolStr>,
    /// What a client of the forward proxy asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<SmolStr>,
    /// What it was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<&'static str>,
    /// What the client got; none if it was gone.
    pub status: Option<u16>,
    /// What became of a contact write.
    pub outcome: Option<Outcome>,
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
    pub findings: Rows<Found>,
    /// A bit for each kind that was found, whether it stands in `findings` or not.
    #[serde(skip)]
    kinds: u8,
    /// Whether the client got all of the answer.
    pub complete: bool,
    /// From the head of the request to the end of the answer.
    pub duration_ms: f64,
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

/// The last account and the last application that were printed as they came. A proxy beside an application hears of few others, and
/// to compare takes a tenth of what it takes to look for what is nobody's business.
#[derive(Debug, Default)]
pub(super) struct Printed {
    account: SmolStr,
    agent: SmolStr,
}

impl Printed {
    fn account(&mut self, account: &str) -> SmolStr {
        Self::of(account, &mut self.account, |account| Account(account).as_str().into())
    }

    fn agent(&mut self, agent: &str) -> SmolStr {
        Self::of(agent, &mut self.agent, |agent| Agent(agent).printed())
    }

    fn of(raw: &str, last: &mut SmolStr, print: impl FnOnce(&str) -> Cow<'_, str>) -> SmolStr {
        // At first there is none.
        if raw.is_empty() || *last != raw {
            let printed = print(raw);
            if printed != raw {
                return printed.into();
            }
            *last = raw.into();
        }
        last.clone()
    }
}

const fn bit(kind: Kind) -> u8 {
    1 << kind as u8
}

impl Record {
    /// Whether a finding of this kind was among all that were.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.kinds & bit(kind) != 0
    }

    /// How much memory it takes, in bytes, beside its own size; its texts as if each were of its usual length.
    pub(super) fn held(&self) -> usize {
        self.findings.held() + self.findings.rows().count() * 16
    }

    /// Puts the material into words, and so many of its findings.
    pub(super) fn new(
        finished: &Finished,
        most: usize,
        now: Clocks,
        printed: &mut Printed,
    ) -> Self {
        let path = finished.text(Part::Path);
        let resource = Resource::of(path);
        let account = resource.map(|resource| printed.account(resource.account));
        let contact_id = resource.and_then(|resource| resource.contact_id());
        let rewritten = finished.found.rows().filter(|(finding, _)| finding.acted_on());
        let policy = finished.config.as_ref().map(|config| &config.sanitize.policy);
        Self {
            seq: 0,
            time: now.time_of(finished.started),
            request_id: finished.text(Part::RequestId).into(),
            trace_id: finished.trace.map(|it| smol_str::format_smolstr!("{:032x}", it.id)),
            trace: finished.trace,
            method: finished.method,
            route: route::template(resource),
            account,
            contact_id: contact_id.map(|id| Id(id).as_str().into()),
            user_agent: finished.has_agent.then(|| printed.agent(finished.text(Part::Agent))),
            authority: finished.target.as_ref().map(|target| target.to_smolstr()),
            decision: finished.decision.map(Decision::as_str),
            status: finished.status.map(|status| status.as_u16()),
            outcome: finished.outcome,
            reason: finished.reason,
            problem: finished.problem,
            attempts: finished.attempts,
            verdicts: finished.verdicts,
            found: finished.found.len(),
            rewritten: rewritten.map(|(_, lists)| lists.len()).sum(),
            findings: finished.found.first(most, |finding| Found::new(finding, policy)),
            kinds: finished.found.rows().fold(0, |kinds, (finding, _)| kinds | bit(finding.kind)),
            complete: finished.is_complete,
            duration_ms: finished.duration.as_micros() as f64 / 1000.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_printed_before_makes_nothing_else_of_what_is_printed_next() {
        let long = "x".repeat(200);
        let texts = ["shop/1", "jo@example.org", "token=S3CRET", "", "shop/2", &long];
        let mut printed = Printed::default();
        for (first, second) in texts.iter().flat_map(|it| texts.iter().map(move |next| (it, next)))
        {
            for text in [first, second, second] {
                assert_eq!(printed.account(text), Account(text).as_str());
                assert_eq!(printed.agent(text), *Agent(text).printed());
            }
        }
    }
}
