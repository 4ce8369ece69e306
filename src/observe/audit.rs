//! The audit trail: one JSON line for each contact write that had a finding or a refusal.
//!
//! Each line holds the SHA-256 of the one before it and a number one higher, so that one that was taken out or
//! changed shows (`optin-proxy report --verify`). A thread of its own writes them: a disk that is full, slow or
//! stuck costs lines, which are counted and leave a line that says so, and never a request.
//!
//! Rotation is ours, and no library's, since the chain goes on from one file to the next.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;
use super::record::{Found, Record, Verdicts, rfc3339, sha256};
use crate::config;

/// How many lines may wait to be written, and of how many bytes in all.
const QUEUE: usize = 8_192;
const HELD: usize = 16 * 1024 * 1024;

/// How many bytes are written at once.
const BATCH: usize = 256 * 1024;

/// What the chain adds to a line, at most, in bytes.
const CHAINED: usize = r#","seq":18446744073709551615,"prev":""}"#.len() + NO_HASH.len() + 1;

/// How often it is tried to get at a file that another process is still writing to, and a fault is logged.
const AGAIN: Duration = Duration::from_millis(100);
const SAID_AGAIN: Duration = Duration::from_secs(60);

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
    held: AtomicUsize,
    /// Lines lost that the trail does not tell of yet.
    untold: AtomicU64,
    fault: Mutex<Option<String>>,
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
    findings: &'a [Found],
    attempts: u32,
    verdicts: Verdicts,
    status: Option<u16>,
    outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    sha256_before: Option<&'a str>,
    sha256_after: Option<&'a str>,
}

impl Audit {
    /// Opens the file, and starts the thread that writes to it.
    ///
    /// # Errors
    /// If the file cannot be opened for appending.
    pub fn start(path: &Path, config: &config::Audit, metrics: Arc<Metrics>) -> io::Result<Self> {
        let file = open(path)?;
        let (queue, lines) = sync_channel(QUEUE);
        let shared = Arc::new(Shared {
            metrics,
            path: path.to_owned(),
            held: AtomicUsize::new(0),
            untold: AtomicU64::new(0),
            fault: Mutex::default(),
        });
        let writer = Writer {
            shared: Arc::clone(&shared),
            config: config.clone(),
            file,
            size: 0,
            begun: SystemTime::now(),
            sequence: 0,
            hash: NO_HASH.to_owned(),
            unsynced: None,
            looked: Instant::now(),
            said: None,
        };
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
            method: &record.method,
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
        if !fits || self.queue.try_send(Item::Line(line)).is_err() {
            self.shared.held.fetch_sub(length, Ordering::Relaxed);
            self.shared.lost(1, "queue");
        }
    }

