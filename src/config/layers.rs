//! The layers of the configuration and where each value came from, so that an error can say it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::{Config, File};

/// The prefix of environment variables that set keys.
const ENVIRONMENT: &str = "OPTIN_PROXY_";

/// Everything that is wrong with a configuration, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(Vec<String>);

/// Values from all layers, the later ones over the earlier ones.
///
/// ```
/// use optin_proxy::config::Layers;
///
/// let mut layers = Layers::default();
/// layers.set("--set", "retry.max_attempt=5");
/// let error = layers.build().unwrap_err().to_string();
/// assert_eq!(error, "--set: unknown key `retry.max_attempt`; did you mean `retry.max_attempts`?");
/// ```
#[derive(Debug, Default)]
pub struct Layers {
    values: Table,
    origins: HashMap<String, Origin>,
    problems: Vec<String>,
}

/// Who set a value.
#[derive(Debug, Clone)]
enum Origin {
    File { name: String, line: usize },
    Variable(String),
    Argument(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name, line } => write!(f, "{name}:{line}"),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Argument(flag) => f.write_str(flag),
        }
    }
}

impl Layers {
    /// Adds the file at `path`.
    pub fn file(&mut self, path: &Path) {
        let name = path.display();
        match std::fs::read(path).map(String::from_utf8) {
            Ok(Ok(text)) => self.toml(&name.to_string(), &text),
            Ok(Err(error)) => {
                let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = memchr::memchr_iter(b'\n', valid).count() + 1;
                self.problems
                    .push(format!("{name}:{line}: this is not UTF-8: save the file as that"));
            }
            Err(error) => self.problems.push(format!(
                "{name}: cannot read the configuration: {error}; name another file with -c, or none"
            )),
        }
    }

    /// Adds a file's text.
    pub fn toml(&mut self, name: &str, text: &str) {
        let line_at = |offset: usize| text[..offset].matches('\n').count() + 1;
        let (spans, values) = match (DeTable::parse(text), text.parse::<Table>()) {
            (Ok(spans), Ok(values)) => (spans.into_inner(), values),
            (spans, values) => {
                let (error, message) = match (spans, values) {
                    (Err(error), _) => {
                        let message = error.message().to_owned();
                        (Some(error), message)
                    }
                    // The parser would repeat the number, and it may have been meant as a secret.
                    (Ok(_), values) => (
                        values.err(),
                        "a number is too large; if it is text, put it in quotes".into(),
                    ),
                };
                let start = error.and_then(|error| error.span()).map_or(0, |span| span.start);
                let line = line_at(start);
                let key = key_at(text, line);
                self.problems.push(format!("{name}:{line}: {key}{message}"));
                return;
            }
        };
        for (section, value) in &spans {
            let section_name = section.get_ref().as_ref();
            let line = line_at(section.span().start);
            let origin = Origin::File { name: name.to_owned(), line };
            if !schema().contains_key(section_name) {
                self.problems.push(format!("{origin}: {}", unknown(&[section_name])));
                continue;
            }
            let (DeValue::Table(keys), Some(Value::Table(values))) =
                (value.get_ref(), values.get(section_name))
            else {
                self.problems.push(format!(
                    "{origin}: `{section_name}` is a section: write [{section_name}] and its keys below"
                ));
                continue;
            };
            for (key, value) in keys {
                let origin =
                    Origin::File { name: name.to_owned(), line: line_at(key.span().start) };
                let key = key.get_ref().as_ref();
                let path = [section_name, key];
                match (value.get_ref(), &values[key]) {
                    (DeValue::Table(entries), Value::Table(values)) if is_open(&path) => {
                        for (entry, _) in entries {
                            let line = line_at(entry.span().start);
                            let origin = Origin::File { name: name.to_owned(), line };
                            let entry = entry.get_ref().as_ref();
                            let path = [section_name, key, entry];
                            self.assign(&path, values[entry].clone(), origin);
                        }
                    }
                    (_, value) => self.assign(&path, value.clone(), origin),
                }
            }
        }
    }

