//! Whether an answer is the API's transition refusal, and whether it is true of what was sent.
//!
//! Only one wording is attested (API-V1: "The error that the project exists for"); the rest of the
//! pattern is deduced from it, so it is a setting.

use std::borrow::Cow;

use regex::{Regex, RegexBuilder, bytes};

/// The attested wording, parsed loosely.
pub const DEFAULT_PATTERN: &str = r"Status transition from (\w+) to (\w+) is not allowed when action by (?<actor>\w+)( and confirm opt[- ]?in is (on|off))?";

/// How much of a decoded answer is looked at, in bytes.
pub const INSPECTED: usize = 64 * 1024;

/// Recognises the refusal in an answer's text.
#[derive(Debug, Clone)]
pub struct Pattern {
    any: Regex,
    /// The same for a text of ASCII, in which it finds the same. It has a tenth of the states, and which of them were met where is
    /// noted in memory that is cleared before each text: for the default and a line, 14 KB with all letters that there are.
    ascii: Option<bytes::Regex>,
}

/// Why a pattern cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PatternError {
    /// Not a regular expression.
    #[error("is not a regular expression: {0}")]
    Syntax(#[from] regex::Error),
    /// Nothing in it says who acted.
    #[error("has no group `actor`: write (?<actor>\\w+) where the message says who acted")]
    NoActor,
}

/// What was sent upstream when the answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// It was a PUT.
    pub update: bool,
    /// Some contact-level node of it said ACTION_BY_CONTACT.
    pub claims_contact: bool,
}

/// What a refusal is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The message speaks of the owner, yet the contact was declared: sent again, it may go through.
    Transient,
    /// The message is true of what was sent. Never to be retried.
    Legitimate,
}

impl Verdict {
    /// All of them, each at its own number.
    pub const ALL: [Self; 2] = [Self::Transient, Self::Legitimate];

    /// The verdict's name in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Legitimate => "legitimate",
        }
    }
}

impl Pattern {
    /// Compiles `pattern`: case is ignored, and it is matched against text in which every run of
    /// white space is one space, as it is in the pattern.
    ///
    /// # Errors
    /// If it is no regular expression, or has no group named `actor`.
    pub fn new(pattern: &str) -> Result<Self, PatternError> {
        // But where there may be comments, which end with their line.
        let folded = (!has_comments(pattern)).then(|| fold(pattern.as_bytes()));
        let pattern = folded.as_deref().unwrap_or(pattern);
        let any = RegexBuilder::new(pattern).case_insensitive(true).build()?;
        if !any.capture_names().flatten().any(|name| name == "actor") {
            return Err(PatternError::NoActor);
        }
        let ascii = is_same_in_ascii(pattern).then(|| {
            bytes::RegexBuilder::new(pattern).case_insensitive(true).unicode(false).build().ok()
        });
        Ok(Self { any, ascii: ascii.flatten() })
    }

    /// Judges the text of a 400. `None` if it is not the transition refusal.
    ///
    /// `text` is the answer's decoded body; only its first [`INSPECTED`] bytes count.
    pub fn judge(&self, text: &[u8], sent: Sent) -> Option<Verdict> {
        let text = fold(&text[..text.len().min(INSPECTED)]);
        let actor = match &self.ascii {
            Some(ascii) if text.is_ascii() => {
                ascii.captures(text.as_bytes())?.name("actor").map(|it| it.as_bytes())
            }
            _ => self.any.captures(&text)?.name("actor").map(|it| it.as_str().as_bytes()),
        };
        let by_owner = actor.is_some_and(|actor| actor.eq_ignore_ascii_case(b"owner"));
        Some(if sent.update && sent.claims_contact && by_owner {
            Verdict::Transient
        } else {
            Verdict::Legitimate
        })
    }
}

/// Whether a pattern finds the same in ASCII if it knows no other letters: none that it names, of which some (K for kelvin) are taken
/// for one of ASCII where case is ignored.
fn is_same_in_ascii(pattern: &str) -> bool {
    pattern.is_ascii() && !["\\x", "\\u", "\\U"].iter().any(|escape| pattern.contains(escape))
}

/// Whether a `#` in a pattern may begin a comment: by the flag `x`.
fn has_comments(pattern: &str) -> bool {
    let flags = |(at, open): (usize, &str)| {
        let letters = pattern[at + open.len()..].bytes();
        letters.take_while(|byte| byte.is_ascii_alphabetic() || *byte == b'-').any(|it| it == b'x')
    };
    pattern.contains('#') && pattern.match_indices("(?").any(flags)
}

/// The text with every run of white space as one space.
fn fold(text: &[u8]) -> Cow<'_, str> {
    let text =
        std::str::from_utf8(text).map_or_else(|_| String::from_utf8_lossy(text), Cow::Borrowed);
    // A line of ASCII is, which is told in half the time that a copy takes.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) && !text.contains("  ") {
        return text;
    }
    let mut folded = String::with_capacity(text.len());
    for char in text.chars() {
        if !char.is_whitespace() {
            folded.push(char);
        } else if !folded.ends_with(' ') {
            folded.push(' ');
        }
    }
    folded.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without it, nothing is wrong but what it costs.
    #[test]
    fn a_pattern_that_names_no_other_letters_has_one_for_ascii() {
        for (pattern, has_one) in [
            (DEFAULT_PATTERN, true),
            (r"denied for (?<actor>\w+)", true),
            ("d\u{e9}nied for (?<actor>\\w+)", false),
            (r"denied for (?<actor>\u006f\w+)", false),
            (r"denied for (?<actor>\p{L}+)", false),
        ] {
            let compiled = Pattern::new(pattern).expect("it compiles");
            assert_eq!(compiled.ascii.is_some(), has_one, "{pattern}");
        }
    }
}
