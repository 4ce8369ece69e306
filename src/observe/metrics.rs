//! Every metric, defined once. Label values come from fixed sets: nothing that a client sends can make
//! a new series.

use std::array;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

use super::exchange::Retried;
use super::log;
use super::process::Process;
use super::record::Outcome;
use crate::contact::refusal::Verdict;
use crate::contact::{Kind, Uninspectable};
use crate::proxy::Fault;

/// How many outcomes an inspection alone may have: the first ones.
const INSPECTED: usize = 4;

/// How a TLS handshake with a client ends.
const HANDSHAKES: [&str; 7] =
    ["completed", "timeout", "client_gone", "alert", "not_tls", "wrong_name", "incompatible"];

/// Why a line is lost to the audit trail.
const AUDIT_LOST: [&str; 2] = ["queue", "disk"];

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
    /// Bodies that were inspected, by what was found and done.
    bodies: [Counter; INSPECTED],
    /// Those not inspected, by the reason.
    uninspected: [Counter; Uninspectable::ALL.len()],
    /// Contact writes, by their outcome.
    writes: [Counter; Outcome::ALL.len() - 1],
    /// Refused attempts, by verdict.
    refusals: [Counter; Verdict::ALL.len()],
    /// Attempts beyond the first, by how they ended.
    retries: [Counter; Retried::ALL.len()],
    /// Refusals not retried for want of budget.
    pub budget_exhausted: Counter,
    /// Answers of the proxy's own, by their problem.
    problems: By,
    /// Heads that could not be read as a request, and connections of HTTP/2 that were none or asked too much.
    pub malformed: Counter,
    /// Open downstream connections.
    pub connections: Gauge,
    /// Targets of the forward proxy, by what became of them.
    forwards: By,
    /// TLS handshakes with clients, by how they ended.
    handshakes: By,
    /// Open blind tunnels.
    pub tunnels: Gauge,
    /// Bytes through blind tunnels, by direction.
    tunnel_bytes: By,
    /// Reloads of the configuration, by how they ended.
    reloads: By,
    /// 1 if the last reload took effect, or there was none.
    reloaded: Gauge,
    /// Exchanges that the journal had no room for.
    pub journal_dropped: Counter,
    /// Lines written to the audit trail.
    pub audit_lines: Counter,
    /// Lines lost to it, by reason.
    audit_lost: By,
    /// When the certificate authority ends, in seconds since 1970; 0 if there is none.
    authority_end: Gauge,
    /// 1 if mismatches are mended.
    enforcing: Gauge,
    /// 1 if connections close after their answer.
    draining: Gauge,
}

/// Counters that are told apart by a label, whose values the program itself wrote.
#[derive(Debug)]
struct By {
    label: &'static str,
    counters: Family<[(&'static str, &'static str); 1], Counter>,
}

impl By {
    fn of(&self, value: &'static str) -> Counter {
        self.counters.get_or_create_owned(&[(self.label, value)])
    }
}

/// From 100 us to 30 s, in seconds.
const BUCKETS: [f64; 15] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
    30.0,
];

/// A metric that was registered.
fn metric<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Counters that were registered. Series that exist from the start can be alerted on before anything happened.
fn by(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl IntoIterator<Item = &'static str>,
) -> By {
    let by = By { label, counters: metric(registry, name, help) };
    values.into_iter().for_each(|value| drop(by.of(value)));
    by
}

