//! One request and its answer, as the operator hears of them.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri};
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::OwnedSemaphorePermit;

use super::finished::{Finished, Inspected, Part};
use super::ids::{RequestId, Trace, hexadecimal};
use super::journal::Journal;
use super::lines;
use super::metrics::Metrics;
use super::record::{Decision, Outcome, Verdicts};
use super::redact::{self, Account, Agent, Id};
use crate::contact::refusal::Verdict;
use crate::contact::{Findings, Kind, Uninspectable};
use crate::proxy::connect::{Peer, Target};
use crate::proxy::error::Error;
use crate::proxy::route::Resource;

/// The record of one exchange. Each stage notes what it did; the line is written when all is over.
pub struct Exchange {
    metrics: Arc<Metrics>,
    journal: Option<Journal>,
    id: RequestId,
    trace: Option<Trace>,
    started: Instant,
    method: &'static str,
    uri: Uri,
    user_agent: Option<HeaderValue>,
    peer: Option<Arc<Peer>>,
    /// What a client of the forward proxy asked for, and what it was given.
    target: OnceLock<Target>,
    decision: OnceLock<Decision>,
    /// What it takes of the limits, for as long as it is.
    slot: OnceLock<OwnedSemaphorePermit>,
    bytes: OnceLock<OwnedSemaphorePermit>,
    result: OnceLock<Tally>,
    /// Of a contact write. Taken when all is over.
    material: Mutex<Option<Material>>,
    attempts: AtomicU32,
    /// How often it was refused though it ought not to have been.
    transient: AtomicU32,
    /// The last attempt was refused, and rightly so.
    legitimate: AtomicBool,
    exhausted: AtomicBool,
    rescued: AtomicBool,
    status: OnceLock<StatusCode>,
    error: OnceLock<&'static str>,
}

/// What inspection found.
pub(crate) enum Inspection<'a> {
    /// No contact in the body.
    NotOurs,
    /// Not inspected, and why.
    Uninspectable(Uninspectable),
    /// A contact write.
    Contact(Inspected<'a>),
}

/// What is kept until all is over.
struct Material {
    begun: Box<Finished>,
    /// The body, if it may have to be hashed and is not in there yet.
    body: Option<Bytes>,
}

/// What is kept of an inspection until the line is written.
#[derive(Clone, Copy)]
enum Tally {
    NotOurs,
    Uninspected(Uninspectable),
    Inspected { findings: usize, acted_on: usize },
}

/// How a retry ended.
#[derive(Clone, Copy)]
pub(crate) enum Retried {
    /// With an answer that is no error.
    Rescued,
    /// Refused once more.
    Refused,
    /// With another error, or none at all.
    Failed,
}

impl Retried {
    /// All of them, each at its own number.
    pub const ALL: [Self; 3] = [Self::Rescued, Self::Refused, Self::Failed];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rescued => "rescued",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

impl Exchange {
    /// `peer`: who sends it, unless its connections are another program's.
    pub(crate) fn begin<B>(
        request: &Request<B>,
        peer: Option<Arc<Peer>>,
        metrics: Arc<Metrics>,
        journal: Option<Journal>,
    ) -> Self {
        // One look at each costs less than to look up three.
        let (mut id, mut trace, mut user_agent) = (None, None, None);
        for (name, value) in request.headers() {
            let field = match name.as_str() {
                "x-request-id" => &mut id,
                "traceparent" => &mut trace,
                "user-agent" => &mut user_agent,
                _ => continue,
            };
            field.get_or_insert(value);
        }
        let is_traced = journal.as_ref().is_some_and(Journal::is_traced);
        let trace = trace.and_then(Trace::of).or_else(|| is_traced.then(Trace::begin));
        Self {
            metrics,
            journal,
            id: RequestId::of(id),
            trace,
            started: Instant::now(),
            method: redact::method(request.method()),
            uri: request.uri().clone(),
            user_agent: user_agent.cloned(),
            peer,
            target: OnceLock::new(),
            decision: OnceLock::new(),
            slot: OnceLock::new(),
            bytes: OnceLock::new(),
            result: OnceLock::new(),
            material: Mutex::new(None),
            attempts: AtomicU32::new(0),
            transient: AtomicU32::new(0),
            legitimate: AtomicBool::new(false),
            exhausted: AtomicBool::new(false),
            rescued: AtomicBool::new(false),
            status: OnceLock::new(),
            error: OnceLock::new(),
        }
    }

