//! The material of a record, as an exchange hands it over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{self, Digest, SHA256};
use bytes::Bytes;
use http::StatusCode;

use super::found::Rows;
use super::ids::Trace;
use super::record::{Decision, Outcome, Verdicts};
use super::redact::{ListNumber, Value};
use crate::config::Config;
use crate::contact::{Edits, Finding, Findings, Span, Was, edit};
use crate::proxy::connect::Target;

/// The longest body that is copied before its exchange is over, and how much room a record keeps for the next one's, in
/// bytes.
const SMALL: usize = 8 * 1024;

/// The longest body that may be a part of its connection's buffer, as the limits are by default, in bytes: what is longer was
/// put together, and is nobody else's.
const PIECE: usize = 16 * 1024;

/// A contact write's body, and what was found in it.
pub(crate) struct Inspected<'a> {
    pub findings: Findings,
    /// What was changed of `original`.
    pub edits: Edits,
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
    pub method: &'static str,
    pub target: Option<Target>,
    pub decision: Option<Decision>,
    pub status: Option<StatusCode>,
    /// Of a contact write, or of a body that may have been one.
    pub outcome: Option<Outcome>,
    pub reason: Option<&'static str>,
    pub problem: Option<&'static str>,
    pub attempts: u32,
    pub verdicts: Verdicts,
    pub is_complete: bool,
    /// Bytes of the answer's body.
    pub sent: u64,
    /// The proxy did not wait any longer.
    pub is_cut: bool,
    pub duration: Duration,
    pub has_agent: bool,
    /// What was found.
    pub found: Rows<Finding>,
    edits: Edits,
    /// How many bytes the texts in findings take.
    texts: usize,
    is_inspected: bool,
    /// Left in place for the next exchange, which most often has the same: where two threads count the references to
    /// it, both wait for each other.
    pub(super) config: Option<Arc<Config>>,
    /// The original, if it is longer than [`PIECE`]. It would be copied for nothing.
    large: Bytes,
    text: Vec<u8>,
    /// Where each [`Part`] ends.
    ends: [usize; 4],
}

/// A part of the text, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    RequestId,
    Path,
    Agent,
    /// The body, for its digests.
    Original,
}

impl Default for Finished {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            trace: None,
            method: "",
            target: None,
            decision: None,
            status: None,
            outcome: None,
            reason: None,
            problem: None,
            attempts: 0,
            verdicts: Verdicts::default(),
            is_complete: false,
            sent: 0,
            is_cut: false,
            duration: Duration::ZERO,
            has_agent: false,
            found: Rows::default(),
            edits: Edits::default(),
            texts: 0,
            is_inspected: false,
            config: None,
            large: Bytes::new(),
            text: Vec::new(),
            ends: [0; 4],
        }
    }
}

