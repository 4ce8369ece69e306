//! The journal: what became of every exchange, kept off the request path.
//!
//! An exchange that is over leaves its material in a bounded queue and is done; a thread of its own puts it into
//! words, logs and counts it, keeps the last ones for who wants to see them, and passes on what is for the audit trail. A full queue
//! costs the record, which is counted and logged, and never the request.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::audit::Audit;
use super::clocks::Clocks;
use super::finished::Finished;
use super::found::Found;
use super::lines;
use super::log;
use super::metrics::Metrics;
use super::record::{Printed, Record};
use super::stats::Stats;

/// How much may wait to be put into words, in bytes. Where there is an audit trail, most of it is bodies, and a half is for
/// what is to be audited: no other traffic can crowd that out. Beyond the whole, what is audited has to put itself into
/// words, and may wait for as much again.
const HELD: usize = 16 * 1024 * 1024;

/// How much of it may wait for its lines to be logged as well, in bytes. Beyond that, exchanges log theirs themselves: they
/// are slowed down by it, as it should be, before records are lost.
const AHEAD: usize = 1024 * 1024;

/// What an exchange weighs at least, in bytes. That bounds their number too.
const LIGHTEST: usize = 1024;

/// How often it is logged that there was no room.
const SAID_AGAIN: Duration = Duration::from_secs(60);

/// How long records are left to gather. Being woken for each would cost the request path a system call; the longer
/// they gather, the more memory goes round, out of the caches of who fills it (50 ms: 1.10 times the CPU time of a
/// request without a journal, 10 ms: 1.08, 2 ms: 1.06, with eight audited findings each).
const TICK: Duration = Duration::from_millis(2);

/// The same after fewer than [`BATCH`] that are small: they stay in the caches, and what this thread does for each takes less
/// than to be woken (1,000 connections, 1,900 updates a second: 7 us of each instead of 11).
const SLACK: Duration = Duration::from_millis(8);

/// What is small: a fraction of the caches, and of [`AHEAD`], in bytes.
const SMALL: usize = 64 * 1024;

/// How many blanks are kept to be filled again, and for how long while nothing comes.
const BLANKS: usize = 1_024;
const IDLE: Duration = Duration::from_secs(5);

/// The most findings of one exchange that are put into words, but for the audit trail. All of them are counted.
const FINDINGS: usize = 16;

/// After how many records room is made and blanks are given back.
const BATCH: usize = 16;

/// Takes what is over, and answers for it.
#[derive(Clone)]
pub struct Journal(Arc<Owner>);

/// The thread ends with it.
struct Owner(Arc<State>);

/// Material to be filled in, which goes from hand to hand as the pointer that it is.
type Blank = Box<Finished>;

/// What is over, and the room that it takes.
struct Item {
    what: What,
    weight: usize,
}

enum What {
    Finished {
        finished: Blank,
        /// Its lines are still to be logged.
        to_log: bool,
    },
    InWords(Box<InWords>),
    /// Answered once all that came before has been dealt with.
    Flush(SyncSender<()>),
}

/// A record, and what else goes into the audit trail if it belongs there.
struct InWords {
    record: Record,
    is_audited: bool,
    digests: Option<[String; 2]>,
}

impl InWords {
    fn new(finished: &Finished, has_audit: bool, now: Clocks, printed: &mut Printed) -> Self {
        let is_audited = has_audit && finished.is_audited();
        let digests = is_audited.then(|| finished.digests()).flatten();
        let findings = if is_audited { usize::MAX } else { FINDINGS };
        Self { record: Record::new(finished, findings, now, printed), is_audited, digests }
    }
}

struct State {
    inbox: Inbox,
    metrics: Arc<Metrics>,
    /// When it was last logged that there was no room.
    said: Mutex<Option<Instant>>,
    kept: Mutex<Kept>,
    audit: Option<Audit>,
    outlet: Option<Box<dyn Outlet>>,
}

/// What exchanges touch. Nothing else stands in its cache lines: they would go to and fro between the cores.
#[derive(Default)]
#[repr(align(128))]
struct Inbox {
    waiting: Mutex<Waiting>,
    /// Something has come to a thread that sleeps.
    came: Condvar,
}

#[derive(Default)]
struct Waiting {
    items: Vec<Item>,
    /// What they weigh, and those that are being put into words.
    held: usize,
    /// Those alone.
    in_work: usize,
    /// Filled by exchanges, and given back here. Memory that one thread allocates for another to free costs both.
    blanks: Vec<Blank>,
    sleeps: bool,
    /// Nothing comes any more.
    is_over: bool,
}

impl Waiting {
    /// Adds it if there is room.
    fn add(&mut self, item: Item, most: usize) -> Result<(), Item> {
        if self.held + item.weight > most {
            return Err(item);
        }
        self.held += item.weight;
        self.items.push(item);
        Ok(())
    }
}