    /// The connection that the request came on.
    pub(crate) fn peer(&self) -> Option<&Arc<Peer>> {
        self.peer.as_ref()
    }

    /// One of `limits.max_requests` is this one.
    pub(crate) fn holds_slot(&self, slot: OwnedSemaphorePermit) {
        let _ = self.slot.set(slot);
    }

    /// So much of `limits.max_buffered` is its body's.
    pub(crate) fn holds_bytes(&self, bytes: OwnedSemaphorePermit) {
        let _ = self.bytes.set(bytes);
    }

    /// A client of the forward proxy asks for this.
    pub(crate) fn concerns(&self, target: &Target) {
        let _ = self.target.set(target.clone());
    }

    /// What it was given.
    pub(crate) fn decided(&self, decision: Decision) {
        let _ = self.decision.set(decision);
    }

    /// Counts what was found, and keeps it for the record.
    pub(crate) fn inspected(&self, inspection: Inspection<'_>) {
        let tally = match inspection {
            Inspection::NotOurs => Tally::NotOurs,
            Inspection::Uninspectable(reason) => {
                tracing::warn!(
                    request_id = %self.id(),
                    account = self.account().map(display),
                    contact_id = self.contact_id().map(display),
                    user_agent = self.user_agent().map(|it| it.to_string()),
                    reason = reason.as_str(),
                    "uninspected"
                );
                Tally::Uninspected(reason)
            }
            Inspection::Contact(inspected) => {
                let findings = &inspected.findings;
                self.count(findings);
                self.metrics.edits.inc_by(inspected.edits.len() as u64);
                let acted_on = findings.rows().iter().filter(|(finding, _)| finding.acted_on());
                let acted_on = acted_on.map(|(_, count)| count).sum();
                let tally = Tally::Inspected { findings: findings.len(), acted_on };
                if self.is_recorded() {
                    let mut begun = self.begun();
                    let body = begun.inspected(inspected, self.has_audit());
                    *self.material.lock() = Some(Material { begun, body });
                }
                tally
            }
        };
        match tally {
            Tally::Uninspected(reason) => self.metrics.uninspected(reason),
            Tally::NotOurs | Tally::Inspected { .. } => {
                self.metrics.inspected(self.outcome_of(tally));
            }
        }
        let _ = self.result.set(tally);
    }

    /// Whether anybody is told of it once it is over.
    fn is_recorded(&self) -> bool {
        self.journal.is_some() || lines::are_wanted()
    }

    fn has_audit(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::has_audit)
    }

    /// A record with all that is known of a request before it is sent.
    fn begun(&self) -> Box<Finished> {
        let mut begun = self.journal.as_ref().map(Journal::blank).unwrap_or_default();
        match &self.id {
            RequestId::Client(id) => begun.put(Part::RequestId, id.as_bytes()),
            RequestId::Ours(id) => begun.put(Part::RequestId, &hexadecimal(*id)),
        }
        begun.put(Part::Path, self.uri.path().as_bytes());
        let agent = self.user_agent.as_ref().and_then(|agent| agent.to_str().ok());
        begun.has_agent = agent.is_some();
        begun.put(Part::Agent, agent.unwrap_or_default().as_bytes());
        begun
    }

    fn count(&self, findings: &Findings) {
        let mut found = [0; Kind::ALL.len()];
        for (finding, count) in findings.rows() {
            found[finding.kind as usize] += *count as u64;
        }
        for (kind, found) in Kind::ALL.into_iter().zip(found) {
            if found > 0 {
                self.metrics.mismatches(kind).inc_by(found);
            }
        }
    }

