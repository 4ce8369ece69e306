//! What the records add up to: since the start, over the last hour, and by application.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use rustc_hash::FxHashMap;
use serde::Serialize;
use smol_str::SmolStr;

use super::found::Seen;
use super::record::{Outcome, Record};
use super::redact::ListNumber;
use crate::contact::Kind;

/// How many minutes are kept.
const MINUTES: usize = 60;

/// How many applications are told apart, and how many lists of each. What comes later counts as [`OTHERS`].
const APPLICATIONS: usize = 100;
const LISTS: usize = 50;

/// The name for all that are not told apart.
const OTHERS: &str = "(others)";

/// The name for clients that send no `User-Agent`.
const UNNAMED: &str = "(no User-Agent)";

/// Counts of exchanges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Exchanges.
    pub requests: u64,
    /// Contact writes that were inspected.
    pub writes: u64,
    /// Findings.
    pub findings: u64,
    /// Bodies that were rewritten, whatever became of them.
    pub rewritten: u64,
    /// Writes that a retry rescued.
    pub rescued: u64,
    /// Refusals that reached a client, because they were true.
    pub refused: u64,
    /// Refusals that reached a client though they were not.
    pub exhausted: u64,
    /// Bodies that were not inspected.
    pub uninspected: u64,
    /// Answers of the proxy's own for want of another.
    pub problems: u64,
}

impl Totals {
    fn add(&mut self, record: &Record) {
        self.requests += 1;
        self.findings += record.found as u64;
        self.rewritten += u64::from(record.rewritten > 0);
        self.problems += u64::from(record.problem.is_some());
        match record.outcome {
            None | Some(Outcome::NoContact) => return,
            Some(Outcome::Rescued) => self.rescued += 1,
            Some(Outcome::Refused) => self.refused += 1,
            Some(Outcome::Exhausted) => self.exhausted += 1,
            Some(Outcome::Uninspected) => {
                self.uninspected += 1;
                return;
            }
            Some(Outcome::Clean | Outcome::Rewritten | Outcome::Observed) => {}
        }
        self.writes += 1;
    }
}

/// One minute's counts.
#[derive(Debug, Clone, Copy, Serialize)]
struct Minute {
    /// Minutes since 1970.
    minute: u64,
    #[serde(flatten)]
    totals: Totals,
}

/// What one application sent, told apart by its `User-Agent`.
#[derive(Debug, Clone, Default)]
struct Application {
    totals: Totals,
    kinds: Vec<ByKind>,
    /// Findings by list. There are too few for a sender to gain by ids that collide.
    lists: FxHashMap<ListNumber, u64>,
    /// Those in the lists that came once there were enough.
    others: u64,
}

impl Application {
    /// Where findings of this kind are counted: this is the newest.
    fn kind_of(&mut self, seen: Seen, request_id: &str) -> &mut ByKind {
        let Seen { kind, cause, .. } = seen;
        let position = self.kinds.iter().position(|it| it.kind == kind);
        let position = position.unwrap_or_else(|| {
            let request_id = request_id.into();
            self.kinds.push(ByKind { kind, findings: 0, changed: 0, cause, request_id });
            self.kinds.len() - 1
        });
        let by_kind = &mut self.kinds[position];
        if *by_kind.request_id != *request_id {
            by_kind.request_id = request_id.into();
        }
        by_kind
    }
}

#[derive(Debug, Clone, Serialize)]
struct ByKind {
    kind: Kind,
    findings: u64,
    changed: u64,
    /// Where such a thing comes from, as far as is known.
    cause: &'static str,
    /// The last exchange that had one.
    request_id: SmolStr,
}

/// All counts.
#[derive(Debug, Default)]
pub struct Stats {
    totals: Totals,
    minutes: VecDeque<Minute>,
    applications: HashMap<Box<str>, Application>,
}

impl Stats {
    /// Counts one exchange more, and all that was found in it: a record may name fewer.
    ///
    /// `found`: findings that are alike, and the list that each stands in.
    pub fn add<'s>(
        &mut self,
        record: &Record,
        found: impl Iterator<Item = (Seen, &'s [Option<ListNumber>])>,
    ) {
        self.totals.add(record);
        self.minute_of(record.time).add(record);
        if record.outcome.is_none_or(|outcome| outcome == Outcome::NoContact) {
            return;
        }
        let agent = record.user_agent.as_deref().unwrap_or(UNNAMED);
        let room = self.applications.len() < APPLICATIONS;
        let application = match self.applications.get_mut(agent) {
            Some(application) => application,
            None => self.applications.entry(if room { agent } else { OTHERS }.into()).or_default(),
        };
        application.totals.add(record);
        let mut before = None;
        for (seen, lists) in found {
            let by_kind = application.kind_of(seen, &record.request_id);
            // Of several in a row, the first tells.
            if before != Some(seen.kind) {
                by_kind.cause = seen.cause;
            }
            before = Some(seen.kind);
            by_kind.findings += lists.len() as u64;
            by_kind.changed += if seen.changed { lists.len() as u64 } else { 0 };
            for list in lists.iter().flatten() {
                let room = application.lists.len() < LISTS;
                match application.lists.get_mut(list) {
                    Some(count) => *count += 1,
                    None if room => drop(application.lists.insert(*list, 1)),
                    None => application.others += 1,
                }
            }
        }
    }

    /// The counts of the minute in which something began. Minutes that have not come yet are of a clock that was ahead.
    fn minute_of(&mut self, time: SystemTime) -> &mut Totals {
        let minute = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 60;
        if self.minutes.back().is_none_or(|newest| newest.minute != minute) {
            self.turn_to(minute);
        }
        let position = self.minutes.iter().rposition(|it| it.minute <= minute).unwrap_or(0);
        &mut self.minutes[position].totals
    }

    /// Makes room for a minute, if it is a new one.
    fn turn_to(&mut self, minute: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 60;
        while self.minutes.back().is_some_and(|it| it.minute > now.max(minute)) {
            self.minutes.pop_back();
        }
        if self.minutes.back().is_none_or(|newest| newest.minute < minute) {
            self.minutes.push_back(Minute { minute, totals: Totals::default() });
            while self.minutes.front().is_some_and(|it| it.minute + MINUTES as u64 <= minute) {
                self.minutes.pop_front();
            }
        }
    }

    /// All of it as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let mut applications: Vec<_> = self.applications.iter().collect();
        applications.sort_by(|(a, left), (b, right)| {
            right.totals.findings.cmp(&left.totals.findings).then_with(|| a.cmp(b))
        });
        let applications: Vec<_> = applications
            .into_iter()
            .map(|(user_agent, application)| {
                let mut kinds: Vec<_> = application.kinds.iter().collect();
                kinds.sort_by_key(|it| (Reverse(it.findings), it.kind as usize));
                let mut lists: Vec<_> =
                    application.lists.iter().map(|(it, n)| (Some(*it), *n)).collect();
                lists.extend((application.others > 0).then_some((None, application.others)));
                lists.sort_by_key(|(list, findings)| (Reverse(*findings), *list));
                let lists: Vec<_> = lists
                    .into_iter()
                    .map(|(list, findings)| {
                        let list_id = list.map_or_else(|| OTHERS.to_owned(), |it| it.to_string());
                        serde_json::json!({ "list_id": list_id, "findings": findings })
                    })
                    .collect();
                serde_json::json!({
                    "user_agent": user_agent,
                    "totals": application.totals,
                    "kinds": kinds,
                    "lists": lists,
                })
            })
            .collect();
        serde_json::json!({
            "totals": self.totals,
            "minutes": self.minutes,
            "applications": applications,
        })
    }
}
