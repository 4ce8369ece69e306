//! What is kept of an exchange once it is over: nothing but what may be known of it.
//!
//! An exchange hands its material over as it is (`Finished`); turning that into text is done off the request
//! path. [`Record`] is the text, through the types of [`super::redact`] alone.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::digest::{self, Digest, SHA256};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde::{Serialize, Serializer};
use smol_str::{SmolStr, ToSmolStr};

use super::clocks::Clocks;
use super::found::{Found, Seen, list_id};
use super::ids::Trace;
use super::redact::{Account, Agent, Id};
use crate::config::Config;
use crate::contact::{Edit, Finding, Span, edit};
use crate::proxy::connect::Target;
use crate::proxy::route::{self, Resource};

/// The longest body that is copied before its exchange is over, and how much room a record keeps for the next one's, in
/// bytes.
const SMALL: usize = 8 * 1024;

/// The longest body that may be a part of its connection's buffer, as the limits are by default, in bytes: what is longer was
/// put together, and is nobody else's.
const PIECE: usize = 16 * 1024;

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

/// A method of RFC 9110 or RFC 5789 by its name; any other is a client's own text.
fn method_name(method: &Method) -> &'static str {
    ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "PATCH", "TRACE"]
        .into_iter()
        .find(|known| method == *known)
        .unwrap_or("(other)")
}

/// A contact write's body, and what was found in it.
pub(crate) struct Inspected<'a> {
    pub findings: Vec<Finding>,
    /// What was changed of `original`.
    pub edits: Vec<Edit>,
    /// As it came, which the findings' spans are about. Its content coding is undone.
    pub original: Bytes,
    /// By which it was judged.
    pub config: &'a Arc<Config>,
}

/// The material of a record. All that is text in it is a copy in one buffer: the pieces of a request are parts of
/// the buffer that it was read into, which its connection would have to do without. Used again and again,
/// so that what one thread allocates is not another's to free.
pub(crate) struct Finished {
    /// What time that was is looked up off the request path.
    pub started: Instant,
    pub trace: Option<Trace>,
    pub method: Method,
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
    pub is_complete: bool,
    /// Bytes of the answer's body.
    pub sent: u64,
    /// Nobody was left to answer.
    pub is_abandoned: bool,
    /// The proxy did not wait any longer.
    pub is_cut: bool,
    pub duration: Duration,
    pub has_agent: bool,
    /// Each `list_id` is where `text` has the list's number.
    findings: Vec<Finding>,
    edits: Vec<Edit>,
    is_inspected: bool,
    /// Left in place for the next exchange, which most often has the same: where two threads count the references to
    /// it, both wait for each other.
    config: Option<Arc<Config>>,
    /// The original, if it is longer than [`PIECE`]. It would be copied for nothing.
    large: Bytes,
    text: Vec<u8>,
    /// Where each [`Part`] ends.
    ends: [usize; 5],
}

/// A part of the text, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    RequestId,
    Path,
    Agent,
    /// The numbers of the lists that findings stand in.
    Lists,
    /// The body, for its digests.
    Original,
}

impl Default for Finished {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            trace: None,
            method: Method::GET,
            target: None,
            decision: None,
            status: None,
            outcome: None,
            reason: None,
            problem: None,
            attempts: 0,
            transient: 0,
            legitimate: false,
            is_complete: false,
            sent: 0,
            is_abandoned: false,
            is_cut: false,
            duration: Duration::ZERO,
            has_agent: false,
            findings: Vec::new(),
            edits: Vec::new(),
            is_inspected: false,
            config: None,
            large: Bytes::new(),
            text: Vec::new(),
            ends: [0; 5],
        }
    }
}

impl Finished {
    /// Makes it as good as new. What is large is given back.
    pub fn reset(&mut self) {
        self.target = None;
        self.is_inspected = false;
        self.findings.clear();
        self.findings.shrink_to(64);
        self.edits.clear();
        self.edits.shrink_to(64);
        self.large = Bytes::new();
        self.text.clear();
        self.text.shrink_to(SMALL);
        self.ends = [0; 5];
    }

