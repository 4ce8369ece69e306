//! The audit trail: one JSON line for each contact write that had a finding or a refusal.
//!
//! Each line holds the SHA-256 of the one before it and a number one higher, so that one that was taken out or
//! changed shows (`optin-proxy report --verify`). A thread of its own writes them: a disk that is full, slow or
//! stuck costs lines, which are counted and leave a line that says so, and never a request.
//!
//! Rotation is ours, and no library's, since the chain goes on from one file to the next.

mod files;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde::Serialize;

use super::found::{Found, Rows};
use super::metrics::Metrics;
use super::record::{Outcome, Record, Verdicts, rfc3339};
use crate::config;

pub use files::rotated;
use writer::Writer;

/// How many lines may wait to be written, and of how many bytes in all.
const QUEUE: usize = 8_192;
const HELD: usize = 16 * 1024 * 1024;

/// How often a loss and a fault that lasts are logged.
const SAID_AGAIN: Duration = Duration::from_secs(60);

/// How often it is tried to hand something to a queue that is full.
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// What stands in the place of a hash before the first line.
pub const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Writes the trail.
pub struct Audit {
    queue: SyncSender<Item>,
    shared: Arc<Shared>,
}

enum Item {
    /// A line without its end.
    Line(String),
    /// Answered once all that came before is on the disk.
    Flush(SyncSender<()>),
}

struct Shared {
    metrics: Arc<Metrics>,
    path: PathBuf,
    /// Lines in the queue, and their bytes.
    waiting: AtomicU64,
    /// The file is this process's alone, or is not had alone by anybody.
    is_ours: AtomicBool,
    held: AtomicUsize,
    /// Lines lost that the trail does not tell of yet.
    untold: AtomicU64,
    faults: Mutex<[Option<Standing>; Fault::COUNT]>,
    /// When a loss was last logged.
    said: Mutex<Option<Instant>>,
}

/// What may be wrong with the file, each by itself: what is mended of one says nothing of another.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Lock,
    Read,
    Write,
    Rotate,
    Sync,
}

impl Fault {
    const COUNT: usize = 5;

    const fn as_str(self) -> &'static str {
        match self {
            Self::Lock => "cannot be had for itself",
            Self::Read => "cannot be read back",
            Self::Write => "cannot be written",
            Self::Rotate => "cannot be rotated",
            Self::Sync => "cannot be forced to the disk",
        }
    }
}

/// A fault that lasts.
struct Standing {
    words: String,
    said: Instant,
}

/// What goes before the chain in a line.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "rfc3339")]
    time: SystemTime,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<&'a str>,
    method: &'a str,
    account: Option<&'a str>,
    contact_id: Option<&'a str>,
    user_agent: Option<&'a str>,
    findings: &'a Rows<Found>,
    attempts: u32,
    verdicts: Verdicts,
    status: Option<u16>,
    outcome: Option<Outcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    sha256_before: Option<&'a str>,
    sha256_after: Option<&'a str>,
}

impl Audit {
    /// Opens the file, and starts the thread that writes to it.
    ///
    /// # Errors
    /// If the file cannot be opened for appending, or holds something else than a trail.
    pub fn start(path: &Path, config: &config::Audit, metrics: Arc<Metrics>) -> io::Result<Self> {
        let file = files::open(path)?;
        files::check(&file)?;
        let (queue, lines) = sync_channel(QUEUE);
        let shared = Arc::new(Shared {
            metrics,
            path: path.to_owned(),
            waiting: AtomicU64::new(0),
            is_ours: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            untold: AtomicU64::new(0),
            faults: Mutex::default(),
            said: Mutex::default(),
        });
        let writer = Writer::new(Arc::clone(&shared), config.clone(), file);
        thread::Builder::new().name("audit".into()).spawn(move || writer.run(&lines))?;
        Ok(Self { queue, shared })
    }

