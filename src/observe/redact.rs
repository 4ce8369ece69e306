//! Types that print only what may be known of what a client sent.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU64;

use http::Method;
use percent_encoding::percent_decode_str;
use serde::{Serialize, Serializer};

use crate::contact::{Finding, Was, Written};

/// The user name in a path. One that is an e-mail address is not printed.
#[derive(Clone, Copy)]
pub struct Account<'a>(pub &'a str);

/// The identifier of a contact, which is a number. A path may hold anything, names too, so nothing else is printed.
#[derive(Clone, Copy)]
pub struct Id<'a>(pub &'a str);

/// The number of a list. An id may hold anything, so nothing else is kept of it: there may be thousands.
///
/// Its digits behind a 1, since they may begin with zeros; the 1 alone stands for what is not printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListNumber(NonZeroU64);

/// A `User-Agent`. Words that are e-mail addresses, and whatever is over length, are not printed.
#[derive(Clone, Copy)]
pub struct Agent<'a>(pub &'a str);

/// The value that stood in a node. An unknown one is printed only if it is one that the API is known to
/// have been sent.
#[derive(Clone, Copy)]
pub struct Value<'a>(pub &'a Was);

/// The longest that is printed of anything, in bytes.
const LONGEST: usize = 128;

/// What values are called that nobody may read, wherever they stand.
const CREDENTIALS: Names = Names::new(&[
    "oauth_",
    "access_token",
    "api_key",
    "api-key",
    "apikey",
    "authorization",
    "password=",
    "password:",
    "passwd=",
    "pwd=",
    "secret=",
    "secret:",
    "token=",
    "token:",
    "jwt=",
    "jwt:",
    "session=",
    "sid=",
    "signature=",
    "credential=",
]);

/// Authentication schemes (RFC 7617, RFC 6750, RFC 7616, RFC 5849, RFC 4559): what follows is a secret.
const SCHEMES: Names = Names::new(&["basic", "bearer", "digest", "oauth", "negotiate"]);

/// Names to look for, in any case. Each begins with a letter.
struct Names {
    all: &'static [&'static str],
    /// The letters that they begin with, a bit each: nearly all others begin none.
    firsts: u32,
}

impl Names {
    const fn new(all: &'static [&'static str]) -> Self {
        let (mut firsts, mut at) = (0, 0);
        while at < all.len() {
            firsts |= Self::bit(all[at].as_bytes()[0]);
            at += 1;
        }
        Self { all, firsts }
    }

    const fn bit(letter: u8) -> u32 {
        if letter.is_ascii_alphabetic() { 1 << ((letter | 0x20) - b'a') } else { 0 }
    }

    fn are_in(&self, text: &[u8]) -> bool {
        let begins = |rest: &[u8], name: &str| {
            let name = name.as_bytes();
            rest[0] | 0x20 == name[0]
                && rest.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
        };
        let places =
            text.iter().enumerate().filter(|(_, byte)| self.firsts & Self::bit(**byte) != 0);
        places.map(|(at, _)| &text[at..]).any(|rest| self.all.iter().any(|name| begins(rest, name)))
    }
}

const UNPRINTABLE: &str = "(unprintable)";
const UNKNOWN: &str = "(unknown)";
const OWN_ORIGIN: &str = "(own origin)";

/// A method of RFC 9110 or RFC 5789 by its name; any other is a client's own text.
pub fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::CONNECT => "CONNECT",
        Method::PATCH => "PATCH",
        Method::TRACE => "TRACE",
        _ => "(other)",
    }
}

/// Whether there is an `@` in it, as it is or escaped, once or more often.
fn is_address(text: &str) -> bool {
    let escaped = |percent: usize| {
        let mut rest = &text[percent + 1..];
        while let Some(deeper) = rest.strip_prefix("25") {
            rest = deeper;
        }
        rest.starts_with("40")
    };
    text.contains('@') || text.match_indices('%').any(|(percent, _)| escaped(percent))
}

/// Whether one of these is in it, escaped or not.
fn holds(text: &str, names: &Names) -> bool {
    if text.contains('%') {
        return names.are_in(&percent_decode_str(text).collect::<Vec<u8>>());
    }
    names.are_in(text.as_bytes())
}

