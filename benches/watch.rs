//! What floors keep of exchanges, and the limits and deadlines that they keep to, each in the least way: by one thread for itself.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use optin_proxy::contact::{self, Finding, Findings, Kind, Policy, Sanitized, sanitize};
use smallvec::SmallVec;
use tokio::time::{Instant, Sleep, sleep};

/// The limits' defaults.
pub const KEEP_ALIVE: Duration = Duration::from_secs(75);
pub const RESPONSE: Duration = Duration::from_secs(60);
const EXCHANGES: usize = 10_000;
const REQUESTS: usize = 1_024;
const BUFFERED: usize = 64 << 20;

/// How many lists of an exchange are kept. All are counted.
const LISTS: usize = 16;

/// The upper ends of a histogram's buckets, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// One timer for all the waits of a connection: most never last, and to put it off costs next to nothing.
pub struct Deadline(Pin<Box<Sleep>>);

impl Deadline {
    pub fn new() -> Self {
        Self(Box::pin(sleep(KEEP_ALIVE)))
    }

    pub async fn within<T>(
        &mut self,
        limit: Duration,
        future: impl Future<Output = T>,
    ) -> io::Result<T> {
        let (mut future, mut until) = (pin!(future), None);
        poll_fn(|cx| {
            if let Poll::Ready(done) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(done));
            }
            let until = *until.get_or_insert_with(|| Instant::now() + limit);
            while self.0.as_mut().poll(cx).is_ready() {
                if Instant::now() >= until {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                self.0.as_mut().reset(until);
            }
            Poll::Pending
        })
        .await
    }
}

/// The record of an exchange, in one piece: of ten thousand, the oldest is in no cache.
#[derive(Default)]
pub struct Record {
    started: Option<Instant>,
    duration: Duration,
    pub id: SmallVec<[u8; 24]>,
    pub line: SmallVec<[u8; 64]>,
    pub agent: Option<SmallVec<[u8; 24]>>,
    pub status: Option<u16>,
    pub attempts: u32,
    findings: SmallVec<[(Finding, usize); 1]>,
    /// How many findings there were, and the first lists of them.
    found: usize,
    lists: SmallVec<[u32; LISTS]>,
}

impl Record {
    pub fn begun(at: Instant) -> Self {
        Self { started: Some(at), attempts: 1, ..Self::default() }
    }

    /// What the client is told of it.
    pub fn report(&self) -> String {
        let (mut report, mut digits) = (String::with_capacity(64), itoa::Buffer::new());
        let (found, attempts) = (self.found, self.attempts as usize);
        for (name, number) in
            [("findings=", found), (", rewritten=", found), (", attempts=", attempts)]
        {
            report.push_str(name);
            report.push_str(digits.format(number));
        }
        report
    }
}

/// What all exchanges have in common.
pub struct Watch {
    slots: Cell<usize>,
    room: Cell<usize>,
    kept: RefCell<VecDeque<Record>>,
    ids: Cell<u64>,
    requests: Cell<u64>,
    edits: Cell<usize>,
    /// The sum of all lists' numbers, in the place of how often each was found.
    listed: Cell<u64>,
    found: RefCell<[usize; Kind::ALL.len()]>,
    durations: RefCell<[u64; BUCKETS.len() + 1]>,
}

/// What an exchange takes of the limits, for as long as it is.
pub struct Held {
    watch: Rc<Watch>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.watch.slots.set(self.watch.slots.get() + 1);
        self.watch.room.set(self.watch.room.get() + self.bytes);
    }
}

/// The number at the end of a list's id.
fn number(id: &[u8]) -> u32 {
    let (mut number, mut worth) = (0_u32, 1_u32);
    for digit in id.iter().rev().take_while(|byte| byte.is_ascii_digit()) {
        number = number.wrapping_add(worth.wrapping_mul(u32::from(digit - b'0')));
        worth = worth.wrapping_mul(10);
    }
    number
}

impl Watch {
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            slots: Cell::new(REQUESTS),
            room: Cell::new(BUFFERED),
            kept: RefCell::new(VecDeque::with_capacity(EXCHANGES)),
            ids: Cell::default(),
            requests: Cell::default(),
            edits: Cell::default(),
            listed: Cell::default(),
            found: RefCell::default(),
            durations: RefCell::default(),
        })
    }

    /// Takes what an exchange takes of the limits.
    pub fn take(self: &Rc<Self>, bytes: usize) -> Held {
        let less = |left: &Cell<usize>, many: usize| {
            left.set(left.get().checked_sub(many).expect("there is no more than fits"));
        };
        less(&self.slots, 1);
        less(&self.room, bytes);
        Held { watch: Rc::clone(self), bytes }
    }

    fn count(&self, findings: &Findings, edits: usize) {
        self.edits.set(self.edits.get() + edits);
        for (finding, count) in findings.rows() {
            self.found.borrow_mut()[finding.kind as usize] += count;
        }
    }

    /// Keeps that of an exchange which is over.
    pub fn keep(&self, mut record: Record) {
        record.duration = record.started.map_or(Duration::ZERO, |started| started.elapsed());
        self.requests.set(self.requests.get() + 1);
        let seconds = record.duration.as_secs_f64();
        let bucket = BUCKETS.iter().position(|end| seconds <= *end).unwrap_or(BUCKETS.len());
        self.durations.borrow_mut()[bucket] += 1;
        let mut kept = self.kept.borrow_mut();
        if kept.len() == EXCHANGES {
            kept.pop_front();
        }
        kept.push_back(record);
    }

    pub fn id(&self) -> SmallVec<[u8; 24]> {
        let id = self.ids.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.ids.set(id);
        (0..16).map(|digit| b"0123456789abcdef"[(id >> (4 * digit)) as usize % 16]).collect()
    }

    /// What is sent for the content of a request, and what is told of it.
    pub fn rewritten(&self, content: &Bytes, policy: &Policy, record: &mut Record) -> Bytes {
        let asked = contact::Request { update: true, own_host: Some("api"), charset: None };
        let Sanitized::Contact(found) = sanitize(content, &asked, policy) else {
            return content.clone();
        };
        self.count(&found.findings, found.edits.len());
        record.findings.extend(found.findings.rows().iter().cloned());
        record.found = found.findings.len();
        let ids = found.findings.places().iter().filter_map(|place| place.list_id);
        let mut listed = self.listed.get();
        for number in ids.map(|id| number(&content[id.range()])) {
            listed += u64::from(number);
            if record.lists.len() < LISTS {
                record.lists.push(number);
            }
        }
        self.listed.set(listed);
        found.body
    }
}
