//! A finding, as it is counted and as it is told.

use std::borrow::Cow;

use serde::{Serialize, Serializer};
use smallvec::SmallVec;

use super::cause;
use super::redact::{ListNumber, Value};
use crate::contact::{Finding, Kind, Policy, Source, Was, Written};

/// How much room is kept for the next findings, in bytes.
const FEW: usize = 4096;

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

/// One finding, wherever it stands.
#[derive(Debug, Clone)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// What was there.
    was: Cow<'static, str>,
    /// What is there now.
    now: Cow<'static, str>,
    /// Whether it was changed.
    changed: bool,
    /// The declaration that it was held against.
    declared: Option<Source>,
    /// The setting that decided.
    setting: &'static str,
}

impl Found {
    /// `policy`: what it was made by.
    pub(super) fn new(finding: &Finding, policy: Option<&Policy>) -> Self {
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
            was,
            now,
            changed: finding.acted_on(),
            declared: finding.declared,
            setting: policy.map_or("", |policy| policy.setting(finding.kind)),
        }
    }
}

/// Findings, and the list that each stands in. Those that are alike and follow one another are kept once: of a contact's
/// lists, nearly all.
///
/// As many as most contacts have need no memory of their own: of ten thousand records, the oldest is in no cache any more, and each piece
/// of memory that is given back with it has to be waited for.
#[derive(Debug, Clone)]
pub struct Rows<T> {
    rows: SmallVec<[(T, usize); 1]>,
    lists: SmallVec<[Option<ListNumber>; 8]>,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self { rows: SmallVec::new(), lists: SmallVec::new() }
    }
}

impl<T> Rows<T> {
    /// Adds rows, and the list of each finding in them.
    pub(super) fn extend(
        &mut self,
        rows: Vec<(T, usize)>,
        lists: impl Iterator<Item = Option<ListNumber>>,
    ) {
        self.rows.extend(rows);
        self.lists.extend(lists);
    }

    /// How many findings there are.
    pub fn len(&self) -> usize {
        self.lists.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Those that are alike, and the lists that they stand in.
    pub fn rows(&self) -> impl Iterator<Item = (&T, &[Option<ListNumber>])> {
        let mut rest = &*self.lists;
        self.rows.iter().map(move |(alike, count)| {
            let (lists, others) = rest.split_at(*count);
            rest = others;
            (alike, lists)
        })
    }

    /// Findings one by one.
    pub(super) fn each(&self) -> impl Iterator<Item = (&T, Option<ListNumber>)> {
        self.rows().flat_map(|(alike, lists)| lists.iter().map(move |list| (alike, *list)))
    }

    /// Those that are alike, to be changed.
    pub(super) fn rows_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.rows.iter_mut().map(|(alike, _)| alike)
    }

    /// The first so many findings, as something else.
    pub(super) fn first<U>(&self, most: usize, mut of: impl FnMut(&T) -> U) -> Rows<U> {
        let mut left = most;
        let mut rows = SmallVec::with_capacity(self.rows.len().min(most));
        for (alike, count) in &self.rows {
            if left == 0 {
                break;
            }
            let count = left.min(*count);
            left -= count;
            rows.push((of(alike), count));
        }
        rows.shrink_to_fit();
        let lists = &self.lists[..self.lists.len().min(most)];
        Rows { rows, lists: SmallVec::from_slice(lists) }
    }

    /// Forgets all of them. Room for more than a few is given back.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.lists.clear();
        if self.room() > FEW {
            *self = Self::default();
        }
    }

    /// How much room is kept for them, in bytes, beside what they have anyway.
    pub(super) fn room(&self) -> usize {
        let rows = if self.rows.spilled() { self.rows.capacity() } else { 0 };
        let lists = if self.lists.spilled() { self.lists.capacity() } else { 0 };
        rows * size_of::<(T, usize)>() + lists * size_of::<Option<ListNumber>>()
    }

    /// How much memory they take, in bytes, beside their texts; of what stands in here, as if it did not.
    pub(super) fn held(&self) -> usize {
        size_of_val(&*self.rows) + size_of_val(&*self.lists)
    }
}

impl Serialize for Rows<Found> {
    /// One by one.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Line<'f> {
            kind: Kind,
            #[serde(skip_serializing_if = "Option::is_none")]
            list_id: Option<ListNumber>,
            was: &'f str,
            now: &'f str,
            changed: bool,
            declared: Option<Source>,
            setting: &'static str,
        }
        serializer.collect_seq(self.each().map(|(found, list_id)| {
            let Found { kind, ref was, ref now, changed, declared, setting } = *found;
            Line { kind, list_id, was, now, changed, declared, setting }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_findings_the_first_are_the_same_wherever_they_are_cut() {
        let list = |number: u8| Some(ListNumber::of(number.to_string().as_bytes()));
        let mut all = Rows::default();
        all.extend(vec![('a', 3), ('b', 1), ('c', 2)], (1..=6).map(list));
        let each: Vec<_> = all.each().map(|(alike, list)| (*alike, list)).collect();
        for most in 0..10 {
            let first = all.first(most, char::to_ascii_uppercase);
            assert_eq!((first.len(), first.is_empty()), (most.min(6), most == 0));
            let told = first.each().map(|(alike, list)| (alike.to_ascii_lowercase(), list));
            assert!(told.eq(each[..most.min(6)].iter().copied()), "{most}");
            assert!(first.rows().all(|(_, lists)| !lists.is_empty()));
            let room = if first.rows.spilled() {
                first.rows.len() * size_of::<(char, usize)>()
            } else {
                0
            };
            assert_eq!(first.room(), room);
        }
    }

    #[test]
    fn findings_are_told_one_by_one_and_with_their_list_if_they_stand_in_one() {
        let finding = |kind, was, now, declared| {
            Found::new(&Finding { kind, was, now, declared }, Some(&Policy::default()))
        };
        let contact = Some(Source::Contact);
        let listed = finding(
            Kind::ListDiffers,
            Was::Known(Source::Customer),
            Written::Value(Source::Contact),
            contact,
        );
        let undeclared = finding(Kind::Undeclared, Was::Empty, Written::Nothing, None);
        let lists = ["lists/7", "lists/8"].map(|id| Some(ListNumber::of(id.as_bytes())));
        let mut rows = Rows::default();
        rows.extend(vec![(listed, 2), (undeclared, 1)], lists.into_iter().chain([None]));
        let json = serde_json::to_string(&rows).expect("strings and numbers");
        let listed = |list| {
            format!(
                r#"{{"kind":"list_differs","list_id":"{list}","was":"ACTION_BY_CUSTOMER","now":"ACTION_BY_CONTACT","changed":true,"declared":"ACTION_BY_CONTACT","setting":"sanitize.lists=align"}}"#
            )
        };
        let undeclared = r#"{"kind":"undeclared","was":"","now":"","changed":false,"declared":null,"setting":"sanitize.undeclared=leave"}"#;
        assert_eq!(json, format!("[{},{},{undeclared}]", listed(7), listed(8)));
        assert_eq!(serde_json::to_string(&Rows::<Found>::default()).expect("nothing"), "[]");
    }
}