/// Whether it is a short row of digits and dots, perhaps before something else than a letter.
fn is_version(text: &[u8]) -> bool {
    let length = text.iter().take_while(|byte| byte.is_ascii_digit() || **byte == b'.').count();
    (1..=12).contains(&length) && !text[length..].iter().any(u8::is_ascii_alphanumeric)
}

/// Whether a word names an authentication scheme, and is no product with its version.
fn names_scheme(word: &str) -> bool {
    let word = word.trim_start_matches(|char: char| !char.is_ascii_alphanumeric());
    SCHEMES.all.iter().any(|scheme| {
        let start = word.get(..scheme.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
            && match &word.as_bytes()[scheme.len()..] {
                [b'/', version @ ..] => !is_version(version),
                [next, ..] => !next.is_ascii_alphanumeric(),
                [] => true,
            }
    })
}

fn is_made_of(text: &str, extra: &str) -> bool {
    let allowed = |char: char| char.is_ascii_alphanumeric() || extra.contains(char);
    !text.is_empty() && text.len() <= LONGEST && text.chars().all(allowed)
}

impl<'a> Account<'a> {
    /// What may be printed of it.
    pub fn as_str(&self) -> &'a str {
        if is_address(self.0) {
            return "(e-mail address)";
        }
        // Of what is escaped, it is the meaning that may be printed: there are passwords, too, in what some paste into a path.
        let is_name = match self.0.contains('%') {
            true => is_made_of(&percent_decode_str(self.0).decode_utf8_lossy(), "-_.~+"),
            false => is_made_of(self.0, "-_.~+"),
        };
        if is_name && self.0.len() <= LONGEST { self.0 } else { UNPRINTABLE }
    }
}

impl fmt::Display for Account<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<'a> Id<'a> {
    /// What may be printed of it.
    pub fn as_str(&self) -> &'a str {
        let is_number = !self.0.is_empty() && self.0.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && self.0.len() <= LONGEST { self.0 } else { UNPRINTABLE }
    }
}

impl ListNumber {
    const UNPRINTED: Self = Self(NonZeroU64::MIN);

    /// The longest that is printed, in digits.
    const MOST: u32 = 18;

    /// Of an id, as it stands in a body.
    #[inline]
    pub fn of(id: &[u8]) -> Self {
        let (mut number, mut unit) = (0, 1);
        for &byte in id.strip_suffix(b"/").unwrap_or(id).iter().rev() {
            match byte {
                b'0'..=b'9' if unit < 10_u64.pow(Self::MOST) => {
                    number += u64::from(byte - b'0') * unit;
                    unit *= 10;
                }
                b'/' => break,
                _ => return Self::UNPRINTED,
            }
        }
        NonZeroU64::new(unit + number).map_or(Self::UNPRINTED, Self)
    }
}

impl fmt::Display for ListNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = itoa::Buffer::new();
        match &digits.format(self.0.get())[1..] {
            "" => f.write_str(UNPRINTABLE),
            digits => f.write_str(digits),
        }
    }
}

impl Serialize for ListNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<'a> Agent<'a> {
    /// What may be printed of it: most often all.
    pub fn printed(&self) -> Cow<'a, str> {
        if self.0.len() <= LONGEST
            && !is_address(self.0)
            && !holds(self.0, &CREDENTIALS)
            && !holds(self.0, &SCHEMES)
        {
            return Cow::Borrowed(self.0);
        }
        Cow::Owned(self.to_string())
    }
}

impl fmt::Display for Agent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printed = 0;
        for (position, word) in self.0.split([' ', '\t']).enumerate() {
            let mut parts = word.split(['=', ':']);
            if parts.any(names_scheme) || holds(word, &CREDENTIALS) {
                // How much of what follows belongs to it, nobody can say.
                let before = if position > 0 { " " } else { "" };
                return write!(f, "{before}(credentials)");
            }
            // Whole words only: half an address is one still.
            let word = if is_address(word) { "(e-mail address)" } else { word };
            printed += word.len() + 1;
            if printed > LONGEST + 1 {
                return f.write_str(" ...");
            }
            if position > 0 {
                f.write_str(" ")?;
            }
            f.write_str(word)?;
        }
        Ok(())
    }
}

