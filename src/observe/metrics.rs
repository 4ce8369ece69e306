//! Every metric, defined once. Label values come from fixed sets: nothing that a client sends can make
//! a new series.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::log;
use super::process::Process;
use crate::contact::refusal::Verdict;
use crate::contact::{Kind, Uninspectable};
use crate::proxy::Fault;

/// What becomes of bodies that are inspected.
const BODIES: [&str; 4] = ["clean", "rewritten", "observed", "no_contact"];

/// What becomes of a contact write (SPEC section 3).
const OUTCOMES: [&str; 7] =
    ["clean", "rewritten", "observed", "uninspected", "rescued", "refused", "exhausted"];

/// How a TLS handshake with a client ends.
const HANDSHAKES: [&str; 7] =
    ["completed", "timeout", "client_gone", "alert", "not_tls", "wrong_name", "incompatible"];

/// The counters of one proxy.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Requests answered or given up.
    pub requests: Counter,
    /// From the request's head to the end of the answer, in seconds.
    pub duration: Histogram,
    /// Findings, by kind.
    mismatches: [Counter; Kind::ALL.len()],
    /// Places edited in bodies.
    pub edits: Counter,
    /// Bodies of contact writes, by what became of them.
    bodies: [Counter; BODIES.len()],
    /// Those not inspected, by the reason.
    uninspected: [Counter; Uninspectable::ALL.len()],
    /// Contact writes, by their outcome.
    writes: [Counter; OUTCOMES.len()],
    /// Refused attempts, by verdict.
    pub refusals: Family<VerdictLabel, Counter>,
    /// Attempts beyond the first, by how they ended.
    pub retries: Family<RetryLabel, Counter>,
    /// Refusals not retried for want of budget.
    pub budget_exhausted: Counter,
    /// Answers of the proxy's own, by their problem.
    problems: Family<ProblemLabel, Counter>,
    /// Heads that could not be read as a request.
    pub malformed: Counter,
    /// Open downstream connections.
    pub connections: Gauge,
    /// Targets of the forward proxy, by what became of them.
    forwards: Family<DecisionLabel, Counter>,
    /// TLS handshakes with clients, by how they ended.
    handshakes: Family<ResultLabel, Counter>,
    /// Open blind tunnels.
    pub tunnels: Gauge,
    /// Bytes through blind tunnels, by direction.
    tunnel_bytes: Family<DirectionLabel, Counter>,
    /// Reloads of the configuration, by how they ended.
    reloads: Family<ResultLabel, Counter>,
    /// 1 if the last reload took effect, or there was none.
    reloaded: Gauge,
    /// Exchanges that the journal had no room for.
    pub journal_dropped: Counter,
    /// Lines written to the audit trail.
    pub audit_lines: Counter,
    /// Lines lost to it, by reason.
    audit_lost: Family<ReasonLabel, Counter>,
    /// When the certificate authority ends, in seconds since 1970; 0 if there is none.
    authority_end: Gauge,
    /// 1 if mismatches are mended.
    enforcing: Gauge,
    /// 1 if connections close after their answer.
    draining: Gauge,
}

/// The label of `optin_proxy_mismatches_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    /// What kind of inconsistency.
    pub kind: Name,
}

/// The labels of `optin_proxy_bodies_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BodyLabel {
    /// `clean`, `rewritten`, `observed`, `uninspected` or `no_contact`.
    pub result: Name,
    /// Why a body was not inspected; else empty.
    pub reason: Name,
}

/// The label of `optin_proxy_refusals_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VerdictLabel {
    /// `transient` or `legitimate`.
    pub verdict: Name,
}

