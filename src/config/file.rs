//! The configuration as it is written, section by section. `proxy.toml` documents every key.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::values::Network;
use crate::contact::{Ambiguous, Lists, Mode, Removal, Source, Undeclared, refusal};
use crate::intercept::{Host, OtherHosts, Pattern, Private};

/// All sections.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct File {
    pub listen: Listen,
    pub upstream: Upstream,
    pub sanitize: Sanitize,
    pub retry: Retry,
    pub intercept: Intercept,
    pub limits: Limits,
    pub log: Log,
    pub audit: Audit,
    pub admin: Admin,
}

/// `[listen]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Listen {
    pub address: String,
    pub drain_timeout: Span,
    pub keep_alive: Span,
    pub allow_from: List<Network>,
    pub proxy_auth: Secret,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: "127.0.0.1:8080".into(),
            drain_timeout: Span::from_secs(25),
            keep_alive: Span::from_secs(2 * 60),
            allow_from: List::default(),
            proxy_auth: Secret::default(),
        }
    }
}

/// `[upstream]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Upstream {
    pub url: String,
    pub ca_file: String,
    pub connect_timeout: Span,
    pub response_timeout: Span,
    pub keep_alive: Span,
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            url: "https://api.constantcontact.com".into(),
            ca_file: String::new(),
            connect_timeout: Span::from_secs(5),
            response_timeout: Span::from_secs(60),
            keep_alive: Span::from_secs(30),
        }
    }
}

/// `[sanitize]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Sanitize {
    pub mode: Mode,
    pub lists: Lists,
    pub undeclared: Undeclared,
    pub ambiguous: Ambiguous,
    pub removal: Removal,
    pub restore_ids: bool,
    pub uninspectable: Uninspectable,
    pub max_body: Size,
    pub aliases: BTreeMap<String, Source>,
}

impl Default for Sanitize {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            lists: Lists::default(),
            undeclared: Undeclared::default(),
            ambiguous: Ambiguous::default(),
            removal: Removal::default(),
            restore_ids: true,
            uninspectable: Uninspectable::default(),
            max_body: Size(1024 * 1024),
            aliases: BTreeMap::new(),
        }
    }
}

/// `sanitize.uninspectable`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Uninspectable {
    /// Pass it on as it came: what worked without the proxy works with it.
    #[default]
    Forward,
    /// Refuse it.
    Reject,
}

/// `[retry]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Retry {
    pub pattern: String,
    pub max_attempts: u32,
    pub base_delay: Span,
    pub max_delay: Span,
    pub deadline: Span,
    pub budget: f64,
    pub budget_floor: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            pattern: refusal::DEFAULT_PATTERN.into(),
            max_attempts: 3,
            base_delay: Span(Duration::from_millis(250)),
            max_delay: Span::from_secs(2),
            deadline: Span::from_secs(10),
            budget: 0.2,
            budget_floor: 3,
        }
    }
}

/// `[intercept]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Intercept {
    pub hosts: List<Host>,
    pub ca_dir: String,
    pub other_hosts: OtherHosts,
    pub ports: List<u16>,
    pub allow: List<Pattern>,
    pub deny: List<Pattern>,
    pub allow_private: List<Private>,
    pub tunnel_idle_timeout: Span,
}

impl Default for Intercept {
    fn default() -> Self {
        Self {
            hosts: List(vec![Host::Name("api.constantcontact.com".into())]),
            ca_dir: String::new(),
            other_hosts: OtherHosts::default(),
            ports: List(vec![443]),
            allow: List::default(),
            deny: List::default(),
            allow_private: List::default(),
            tunnel_idle_timeout: Span::from_secs(10 * 60),
        }
    }
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Limits {
    pub header_timeout: Span,
    pub body_timeout: Span,
    pub request_timeout: Span,
    pub idle_timeout: Span,
    pub min_rate: Size,
    pub max_connections: usize,
    pub max_requests: usize,
    pub max_buffered: Size,
    pub max_head: Size,
    pub max_headers: usize,
    pub max_target: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Span::from_secs(30),
            body_timeout: Span::from_secs(2 * 60),
            request_timeout: Span::from_secs(60 * 60),
            idle_timeout: Span::from_secs(60),
            min_rate: Size(10),
            max_connections: 10_000,
            max_requests: 1_000,
            max_buffered: Size(64 * 1024 * 1024),
            max_head: Size(16 * 1024),
            max_headers: 100,
            max_target: Size(8 * 1024),
        }
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Log {
    pub format: LogFormat,
    pub level: LogLevel,
    pub report_header: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: LogLevel::default(), report_header: true }
    }
}