/// The same for those that are looked up once, and not with every request.
fn each<const N: usize>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: [&'static str; N],
) -> [Counter; N] {
    let by = by(registry, name, help, label, []);
    values.map(|value| by.of(value))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let own = registry.sub_registry_with_prefix("optin_proxy");
        let requests = metric(own, "requests", "Requests answered or given up");
        let duration = Histogram::new(BUCKETS);
        let help = "From the request's head to the end of the answer";
        own.register("request_duration_seconds", help, duration.clone());
        let (help, kinds) = ("Findings in contact writes", Kind::ALL.map(Kind::as_str));
        let mismatches = each(own, "mismatches", help, "kind", kinds);
        let edits = metric(own, "edits", "Places edited in bodies");
        let bodies: Family<_, Counter> = metric(own, "bodies", "Bodies that may be contact writes");
        let body =
            |result, reason| bodies.get_or_create_owned(&[("result", result), ("reason", reason)]);
        let (inspected, uninspected) = (
            array::from_fn(|outcome| body(Outcome::ALL[outcome].as_str(), "")),
            Uninspectable::ALL.map(|reason| body("uninspected", reason.as_str())),
        );
        let help = "Contact writes, by their outcome";
        let outcomes = array::from_fn(|before| Outcome::ALL[before + 1].as_str());
        let writes = each(own, "contact_writes", help, "outcome", outcomes);
        let help = "Attempts refused for their transition";
        let verdicts = Verdict::ALL.map(Verdict::as_str);
        let refusals = each(own, "refusals", help, "verdict", verdicts);
        let outcomes = Retried::ALL.map(Retried::as_str);
        let retries = each(own, "retries", "Attempts beyond the first", "outcome", outcomes);
        let help = "Refusals not retried for want of budget";
        let budget_exhausted = metric(own, "retry_budget_exhausted", help);
        let help = "Answers of the proxy's own, for want of the API's";
        let names = Fault::ALL.map(Fault::name).into_iter().chain(["overloaded"]);
        let problems = by(own, "problems", help, "problem", names);
        let help = "Heads that could not be read as a request, and connections of HTTP/2 that were none or asked too much";
        let malformed = metric(own, "malformed_requests", help);
        let connections = metric(own, "connections", "Open downstream connections");
        let decisions = ["intercepted", "tunneled", "forwarded", "refused", "failed"];
        let help = "Targets of the forward proxy";
        let forwards = by(own, "forward_targets", help, "decision", decisions);
        let help = "TLS handshakes with clients of intercepted hosts";
        let handshakes = by(own, "tls_handshakes", help, "result", HANDSHAKES);
        let tunnels = metric(own, "tunnels", "Open blind tunnels");
        let help = "Bytes through blind tunnels that have ended";
        let tunnel_bytes = by(own, "tunnel_bytes", help, "direction", ["sent", "received"]);
        let help = "Reloads of the configuration";
        let reloads = by(own, "config_reloads", help, "result", ["applied", "refused"]);
        let help = "1 if the configuration is the one last asked for";
        let reloaded: Gauge = metric(own, "config_last_reload_successful", help);
        reloaded.set(1);
        let help = "Lines of the log that were lost because whoever reads it is too slow";
        own.register("log_lost", help, log::lost());
        let help = "Exchanges that neither the dashboard nor the audit trail knows of";
        let journal_dropped = metric(own, "journal_dropped", help);
        let audit_lines = metric(own, "audit_lines", "Lines written to the audit trail");
        let help = "Lines lost to the audit trail";
        let audit_lost = by(own, "audit_lost", help, "reason", AUDIT_LOST);
        let help = "When the certificate authority ends, since 1970; 0 if there is none";
        let authority_end = metric(own, "ca_not_after_seconds", help);
        let help = "1 if mismatches are mended, 0 if they are only reported or not looked for";
        let enforcing = metric(own, "enforcing", help);
        let draining = metric(own, "draining", "1 if connections close after their answer");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        own.register("build", "The running program", build);
        Self {
            registry,
            requests,
            duration,
            mismatches,
            edits,
            bodies: inspected,
            uninspected,
            writes,
            refusals,
            retries,
            budget_exhausted,
            problems,
            malformed,
            connections,
            forwards,
            handshakes,
            tunnels,
            tunnel_bytes,
            reloads,
            reloaded,
            journal_dropped,
            audit_lines,
            audit_lost,
            authority_end,
            enforcing,
            draining,
        }
    }
}

impl Metrics {
    /// Findings of one kind.
    pub fn mismatches(&self, kind: Kind) -> &Counter {
        &self.mismatches[kind as usize]
    }

    /// A body was inspected.
    pub(crate) fn inspected(&self, outcome: Outcome) {
        let counter = self.bodies.get(outcome as usize);
        debug_assert!(counter.is_some(), "nothing else comes of an inspection");
        counter.map(Counter::inc);
    }

    /// A body was not inspected.
    pub(crate) fn uninspected(&self, reason: Uninspectable) {
        for (counter, of) in self.uninspected.iter().zip(Uninspectable::ALL) {
            if of == reason {
                counter.inc();
            }
        }
    }

    /// An attempt was refused.
    pub(crate) fn refused(&self, verdict: Verdict) {
        self.refusals[verdict as usize].inc();
    }

    /// An attempt beyond the first ended.
    pub(crate) fn retried(&self, retried: Retried) {
        self.retries[retried as usize].inc();
    }

    /// An answer of the proxy's own.
    pub(crate) fn problem(&self, name: &'static str) {
        self.problems.of(name).inc();
    }

    /// Whether mismatches are mended, and whether new requests are welcome.
    pub(crate) fn is(&self, enforcing: bool, draining: bool) {
        self.enforcing.set(i64::from(enforcing));
        self.draining.set(i64::from(draining));
    }

    /// A contact write ended so; what is none is not counted.
    pub(crate) fn wrote(&self, outcome: Outcome) {
        if let Some(before) = (outcome as usize).checked_sub(1) {
            self.writes[before].inc();
        }
    }

    /// A target of the forward proxy: `intercepted`, `tunneled`, `forwarded`, `refused` or `failed`.
    pub(crate) fn forward(&self, decision: &'static str) {
        self.forwards.of(decision).inc();
    }

    /// A TLS handshake: `completed`, or why it was not.
    pub(crate) fn handshake(&self, result: &'static str) {
        self.handshakes.of(result).inc();
    }

    /// Lines lost to the audit trail: for want of room in the `queue`, or on the `disk`.
    pub(crate) fn audit_lost(&self, reason: &'static str, lines: u64) {
        self.audit_lost.of(reason).inc_by(lines);
    }

    /// Lines lost to the audit trail for any reason.
    pub(crate) fn audit_lost_in_all(&self) -> u64 {
        AUDIT_LOST.map(|reason| self.audit_lost.of(reason).get()).into_iter().sum()
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
        self.tunnel_bytes.of("sent").inc_by(sent);
        self.tunnel_bytes.of("received").inc_by(received);
    }

    /// A reload, and whether it took effect.
    pub(crate) fn reloaded(&self, took_effect: bool) {
        let result = if took_effect { "applied" } else { "refused" };
        self.reloads.of(result).inc();
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