    /// Adds a part; they come in their order, and one that does not come is empty.
    pub fn put(&mut self, part: Part, text: &[u8]) {
        self.text.extend_from_slice(text);
        self.ends[part as usize..].fill(self.text.len());
    }

    fn part(&self, part: Part) -> &[u8] {
        if part == Part::Original && !self.large.is_empty() {
            return &self.large;
        }
        let part = part as usize;
        let start = part.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[part]]
    }

    fn text(&self, part: Part) -> &str {
        std::str::from_utf8(self.part(part)).unwrap_or_default()
    }

    /// Adds what was found, and returns the body if it is to be added once all is over, if at all: of one that has not to
    /// be hashed, nothing is kept but the numbers of lists.
    ///
    /// What is small is copied at once: it is at hand now, and its memory goes to the next request as it would without
    /// a journal, whereas memory that waits for the end comes back cold. What is large is moved in. The body sent is
    /// not needed: the edits make it of the other.
    pub fn inspected(&mut self, inspected: Inspected<'_>, has_audit: bool) -> Option<Bytes> {
        let Inspected { mut findings, mut edits, original, config } = inspected;
        self.is_inspected = true;
        if !self.config.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, config)) {
            self.config = Some(Arc::clone(config));
        }
        self.name_lists(&mut findings, &original);
        let is_small = original.len() <= SMALL;
        if is_small {
            self.findings.append(&mut findings);
        } else {
            self.findings = findings;
        }
        if !has_audit {
            return None;
        }
        if !is_small {
            self.edits = edits;
            return Some(original);
        }
        self.edits.append(&mut edits);
        if self.findings.is_empty() {
            return Some(original);
        }
        self.put(Part::Original, &original);
        None
    }

    /// Copies the numbers of the lists, each once for all that was found in it: it takes no more than the body does.
    fn name_lists(&mut self, findings: &mut [Finding], original: &[u8]) {
        let mut last = None;
        for finding in findings {
            finding.list_id = match (finding.list_id, last) {
                (id, Some((known, copied))) if id == known => copied,
                (id, _) => {
                    let copied = list_id(finding, original).map(|number| {
                        let start = self.text.len();
                        self.text.extend_from_slice(number.as_bytes());
                        Span::new(start..self.text.len())
                    });
                    last = Some((id, copied));
                    copied
                }
            };
        }
        self.put(Part::Lists, b"");
    }

    /// Adds the body after all, if its digests have to be made.
    pub fn complete(&mut self, original: Bytes) {
        if !self.is_audited() {
            return;
        }
        if original.len() > PIECE {
            self.large = original;
        } else {
            self.put(Part::Original, &original);
        }
    }

    /// How much memory it takes, in bytes, beside its own size.
    pub fn held(&self) -> usize {
        self.text.len()
            + self.large.len()
            + size_of_val(&*self.findings)
            + size_of_val(&*self.edits)
    }

    /// Whether it belongs into the audit trail: a contact write with a finding or a refusal.
    pub fn is_audited(&self) -> bool {
        self.transient > 0 || self.legitimate || !self.findings.is_empty()
    }

    /// All that was found, and the list that each stands in.
    pub fn found(&self) -> impl Iterator<Item = (&Finding, Option<Id<'_>>)> {
        self.findings
            .iter()
            .map(|finding| (finding, finding.list_id.map(|list| Id(&self.text[list.range()]))))
    }

    /// The same, as it is counted.
    pub fn seen(&self) -> impl Iterator<Item = Seen<'_>> {
        self.found().map(|(finding, list_id)| Seen::Bare(finding, list_id))
    }

    /// Whether a contact was looked for in the body, or would have been.
    pub fn is_write(&self) -> bool {
        self.is_inspected || self.reason.is_some()
    }

    /// SHA-256 of the body before and after, if it was inspected.
    pub fn digests(&self) -> Option<[String; 2]> {
        if !self.is_inspected {
            return None;
        }
        let original = self.part(Part::Original);
        let before = sha256(original);
        if self.edits.is_empty() {
            return Some([before.clone(), before]);
        }
        let mut after = digest::Context::new(&SHA256);
        edit::pieces(original, &self.edits, |piece| after.update(piece));
        Some([before, hexadecimal(&after.finish())])
    }
}