/// `log.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// `human` on a terminal, else `json`.
    #[default]
    Auto,
    /// Text for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// `log.level`: of the proxy's own events. What its libraries say is never more than their warnings, since
/// their traces can hold what a client sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the usual names")]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// `[audit]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Audit {
    pub path: String,
    pub max_size: Size,
    pub max_age: Span,
    pub keep: usize,
    pub fsync: Span,
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            path: String::new(),
            max_size: Size(64 * 1024 * 1024),
            max_age: LONGEST_SPAN,
            keep: 30,
            fsync: Span::from_secs(1),
        }
    }
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "proxy.toml documents every key")]
pub struct Admin {
    pub address: String,
    pub token: Secret,
    pub hosts: List<Host>,
    pub exchanges: usize,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            address: "127.0.0.1:9901".into(),
            token: Secret::default(),
            hosts: List::default(),
            exchanges: 10_000,
        }
    }
}

/// A duration, written like "250ms" or "1m 30s".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

/// The longest duration that can be written: a day. More would overflow a clock sooner or later.
const LONGEST: Duration = LONGEST_SPAN.0;
const LONGEST_SPAN: Span = Span::from_secs(24 * 60 * 60);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let duration = humantime::parse_duration(text).map_err(|error| {
            format!("{error}: write a duration like \"250ms\", \"10s\" or \"2m\"")
        })?;
        if duration > LONGEST {
            return Err(
                "is longer than a day: write a duration like \"250ms\", \"10s\" or \"2m\"".into()
            );
        }
        Ok(Self(duration))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number of bytes, written like "1MiB".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size: ByteSize = text
            .parse()
            .map_err(|_| "is not a size: write one like \"64KiB\" or \"1MiB\"".to_string())?;
        usize::try_from(size.as_u64()).map(Self).map_err(|error| error.to_string())
    }
}

impl fmt::Display for Size {
    /// In the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(unit, _)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// Several values: an array, or text with commas between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for List<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// One entry, before it is known what it means.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "write text, or an array of it")]
        enum Written {
            Text(String),
            Number(i64),
            Array(Vec<Written>),
        }

        fn entries(written: Written, into: &mut Vec<String>) {
            match written {
                Written::Text(text) => into.extend(
                    text.split(',').map(str::trim).filter(|it| !it.is_empty()).map(str::to_owned),
                ),
                Written::Number(number) => into.push(number.to_string()),
                Written::Array(all) => all.into_iter().for_each(|one| entries(one, into)),
            }
        }

        let mut texts = Vec::new();
        entries(Written::deserialize(deserializer)?, &mut texts);
        let parse =
            |text: String| text.parse().map_err(|why| D::Error::custom(format!("`{text}`: {why}")));
        texts.into_iter().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

/// What nobody may read in a log or a print-out.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The secret itself. `None` if there is none.
    pub fn reveal(&self) -> Option<&str> {
        Some(&*self.0).filter(|secret| !secret.is_empty())
    }

    const fn shown(&self) -> &'static str {
        if self.0.is_empty() { "" } else { "(hidden)" }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.shown())
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.shown())
    }
}

macro_rules! serde_as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                /// Text, or a number where its unit is missing.
                #[derive(Deserialize)]
                #[serde(untagged, expecting = "write a number and its unit, in quotes")]
                enum Written {
                    Text(String),
                    Number(u64),
                }
                let text = match Written::deserialize(deserializer)? {
                    Written::Text(text) => text,
                    Written::Number(number) => number.to_string(),
                };
                text.parse().map_err(D::Error::custom)
            }
        }
    )+};
}

serde_as_text!(Span, Size);