    /// Waits until all lines are on the disk, so long at most.
    pub(super) fn flush(&self, limit: Duration) {
        let (done, all_done) = sync_channel(1);
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            let _ = all_done.recv_timeout(limit);
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Why lines cannot be written at present.
    pub fn fault(&self) -> Option<String> {
        self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Shared {
    fn lost(&self, lines: u64, reason: &'static str) {
        self.untold.fetch_add(lines, Ordering::Relaxed);
        self.metrics.audit_lost(reason, lines);
    }
}

/// For appending only, and for nobody else to read: it names accounts.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

struct Writer {
    shared: Arc<Shared>,
    config: config::Audit,
    file: File,
    /// The file's bytes that are whole lines.
    size: u64,
    /// When its first line was written.
    begun: SystemTime,
    /// The last line's number and hash.
    sequence: u64,
    hash: String,
    /// Since when something is written that may not be on the disk.
    unsynced: Option<Instant>,
    /// When it was last looked whether the file is still in its place.
    looked: Instant,
    /// When a fault was last logged.
    said: Option<Instant>,
}

impl Writer {
    fn run(mut self, lines: &Receiver<Item>) {
        self.take_over();
        loop {
            let item = match self.unsynced {
                None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(since) => {
                    lines.recv_timeout(self.config.fsync.saturating_sub(since.elapsed()))
                }
            };
            let mut next = match item {
                Ok(item) => Some(item),
                Err(RecvTimeoutError::Timeout) => {
                    self.sync();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.sync();
                    return;
                }
            };
            let mut batch = Batch::default();
            while let Some(item) = next {
                match item {
                    Item::Line(line) => {
                        self.shared.held.fetch_sub(line.len(), Ordering::Relaxed);
                        self.add(line, &mut batch);
                    }
                    Item::Flush(done) => {
                        self.write(&mut batch);
                        self.sync();
                        // Nobody waits any longer, at the worst.
                        let _ = done.send(());
                    }
                }
                next = match lines.try_recv() {
                    Ok(item) if batch.text.len() < BATCH => Some(item),
                    Ok(item) => {
                        self.write(&mut batch);
                        Some(item)
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
                };
            }
            self.write(&mut batch);
            if self.unsynced.is_some_and(|since| since.elapsed() >= self.config.fsync) {
                self.sync();
            }
        }
    }

    /// Waits for the file to be ours alone, and goes on where its last line ends.
    fn take_over(&mut self) {
        let mut waited = false;
        while let Err(error) = self.file.try_lock() {
            if !waited {
                tracing::warn!(path = %self.shared.path.display(), %error, "another process writes the audit trail: lines wait for its end");
                waited = true;
            }
            thread::sleep(AGAIN);
            // It may have moved the file away.
            if let Ok(file) = open(&self.shared.path) {
                self.file = file;
            }
        }
        if let Err(error) = self.recover() {
            self.fail("cannot be read back", &error);
        }
    }

    fn recover(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length == 0 {
            (self.size, self.begun) = (0, SystemTime::now());
            return Ok(());
        }
        let mut first = String::new();
        BufReader::new(&self.file).take(BATCH as u64).read_line(&mut first)?;
        #[derive(Deserialize)]
        struct Begin {
            time: String,
        }
        let begin = serde_json::from_str::<Begin>(&first).ok();
        let time = begin.and_then(|it| humantime::parse_rfc3339_weak(&it.time).ok());
        self.begun = time.unwrap_or_else(SystemTime::now);
        let whole = whole_lines(&self.file, length)?;
        if whole.end < length {
            // What a crash left of a line: it would be taken for the start of the next one.
            self.file.set_len(whole.end)?;
            self.shared.lost(1, "disk");
        }
        self.size = whole.end;
        if let Some(last) = whole.last {
            #[derive(Deserialize)]
            struct End {
                seq: u64,
            }
            self.sequence = serde_json::from_slice::<End>(&last).map_or(0, |end| end.seq);
            self.hash = sha256(&last);
        }
        Ok(())
    }

    /// Puts a line's end to it.
    fn add(&mut self, line: String, batch: &mut Batch) {
        let untold = self.shared.untold.swap(0, Ordering::Relaxed);
        if untold > 0 {
            let time = humantime::format_rfc3339_millis(SystemTime::now());
            self.chain(format!("{{\"event\":\"gap\",\"time\":\"{time}\",\"lost\":{untold}"), batch);
            batch.told += untold;
        }
        if self.is_due(self.size + batch.text.len() as u64, line.len() + CHAINED) {
            self.write(batch);
            if let Err(error) = self.rotate() {
                self.fail("cannot be rotated", &error);
            }
        }
        self.chain(line, batch);
        batch.lines += 1;
    }

    fn chain(&mut self, mut line: String, batch: &mut Batch) {
        use std::fmt::Write as _;
        if batch.text.is_empty() {
            batch.before = (self.sequence, self.hash.clone());
        }
        self.sequence += 1;
        // Writing into a string cannot fail.
        let _ = write!(line, ",\"seq\":{},\"prev\":\"{}\"}}", self.sequence, self.hash);
        self.hash = sha256(line.as_bytes());
        batch.text.push_str(&line);
        batch.text.push('\n');
    }

    fn write(&mut self, batch: &mut Batch) {
        let batch = std::mem::take(batch);
        if batch.text.is_empty() {
            return;
        }
        self.stay_in_place();
        match self.file.write_all(batch.text.as_bytes()) {
            Ok(()) => {
                self.size += batch.text.len() as u64;
                self.shared.metrics.audit_lines.inc_by(batch.lines);
                self.unsynced.get_or_insert_with(Instant::now);
                self.recovered();
            }
            Err(error) => {
                // Half a line would spoil the next one. What is no file has no length.
                let _ = self.file.set_len(self.size);
                (self.sequence, self.hash) = batch.before;
                self.shared.untold.fetch_add(batch.told, Ordering::Relaxed);
                self.shared.lost(batch.lines, "disk");
                self.fail("cannot be written", &error);
            }
        }
    }

    /// Somebody else may have moved the file away, to rotate it by other means.
    fn stay_in_place(&mut self) {
        if self.looked.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.looked = Instant::now();
        let ours = self.file.metadata().map(|it| (it.dev(), it.ino()));
        let there = fs::metadata(&self.shared.path).map(|it| (it.dev(), it.ino()));
        if matches!((&ours, &there), (Ok(ours), Ok(there)) if ours == there) {
            return;
        }
        self.sync();
        if let Err(error) = self.begin_anew() {
            self.fail("cannot be opened again", &error);
        }
    }

    /// Whether a file with so many bytes is not to get so many more.
    fn is_due(&self, there: u64, more: usize) -> bool {
        let age = SystemTime::now().duration_since(self.begun).unwrap_or_default();
        there > 0 && (there + more as u64 > self.config.max_size || age >= self.config.max_age)
    }

    /// Gives the file a name with the time in it, begins a new one, and takes the oldest away.
    fn rotate(&mut self) -> io::Result<()> {
        self.sync();
        let stamp = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let stamp: String = stamp.chars().filter(|it| !matches!(it, '-' | ':' | '.')).collect();
        let mut name = self.shared.path.clone().into_os_string();
        name.push(format!(".{stamp}-{:08}", self.sequence));
        fs::rename(&self.shared.path, &name)?;
        self.begin_anew()?;
        for oldest in rotated(&self.shared.path)?.iter().rev().skip(self.config.keep) {
            fs::remove_file(oldest)?;
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        self.file = open(&self.shared.path)?;
        self.file.lock()?;
        (self.size, self.begun) = (self.file.metadata()?.len(), SystemTime::now());
        Ok(())
    }

    fn sync(&mut self) {
        if self.unsynced.take().is_some()
            && let Err(error) = self.file.sync_data()
            // What is no file need not be synced.
            && error.kind() != io::ErrorKind::InvalidInput
        {
            self.fail("cannot be forced to the disk", &error);
        }
    }

    /// Says so, once a minute at most; the metrics count each line.
    fn fail(&mut self, what: &str, error: &io::Error) {
        let mut fault = self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
        *fault = Some(format!("it {what}: {error}"));
        drop(fault);
        if self.said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) {
            self.said = Some(Instant::now());
            tracing::error!(path = %self.shared.path.display(), %error, "the audit trail {what}");
        }
    }

    fn recovered(&mut self) {
        if self.said.take().is_some() {
            *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
            tracing::info!(path = %self.shared.path.display(), "the audit trail is written again");
        }
    }
}

/// Lines to be written at once.
#[derive(Default)]
struct Batch {
    text: String,
    /// Lines of exchanges in it, and lines lost that it tells of.
    lines: u64,
    told: u64,
    /// The chain's end before it.
    before: (u64, String),
}

/// Where the whole lines of a file end, and the last of them.
struct Whole {
    end: u64,
    last: Option<Vec<u8>>,
}

fn whole_lines(mut file: &File, length: u64) -> io::Result<Whole> {
    // Backwards, by more and more, until a line begins in what was read.
    let mut reach = 64 * 1024;
    loop {
        let from = length.saturating_sub(reach);
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.take(length - from).read_to_end(&mut tail)?;
        let end = memchr::memrchr(b'\n', &tail);
        let begin = end.and_then(|end| memchr::memrchr(b'\n', &tail[..end]).map(|at| at + 1));
        match (begin, end) {
            (Some(begin), Some(end)) => {
                let last = Some(tail[begin..end].to_vec());
                return Ok(Whole { end: from + end as u64 + 1, last });
            }
            (None, Some(end)) if from == 0 => {
                return Ok(Whole { end: end as u64 + 1, last: Some(tail[..end].to_vec()) });
            }
            _ if from == 0 => return Ok(Whole { end: 0, last: None }),
            _ => reach *= 4,
        }
    }
}

/// The files that were rotated away from `path`, the oldest first.
///
/// # Errors
/// If the folder cannot be read.
pub fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut prefix = path.file_name().map_or_else(OsString::new, ToOwned::to_owned);
    prefix.push(".");
    let is_stamp = |name: &str| {
        let parts = name.split_once("Z-").map(|(time, number)| (time.split_once('T'), number));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
        matches!(parts, Some((Some((day, time)), number)) if digits(day) && digits(time) && digits(number))
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let rest = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
        if rest.and_then(|rest| std::str::from_utf8(rest).ok()).is_some_and(is_stamp) {
            files.push(folder.join(name));
        }
    }
    files.sort();
    Ok(files)
}