    /// Adds a line. Never waits.
    pub(super) fn submit(&self, record: &Record, digests: Option<[String; 2]>) {
        let [before, after] = digests.map_or([None, None], |both| both.map(Some));
        let line = Line {
            time: record.time,
            request_id: &record.request_id,
            trace_id: record.trace_id.as_deref(),
            method: record.method,
            account: record.account.as_deref(),
            contact_id: record.contact_id.as_deref(),
            user_agent: record.user_agent.as_deref(),
            findings: &record.findings,
            attempts: record.attempts,
            verdicts: record.verdicts,
            status: record.status,
            outcome: record.outcome,
            reason: record.reason,
            sha256_before: before.as_deref(),
            sha256_after: after.as_deref(),
        };
        // Strings and numbers only: it can be written.
        let Ok(mut line) = serde_json::to_string(&line) else { return };
        line.pop();
        let length = line.len();
        let fits = self.shared.held.fetch_add(length, Ordering::Relaxed) + length <= HELD;
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        if !fits || self.queue.try_send(Item::Line(line)).is_err() {
            self.shared.taken(length);
            self.shared.ended(1);
            self.lost();
        }
    }

    /// A line is lost before it was one. Never waits.
    pub(super) fn lost(&self) {
        self.shared.lost(1, "queue");
        let mut said = self.shared.said.lock();
        if said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) {
            *said = Some(Instant::now());
            let path = self.shared.path.display();
            tracing::error!(%path, "lines of the audit trail are lost for want of room: they come faster than they are written");
        }
    }

    /// Waits until all lines are on the disk, until then at the latest. What is not written by then is counted
    /// and logged: nobody will write it.
    pub(super) fn flush(&self, deadline: Instant) {
        // Another process may have the file, and this one nothing for it.
        let waiting = || self.shared.waiting.load(Ordering::Acquire);
        if waiting() == 0 && !self.shared.is_ours.load(Ordering::Relaxed) {
            return;
        }
        let (done, all_done) = sync_channel(1);
        let mut item = Item::Flush(done);
        while let Err(TrySendError::Full(again)) = self.queue.try_send(item) {
            if Instant::now() >= deadline {
                break;
            }
            item = again;
            thread::sleep(TRY_AGAIN);
        }
        if all_done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err() {
            let lines = waiting();
            let path = self.shared.path.display();
            tracing::error!(%path, lines, "the end came before these lines of the audit trail were written");
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Why lines cannot be written at present, or not as they should be.
    pub fn fault(&self) -> Option<String> {
        self.shared.faults.lock().iter().flatten().next().map(|fault| fault.words.clone())
    }
}

impl Shared {
    /// A line of so many bytes is in the queue no more.
    fn taken(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// So many lines are written, or counted as lost.
    fn ended(&self, lines: u64) {
        self.waiting.fetch_sub(lines, Ordering::Release);
    }

    fn lost(&self, lines: u64, reason: &'static str) {
        self.untold.fetch_add(lines, Ordering::Relaxed);
        self.metrics.audit_lost(reason, lines);
    }

    /// Says so, once a minute at most.
    fn fail(&self, fault: Fault, error: &dyn std::fmt::Display) {
        let words = format!("it {}: {error}", fault.as_str());
        let standing = &mut self.faults.lock()[fault as usize];
        let said = standing.as_ref().map(|standing| standing.said);
        let is_due = said.is_none_or(|said| said.elapsed() >= SAID_AGAIN);
        let said = said.filter(|_| !is_due).unwrap_or_else(Instant::now);
        *standing = Some(Standing { words, said });
        if is_due {
            let path = self.path.display();
            tracing::error!(%path, %error, "the audit trail {}", fault.as_str());
        }
    }

    fn mended(&self, fault: Fault) {
        if self.faults.lock()[fault as usize].take().is_some() {
            let path = self.path.display();
            tracing::info!(%path, "no longer so: the audit trail {}", fault.as_str());
        }
    }
}