impl<'a> Value<'a> {
    /// What may be printed of it.
    pub fn as_str(&self) -> &'a str {
        match self.0 {
            // A host, once more: it was held against the request's own.
            Was::OwnOrigin(origin) if is_made_of(origin, ":/.-_[]") => origin,
            value => Self::known(value),
        }
    }

    /// The same, of all that needs no text of a client's.
    pub fn known(value: &Was) -> &'static str {
        match value {
            Was::Empty => "",
            Was::Known(source) => source.as_str(),
            Was::Several => "(several)",
            Was::OwnOrigin(_) => OWN_ORIGIN,
            // Seen on the wire (API-V1: "What the values mean"); anything else may be anybody's text.
            Was::Other(text) => match &**text {
                "ACTION_BY_CLIENT" => "ACTION_BY_CLIENT",
                "ACTION_BY_SYSTEM" => "ACTION_BY_SYSTEM",
                _ => UNKNOWN,
            },
        }
    }

    /// Forgets a client's text that would not be printed: it may be as long as a body.
    pub fn forget_unprinted(value: &mut Was) {
        let is_printed = match value {
            Was::Other(_) => Self::known(value) != UNKNOWN,
            Was::OwnOrigin(_) => Value(value).as_str() != OWN_ORIGIN,
            _ => true,
        };
        if !is_printed && let Was::Other(text) | Was::OwnOrigin(text) = value {
            *text = Box::default();
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What stands in the place of a finding now.
#[derive(Clone, Copy)]
pub struct Now<'a>(pub &'a Finding);

impl fmt::Display for Now<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.now {
            Written::Nothing => Value(&self.0.was).fmt(f),
            written => written.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_printed_in_no_spelling() {
        for text in ["jo@example.org", "jo%40example.org", "JO%40EXAMPLE.ORG", "jo%2540example.org"]
        {
            assert_eq!(Account(text).to_string(), "(e-mail address)");
            assert!(!Id(text).to_string().contains("xample"));
            let agent = format!("Shop/1.0 (+{text}) PHP");
            assert_eq!(Agent(&agent).to_string(), "Shop/1.0 (e-mail address) PHP");
            assert_eq!(Agent(&agent).printed(), Agent(&agent).to_string());
        }
    }

    #[test]
    fn credentials_in_an_agents_name_are_not_printed() {
        for (agent, printed) in [
            ("app access_token=S3CRET x", "app (credentials)"),
            ("app?api_key=S3CRET&x=y", "(credentials)"),
            ("x api_key = S3CRET", "x (credentials)"),
            ("x access%5Ftoken=S3CRET", "x (credentials)"),
            ("x OAuth_Token=\"S3CRET\"", "x (credentials)"),
            ("x OAuth realm=\"S3CRET\"", "x (credentials)"),
            ("Authorization: Token S3CRET", "(credentials)"),
            ("\"Authorization\": \"Bearer S3CRET\"", "(credentials)"),
            ("x Digest username=\"jo\", response=\"S3CRET\"", "x (credentials)"),
            ("x Bearer  S3CRET", "x (credentials)"),
            ("x\tBearer\tS3CRET", "x (credentials)"),
            ("x (bearer S3CRET)", "x (credentials)"),
            ("x client_secret=S3CRET", "x (credentials)"),
            ("x Password: S3CRET", "x (credentials)"),
            ("x/1 (pwd=S3CRET)", "x/1 (credentials)"),
            ("x X-Api-Key: S3CRET", "x (credentials)"),
            ("x token%3DS3CRET", "x (credentials)"),
            ("x jwt=S3CRET session=S3CRET", "x (credentials)"),
            ("x Bearer:S3CRET", "x (credentials)"),
            ("x Bearer%20S3CRET", "x (credentials)"),
            ("x (Bearer/S3CRET)", "x (credentials)"),
            ("x Bearer/9f86d081884c7d65", "x (credentials)"),
            ("x Basic/1dXNlcjpwYXNz", "x (credentials)"),
            ("x \"Basic\",\"S3CRET\"", "x (credentials)"),
            ("x Negotiate S3CRET", "x (credentials)"),
            ("x auth=Bearer S3CRET", "x (credentials)"),
            ("x credential=S3CRET", "x (credentials)"),
            ("Bearers/1 basically 2", "Bearers/1 basically 2"),
            ("Visual Basic/6.0 x", "Visual Basic/6.0 x"),
            (
                "Tokenizer/2 (Secrets 1.0; password manager)",
                "Tokenizer/2 (Secrets 1.0; password manager)",
            ),
            (
                "Mozilla/5.0 (X11; Linux x86_64) Objects/1",
                "Mozilla/5.0 (X11; Linux x86_64) Objects/1",
            ),
        ] {
            assert_eq!(Agent(agent).to_string(), printed);
            assert_eq!(Agent(agent).printed(), printed);
        }
    }

    /// Regression: what some paste into a path beside the account, or instead, was printed, since it was escaped.
    #[test]
    fn of_an_account_only_what_makes_up_names_is_printed() {
        for name in ["joesflowers", "joe%73-flowers_2", "jo~e%2Bs"] {
            assert_eq!(Account(name).to_string(), name);
        }
        for other in [
            "0f1e2d3c-APIKEY%25joesflowers",
            "APIKEY%25jo%3AS3CRET",
            "access_token%3DS3CRET",
            "jo%%34%30example.org",
            "jo%u0040example.org",
            "jo%20roe",
            "",
        ] {
            assert_eq!(Account(other).to_string(), UNPRINTABLE);
        }
    }

    /// Regression: what was escaped again and again took seconds.
    #[test]
    fn a_text_that_was_escaped_a_thousand_times_is_looked_at_once() {
        let deep = format!("jo%{}40example.org", "25".repeat(500_000));
        assert_eq!(Account(&deep).to_string(), "(e-mail address)");
        let none = format!("%{}", "25%".repeat(500_000));
        assert!(!is_address(&none) && !is_address(&format!("%{}", "25".repeat(500_000))));
    }

    #[test]
    fn a_method_is_printed_if_it_is_one_that_http_defines() {
        for name in "GET HEAD POST PUT DELETE OPTIONS CONNECT PATCH TRACE".split(' ') {
            assert_eq!(method(&name.parse().expect("a token")), name);
        }
        for other in ["get", "JO-DOE"] {
            assert_eq!(method(&other.parse().expect("a token")), "(other)");
        }
    }

    #[test]
    fn an_id_is_a_number() {
        for id in ["238", "1"] {
            assert_eq!(Id(id).to_string(), id);
        }
        for other in ["JaneRoe", "jane-roe", "", "12a", "-1", "١"] {
            assert_eq!(Id(other).to_string(), UNPRINTABLE);
        }
    }

    #[test]
    fn of_a_lists_id_the_number_at_its_end_is_printed() {
        let most = "9".repeat(18);
        let lengths =
            (1..18).flat_map(|length| [&most[..length], &"1234567890123456789"[..length]]);
        for number in ["238", "1", "0", "007", "00", "0000000", &most].into_iter().chain(lengths) {
            for id in [number.to_owned(), format!("/lists/{number}"), format!("jo/{number}/")] {
                assert_eq!(ListNumber::of(id.as_bytes()).to_string(), number);
            }
        }
        let too_long = format!("lists/{most}9");
        for other in [
            "",
            "/",
            "//",
            "7//",
            "lists/",
            "lists/7a",
            "lists/a7",
            "a7",
            "-1",
            "/١",
            "lists/a1234567",
            "lists/1234/-567",
            &too_long,
        ] {
            assert_eq!(ListNumber::of(other.as_bytes()).to_string(), UNPRINTABLE, "{other}");
        }
    }

    #[test]
    fn only_the_apis_own_words_are_printed_of_a_value() {
        let of = |text: &str| Value(&Was::Other(text.into())).to_string();
        assert_eq!(of("ACTION_BY_CLIENT"), "ACTION_BY_CLIENT");
        assert_eq!(of("Jo Doe"), "(unknown)");
        assert_eq!(of("ACTION_BY_JO_DOE"), "(unknown)");
    }

    #[test]
    fn what_is_forgotten_of_a_value_is_what_would_not_be_printed() {
        for (text, kept) in [("ACTION_BY_CLIENT", true), ("Jo Doe", false), ("[::1]:8080", true)] {
            for (was, kept) in [
                (Was::Other(text.into()), kept && text.starts_with('A')),
                (Was::OwnOrigin(text.into()), kept && !text.starts_with('J')),
                (Was::OwnOrigin(text.repeat(100).into()), false),
            ] {
                let mut left = was.clone();
                Value::forget_unprinted(&mut left);
                assert_eq!(Value(&left).to_string(), Value(&was).to_string());
                assert_eq!(left == was, kept, "{text}");
            }
        }
    }
}
