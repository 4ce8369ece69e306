//! What audit lines add up to.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use serde_json::{Value, json};

use super::line::Line;

/// How many names of each kind are told apart; memory has to end somewhere.
const NAMES: usize = 20_000;
const OTHERS: &str = "(others)";

/// Counts of contact writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub writes: u64,
    pub findings: u64,
    pub changed: u64,
    pub rescued: u64,
    pub refused: u64,
    pub exhausted: u64,
}

impl Counts {
    pub fn columns(&self) -> [u64; 6] {
        let Self { writes, findings, changed, rescued, refused, exhausted } = *self;
        [writes, findings, changed, rescued, refused, exhausted]
    }

    fn add(&mut self, other: &Self) {
        self.writes += other.writes;
        self.findings += other.findings;
        self.changed += other.changed;
        self.rescued += other.rescued;
        self.refused += other.refused;
        self.exhausted += other.exhausted;
    }
}

type Names = HashMap<Box<str>, Counts>;

/// All counts.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub all: Counts,
    /// From when to when.
    pub period: Option<(String, String)>,
    /// Lines that the trail says were lost.
    pub lost: u64,
    /// Lines that are none of an audit trail.
    pub foreign: u64,
    applications: Names,
    accounts: Names,
    lists: Names,
    kinds: Names,
    days: Names,
}

fn add(names: &mut Names, name: &str, counts: &Counts) {
    match names.get_mut(name) {
        Some(sum) => sum.add(counts),
        None => {
            let name = if names.len() < NAMES { name } else { OTHERS };
            names.entry(name.into()).or_default().add(counts);
        }
    }
}

impl Sums {
    pub fn is_empty(&self) -> bool {
        self.all.writes == 0 && self.lost == 0
    }

    pub fn add(&mut self, line: &Line<'_>) {
        let time: &str = &line.time.0;
        match &mut self.period {
            Some((from, to)) => {
                if time < from.as_str() {
                    *from = time.to_owned();
                }
                if time > to.as_str() {
                    time.clone_into(to);
                }
            }
            none => *none = Some((time.to_owned(), time.to_owned())),
        }
        if line.event.is_some() {
            self.lost += line.lost;
            return;
        }
        let outcome = line.outcome.as_ref().map(|outcome| &*outcome.0);
        let findings = &line.findings.0;
        let one = Counts {
            writes: 1,
            findings: findings.len() as u64,
            changed: findings.iter().filter(|finding| finding.changed).count() as u64,
            rescued: u64::from(outcome == Some("rescued")),
            refused: u64::from(outcome == Some("refused")),
            exhausted: u64::from(outcome == Some("exhausted")),
        };
        self.all.add(&one);
        let agent = line.user_agent.as_ref().map_or("(no User-Agent)", |it| &it.0);
        add(&mut self.applications, agent, &one);
        add(&mut self.accounts, line.account.as_ref().map_or("(none)", |it| &it.0), &one);
        add(&mut self.days, time.get(..10).unwrap_or(time), &one);
        let (mut kinds, mut lists) = (HashSet::new(), HashSet::new());
        for finding in findings {
            let once = |is_first: bool| {
                let base = if is_first { one } else { Counts::default() };
                Counts { findings: 1, changed: u64::from(finding.changed), ..base }
            };
            let kind: &str = &finding.kind.0;
            add(&mut self.kinds, kind, &once(kinds.insert(kind)));
            if let Some(list) = &finding.list_id {
                let list: &str = &list.0;
                add(&mut self.lists, list, &once(lists.insert(list)));
            }
        }
    }

    /// The names of each kind with their counts, the most findings first; days in their order.
    pub fn dimensions(&self) -> [(&'static str, Vec<(&str, &Counts)>); 5] {
        [
            ("application", order(&self.applications, false)),
            ("account", order(&self.accounts, false)),
            ("list", order(&self.lists, false)),
            ("kind", order(&self.kinds, false)),
            ("day", order(&self.days, true)),
        ]
    }

    pub fn to_json(&self) -> Value {
        let mut all = json!({
            "all": self.all,
            "from": self.period.as_ref().map(|(from, _)| from),
            "to": self.period.as_ref().map(|(_, to)| to),
            "lost": self.lost,
        });
        for (title, names) in self.dimensions() {
            let rows: Vec<_> = names
                .into_iter()
                .map(|(name, counts)| {
                    let mut row = json!(counts);
                    row["name"] = json!(name);
                    row
                })
                .collect();
            all[title] = json!(rows);
        }
        all
    }
}

fn order(names: &Names, by_name: bool) -> Vec<(&str, &Counts)> {
    let mut all: Vec<_> = names.iter().map(|(name, counts)| (&**name, counts)).collect();
    all.sort_by(|(a, left), (b, right)| {
        let by_count = right.findings.cmp(&left.findings).then(right.writes.cmp(&left.writes));
        if by_name { a.cmp(b) } else { by_count.then_with(|| a.cmp(b)) }
    });
    all
}