    /// Adds the variables `OPTIN_PROXY_SECTION__KEY`.
    pub fn environment(&mut self, variables: impl Iterator<Item = (OsString, OsString)>) {
        for (name, value) in variables {
            let name = name.to_string_lossy();
            let Some(variable) = name.strip_prefix(ENVIRONMENT) else { continue };
            let origin = Origin::Variable(name.to_string());
            // To go on without what may guard the proxy would be worse than not to start.
            let Ok(text) = value.into_string() else {
                self.problems.push(format!("{origin}: its value is not UTF-8"));
                continue;
            };
            if variable.is_empty() {
                self.problems.push(format!("{origin}: it names no key"));
                continue;
            }
            let Some((section, rest)) = variable.split_once("__") else {
                // Not every variable with our name is a key (Kubernetes makes some of services' names),
                // but one that is nearly a key's was meant as one.
                let meant = all_keys().into_iter().find(|(section, key)| {
                    let name = format!("{section}_{key}").to_ascii_uppercase();
                    let is_half = [section, key].iter().any(|it| it.eq_ignore_ascii_case(variable));
                    is_half || strsim::normalized_damerau_levenshtein(&name, variable) >= 0.85
                });
                if let Some((section, key)) = meant {
                    self.problems.push(format!(
                        "{origin}: two underscores separate section and key: {ENVIRONMENT}{}__{}",
                        section.to_ascii_uppercase(),
                        key.to_ascii_uppercase()
                    ));
                }
                continue;
            };
            let section = section.to_ascii_lowercase();
            // The name of an alias keeps its case.
            match rest.split_once("__") {
                Some((key, entry)) => {
                    let key = key.to_ascii_lowercase();
                    self.assign_text(&[&section, &key, entry], &text, origin);
                }
                None => self.assign_text(&[&section, &rest.to_ascii_lowercase()], &text, origin),
            }
        }
    }

    /// Adds `section.key=value`, as given to the argument `flag`.
    pub fn set(&mut self, flag: &'static str, assignment: &str) {
        let origin = Origin::Argument(flag);
        let Some((path, text)) = assignment.split_once('=') else {
            // What stands there instead may be a secret.
            let is_name = |symbol: char| symbol.is_ascii_alphanumeric() || "._-".contains(symbol);
            let name =
                &assignment[..assignment.find(|it| !is_name(it)).unwrap_or(assignment.len())];
            self.problems.push(format!("{flag}: write section.key=value, not `{name}`"));
            return;
        };
        let parts = dotted(path.trim());
        let path: Vec<&str> = match &parts {
            Some(parts) => parts.iter().map(String::as_str).collect(),
            // A name of the user's own may have dots in it, and what TOML would have in quotes.
            None => path.trim().splitn(3, '.').collect(),
        };
        self.assign_text(&path, text.trim(), origin);
    }

    fn assign_text(&mut self, path: &[&str], text: &str, origin: Origin) {
        // A value that is no TOML (an address, a URL, a bare word) is meant as a string.
        let value = format!("value = {text}")
            .parse::<Table>()
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| Value::String(text.to_owned()));
        // So is a number or a boolean where a string is expected.
        let expects_text =
            is_open(&path[..path.len() - 1]) || matches!(default_of(path), Some(Value::String(_)));
        let value = match value {
            Value::String(_) | Value::Array(_) | Value::Table(_) => value,
            _ if expects_text => Value::String(text.to_owned()),
            value => value,
        };
        self.assign(path, value, origin);
    }

    fn assign(&mut self, path: &[&str], value: Value, origin: Origin) {
        let known = default_of(path).is_some() || (path.len() == 3 && is_open(&path[..2]));
        if !known {
            self.problems.push(format!("{origin}: {}", unknown(path)));
            return;
        }
        let mut table = &mut self.values;
        for section in &path[..path.len() - 1] {
            let entry = table.entry(*section).or_insert_with(|| Value::Table(Table::new()));
            let Value::Table(inner) = entry else { return };
            table = inner;
        }
        table.insert(path[path.len() - 1].to_owned(), value);
        self.origins.insert(path.join("."), origin);
    }

    /// The valid configuration that all layers make up.
    ///
    /// # Errors
    /// Everything that is wrong, each with the place where it was set.
    pub fn build(self) -> Result<Config, ConfigError> {
        if !self.problems.is_empty() {
            return Err(ConfigError(self.problems));
        }
        // What stands in a table was set there, or with the table.
        let place = |key: &str| {
            let table = key.rsplit_once('.').map_or(key, |(table, _)| table);
            let origin = self.origins.get(key).or_else(|| self.origins.get(table));
            origin.map_or_else(|| "default".to_owned(), ToString::to_string)
        };
        let file: File =
            serde_path_to_error::deserialize(self.values.clone()).map_err(|error| {
                let key = error.path().to_string();
                // serde tells what was there instead.
                let message = match key.as_str() {
                    "admin.token" | "listen.proxy_auth" => {
                        "this has to be text: put it in quotes".to_owned()
                    }
                    _ => error.inner().message().to_owned(),
                };
                ConfigError(vec![format!("{}: {key}: {message}", place(&key))])
            })?;
        let mut config = Config::build(file).map_err(|(key, message)| {
            ConfigError(vec![format!("{}: {key}: {message}", place(key))])
        })?;
        // The shipped file repeats the default, and chooses nothing by that.
        config.admin.required = match self.origins.get("admin.address") {
            Some(Origin::File { .. }) => config.admin.address != File::default().admin.address,
            Some(Origin::Variable(_) | Origin::Argument(_)) => true,
            None => false,
        };
        Ok(config)
    }
}

