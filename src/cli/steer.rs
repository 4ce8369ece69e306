//! What changes a proxy while it runs: signals, the configuration file, and operators.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::mpsc;

use super::ConfigArgs;
use super::serve::{Signals, TERMINATED};
use crate::config::{Change, Config, ConfigError, File};
use crate::observe::admin::{Asked, Order};
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::Control;

/// How many orders may wait.
pub(super) const ORDERS: usize = 8;

/// How often the configuration file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where the configuration comes from, now and when it is reloaded.
pub(super) struct Source {
    pub args: ConfigArgs,
    pub defaults: Vec<(&'static str, String)>,
    pub flags: Vec<(&'static str, String)>,
}

impl Source {
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.args.load_over(&self.defaults, &self.flags)
    }

    /// What stands in the file, if there is one that can be read.
    pub fn content(&self) -> Option<Vec<u8>> {
        self.args.file_content()
    }
}

/// What the process has to do itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Reload the configuration, and tell who has to know.
    Reload,
    /// Finish and end, with this exit status if there is no time for it.
    Stop(i32),
}

/// Changes a proxy, and says when it is to reload or to end.
pub(super) struct Steering {
    pub source: Arc<Source>,
    pub signals: Signals,
    pub hangup: Signal,
    pub content: Option<Vec<u8>>,
    pub control: Control,
    pub level: log::Level,
    pub metrics: Arc<Metrics>,
    pub asked: mpsc::Receiver<Asked>,
}

impl Steering {
    /// Waits for a reason to reload or to end; what else is asked for is done meanwhile.
    pub async fn next(&mut self) -> Wish {
        loop {
            let source = Arc::clone(&self.source);
            let look = async move {
                tokio::time::sleep(LOOK).await;
                // A file system that hangs must not make the process deaf.
                tokio::task::spawn_blocking(move || source.content()).await
            };
            tokio::select! {
                code = self.signals.next() => return Wish::Stop(code),
                _ = self.hangup.recv() => {
                    self.content = self.source.content();
                    return Wish::Reload;
                }
                Some(Asked { order, answer }) = self.asked.recv() => {
                    let done = match order {
                        Order::Quit => {
                            // Who asked may have gone.
                            let _ = answer.send(Ok("Finishing what is in flight, then ending.".into()));
                            return Wish::Stop(TERMINATED);
                        }
                        Order::Reload => {
                            self.content = self.source.content();
                            self.reload()
                        }
                        Order::Mode(mode) => self.change(|file| file.sanitize.mode = mode),
                        Order::Level(level) => self.change(|file| file.log.level = level),
                    };
                    let _ = answer.send(done);
                }
                content = look => {
                    let content = content.ok().flatten();
                    // A file that is just being replaced is not there for a moment.
                    if content.is_some() && content != self.content {
                        self.content = content;
                        return Wish::Reload;
                    }
                }
            }
        }
    }

    /// Takes effect whole, or not at all. One sentence on what came of it.
    pub fn reload(&mut self) -> Result<String, String> {
        let applied = match self.source.load() {
            Ok(config) => self.apply(config),
            Err(error) => Err(error.to_string()),
        };
        self.metrics.reloaded(applied.is_ok());
        if let Err(error) = &applied {
            tracing::error!(%error, "configuration not reloaded: the last good one stays in force");
        }
        applied
    }

    /// Changes one thing, until the next reload.
    fn change(&mut self, change: impl FnOnce(&mut File)) -> Result<String, String> {
        let mut file = self.control.config().resolved.clone();
        change(&mut file);
        let fault = |error: &dyn Display| format!("{error}; nothing was changed");
        let config = Config::again(file).map_err(|error| fault(&error))?;
        self.apply(config)
    }

    fn apply(&mut self, config: Config) -> Result<String, String> {
        let (before, config) = (self.control.config(), Arc::new(config));
        self.control.reload(Arc::clone(&config)).map_err(|error| error.to_string())?;
        self.level.set(&config.log);
        let changes = before.resolved.changes(&config.resolved);
        tracing::info!(changes = changes.len(), "configuration reloaded");
        let mut words = Vec::new();
        for Change { key, was, now, needs_restart } in changes {
            if needs_restart {
                tracing::warn!(key, was, now, "changed, but heeded at the next start only");
                words.push(format!("{key} is {now} (heeded at the next start only)"));
            } else {
                tracing::info!(key, was, now, "changed");
                words.push(format!("{key} is {now}"));
            }
        }
        Ok(if words.is_empty() { "Nothing has changed.".into() } else { words.join(", ") })
    }
}