/// Who else is told of each exchange. It must not wait for anything.
pub(crate) trait Outlet: Send + Sync {
    /// Takes one that is over.
    fn take(&self, record: &Record);

    /// Passes on what it has gathered, within so long at most.
    fn flush(&self, limit: Duration);
}

/// The last exchanges, and what all of them add up to.
pub struct Kept {
    /// One behind the other in memory, as they are replaced: those to come are fetched while one is.
    records: VecDeque<Record>,
    capacity: usize,
    /// How many there have been.
    count: u64,
    /// What they add up to.
    pub stats: Stats,
}

impl Kept {
    /// The records that are kept, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().rev()
    }

    /// How many records there have been.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Keeps one more, in the place of the oldest.
    fn keep(&mut self, record: Record) {
        if self.records.len() >= self.capacity {
            self.records.pop_front();
        }
        if self.capacity > 0 {
            self.records.push_back(record);
        }
    }
}

impl Journal {
    /// Starts the thread that keeps the last `capacity` exchanges.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(capacity: usize, audit: Option<Audit>, metrics: Arc<Metrics>) -> io::Result<Self> {
        Self::start_with(capacity, audit, None, metrics)
    }

    /// The same with somebody else to be told.
    pub(crate) fn start_with(
        capacity: usize,
        audit: Option<Audit>,
        outlet: Option<Box<dyn Outlet>>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        // Room for all of them at once: what is not filled yet takes none, and none is ever copied.
        let records = VecDeque::with_capacity(capacity);
        let kept = Kept { records, capacity, count: 0, stats: Stats::default() };
        let state = Arc::new(State {
            inbox: Inbox::default(),
            metrics,
            said: Mutex::default(),
            kept: Mutex::new(kept),
            audit,
            outlet,
        });
        let thread = Arc::clone(&state);
        thread::Builder::new().name("journal".into()).spawn(move || thread.run())?;
        Ok(Self(Arc::new(Owner(state))))
    }

    fn state(&self) -> &State {
        &self.0.0
    }

    /// To be filled in by an exchange, from its inspection or its end on.
    pub(crate) fn blank(&self) -> Blank {
        self.state().inbox.waiting.lock().blanks.pop().unwrap_or_default()
    }

    /// Whether contact writes are audited.
    pub(crate) fn has_audit(&self) -> bool {
        self.state().audit.is_some()
    }

    /// Whether each exchange has to belong to a trace.
    pub(crate) fn is_traced(&self) -> bool {
        self.state().outlet.is_some()
    }

    /// Takes an exchange that is over. Never waits.
    pub(crate) fn submit(&self, mut finished: Blank) {
        let weight = LIGHTEST + finished.held();
        let is_audited = self.has_audit() && finished.is_audited();
        if lines::are_wanted() {
            let item = Item { what: What::Finished { finished, to_log: true }, weight };
            // What is large alone is not behind.
            finished = match self.state().inbox.add(item, AHEAD.max(weight.min(HELD / 2))) {
                Err(Item { what: What::Finished { finished, .. }, .. }) => finished,
                _ => return,
            };
            lines::log_at_once(&finished);
        }
        let most = if is_audited || !self.has_audit() { HELD } else { HELD / 2 };
        let item = Item { what: What::Finished { finished, to_log: false }, weight };
        match self.state().inbox.add(item, most) {
            Err(Item { what: What::Finished { finished, .. }, .. }) if is_audited => {
                let in_words = Box::new(InWords::new(
                    &finished,
                    true,
                    Clocks::read(),
                    &mut Printed::default(),
                ));
                let weight = LIGHTEST + in_words.record.held();
                let item = Item { what: What::InWords(in_words), weight };
                if self.state().inbox.add(item, 2 * HELD).is_err() {
                    self.state().dropped(true);
                }
            }
            Err(_) => self.state().dropped(false),
            Ok(()) => {}
        }
    }

    /// What is kept.
    pub fn kept(&self) -> MutexGuard<'_, Kept> {
        self.state().kept.lock()
    }

    /// The audit trail, if there is one.
    pub fn audit(&self) -> Option<&Audit> {
        self.state().audit.as_ref()
    }

    /// Waits until all that has been submitted is written, for so long at most.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let (done, all_done) = sync_channel(1);
        let item = Item { what: What::Flush(done), weight: 0 };
        let is_added = self.state().inbox.add(item, usize::MAX).is_ok();
        if !is_added || all_done.recv_timeout(left()).is_err() {
            tracing::error!("the end came before all exchanges were recorded");
        }
        if let Some(audit) = self.audit() {
            audit.flush(deadline);
        }
        if let Some(outlet) = &self.state().outlet {
            outlet.flush(left());
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.inbox.waiting.lock().is_over = true;
        self.0.inbox.came.notify_one();
    }
}

