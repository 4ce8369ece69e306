//! `optin-proxy sanitize`: the rewrite alone, for a body in a file.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use super::{ConfigArgs, Failure};
use crate::contact::{self, Finding, Mode, Place, Sanitized, Uninspectable, Was, Written};

#[derive(Debug, Args)]
pub(super) struct Sanitize {
    /// File with the body; `-` is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// Method of the request that carried it
    #[arg(long, default_value = "PUT", value_enum, ignore_case = true)]
    method: Method,
    /// Host under which the client knew the proxy [default: listen.address]
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Print a diff instead of the XML
    #[arg(long)]
    diff: bool,
    /// How to print the findings
    #[arg(long, default_value = "text", value_enum)]
    format: Format,
    /// Print no XML; exit with 1 if there is a finding or the input cannot be inspected
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "UPPER")]
enum Method {
    Post,
    Put,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// A line a finding
    Text,
    /// One JSON object
    Json,
}

impl Sanitize {
    pub fn run(self) -> Result<(), Failure> {
        let config = self.config.load(&[])?;
        let mut input: Box<dyn Read> = if self.file.as_os_str() == "-" {
            Box::new(io::stdin().lock())
        } else {
            let open = File::open(&self.file);
            Box::new(open.map_err(|error| {
                Failure::Failed(format!("cannot read {}: {error}", self.file.display()))
            })?)
        };
        let cap = config.sanitize.max_body;
        let mut start = Vec::new();
        (&mut input).take(cap as u64 + 1).read_to_end(&mut start).map_err(|error| {
            Failure::Failed(format!("cannot read {}: {error}", self.file.display()))
        })?;
        let body = Bytes::from(start);
        let host = self.host.as_deref().unwrap_or(&config.listen.address);
        let request = contact::Request {
            update: self.method == Method::Put,
            own_host: Some(host),
            charset: None,
        };
        let is_off = config.sanitize.policy.mode == Mode::Off;
        let sanitized = if is_off {
            Sanitized::NoContact
        } else if body.len() > cap {
            Sanitized::Uninspectable(Uninspectable::TooLarge)
        } else {
            contact::sanitize(&body, &request, &config.sanitize.policy)
        };
        let report = Report::of(&sanitized, is_off, &body);
        let out = match &sanitized {
            Sanitized::Contact(contact) => contact.body.clone(),
            _ => body.clone(),
        };
        let mut told = Ok(());
        if self.diff {
            told = print_diff(&body, &out);
        } else if !self.check {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&out)?;
            // Beyond the limit nothing was looked at, but all of it comes out.
            io::copy(&mut input, &mut stdout)?;
            stdout.flush()?;
        }
        let printed = report.print(self.format);
        let clean = report.findings.is_empty() && report.uninspectable.is_none();
        // Whoever stops reading the diff is told the truth by the status.
        if self.check && !clean {
            return Err(Failure::Negative);
        }
        Ok(told.and(printed)?)
    }
}

/// What is printed beside the XML.
#[derive(Serialize)]
struct Report {
    /// Unknown where nothing was looked at.
    contact: Option<bool>,
    uninspectable: Option<Uninspectable>,
    findings: Vec<Line>,
    rewritten: usize,
}

/// A finding for a person with the body at hand: what was there is shown as it was.
#[derive(Serialize)]
struct Line {
    kind: contact::Kind,
    line: usize,
    column: usize,
    list_id: Option<String>,
    was: String,
    now: String,
    rewritten: bool,
}

impl Report {
    fn of(sanitized: &Sanitized, is_off: bool, body: &[u8]) -> Self {
        let mut report =
            Self { contact: None, uninspectable: None, findings: Vec::new(), rewritten: 0 };
        match sanitized {
            Sanitized::NoContact => report.contact = (!is_off).then_some(false),
            Sanitized::Uninspectable(reason) => report.uninspectable = Some(*reason),
            Sanitized::Contact(contact) => {
                report.contact = Some(true);
                let mut lines = Lines::of(body);
                report.findings = contact
                    .findings
                    .iter()
                    .zip(contact.findings.places())
                    .map(|(finding, place)| Line::of(finding, *place, &mut lines))
                    .collect();
                report.rewritten = report.findings.iter().filter(|line| line.rewritten).count();
            }
        }
        report
    }

