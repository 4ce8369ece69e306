//! Where events go: standard error, as text for people or as JSON for machines.

use std::io::{self, IsTerminal};

use tracing_subscriber::Registry;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Log, LogFormat, LogLevel};

/// Changes how much is logged.
pub struct Level(reload::Handle<Targets, Registry>);

impl Level {
    /// From now on by `log.level`.
    pub fn set(&self, log: &Log) {
        // Fails only where the subscriber has gone, and the process with it.
        let _ = self.0.reload(filter(log));
    }
}

/// Starts logging for the whole process. A second call changes nothing.
pub fn start(log: &Log) -> Level {
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Human => false,
        LogFormat::Auto => !io::stderr().is_terminal(),
    };
    let (filter, handle) = reload::Layer::new(filter(log));
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    // Fails only where a subscriber is set already, as in a test process with several proxies.
    let _ = if json {
        registry.with(layer.json().flatten_event(true).with_current_span(false)).try_init()
    } else {
        registry.with(layer.with_target(false).with_ansi(io::stderr().is_terminal())).try_init()
    };
    Level(handle)
}

/// The proxy's own events as wanted, its libraries' never below their warnings: what they trace can hold
/// what a client sent.
fn filter(log: &Log) -> Targets {
    let level = match log.level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_target(env!("CARGO_CRATE_NAME"), level)
        .with_default(level.min(LevelFilter::WARN))
}