impl Inbox {
    /// Adds it if there is room.
    fn add(&self, item: Item, most: usize) -> Result<(), Item> {
        let mut waiting = self.waiting.lock();
        waiting.add(item, most)?;
        if std::mem::take(&mut waiting.sleeps) {
            drop(waiting);
            self.came.notify_one();
        }
        Ok(())
    }

    /// More waits than whoever reads the log may keep waiting: records come before lines.
    fn is_behind(&self) -> bool {
        let waiting = self.waiting.lock();
        waiting.held - waiting.in_work > AHEAD
    }

    /// What has come, once something has; an empty `items` takes its place. False if nothing comes any more.
    fn wait(&self, items: &mut Vec<Item>) -> bool {
        let mut waiting = self.waiting.lock();
        while waiting.items.is_empty() {
            if waiting.is_over {
                return false;
            }
            waiting.sleeps = true;
            // Blanks that nobody needs for so long need not be kept.
            if waiting.blanks.is_empty() {
                self.came.wait(&mut waiting);
            } else if self.came.wait_for(&mut waiting, IDLE).timed_out() {
                let blanks = std::mem::take(&mut waiting.blanks);
                MutexGuard::unlocked(&mut waiting, || drop(blanks));
            }
        }
        waiting.sleeps = false;
        waiting.in_work = waiting.held;
        std::mem::swap(&mut waiting.items, items);
        true
    }

    /// Makes room for so much, and gives back what can be filled again.
    fn settle(&self, weight: usize, blanks: &mut Vec<Blank>) {
        let mut waiting = self.waiting.lock();
        waiting.held -= weight;
        waiting.in_work -= weight;
        blanks.truncate(BLANKS - waiting.blanks.len().min(BLANKS));
        waiting.blanks.append(blanks);
    }
}

impl State {
    /// An exchange goes unrecorded.
    fn dropped(&self, is_audited: bool) {
        self.metrics.journal_dropped.inc();
        if let Some(audit) = self.audit.as_ref().filter(|_| is_audited) {
            audit.lost();
        }
        let mut said = self.said.lock();
        if said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) {
            *said = Some(Instant::now());
            tracing::error!(
                "exchanges go unrecorded for want of room: optin_proxy_journal_dropped_total counts them"
            );
        }
    }

    fn run(&self) {
        let (mut items, mut blanks) = (Vec::new(), Vec::with_capacity(BATCH));
        let mut printed = Printed::default();
        while self.inbox.wait(&mut items) {
            let is_small = items.iter().map(|item| item.weight).sum::<usize>() <= SMALL;
            let pause = if items.len() < BATCH && is_small { SLACK } else { TICK };
            let (now, mut rest) = (Clocks::read(), items.drain(..).peekable());
            while rest.peek().is_some() {
                let mut weight = 0;
                for item in rest.by_ref().take(BATCH) {
                    weight += item.weight;
                    match item.what {
                        What::Finished { mut finished, to_log } => {
                            let has_audit = self.audit.is_some();
                            let in_words = InWords::new(&finished, has_audit, now, &mut printed);
                            if to_log {
                                let may_wait = || !self.inbox.is_behind();
                                let room = || log::await_room(may_wait);
                                lines::log(&finished, &in_words.record, room);
                            }
                            self.take(in_words, |stats, record| {
                                let rows = finished.found.rows();
                                stats.add(record, rows.map(|(it, lists)| (it.into(), lists)));
                            });
                            finished.reset();
                            blanks.push(finished);
                        }
                        What::InWords(in_words) => self.take(*in_words, |stats, record| {
                            let rows = record.findings.rows();
                            stats.add(record, rows.map(|(it, lists)| (it.into(), lists)));
                        }),
                        // Nobody waits any longer, at the worst.
                        What::Flush(flushed) => drop(flushed.send(())),
                    }
                }
                self.inbox.settle(weight, &mut blanks);
            }
            drop(rest);
            items.shrink_to(BLANKS);
            thread::sleep(pause);
        }
    }

    fn take(&self, in_words: InWords, count: impl FnOnce(&mut Stats, &Record)) {
        let InWords { mut record, is_audited, digests } = in_words;
        if let Some(audit) = self.audit.as_ref().filter(|_| is_audited) {
            audit.submit(&record, digests);
        }
        if let Some(outlet) = &self.outlet {
            outlet.take(&record);
        }
        let mut kept = self.kept.lock();
        kept.count += 1;
        record.seq = kept.count;
        count(&mut kept.stats, &record);
        if record.findings.len() > FINDINGS {
            record.findings = record.findings.first(FINDINGS, Found::clone);
        }
        kept.keep(record);
    }
}
