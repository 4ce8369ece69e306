//! What two configurations differ in.

use toml::{Table, Value};

use super::{Config, File};

/// Keys that are heeded at start only.
const AT_START: [&str; 10] = [
    "listen.address",
    "admin.address",
    "admin.exchanges",
    "audit.fsync",
    "audit.keep",
    "audit.max_age",
    "audit.max_size",
    "audit.path",
    "limits.max_connections",
    "log.format",
];

/// One key whose value is another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The dotted key.
    pub key: String,
    /// Its value before. Secrets are hidden.
    pub was: String,
    /// Its value now.
    pub now: String,
    /// It has no effect before the next start.
    pub needs_restart: bool,
}

impl Config {
    /// The keys that differ in `other`, or what is in the files that they name.
    pub fn changes(&self, other: &Self) -> Vec<Change> {
        let (before, after) = (keys(&self.resolved), keys(&other.resolved));
        let change = |key: &str, was: String, now: String| {
            let needs_restart = AT_START.contains(&key);
            Change { key: key.to_owned(), was, now, needs_restart }
        };
        let mut changes: Vec<_> = before
            .iter()
            .zip(&after)
            .filter(|((_, was), (_, now))| was != now)
            .map(|((key, was), (_, now))| change(key, was.to_string(), now.to_string()))
            .collect();
        // They look the same, whatever they are.
        let unseen = [
            ("listen.proxy_auth", self.listen.proxy_auth != other.listen.proxy_auth),
            ("admin.token", self.admin.token != other.admin.token),
            ("upstream.ca_file", self.upstream.authorities != other.upstream.authorities),
        ];
        for (key, differs) in unseen {
            if differs && !changes.iter().any(|change| change.key == key) {
                changes.push(change(key, "(hidden)".into(), "(hidden)".into()));
            }
        }
        changes
    }
}

/// All keys with their values: as many for every file, in one order.
fn keys(file: &File) -> Vec<(String, Value)> {
    let table = Table::try_from(file).unwrap_or_default();
    let mut all = Vec::new();
    for (section, keys) in table {
        let Value::Table(keys) = keys else { continue };
        all.extend(keys.into_iter().map(|(key, value)| (format!("{section}.{key}"), value)));
    }
    all
}
