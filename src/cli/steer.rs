//! What changes a proxy while it runs: signals, the configuration file, and operators.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::ConfigArgs;
use super::serve::{Signals, notify};
use crate::config::{Change, Config, ConfigError};
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
    args: ConfigArgs,
    defaults: Vec<(&'static str, String)>,
    flags: Vec<(&'static str, String)>,
    /// What stood in the file before it was loaded first: what is another since is to be loaded.
    content: Option<Vec<u8>>,
}

impl Source {
    pub fn new(
        args: ConfigArgs,
        defaults: Vec<(&'static str, String)>,
        flags: Vec<(&'static str, String)>,
    ) -> Self {
        let content = args.file_content();
        Self { args, defaults, flags, content }
    }

    pub fn load(&self) -> Result<Config, ConfigError> {
        self.args.load_over(&self.defaults, &self.flags)
    }

    /// What stands in the file, if there is one that can be read again and again.
    pub fn content(&self) -> Option<Vec<u8>> {
        self.args.file_content()
    }

    fn load_again(&self) -> Result<Config, String> {
        self.args.check_again()?;
        self.load().map_err(|error| error.to_string())
    }
}

/// What a proxy is changed by.
pub(super) struct Hand {
    pub source: Source,
    pub control: Control,
    pub level: log::Level,
    pub metrics: Arc<Metrics>,
    /// Keys that this command heeds at its start only, beside those of all.
    pub at_start: &'static [&'static str],
}

/// Changes a proxy, and says when it is to end.
pub(super) struct Steering {
    hand: Arc<Hand>,
    signals: Signals,
    /// What the file said when it was read.
    content: Option<Vec<u8>>,
    /// What it said when it was last looked at.
    seen: Option<Vec<u8>>,
    looks: Interval,
    asked: mpsc::Receiver<Asked>,
}

impl Steering {
    /// Heeds signals, the configuration file, and what comes from `asked`.
    pub fn new(hand: Hand, signals: Signals, asked: mpsc::Receiver<Asked>) -> Self {
        let content = hand.source.content.clone();
        let mut looks = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { hand: Arc::new(hand), signals, content, seen: None, looks, asked }
    }

    /// Does what is asked for, until the process is to finish and to end: with this exit status if there is no time for it.
    pub async fn until_stop(&mut self) -> i32 {
        loop {
            if let Err(code) = self.step().await {
                return code;
            }
        }
    }

    /// Waits for one thing to do, and does it; the exit status if that is to stop.
    async fn step(&mut self) -> Result<(), i32> {
        let hand = Arc::clone(&self.hand);
        let looks = &mut self.looks;
        let look = async move {
            looks.tick().await;
            tokio::task::spawn_blocking(move || hand.source.content()).await
        };
        tokio::select! {
            code = self.signals.stop.next() => return Err(code),
            _ = self.signals.hangup.recv() => self.reload_openly().await?,
            Some(Asked { order, answer }) = self.asked.recv() => {
                // Nobody waits for it any more, and who did was told that it is not done.
                if answer.is_closed() {
                    return Ok(());
                }
                let done = match order {
                    Order::Reload => self.reload().await?,
                    Order::Mode(mode) => {
                        self.apart(move |hand| hand.change(|it| it.with_mode(mode))).await?
                    }
                    Order::Level(level) => {
                        self.apart(move |hand| hand.change(|it| it.with_level(level))).await?
                    }
                };
                // Who asked may have gone.
                let _ = answer.send(done);
            }
            content = look => {
                let content = content.ok().flatten();
                // One that is just being written is not there for a moment, or empty, or changes still.
                let is_written = content.as_ref().is_some_and(|it| !it.trim_ascii().is_empty());
                if content != self.content && is_written && self.seen == content {
                    self.reload_openly().await?;
                }
                self.seen = content;
            }
        }
        Ok(())
    }

    /// Reloads, and lets the service manager know.
    async fn reload_openly(&mut self) -> Result<(), i32> {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        // It has logged what came of it.
        let reloaded = self.reload().await.map(drop);
        notify(&[NotifyState::Ready]);
        reloaded
    }

    async fn reload(&mut self) -> Result<Result<String, String>, i32> {
        self.apart(|hand| hand.source.content()).await.map(|content| self.content = content)?;
        self.apart(Hand::reload).await
    }

    /// Has something done where it may take its time: neither requests nor signals wait for a file system that hangs. What was
    /// begun is done even if a signal comes first.
    async fn apart<T, W>(&mut self, work: W) -> Result<T, i32>
    where
        T: Send + 'static,
        W: FnOnce(&Hand) -> T + Send + 'static,
    {
        let hand = Arc::clone(&self.hand);
        tokio::select! {
            done = tokio::task::spawn_blocking(move || work(&hand)) => match done {
                Ok(done) => Ok(done),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            },
            code = self.signals.stop.next() => Err(code),
        }
    }
}

impl Hand {
    /// Takes effect whole, or not at all. One sentence on what came of it.
    fn reload(&self) -> Result<String, String> {
        let applied = self.source.load_again().and_then(|config| {
            let (before, config) = (self.control.config(), Arc::new(config));
            self.control.reload(Arc::clone(&config)).map_err(|error| error.to_string())?;
            Ok(self.applied("configuration reloaded", &before, &config))
        });
        self.metrics.reloaded(applied.is_ok());
        if let Err(error) = &applied {
            tracing::error!(%error, "configuration not reloaded: the last good one stays in force");
        }
        applied
    }

    /// Changes one thing, until the next reload.
    fn change(&self, change: impl FnOnce(Config) -> Config) -> Result<String, String> {
        let before = self.control.config();
        let config = Arc::new(change(Config::clone(&before)));
        self.control.adjust(Arc::clone(&config));
        Ok(self.applied("configuration adjusted", &before, &config))
    }

    /// Says what is another now.
    fn applied(&self, done: &str, before: &Config, config: &Config) -> String {
        self.level.set(&config.log);
        let changes = before.changes(config);
        tracing::info!(changes = changes.len(), "{done}");
        let mut words = Vec::new();
        for Change { key, was, now, needs_restart } in changes {
            if needs_restart || self.at_start.contains(&key.as_str()) {
                tracing::warn!(key, was, now, "changed, but heeded at the next start only");
                words.push(format!("{key} is {now} (heeded at the next start only)"));
            } else {
                tracing::info!(key, was, now, "changed");
                words.push(format!("{key} is {now}"));
            }
        }
        if words.is_empty() { "Nothing has changed.".into() } else { words.join(", ") }
    }
}