    fn print(&self, format: Format) -> io::Result<()> {
        let mut err = anstream::stderr().lock();
        if format == Format::Json {
            serde_json::to_writer(&mut err, self)?;
            return writeln!(err);
        }
        if let Some(reason) = self.uninspectable {
            return writeln!(err, "\x1b[33mnot inspected\x1b[0m: {reason}; passed on unchanged");
        }
        match self.contact {
            Some(true) => {}
            Some(false) => return writeln!(err, "no Contact in it; passed on unchanged"),
            None => return writeln!(err, "sanitize.mode is \"off\"; passed on unchanged"),
        }
        for line in &self.findings {
            let Line { kind, line: row, column, was, now, rewritten, .. } = line;
            let colour = if *rewritten { 32 } else { 33 };
            write!(err, "{row}:{column}: \x1b[{colour}m{kind}\x1b[0m")?;
            if let Some(list) = &line.list_id {
                write!(err, " in list {}", visible(list))?;
            }
            let was = if was.is_empty() { "nothing".into() } else { visible(was) };
            let now = visible(now);
            if *rewritten {
                writeln!(err, ": {was} -> {now}")?;
            } else {
                writeln!(err, ": {was}, left as it is")?;
            }
        }
        let found = self.findings.len();
        let s = if found == 1 { "" } else { "s" };
        writeln!(err, "{found} finding{s}, {} rewritten", self.rewritten)
    }
}

/// What a terminal shows as it is: a line break would look like another finding, and there are worse, as what turns the
/// direction of a text.
fn visible(text: &str) -> Cow<'_, str> {
    let acts = |char: char| {
        let turns = ['\u{200e}'..='\u{200f}', '\u{202a}'..='\u{202e}', '\u{2066}'..='\u{2069}'];
        char.is_control() || turns.iter().any(|turns| turns.contains(&char))
    };
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let escaped = text.chars().map(|char| match acts(char) {
        true => char.escape_default().to_string(),
        false => char.to_string(),
    });
    Cow::Owned(escaped.collect())
}

impl Line {
    fn of(finding: &Finding, place: Place, lines: &mut Lines<'_>) -> Self {
        let (line, column) = lines.position(place.at as usize);
        let was = match &finding.was {
            Was::Empty => String::new(),
            Was::Known(source) => source.to_string(),
            Was::Several => "different values".to_owned(),
            Was::Other(text) | Was::OwnOrigin(text) => text.to_string(),
        };
        Self {
            kind: finding.kind,
            line,
            column,
            list_id: place
                .list_id
                .map(|id| String::from_utf8_lossy(&lines.body[id.range()]).into_owned()),
            now: match finding.now {
                Written::Nothing => was.clone(),
                written => written.to_string(),
            },
            was,
            rewritten: finding.acted_on(),
        }
    }
}

/// Finds line and column. What comes in the order of the body is looked for from the one before.
struct Lines<'b> {
    body: &'b [u8],
    /// The last that was found: offset, line and column, from 0.
    last: (usize, usize, usize),
}

impl<'b> Lines<'b> {
    fn of(body: &'b [u8]) -> Self {
        Self { body, last: (0, 0, 0) }
    }

    /// Of the markup at this offset, from 1.
    fn position(&mut self, at: usize) -> (usize, usize) {
        let (from, line, column) = if at < self.last.0 { (0, 0, 0) } else { self.last };
        let passed = &self.body[from..at];
        let lines = memchr::memchr_iter(b'\n', passed).count();
        let (start, before) = match memchr::memrchr(b'\n', passed) {
            Some(newline) => (newline + 1, 0),
            None => (0, column),
        };
        let chars = String::from_utf8_lossy(&passed[start..]).chars().count();
        self.last = (at, line + lines, before + chars);
        (self.last.1 + 1, self.last.2 + 1)
    }
}

/// A unified diff, coloured on a terminal.
fn print_diff(before: &[u8], after: &[u8]) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(diff(before, after, "before", "after").as_bytes())?;
    out.flush()
}

/// A unified diff with three lines of context and ANSI colours. Empty if nothing differs.
pub(super) fn diff(before: &[u8], after: &[u8], before_name: &str, after_name: &str) -> String {
    use std::fmt::Write as _;

    let (before, after) = (String::from_utf8_lossy(before), String::from_utf8_lossy(after));
    let diff = TextDiff::from_lines(&*before, &*after);
    let mut text = String::new();
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        if text.is_empty() {
            let _ = writeln!(text, "--- {before_name}\n+++ {after_name}");
        }
        let _ = writeln!(text, "\x1b[36m{}\x1b[0m", hunk.header());
        for change in hunk.iter_changes() {
            let (sign, colour) = match change.tag() {
                ChangeTag::Delete => ('-', "\x1b[31m"),
                ChangeTag::Insert => ('+', "\x1b[32m"),
                ChangeTag::Equal => (' ', ""),
            };
            let reset = if colour.is_empty() { "" } else { "\x1b[0m" };
            let line = change.value().trim_end_matches(['\n', '\r']).split('\t').map(visible);
            let line = line.collect::<Vec<_>>().join("\t");
            let _ = writeln!(text, "{colour}{sign}{line}{reset}");
        }
    }
    text
}
