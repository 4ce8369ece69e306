//! The journal: what became of every exchange, kept off the request path.
//!
//! An exchange that is over leaves its material in a bounded queue and is done; a thread of its own puts it into
//! words, counts it, keeps the last ones for who wants to see them, and passes on what is for the audit trail. A full queue
//! costs the record, which is counted and logged, and never the request.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::audit::Audit;
use super::metrics::Metrics;
use super::record::{Finished, Record};
use super::stats::Stats;

/// How much may wait to be put into words, in bytes: bodies, most of it. A half is for what is to be audited, where
/// there is a trail: no other traffic can crowd that out. Beyond the whole, what is audited has to put itself into
/// words, and may wait for as much again.
const HELD: usize = 16 * 1024 * 1024;

/// What an exchange weighs at least, in bytes. That bounds their number too.
const LIGHTEST: usize = 1024;
const QUEUE: usize = 2 * HELD / LIGHTEST;

/// How often it is logged that there was no room.
const SAID_AGAIN: Duration = Duration::from_secs(60);

/// How long records are left to gather. Being woken for each would cost the request path a system call; the longer
/// they gather, the more memory goes round, out of the caches of who fills it (50 ms: 1.10 times the CPU time of a
/// request without a journal, 10 ms: 1.08, 2 ms: 1.06, with eight audited findings each).
const TICK: Duration = Duration::from_millis(2);

/// How many blanks are kept to be filled again while there is traffic, and with how much room for text, in bytes.
const BLANKS: usize = 1_024;
const ROOM: usize = 8 * 1024;

/// The most findings that are kept of one exchange. All of them are counted and audited.
const FINDINGS: usize = 16;

/// Takes what is over, and answers for it.
#[derive(Clone)]
pub struct Journal {
    queue: SyncSender<Item>,
    state: Arc<State>,
}

/// Material to be filled in, which goes from hand to hand as the pointer that it is.
type Blank = Box<Finished>;

enum Item {
    Finished(Box<Finished>),
    InWords(Box<InWords>, usize),
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
    fn new(finished: &Finished, has_audit: bool) -> Self {
        let is_audited = has_audit && finished.is_audited();
        let digests = is_audited.then(|| finished.digests()).flatten();
        Self { record: Record::new(finished), is_audited, digests }
    }
}

struct State {
    metrics: Arc<Metrics>,
    /// Bytes in the queue.
    held: AtomicUsize,
    /// When it was last logged that there was no room.
    said: Mutex<Option<Instant>>,
    /// Filled by exchanges, and given back here. Memory that one thread allocates for another to free costs both.
    blanks: Mutex<Vec<Blank>>,
    kept: Mutex<Kept>,
    audit: Option<Audit>,
    outlet: Option<Box<dyn Outlet>>,
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
    records: VecDeque<Arc<Record>>,
    capacity: usize,
    /// How many there have been.
    count: u64,
    /// What they add up to.
    pub stats: Stats,
}

impl Kept {
    /// The records that are kept, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.records.iter().rev()
    }

    /// How many records there have been.
    pub fn count(&self) -> u64 {
        self.count
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
        let (queue, finished) = sync_channel(QUEUE);
        let kept = Kept { records: VecDeque::new(), capacity, count: 0, stats: Stats::default() };
        let state = Arc::new(State {
            metrics,
            held: AtomicUsize::new(0),
            said: Mutex::default(),
            blanks: Mutex::default(),
            kept: Mutex::new(kept),
            audit,
            outlet,
        });
        let thread = Arc::clone(&state);
        thread::Builder::new().name("journal".into()).spawn(move || thread.run(&finished))?;
        Ok(Self { queue, state })
    }

    /// Takes the material of an exchange that is over.
    pub(crate) fn blank(&self) -> Box<Finished> {
        self.state.blanks().pop().unwrap_or_default()
    }

    /// Whether contact writes are audited.
    pub(crate) fn has_audit(&self) -> bool {
        self.state.audit.is_some()
    }

    /// Whether each exchange has to belong to a trace.
    pub(crate) fn is_traced(&self) -> bool {
        self.state.outlet.is_some()
    }

    /// Takes an exchange that is over. Never waits.
    pub(crate) fn submit(&self, finished: Box<Finished>) {
        let is_audited = self.has_audit() && finished.is_audited();
        let most = if is_audited || !self.has_audit() { HELD } else { HELD / 2 };
        let weight = LIGHTEST + finished.held();
        if self.state.reserve(weight, most) {
            self.send(Item::Finished(finished), weight, is_audited);
        } else if is_audited {
            let in_words = Box::new(InWords::new(&finished, true));
            let weight = LIGHTEST + in_words.record.held();
            if self.state.reserve(weight, 2 * HELD) {
                self.send(Item::InWords(in_words, weight), weight, true);
            } else {
                self.state.dropped(true);
            }
        } else {
            self.state.dropped(false);
        }
    }

    fn send(&self, item: Item, weight: usize, is_audited: bool) {
        if self.queue.try_send(item).is_err() {
            self.state.held.fetch_sub(weight, Ordering::Relaxed);
            self.state.dropped(is_audited);
        }
    }

    /// What is kept.
    pub fn kept(&self) -> MutexGuard<'_, Kept> {
        self.state.kept()
    }

    /// The audit trail, if there is one.
    pub fn audit(&self) -> Option<&Audit> {
        self.state.audit.as_ref()
    }

    /// Waits until all that has been submitted is written, for so long at most.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let (done, all_done) = sync_channel(1);
        let mut item = Item::Flush(done);
        while let Err(TrySendError::Full(again)) = self.queue.try_send(item) {
            if left().is_zero() {
                break;
            }
            item = again;
            thread::sleep(TICK);
        }
        if all_done.recv_timeout(left()).is_err() {
            tracing::error!("the end came before all exchanges were recorded");
        }
        if let Some(audit) = &self.state.audit {
            audit.flush(deadline);
        }
        if let Some(outlet) = &self.state.outlet {
            outlet.flush(left());
        }
    }
}