/// The parts of a dotted path as TOML has it, up to three.
fn dotted(path: &str) -> Option<Vec<String>> {
    let mut table: Table = format!("{path} = 0").parse().ok()?;
    let mut parts = Vec::new();
    while let Some((part, value)) = table.into_iter().next() {
        parts.push(part);
        table = match value {
            Value::Table(table) => table,
            _ => Table::new(),
        };
    }
    (parts.len() <= 3).then_some(parts)
}

/// All keys with their defaults.
fn schema() -> Table {
    Table::try_from(File::default()).expect("the defaults are TOML: a test writes them")
}

/// Section and name of every key.
fn all_keys() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (section, keys) in schema() {
        let Value::Table(keys) = keys else { continue };
        all.extend(keys.into_iter().map(|(key, _)| (section.clone(), key)));
    }
    all
}

fn default_of(path: &[&str]) -> Option<Value> {
    let [section, key] = path else { return None };
    schema().get(*section)?.get(*key).cloned()
}

/// Whether the names in this table are the user's own.
fn is_open(path: &[&str]) -> bool {
    path == ["sanitize", "aliases"]
}

/// The key or section that a line of a file is about, before what is said of it; nothing where it is none of ours: what
/// stands there may be a secret.
fn key_at(text: &str, line: usize) -> String {
    let lines: Vec<&str> = text.lines().take(line).map(str::trim).collect();
    let header = |line: &&str| Some(line.strip_prefix('[')?.split_once(']')?.0.trim().to_owned());
    let section = lines.iter().rev().find_map(header).unwrap_or_default();
    let last = lines.last().copied().unwrap_or_default();
    let word = last.split(['=', ' ', '\t']).next().unwrap_or_default();
    let path = if section.is_empty() { word.to_owned() } else { format!("{section}.{word}") };
    let path: Vec<&str> = path.split('.').collect();
    if default_of(&path).is_some() {
        format!("{}: ", path.join("."))
    } else if header(&last).is_some() && schema().contains_key(&section)
        || is_open(&section.split('.').collect::<Vec<_>>())
    {
        format!("{section}: ")
    } else {
        String::new()
    }
}

/// Says that a key is unknown, and which one it may be.
fn unknown(path: &[&str]) -> String {
    let path = path.join(".");
    if schema().contains_key(&path) {
        return format!("`{path}` is a section: name a key of it, like {path}.key=value");
    }
    let mut known: Vec<String> = Vec::new();
    for (section, keys) in &schema() {
        if !path.contains('.') {
            known.push(section.clone());
        }
        known.extend(
            keys.as_table().into_iter().flatten().map(|(key, _)| format!("{section}.{key}")),
        );
    }
    // A key without its section is as good a try as one with a letter wrong.
    let written = path.to_ascii_lowercase();
    fn bare(key: &str) -> &str {
        key.rsplit_once('.').map_or(key, |(_, bare)| bare)
    }
    let likeness = |key: &str| {
        let whole = strsim::normalized_damerau_levenshtein(key, &written);
        whole.max(0.9 * strsim::normalized_damerau_levenshtein(bare(key), bare(&written)))
    };
    let nearest = known
        .iter()
        .map(|key| (likeness(key), key))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((_, key)) => format!("unknown key `{path}`; did you mean `{key}`?"),
        None => format!("unknown key `{path}`; proxy.toml lists all keys"),
    }
}
