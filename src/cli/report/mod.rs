//! `optin-proxy report`

mod html;
mod line;
mod read;
mod sums;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use self::read::{Chain, Trail};
use self::sums::Sums;
use super::{Failure, progress};

/// How many names of each kind the table shows.
const SHOWN: usize = 20;

/// From how many bytes on there is something to wait for.
const WORTH_A_BAR: u64 = 32 * 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct Report {
    /// Audit files, in any order; - reads standard input
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Check that no line was taken out or changed, and exit with 1 if one was
    #[arg(long)]
    verify: bool,
    /// How to say it
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Where to; standard output if not given
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Text for people
    Table,
    /// One object
    Json,
    /// One row for each name
    Csv,
    /// One page with plots, which needs nothing else
    Html,
}

impl Report {
    pub fn run(self) -> Result<(), Failure> {
        // A pattern for the trail's files behind -o names one of them.
        let is_read = |path: &Path| self.files.iter().any(|file| read::are_same(file, path));
        let is_precious = |path: &&Path| read::is_trail(path) || is_read(path);
        if let Some(path) = self.output.as_deref().filter(is_precious) {
            return Err(Failure::Usage(format!(
                "{}: this is an audit trail, and would be overwritten: name another file behind -o",
                path.display()
            )));
        }
        let trail = Trail::open(&self.files)
            .map_err(|(path, error)| Failure::Failed(format!("{}: {error}", path.display())))?;
        let bar = progress(
            trail.size().filter(|size| *size > WORTH_A_BAR),
            "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
        );
        let (sums, chain) = trail.sum(self.verify, &bar).map_err(|error| {
            Failure::Failed(format!("cannot read on: {error}; see that the file is still there"))
        })?;
        bar.finish_and_clear();
        if sums.is_empty() && sums.foreign > 0 {
            return Err(Failure::Failed(
                "this is no audit trail: no line of it is one of ours; name the file of audit.path"
                    .into(),
            ));
        }
        let text = match self.format {
            Format::Table => table(&sums),
            Format::Json => format!("{:#}\n", sums.to_json()),
            Format::Csv => csv(&sums),
            Format::Html => html::page(&sums),
        };
        let told = match &self.output {
            Some(path) => {
                std::fs::write(path, text)
                    .map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))?;
                Ok(())
            }
            None => io::stdout().write_all(text.as_bytes()),
        };
        if sums.foreign > 0 {
            say(format_args!("{} lines are none of an audit trail, and not counted", sums.foreign));
        }
        // Whoever stops reading the report is told the truth by the status.
        chain.map_or(Ok(()), |chain| verdict(&chain))?;
        Ok(told?)
    }
}

/// On standard error, where nobody may be left to hear it.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What became of the chain, on standard error: the report itself may go on to a program.
fn verdict(chain: &Chain) -> Result<(), Failure> {
    for fault in &chain.faults {
        say(format_args!("{fault}"));
    }
    if chain.broken > chain.faults.len() as u64 {
        say(format_args!("and {} more", chain.broken - chain.faults.len() as u64));
    }
    if chain.broken > 0 {
        return Err(Failure::Failed(format!(
            "the chain is broken in {} places: lines were taken out, added or changed",
            chain.broken
        )));
    }
    let Some((first, last)) = chain.range else {
        say(format_args!("no lines, and so nothing to verify"));
        return Ok(());
    };
    say(format_args!(
        "the chain is whole from line {first} to line {last}, which has the hash {}",
        chain.head
    ));
    if first > 1 {
        say(format_args!("lines before {first} are in files that were not named, or are deleted"));
    }
    Ok(())
}

fn table(sums: &Sums) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = writeln!(
        text,
        "{} contact writes with a finding or a refusal{}\n",
        sums.all.writes,
        sums.period.as_ref().map_or_else(String::new, |(from, to)| format!(", {from} to {to}"))
    );
    let head = ["writes", "findings", "changed", "rescued", "refused", "exhausted"];
    for (title, names) in sums.dimensions() {
        let width = names.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let width = width.clamp(20, 48);
        let _ = write!(text, "{title:<width$}");
        for column in head {
            let _ = write!(text, "{column:>11}");
        }
        text.push('\n');
        for (name, counts) in names.iter().take(SHOWN) {
            let name: String = name.chars().take(width).collect();
            let _ = write!(text, "{name:<width$}");
            for column in counts.columns() {
                let _ = write!(text, "{column:>11}");
            }
            text.push('\n');
        }
        if names.len() > SHOWN {
            let _ = writeln!(text, "and {} more; --format csv has all", names.len() - SHOWN);
        }
        text.push('\n');
    }
    if sums.lost > 0 {
        let _ = writeln!(text, "The trail itself says that {} lines were lost.", sums.lost);
    }
    text
}

fn csv(sums: &Sums) -> String {
    let mut text = String::from("by,name,writes,findings,changed,rescued,refused,exhausted\r\n");
    for (title, names) in sums.dimensions() {
        for (name, counts) in names {
            // RFC 4180; and a spreadsheet is not to take a client's own text for a formula.
            let guard = if name.starts_with(['=', '+', '-', '@', '\t', '\r']) { "'" } else { "" };
            let name = name.replace('"', "\"\"");
            let columns = counts.columns().map(|it| it.to_string()).join(",");
            text.push_str(&format!("{title},\"{guard}{name}\",{columns}\r\n"));
        }
    }
    text
}
