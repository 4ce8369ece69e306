//! The thread that writes the trail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::files::{self, End, GAP, LockError};
use super::{Fault, Item, NO_HASH, Shared};
use crate::config;
use crate::observe::finished::sha256;

/// How many bytes are written at once.
pub(super) const BATCH: usize = 256 * 1024;

/// How long lines are left to gather: the journal hands them over many at a time, and should not be woken for.
const GATHER: Duration = Duration::from_millis(2);

/// What the chain adds to a line, at most, in bytes.
const CHAINED: usize = r#","seq":18446744073709551615,"prev":""}"#.len() + NO_HASH.len() + 1;

/// How often it is tried to get at a file that another process is still writing to, and to rotate one that
/// could not be.
const LOCK_AGAIN: Duration = Duration::from_millis(100);
const ROTATE_AGAIN: Duration = Duration::from_secs(10);

pub(super) struct Writer {
    shared: Arc<Shared>,
    config: config::Audit,
    file: File,
    /// Held for as long as the file is ours.
    _lock: Option<File>,
    /// The file's bytes that are whole lines.
    size: u64,
    /// When its first line was written.
    begun: SystemTime,
    /// The last line's number and hash.
    end: End,
    /// Since when something is written that may not be on the disk.
    unsynced: Option<Instant>,
    /// When it was last looked whether the file is still in its place.
    looked: Instant,
    /// When it could last not be rotated.
    unrotated: Option<Instant>,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, config: config::Audit, file: File) -> Self {
        Self {
            shared,
            config,
            file,
            _lock: None,
            size: 0,
            begun: SystemTime::now(),
            end: End::default(),
            unsynced: None,
            looked: Instant::now(),
            unrotated: None,
        }
    }

    pub fn run(mut self, lines: &Receiver<Item>) {
        self.take_over();
        self.shared.is_ours.store(true, Ordering::Relaxed);
        loop {
            let item = match self.unsynced {
                None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(since) => {
                    lines.recv_timeout(self.config.fsync.saturating_sub(since.elapsed()))
                }
            };
            let mut next = match item {
                Ok(item) => {
                    if let Item::Line(_) = item {
                        thread::sleep(GATHER);
                    }
                    Some(item)
                }
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
                        self.shared.taken(line.len());
                        self.add(line, &mut batch);
                    }
                    Item::Flush(done) => {
                        // There may be no next line to tell of them.
                        self.tell_of_lost(&mut batch);
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
        }
    }

    /// Waits for the trail to be ours alone, and goes on where its last line ends.
    fn take_over(&mut self) {
        if !files::is_regular(&self.file) {
            return;
        }
        self._lock = loop {
            match files::lock(&self.shared.path) {
                Ok(lock) => break Some(lock),
                Err(LockError::Taken) => {
                    self.shared
                        .fail(Fault::Lock, &"another process writes it; lines wait for its end");
                    thread::sleep(LOCK_AGAIN);
                }
                Err(LockError::Fault(error)) => {
                    let path = self.shared.path.display();
                    tracing::warn!(%path, %error, "the audit trail cannot be locked: see that no other process writes it");
                    break None;
                }
            }
        };
        self.shared.mended(Fault::Lock);
        if let Err(error) = self.recover() {
            self.shared.fail(Fault::Read, &error);
        }
    }

    fn recover(&mut self) -> io::Result<()> {
        // It may have been moved away meanwhile.
        self.file = files::open(&self.shared.path)?;
        self.size = self.file.metadata()?.len();
        let found = files::look(&self.file, &self.shared.path)?;
        if found.whole < self.size {
            // What a crash left of a line: it would be taken for the start of the next one.
            let path = self.shared.path.display();
            tracing::warn!(%path, "the last line of the audit trail has no end, and was taken away");
            self.file.set_len(found.whole)?;
            self.size = found.whole;
            self.shared.lost(1, "disk");
        }
        self.begun = found.begun.unwrap_or_else(SystemTime::now);
        self.end = found.end;
        Ok(())
    }

    /// Puts a line's end to it.
    fn add(&mut self, line: String, batch: &mut Batch) {
        self.tell_of_lost(batch);
        if self.is_due(self.size + batch.text.len() as u64, line.len() + CHAINED) {
            self.write(batch);
            match self.rotate() {
                Ok(()) => {
                    self.unrotated = None;
                    self.shared.mended(Fault::Rotate);
                }
                Err(error) => {
                    self.unrotated = Some(Instant::now());
                    self.shared.fail(Fault::Rotate, &error);
                }
            }
        }
        self.chain(line, batch);
        batch.lines += 1;
    }

    /// A line that says how many are missing.
    fn tell_of_lost(&mut self, batch: &mut Batch) {
        let untold = self.shared.untold.swap(0, Ordering::Relaxed);
        if untold > 0 {
            let time = humantime::format_rfc3339_millis(SystemTime::now());
            self.chain(format!("{GAP},\"time\":\"{time}\",\"lost\":{untold}"), batch);
            batch.told += untold;
        }
    }

    fn chain(&mut self, mut line: String, batch: &mut Batch) {
        use std::fmt::Write as _;
        if batch.text.is_empty() {
            batch.before = self.end.clone();
        }
        self.end.number += 1;
        // Writing into a string cannot fail.
        let _ = write!(line, ",\"seq\":{},\"prev\":\"{}\"}}", self.end.number, self.end.hash);
        self.end.hash = sha256(line.as_bytes());
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
                self.shared.mended(Fault::Write);
            }
            Err(error) => {
                let kept = self.keep_whole_lines(&batch);
                self.shared.metrics.audit_lines.inc_by(kept.lines);
                self.shared.untold.fetch_add(batch.told - kept.told, Ordering::Relaxed);
                self.shared.lost(batch.lines - kept.lines, "disk");
                self.shared.fail(Fault::Write, &error);
            }
        }
        self.shared.ended(batch.lines);
        // Here, since there may be no end to what comes.
        if self.unsynced.is_some_and(|since| since.elapsed() >= self.config.fsync) {
            self.sync();
        }
    }

    /// After a fault, what has come into the file of a batch as whole lines. Half a line is taken away: it would spoil the
    /// next one.
    fn keep_whole_lines(&mut self, batch: &Batch) -> Batch {
        let written = self.file.metadata().map_or(0, |it| it.len().saturating_sub(self.size));
        let text = &batch.text.as_bytes()[..batch.text.len().min(written as usize)];
        let whole = memchr::memrchr(b'\n', text).map_or(0, |end| end + 1);
        // What is no file has no length.
        let _ = self.file.set_len(self.size + whole as u64);
        let mut kept = Batch { before: batch.before.clone(), ..Batch::default() };
        for line in batch.text[..whole].lines() {
            kept.before = End { number: kept.before.number + 1, hash: sha256(line.as_bytes()) };
            match line.starts_with(GAP) {
                true => kept.told += files::lost_of(line),
                false => kept.lines += 1,
            }
        }
        self.size += whole as u64;
        self.end = kept.before.clone();
        if whole > 0 {
            self.unsynced.get_or_insert_with(Instant::now);
        }
        kept
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
        match self.begin_anew() {
            Ok(()) => self.shared.mended(Fault::Rotate),
            Err(error) => self.shared.fail(Fault::Rotate, &error),
        }
    }

    /// Whether a file with so many bytes is not to get so many more.
    fn is_due(&self, there: u64, more: usize) -> bool {
        if there == 0 || self.unrotated.is_some_and(|last| last.elapsed() < ROTATE_AGAIN) {
            return false;
        }
        let age = SystemTime::now().duration_since(self.begun).unwrap_or_default();
        there + more as u64 > self.config.max_size || age >= self.config.max_age
    }

    /// Gives the file a name with the time in it, begins a new one, and takes the oldest away.
    fn rotate(&mut self) -> io::Result<()> {
        self.sync();
        fs::rename(&self.shared.path, files::rotated_name(&self.shared.path, self.end.number))?;
        self.begin_anew()?;
        for oldest in files::rotated(&self.shared.path)?.iter().rev().skip(self.config.keep) {
            fs::remove_file(oldest)?;
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        self.file = files::open(&self.shared.path)?;
        (self.size, self.begun) = (self.file.metadata()?.len(), SystemTime::now());
        Ok(())
    }

    fn sync(&mut self) {
        if self.unsynced.take().is_none() {
            return;
        }
        match self.file.sync_data() {
            // What is no file need not be synced.
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                self.shared.fail(Fault::Sync, &error);
            }
            _ => self.shared.mended(Fault::Sync),
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
    before: End,
}
