//! Reads audit files in the order of their lines, in one pass and in constant memory, and follows the chain.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;

use super::line::Line;
use super::sums::Sums;
use crate::observe::audit::NO_HASH;
use crate::observe::finished::sha256;

/// How much is read at once.
const BUFFER: usize = 1024 * 1024;

/// The longest line that is taken for one. A contact write of the largest size has less than this in findings.
const LONGEST: usize = 64 * 1024 * 1024;

/// How many faults of the chain are told one by one.
const TOLD: usize = 10;

/// Files, in the order of their lines.
pub(super) struct Trail {
    files: Vec<(PathBuf, Box<dyn Read>)>,
    size: Option<u64>,
}

/// What became of the chain.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The first and the last line's number.
    pub range: Option<(u64, u64)>,
    /// The last line's hash.
    pub head: String,
    /// The first faults in words, and how many there are.
    pub faults: Vec<String>,
    pub broken: u64,
}

impl Trail {
    /// Opens all of them: what is missing is known before anything is counted.
    pub fn open(paths: &[PathBuf]) -> Result<Self, (PathBuf, io::Error)> {
        let mut files = Vec::new();
        let mut size = Some(0);
        for path in paths {
            if path == Path::new("-") {
                files.push((u64::MAX, path.clone(), Box::new(io::stdin()) as Box<dyn Read>));
                size = None;
                continue;
            }
            let (length, first, file) = open(path).map_err(|error| (path.clone(), error))?;
            size = size.zip(length).map(|(size, length)| size + length);
            files.push((first, path.clone(), file));
        }
        files.sort_by_key(|(first, ..)| *first);
        Ok(Self { files: files.into_iter().map(|(_, path, file)| (path, file)).collect(), size })
    }

    /// Bytes in all; `None` if that is not known.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Sums them up, and follows the chain if asked to.
    pub fn sum(self, verify: bool, bar: &ProgressBar) -> io::Result<(Sums, Option<Chain>)> {
        let mut sums = Sums::default();
        let mut chain = verify.then(Chain::default);
        for (path, file) in self.files {
            let mut reader = BufReader::with_capacity(BUFFER, file);
            let mut number = 0;
            let mut long = Vec::new();
            loop {
                let buffered = reader.fill_buf()?;
                if buffered.is_empty() {
                    if !long.is_empty() {
                        number += 1;
                        take(&long, &path, number, &mut sums, chain.as_mut());
                    }
                    break;
                }
                // Whole lines are looked at where they are; what is left begins the next one.
                let mut used = 0;
                while let Some(end) = memchr::memchr(b'\n', &buffered[used..]) {
                    number += 1;
                    let line = &buffered[used..used + end];
                    if long.is_empty() {
                        take(line, &path, number, &mut sums, chain.as_mut());
                    } else {
                        long.extend_from_slice(line);
                        take(&long, &path, number, &mut sums, chain.as_mut());
                        long.clear();
                    }
                    used += end + 1;
                }
                if long.len() < LONGEST {
                    long.extend_from_slice(&buffered[used..]);
                }
                let read = buffered.len();
                reader.consume(read);
                bar.inc(read as u64);
            }
        }
        Ok((sums, chain))
    }
}

/// Whether there is an audit trail in a file.
pub(super) fn is_trail(path: &Path) -> bool {
    // A pipe would be waited for.
    path.is_file() && open(path).is_ok_and(|(_, first, _)| first != u64::MAX)
}

/// Whether these are one file.
pub(super) fn are_same(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
    file(one).is_some_and(|one| file(other) == Some(one))
}

/// A file's length, the number of its first line (the largest there is if it has none), and all of it to be read.
/// A pipe has no length, and cannot be opened twice.
fn open(path: &Path) -> io::Result<(Option<u64>, u64, Box<dyn Read>)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let length = metadata.is_file().then_some(metadata.len());
    let mut file = BufReader::new(file);
    let mut first = Vec::new();
    (&mut file).take(LONGEST as u64).read_until(b'\n', &mut first)?;
    let line = serde_json::from_slice::<Line<'_>>(&first);
    let number = line.map_or(u64::MAX, |line| line.seq);
    Ok((length, number, Box::new(io::Cursor::new(first).chain(file))))
}

fn take(line: &[u8], path: &Path, number: u64, sums: &mut Sums, chain: Option<&mut Chain>) {
    let parsed = serde_json::from_slice::<Line<'_>>(line);
    if let Some(chain) = chain {
        chain.follow(line, parsed.as_ref().ok().map(|line| line.seq), path, number);
    }
    match parsed {
        Ok(parsed) => sums.add(&parsed),
        Err(_) => sums.foreign += 1,
    }
}

impl Chain {
    fn follow(&mut self, line: &[u8], seq: Option<u64>, path: &Path, number: u64) {
        let place = |why: &str| format!("{}:{number}: {why}", path.display());
        let Some(seq) = seq else {
            self.fault(place("this is no line of an audit trail"));
            return;
        };
        // The end of the line is always the same: no need to look for it elsewhere.
        let prev = line
            .strip_suffix(b"\"}")
            .and_then(|rest| rest.len().checked_sub(NO_HASH.len()).map(|at| &rest[at..]));
        let expected = match self.range {
            None if seq == 1 => Some(NO_HASH),
            None => None,
            Some(_) => Some(self.head.as_str()),
        };
        let follows = match (expected, prev) {
            (Some(expected), Some(prev)) => expected.as_bytes() == prev,
            (None, Some(_)) => true,
            (_, None) => false,
        };
        if !follows {
            self.fault(place("the line before this one was taken out, added or changed"));
        } else if self.range.is_some_and(|(_, last)| seq != last + 1) {
            self.fault(place("its number does not follow that of the line before"));
        }
        self.range = Some((self.range.map_or(seq, |(first, _)| first), seq));
        self.head = sha256(line);
    }

    fn fault(&mut self, words: String) {
        self.broken += 1;
        if self.faults.len() < TOLD {
            self.faults.push(words);
        }
    }
}