/// In hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&digest::digest(&SHA256, bytes))
}

fn hexadecimal(digest: &Digest) -> String {
    let mut text = String::with_capacity(64);
    for byte in digest.as_ref() {
        for half in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(half)]));
        }
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
    /// How much memory it takes, in bytes, beside its own size; its texts as if each were of its usual length.
    pub(super) fn held(&self) -> usize {
        size_of_val(&*self.findings) + self.findings.len() * 16
    }

    /// Puts the material into words, and so many of its findings.
    pub(super) fn new(finished: &Finished, most: usize, now: Clocks) -> Self {
        let path = finished.text(Part::Path);
        let resource = Resource::of(path);
        let account = resource.map(|resource| Account(resource.account).as_str().into());
        let contact_id = resource.and_then(|resource| resource.contact_id());
        let findings = &finished.findings;
        let policy = finished.config.as_ref().map(|config| &config.sanitize.policy);
        Self {
            seq: 0,
            time: now.time_of(finished.started),
            request_id: finished.text(Part::RequestId).into(),
            trace_id: finished.trace.map(|it| smol_str::format_smolstr!("{:032x}", it.id)),
            trace: finished.trace,
            method: method_name(&finished.method),
            route: route::template(resource),
            account,
            contact_id: contact_id.map(|id| Id(id.as_bytes()).as_str().into()),
            user_agent: finished
                .has_agent
                .then(|| Agent(finished.text(Part::Agent)).printed().into()),
            authority: finished.target.as_ref().map(|target| target.to_smolstr()),
            decision: finished.decision.map(Decision::as_str),
            status: finished.status.map(|status| status.as_u16()),
            outcome: finished.outcome,
            reason: finished.reason,
            problem: finished.problem,
            attempts: finished.attempts,
            verdicts: Verdicts { transient: finished.transient, legitimate: finished.legitimate },
            found: findings.len(),
            rewritten: findings.iter().filter(|finding| finding.acted_on()).count(),
            findings: finished.found().take(most).map(|it| Found::new(it, policy)).collect(),
            complete: finished.is_complete,
            duration_ms: finished.duration.as_micros() as f64 / 1000.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contact::{Request, Sanitized, sanitize};

    #[test]
    fn a_list_with_thousands_of_sources_has_its_number_kept_once() {
        let (number, sources) = ("7".repeat(128), "<OptInSource>x</OptInSource>".repeat(3_000));
        let body = format!(
            "<Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\">\
             <OptInSource>ACTION_BY_CONTACT</OptInSource><ContactLists>\
             <ContactList id=\"http://api.constantcontact.com/ws/lists/{number}\">{sources}</ContactList>\
             <ContactList id=\"http://api.constantcontact.com/ws/lists/8\">{sources}</ContactList>\
             </ContactLists></Contact>"
        );
        let (original, config) = (Bytes::from(body), Arc::new(Config::default()));
        let request = Request { update: true, ..Request::default() };
        let Sanitized::Contact(contact) = sanitize(&original, &request, &config.sanitize.policy)
        else {
            panic!("it is a contact");
        };
        let mut finished = Finished::default();
        let (findings, edits, config) = (contact.findings, contact.edits, &config);
        assert!(findings.len() >= 6_000);
        let weight = size_of_val(&*findings);
        finished.inspected(Inspected { findings, edits, original, config }, false);
        assert_eq!(finished.held(), weight + 129);
        let named = |name: &str| {
            let lists = finished.found().filter_map(|(_, list)| list);
            lists.filter(|list| list.as_str() == name).count()
        };
        assert!(named(&number) >= 3_000 && named("8") >= 3_000);
    }
}