/// The label of `optin_proxy_retries_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RetryLabel {
    /// `rescued`, `refused` or `failed`.
    pub outcome: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProblemLabel {
    problem: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabel {
    decision: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// A label value that the program itself wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name(pub &'static str);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

/// From 100 us to 30 s, in seconds.
const BUCKETS: [f64; 15] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
    30.0,
];

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            requests: Counter::default(),
            duration: Histogram::new(BUCKETS),
            mismatches: Default::default(),
            edits: Counter::default(),
            bodies: Default::default(),
            uninspected: Default::default(),
            writes: Default::default(),
            refusals: Family::default(),
            retries: Family::default(),
            budget_exhausted: Counter::default(),
            problems: Family::default(),
            malformed: Counter::default(),
            connections: Gauge::default(),
            forwards: Family::default(),
            handshakes: Family::default(),
            tunnels: Gauge::default(),
            tunnel_bytes: Family::default(),
            reloads: Family::default(),
            reloaded: Gauge::default(),
            journal_dropped: Counter::default(),
            audit_lines: Counter::default(),
            audit_lost: Family::default(),
            authority_end: Gauge::default(),
            enforcing: Gauge::default(),
            draining: Gauge::default(),
        };
        metrics.registry.register_collector(Box::new(Process));
        let registry = metrics.registry.sub_registry_with_prefix("optin_proxy");
        registry.register("requests", "Requests answered or given up", metrics.requests.clone());
        registry.register(
            "request_duration_seconds",
            "From the request's head to the end of the answer",
            metrics.duration.clone(),
        );
        // Series that exist from the start can be alerted on before anything happened; and each is
        // looked up here once, not with every finding.
        let mismatches = Family::<KindLabel, Counter>::default();
        registry.register("mismatches", "Findings in contact writes", mismatches.clone());
        metrics.mismatches = Kind::ALL
            .map(|kind| mismatches.get_or_create_owned(&KindLabel { kind: Name(kind.as_str()) }));
        registry.register("edits", "Places edited in bodies", metrics.edits.clone());
        let bodies = Family::<BodyLabel, Counter>::default();
        registry.register("bodies", "Bodies of contact writes", bodies.clone());
        let body = |result, reason| BodyLabel { result: Name(result), reason: Name(reason) };
        metrics.bodies = BODIES.map(|result| bodies.get_or_create_owned(&body(result, "")));
        metrics.uninspected = Uninspectable::ALL
            .map(|reason| bodies.get_or_create_owned(&body("uninspected", reason.as_str())));
        let writes = Family::<OutcomeLabel, Counter>::default();
        registry.register("contact_writes", "Contact writes, by their outcome", writes.clone());
        metrics.writes = OUTCOMES
            .map(|outcome| writes.get_or_create_owned(&OutcomeLabel { outcome: Name(outcome) }));
        registry.register(
            "refusals",
            "Attempts refused for their transition",
            metrics.refusals.clone(),
        );
        registry.register("retries", "Attempts beyond the first", metrics.retries.clone());
        registry.register(
            "retry_budget_exhausted",
            "Refusals not retried for want of budget",
            metrics.budget_exhausted.clone(),
        );
        registry.register(
            "problems",
            "Answers of the proxy's own, for want of the API's",
            metrics.problems.clone(),
        );
        registry.register(
            "malformed_requests",
            "Heads that could not be read as a request",
            metrics.malformed.clone(),
        );
        registry.register(
            "connections",
            "Open downstream connections",
            metrics.connections.clone(),
        );
        registry.register(
            "forward_targets",
            "Targets of the forward proxy",
            metrics.forwards.clone(),
        );
        registry.register(
            "tls_handshakes",
            "TLS handshakes with clients of intercepted hosts",
            metrics.handshakes.clone(),
        );
        registry.register("tunnels", "Open blind tunnels", metrics.tunnels.clone());
        registry.register(
            "tunnel_bytes",
            "Bytes through blind tunnels that have ended",
            metrics.tunnel_bytes.clone(),
        );
        registry.register(
            "config_reloads",
            "Reloads of the configuration",
            metrics.reloads.clone(),
        );
        registry.register(
            "config_last_reload_successful",
            "1 if the configuration is the one last asked for",
            metrics.reloaded.clone(),
        );
        metrics.reloaded.set(1);
        registry.register(
            "log_lost",
            "Lines of the log that were lost because whoever reads it is too slow",
            log::lost(),
        );
        registry.register(
            "journal_dropped",
            "Exchanges that neither the dashboard nor the audit trail knows of",
            metrics.journal_dropped.clone(),
        );
        registry.register(
            "audit_lines",
            "Lines written to the audit trail",
            metrics.audit_lines.clone(),
        );
        registry.register(
            "audit_lost",
            "Lines lost to the audit trail",
            metrics.audit_lost.clone(),
        );
        registry.register(
            "ca_not_after_seconds",
            "When the certificate authority ends, since 1970; 0 if there is none",
            metrics.authority_end.clone(),
        );
        registry.register(
            "enforcing",
            "1 if mismatches are mended, 0 if they are only reported or not looked for",
            metrics.enforcing.clone(),
        );
        registry.register(
            "draining",
            "1 if connections close after their answer",
            metrics.draining.clone(),
        );
        let build = Build { version: env!("CARGO_PKG_VERSION") };
        registry.register("build", "The running program", Info::new(build));
        metrics.begin_series();
        metrics
    }
}