impl Finished {
    /// Makes it as good as new. What is large is given back.
    pub fn reset(&mut self) {
        self.target = None;
        self.is_inspected = false;
        self.found.clear();
        self.edits.clear();
        self.texts = 0;
        self.large = Bytes::new();
        self.text.clear();
        self.text.shrink_to(SMALL);
        self.ends = [0; 4];
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

    pub(super) fn text(&self, part: Part) -> &str {
        std::str::from_utf8(self.part(part)).unwrap_or_default()
    }

    /// Adds what was found, and returns the body if it is to be added once all is over, if at all: of one that has not to
    /// be hashed, nothing is kept but what will be printed.
    ///
    /// What is small is copied at once: it is at hand now, and its memory goes to the next request as it would without
    /// a journal, whereas memory that waits for the end comes back cold. A large body is moved in, and its edits. The body
    /// sent is not needed: the edits make it of the other.
    pub fn inspected(&mut self, inspected: Inspected<'_>, has_audit: bool) -> Option<Bytes> {
        let Inspected { findings, mut edits, original, config } = inspected;
        self.is_inspected = true;
        if !self.config.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, config)) {
            self.config = Some(Arc::clone(config));
        }
        let list_of = |id: Span| ListNumber::of(&original[id.range()]);
        let (rows, places) = findings.into_parts();
        self.found.extend(rows, places.iter().map(|place| place.list_id.map(list_of)));
        self.forget_unprinted();
        if !has_audit {
            return None;
        }
        if original.len() > SMALL {
            edits.shrink_to_fit();
            self.edits = edits;
            return Some(original);
        }
        self.edits.copy(&edits);
        if self.found.is_empty() {
            return Some(original);
        }
        self.put(Part::Original, &original);
        None
    }

    /// Forgets what would not be printed: a record may have to wait for longer than `limits.max_buffered` counts its body.
    fn forget_unprinted(&mut self) {
        for finding in self.found.rows_mut() {
            Value::forget_unprinted(&mut finding.was);
            if let Was::Other(text) | Was::OwnOrigin(text) = &finding.was {
                self.texts += text.len();
            }
        }
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
        self.text.len() + self.large.len() + self.texts + self.found.held() + self.edits.held()
    }

    /// Whether it belongs into the audit trail: a contact write with a finding or a refusal.
    pub fn is_audited(&self) -> bool {
        self.verdicts.any() || !self.found.is_empty()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contact::{Request, Sanitized, sanitize};

    /// The record of an update with these lists.
    fn of(lists: &str, has_audit: bool) -> Finished {
        let body = format!(
            "<Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\">\
             <OptInSource>ACTION_BY_CONTACT</OptInSource><ContactLists>{lists}</ContactLists></Contact>"
        );
        let (original, config) = (Bytes::from(body), Arc::new(Config::default()));
        let request = Request { update: true, ..Request::default() };
        let Sanitized::Contact(contact) = sanitize(&original, &request, &config.sanitize.policy)
        else {
            panic!("it is a contact");
        };
        let mut finished = Finished::default();
        let (findings, edits, config) = (contact.findings, contact.edits, &config);
        finished.inspected(Inspected { findings, edits, original, config }, has_audit);
        finished
    }

    fn list(number: &str, sources: &str) -> String {
        let id = format!("http://api.constantcontact.com/ws/lists/{number}");
        format!("<ContactList id=\"{id}\">{sources}</ContactList>")
    }

    /// How many stand in a list of this number.
    fn named(finished: &Finished, name: &str) -> usize {
        let lists = finished.found.each().filter_map(|(_, list)| list);
        lists.filter(|list| list.to_string() == name).count()
    }

    #[test]
    fn thousands_of_findings_that_are_alike_are_kept_as_one_and_their_lists_numbers() {
        let sources = "<OptInSource>x</OptInSource>".repeat(3_000);
        let finished = of(&(list("7", &sources) + &list("8", &sources)), false);
        assert_eq!((finished.found.len(), finished.found.rows().count()), (6_000, 1));
        assert_eq!((named(&finished, "7"), named(&finished, "8")), (3_000, 3_000));
        assert_eq!(finished.held(), size_of::<(Finding, usize)>() + 6_000 * size_of::<u64>());
    }

    #[test]
    fn what_is_found_stays_with_the_list_that_it_stands_in() {
        let lists = [
            list(
                "7",
                "<OptInSource/><Contact><OptInSource>x</OptInSource></Contact><OptInSource/>",
            ),
            list("8", "<OptInSource>ACTION_BY_CUSTOMER</OptInSource>"),
            list("9", "<OptInSource>ACTION_BY_CUSTOMER</OptInSource>"),
            list("jo", "<OptInSource/>"),
        ];
        let finished = of(&lists.concat(), false);
        let found: Vec<_> = finished
            .found
            .each()
            .map(|(finding, list)| {
                let list = list.map_or_else(String::new, |list| list.to_string());
                format!("{}({}) {list}", finding.kind, Value(&finding.was))
            })
            .collect();
        let expected = [
            "list_differs() 7",
            "unknown_value((unknown)) ",
            "list_differs() 7",
            "list_differs(ACTION_BY_CUSTOMER) 8",
            "list_differs(ACTION_BY_CUSTOMER) 9",
            "list_differs() (unprintable)",
        ];
        assert_eq!(found, expected);
    }

    /// A record once kept it, and weighed nothing for it.
    #[test]
    fn a_source_as_long_as_a_body_is_not_kept_for_its_record() {
        let long = format!("<OptInSource>{}</OptInSource>", "x".repeat(1_000_000));
        let finished = of(
            &(list("7", &long) + &list("8", "<OptInSource>ACTION_BY_CLIENT</OptInSource>")),
            false,
        );
        let texts = finished.found.rows().map(|(finding, _)| match &finding.was {
            Was::Other(text) | Was::OwnOrigin(text) => &**text,
            _ => "",
        });
        assert!(texts.eq(["", "ACTION_BY_CLIENT"]));
        assert_eq!(finished.held(), finished.found.held() + "ACTION_BY_CLIENT".len());
    }

    #[test]
    fn room_for_thousands_of_findings_is_given_back_where_there_is_one() {
        let one = "<OptInSource>x</OptInSource>".to_owned();
        let finished = of(
            &list("7", &(one + &"<OptInSource>ACTION_BY_CONTACT</OptInSource>".repeat(3_000))),
            false,
        );
        assert_eq!(finished.found.len(), 1);
        assert_eq!(finished.found.room(), 0);
        let mut finished = of(&list("7", &"<OptInSource>x</OptInSource>".repeat(3_000)), false);
        assert!(finished.found.room() >= 3_000 * size_of::<u64>());
        finished.reset();
        assert_eq!(finished.found.room(), 0);
    }

    #[test]
    fn what_is_kept_of_edits_for_an_audit_trail_is_weighed() {
        let held = |of_each: &dyn Fn(usize) -> String| {
            let lists = list("7", &(1_000..4_000).map(of_each).collect::<String>());
            of(&lists, true).held() - of(&lists, false).held()
        };
        let nil = |number, rest| format!("<OptInSource xsi:nil=\"true\" a=\"{number}{rest}\"/>");
        let (short, long) = (held(&|it| nil(it, "")), held(&|it| nil(it, "0123456789")));
        assert_eq!(long - short, 3_000 * "0123456789".len());
        // Those that are alike are kept as one.
        assert!(held(&|_| "<OptInSource/>".to_owned()) < short / 4);
    }
}