    /// Nothing left after all.
    pub(crate) fn unattempted(&self) {
        self.attempts.store(0, Ordering::Relaxed);
    }

    pub(crate) fn attempted(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    /// The last answer so far is a refusal.
    pub(crate) fn refused(&self, verdict: Verdict) {
        // It is until there is another answer, also if nobody waits for one any more.
        self.exhausted.store(verdict == Verdict::Transient, Ordering::Relaxed);
        self.metrics.refused(verdict);
        match verdict {
            Verdict::Transient => drop(self.transient.fetch_add(1, Ordering::Relaxed)),
            Verdict::Legitimate => self.legitimate.store(true, Ordering::Relaxed),
        }
        tracing::debug!(
            request_id = %self.id(),
            attempt = self.attempts.load(Ordering::Relaxed),
            verdict = verdict.as_str(),
            "refusal"
        );
    }

    /// The last answer so far is none.
    pub(crate) fn not_refused(&self) {
        self.exhausted.store(false, Ordering::Relaxed);
    }

    pub(crate) fn retried(&self, retried: Retried) {
        self.metrics.retried(retried);
        if let Retried::Rescued = retried {
            self.rescued.store(true, Ordering::Relaxed);
        }
    }

    /// A retry got no answer: the client gets the refusal before it.
    pub(crate) fn retry_broke(&self, error: &dyn std::error::Error) {
        tracing::warn!(request_id = %self.id(), error = %error, "retry failed");
    }

    /// A retry's answer did not come within `retry.deadline`.
    pub(crate) fn retry_overran(&self) {
        tracing::warn!(request_id = %self.id(), error = "no answer within retry.deadline", "retry failed");
    }

    pub(crate) fn budget_spent(&self) {
        self.metrics.budget_exhausted.inc();
        tracing::warn!(request_id = %self.id(), "retry budget exhausted");
    }

    /// The proxy answers by itself.
    pub(crate) fn failed(&self, name: &'static str, error: &Error) {
        let _ = self.error.set(name);
        self.metrics.problem(name);
        tracing::warn!(request_id = %self.id(), problem = name, error = %error, "problem");
    }

    pub(crate) fn answered(&self, status: StatusCode) {
        let _ = self.status.set(status);
    }

    fn outcome_of(&self, tally: Tally) -> Outcome {
        match tally {
            _ if self.exhausted.load(Ordering::Relaxed) => Outcome::Exhausted,
            _ if self.legitimate.load(Ordering::Relaxed) => Outcome::Refused,
            _ if self.rescued.load(Ordering::Relaxed) => Outcome::Rescued,
            Tally::NotOurs => Outcome::NoContact,
            Tally::Uninspected(_) => Outcome::Uninspected,
            Tally::Inspected { acted_on: 1.., .. } => Outcome::Rewritten,
            Tally::Inspected { findings: 1.., .. } => Outcome::Observed,
            Tally::Inspected { .. } => Outcome::Clean,
        }
    }

    /// The value of the `optin-proxy` response header (SPEC section 3). `None` if the exchange is none
    /// of ours.
    pub(crate) fn report(&self) -> Option<HeaderValue> {
        let tally = *self.result.get()?;
        let (findings, rewritten) = match tally {
            Tally::NotOurs => return None,
            Tally::Uninspected(_) => (0, 0),
            Tally::Inspected { findings, acted_on } => (findings, acted_on),
        };
        let attempts = self.attempts.load(Ordering::Relaxed) as usize;
        let outcome = self.outcome_of(tally);
        // By hand, since formatting took one instruction in a hundred of an update's, and where it needs no memory of its own.
        let (mut report, mut digits) = (SmallVec::<[u8; 128]>::new(), itoa::Buffer::new());
        for (name, number) in
            [("findings=", findings), (", rewritten=", rewritten), (", attempts=", attempts)]
        {
            report.extend_from_slice(name.as_bytes());
            report.extend_from_slice(digits.format(number).as_bytes());
        }
        report.extend_from_slice(b", outcome=");
        report.extend_from_slice(outcome.as_str().as_bytes());
        HeaderValue::from_bytes(&report).ok()
    }

    /// Hands over all that is to be told of it. `complete` is false if the client did not get the whole answer.
    pub(crate) fn finish(&self, complete: bool, sent: u64) {
        let elapsed = self.started.elapsed();
        self.metrics.requests.inc();
        self.metrics.duration.observe(elapsed.as_secs_f64());
        let status = self.status.get().copied();
        let decision = self.target.get().map(|_| {
            let is_fault = status.is_some_and(|status| status.is_server_error());
            let without = if is_fault { Decision::Failed } else { Decision::Refused };
            // Whether its address is one that may be reached shows only once its name is resolved.
            let decision = match self.decision.get() {
                Some(Decision::Forwarded) if self.error.get().is_some() => without,
                decision => decision.copied().unwrap_or(without),
            };
            self.metrics.forward(decision.as_str());
            decision
        });
        let tally = self.result.get().copied();
        let outcome = tally.map(|tally| self.outcome_of(tally));
        if let Some(outcome) = outcome {
            self.metrics.wrote(outcome);
        }
        if !self.is_recorded() {
            return;
        }
        let material = self.material.lock().take();
        let Material { begun: mut finished, body } =
            material.unwrap_or_else(|| Material { begun: self.begun(), body: None });
        finished.started = self.started;
        finished.trace = self.trace;
        finished.method = self.method;
        finished.target = self.target.get().cloned();
        finished.decision = decision;
        finished.status = status;
        finished.outcome = outcome;
        finished.reason = match tally {
            Some(Tally::Uninspected(reason)) => Some(reason.as_str()),
            _ => None,
        };
        finished.problem = self.error.get().copied();
        finished.attempts = self.attempts.load(Ordering::Relaxed);
        finished.verdicts = Verdicts {
            transient: self.transient.load(Ordering::Relaxed),
            legitimate: self.legitimate.load(Ordering::Relaxed),
        };
        finished.is_complete = complete;
        finished.sent = sent;
        finished.is_cut =
            status.is_none() && (CUTTING.get() || self.peer().is_some_and(|peer| peer.is_cut()));
        finished.duration = elapsed;
        if let Some(body) = body {
            finished.complete(body);
        }
        match &self.journal {
            Some(journal) => journal.submit(finished),
            None => lines::log_at_once(&finished),
        }
    }

    /// Its request's target as it came, secrets and all: to be sent, and never printed. No stage changes it.
    pub(crate) fn uri(&self) -> &Uri {
        &self.uri
    }

    pub(crate) fn id(&self) -> &RequestId {
        &self.id
    }

    fn resource(&self) -> Option<Resource<'_>> {
        Resource::of(self.uri.path())
    }

    fn account(&self) -> Option<Account<'_>> {
        self.resource().map(|resource| Account(resource.account))
    }

    fn contact_id(&self) -> Option<Id<'_>> {
        self.resource()?.contact_id().map(Id)
    }

    fn user_agent(&self) -> Option<Agent<'_>> {
        self.user_agent.as_ref()?.to_str().ok().map(Agent)
    }
}

/// Ends the record of an exchange once nothing holds it any more, however it ended.
pub(crate) struct Line {
    pub exchange: Arc<Exchange>,
    pub complete: bool,
    pub sent: u64,
}

thread_local! {
    /// What this thread drops is ended by the proxy itself.
    static CUTTING: Cell<bool> = const { Cell::new(false) };
}

/// Drops what takes too long. Its exchanges are logged as cut, where others that end without an answer are taken for
/// those of clients that went away.
pub(crate) fn cut<T>(ended: T) {
    struct Until;
    impl Drop for Until {
        fn drop(&mut self) {
            CUTTING.set(false);
        }
    }
    let _until = Until;
    CUTTING.set(true);
    drop(ended);
}

impl Drop for Line {
    fn drop(&mut self) {
        self.exchange.finish(self.complete, self.sent);
    }
}