impl State {
    /// Takes room for so many bytes, if there is some.
    fn reserve(&self, weight: usize, most: usize) -> bool {
        let fits = self.held.fetch_add(weight, Ordering::Relaxed) + weight <= most;
        if !fits {
            self.held.fetch_sub(weight, Ordering::Relaxed);
        }
        fits
    }

    /// An exchange goes unrecorded.
    fn dropped(&self, is_audited: bool) {
        self.metrics.journal_dropped.inc();
        if let Some(audit) = self.audit.as_ref().filter(|_| is_audited) {
            audit.lost();
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) {
            *said = Some(Instant::now());
            tracing::error!(
                "exchanges go unrecorded for want of room: optin_proxy_journal_dropped_total counts them"
            );
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Counters and records are each written in one step: a poisoned lock is as good as any.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blanks(&self) -> MutexGuard<'_, Vec<Blank>> {
        self.blanks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, queue: &Receiver<Item>) {
        let mut busy = false;
        let mut done = Vec::new();
        loop {
            let first = if busy {
                thread::sleep(TICK);
                queue.try_recv().ok()
            } else {
                match queue.recv() {
                    Ok(item) => Some(item),
                    Err(_) => return,
                }
            };
            busy = first.is_some();
            for item in first.into_iter().chain(queue.try_iter()) {
                match item {
                    Item::Finished(mut finished) => {
                        self.take(InWords::new(&finished, self.audit.is_some()));
                        self.held.fetch_sub(LIGHTEST + finished.held(), Ordering::Relaxed);
                        finished.reset(ROOM);
                        done.push(finished);
                    }
                    Item::InWords(in_words, weight) => {
                        self.take(*in_words);
                        self.held.fetch_sub(weight, Ordering::Relaxed);
                    }
                    // Nobody waits any longer, at the worst.
                    Item::Flush(flushed) => drop(flushed.send(())),
                }
                if done.len() >= BLANKS / 8 {
                    self.give_back(&mut done);
                }
            }
            self.give_back(&mut done);
            if !busy {
                // Nobody needs them while nothing comes.
                *self.blanks() = Vec::new();
            }
        }
    }

    fn give_back(&self, done: &mut Vec<Blank>) {
        let mut blanks = self.blanks();
        done.truncate(BLANKS - blanks.len().min(BLANKS));
        blanks.append(done);
    }

    fn take(&self, InWords { mut record, is_audited, digests }: InWords) {
        if let Some(audit) = self.audit.as_ref().filter(|_| is_audited) {
            audit.submit(&record, digests);
        }
        if let Some(outlet) = &self.outlet {
            outlet.take(&record);
        }
        let mut kept = self.kept();
        kept.count += 1;
        record.seq = kept.count;
        kept.stats.add(&record);
        record.findings.truncate(FINDINGS);
        record.findings.shrink_to_fit();
        if kept.records.len() >= kept.capacity {
            kept.records.pop_front();
        }
        if kept.capacity > 0 {
            kept.records.push_back(Arc::new(record));
        }
    }
}