impl Metrics {
    /// Series that can be alerted on before anything happened.
    fn begin_series(&self) {
        for problem in Fault::ALL.map(Fault::name).into_iter().chain(["overloaded"]) {
            drop(self.problems.get_or_create(&ProblemLabel { problem: Name(problem) }));
        }
        for verdict in [Verdict::Transient, Verdict::Legitimate] {
            drop(self.refusals.get_or_create(&VerdictLabel { verdict: Name(verdict.as_str()) }));
        }
        for outcome in ["rescued", "refused", "failed"] {
            drop(self.retries.get_or_create(&RetryLabel { outcome: Name(outcome) }));
        }
        for decision in ["intercepted", "tunneled", "forwarded", "refused", "failed"] {
            drop(self.forwards.get_or_create(&DecisionLabel { decision: Name(decision) }));
        }
        for reason in ["queue", "disk"] {
            drop(self.audit_lost.get_or_create(&ReasonLabel { reason: Name(reason) }));
        }
        for result in ["applied", "refused"] {
            drop(self.reloads.get_or_create(&ResultLabel { result: Name(result) }));
        }
        for result in HANDSHAKES {
            drop(self.handshakes.get_or_create(&ResultLabel { result: Name(result) }));
        }
        self.tunneled(0, 0);
    }

    /// Findings of one kind.
    pub fn mismatches(&self, kind: Kind) -> &Counter {
        &self.mismatches[kind as usize]
    }

    /// A body was inspected: `clean`, `rewritten`, `observed` or `no_contact`.
    pub(crate) fn inspected(&self, result: &'static str) {
        let position = BODIES.iter().position(|it| *it == result);
        debug_assert!(position.is_some(), "nothing else comes of an inspection");
        if let Some(position) = position {
            self.bodies[position].inc();
        }
    }

    /// A body was not inspected.
    pub(crate) fn uninspected(&self, reason: Uninspectable) {
        for (counter, of) in self.uninspected.iter().zip(Uninspectable::ALL) {
            if of == reason {
                counter.inc();
            }
        }
    }

    /// An answer of the proxy's own.
    pub(crate) fn problem(&self, name: &'static str) {
        self.problems.get_or_create(&ProblemLabel { problem: Name(name) }).inc();
    }

    /// Whether mismatches are mended, and whether new requests are welcome.
    pub(crate) fn is(&self, enforcing: bool, draining: bool) {
        self.enforcing.set(i64::from(enforcing));
        self.draining.set(i64::from(draining));
    }

    /// A contact write ended so; what is none is not counted.
    pub(crate) fn wrote(&self, outcome: &'static str) {
        if let Some(position) = OUTCOMES.iter().position(|it| *it == outcome) {
            self.writes[position].inc();
        }
    }

    /// A target of the forward proxy: `intercepted`, `tunneled`, `forwarded`, `refused` or `failed`.
    pub(crate) fn forward(&self, decision: &'static str) {
        self.forwards.get_or_create(&DecisionLabel { decision: Name(decision) }).inc();
    }

    /// A TLS handshake: `completed`, or why it was not.
    pub(crate) fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ResultLabel { result: Name(result) }).inc();
    }

    /// Lines lost to the audit trail: for want of room in the `queue`, or on the `disk`.
    pub(crate) fn audit_lost(&self, reason: &'static str, lines: u64) {
        self.audit_lost.get_or_create(&ReasonLabel { reason: Name(reason) }).inc_by(lines);
    }

    /// Lines lost to the audit trail for any reason.
    pub(crate) fn audit_lost_in_all(&self) -> u64 {
        ["queue", "disk"]
            .iter()
            .map(|reason| {
                self.audit_lost.get_or_create(&ReasonLabel { reason: Name(reason) }).get()
            })
            .sum()
    }

    /// When the certificate authority ends, if there is one.
    pub(crate) fn authority_ends(&self, end: Option<SystemTime>) {
        let since = end.and_then(|end| end.duration_since(UNIX_EPOCH).ok());
        let seconds = since.map_or(0, |since| since.as_secs());
        self.authority_end.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Whether the configuration is not the one that was last asked for.
    pub(crate) fn is_reload_refused(&self) -> bool {
        self.reloaded.get() == 0
    }

    /// What passed through a blind tunnel, in bytes.
    pub(crate) fn tunneled(&self, sent: u64, received: u64) {
        for (direction, bytes) in [("sent", sent), ("received", received)] {
            let label = DirectionLabel { direction: Name(direction) };
            self.tunnel_bytes.get_or_create(&label).inc_by(bytes);
        }
    }

    /// A reload, and whether it took effect.
    pub(crate) fn reloaded(&self, took_effect: bool) {
        let result = if took_effect { "applied" } else { "refused" };
        self.reloads.get_or_create(&ResultLabel { result: Name(result) }).inc();
        self.reloaded.set(took_effect.into());
    }

    /// All of them in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing into a string cannot fail");
        text
    }
}
