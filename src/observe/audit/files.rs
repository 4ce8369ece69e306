//! The trail's files: whose they are, what stands in them, and their names.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;

use super::NO_HASH;
use super::writer::BATCH;
use crate::observe::finished::sha256;

/// How a line begins that says how many are missing.
pub(super) const GAP: &str = r#"{"event":"gap""#;

/// The end of a chain: its last line's number and hash.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub number: u64,
    pub hash: String,
}

impl Default for End {
    fn default() -> Self {
        Self { number: 0, hash: NO_HASH.to_owned() }
    }
}

/// What stands in a file.
pub(super) struct Found {
    /// When its first line was written.
    pub begun: Option<SystemTime>,
    /// How many of its bytes are whole lines.
    pub whole: u64,
    /// Where its chain ends.
    pub end: End,
}

/// Why a trail is not ours alone.
pub(super) enum LockError {
    /// It is another process's.
    Taken,
    /// It cannot be locked.
    Fault(io::Error),
}

/// For appending only, and for nobody else to read: it names accounts.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Whether it is a file at all, and no pipe or device.
pub(super) fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|it| it.is_file())
}

/// A file of its own is locked, which no rotation moves away.
pub(super) fn lock(path: &Path) -> Result<File, LockError> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".lock");
    let path = path.with_file_name(name);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(LockError::Fault)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LockError::Taken),
        Err(TryLockError::Error(error)) => Err(LockError::Fault(error)),
    }
}

/// Whether a file is empty or a trail: anything else is somebody's, and not to be written to.
///
/// # Errors
/// If it is neither, or cannot be read.
pub(super) fn check(mut file: &File) -> io::Result<()> {
    if !is_regular(file) {
        return Ok(());
    }
    let mut start = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(16).read_to_end(&mut start)?;
    let begins = [b"{\"time\":\"", GAP.as_bytes()];
    if begins.iter().any(|begin| begin.starts_with(&start) || start.starts_with(begin)) {
        return Ok(());
    }
    let words = "this file holds something else than an audit trail, and was left as it is";
    Err(io::Error::new(io::ErrorKind::InvalidData, words))
}

/// Looks where the trail ends. What stands in an empty file's place is the end of the newest that was rotated away.
///
/// # Errors
/// If the file cannot be read, or is no trail.
pub(super) fn look(file: &File, path: &Path) -> io::Result<Found> {
    check(file)?;
    let (whole, last) = whole_lines(file)?;
    let end = match last {
        Some(last) => end_of(&last),
        None => match rotated(path)?.last() {
            Some(newest) => whole_lines(&File::open(newest)?)?.1.map(|last| end_of(&last)),
            None => None,
        }
        .unwrap_or_default(),
    };
    Ok(Found { begun: begun(file)?, whole, end })
}

/// How many are missing, by a line that says so.
pub(super) fn lost_of(gap: &str) -> u64 {
    #[derive(Deserialize)]
    struct Gap {
        lost: u64,
    }
    serde_json::from_str::<Gap>(gap).map_or(0, |gap| gap.lost)
}

fn end_of(line: &[u8]) -> End {
    #[derive(Deserialize)]
    struct Numbered {
        seq: u64,
    }
    let number = serde_json::from_slice::<Numbered>(line).map_or(0, |line| line.seq);
    End { number, hash: sha256(line) }
}

fn begun(mut file: &File) -> io::Result<Option<SystemTime>> {
    #[derive(Deserialize)]
    struct Timed {
        time: String,
    }
    let mut first = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    BufReader::new(file).take(BATCH as u64).read_until(b'\n', &mut first)?;
    let first = serde_json::from_slice::<Timed>(&first).ok();
    Ok(first.and_then(|it| humantime::parse_rfc3339_weak(&it.time).ok()))
}

/// Where the whole lines of a file end, and the last of them.
fn whole_lines(mut file: &File) -> io::Result<(u64, Option<Vec<u8>>)> {
    let length = file.metadata()?.len();
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
                return Ok((from + end as u64 + 1, Some(tail[begin..end].to_vec())));
            }
            (None, Some(end)) if from == 0 => {
                return Ok((end as u64 + 1, Some(tail[..end].to_vec())));
            }
            _ if from == 0 => return Ok((0, None)),
            _ => reach *= 4,
        }
    }
}

/// What a file is called that is rotated away now, after the line of this number.
pub(super) fn rotated_name(path: &Path, number: u64) -> OsString {
    let stamp = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let stamp: String = stamp.chars().filter(|it| !matches!(it, '-' | ':' | '.')).collect();
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{stamp}-{number:08}"));
    name
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
