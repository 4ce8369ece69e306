//! Where events go: standard error, as text for people or as JSON for machines.
//!
//! Lines are gathered in memory, and a thread of their own writes them: whoever reads them slowly, or not at all,
//! costs lines, which are counted, and no request. A system call for each would also be most of what a request
//! with findings costs. (tracing-appender's writer wakes its thread for each line, has no bound in bytes, and cannot say
//! in the log that lines were lost.)

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::json::Json;
use crate::config::{Log, LogFormat, LogLevel};

/// How much may wait to be written, in bytes: some ten thousand lines, what all cores together make of a rush until the thread
/// that writes has its turn.
const WAITING: usize = 4 * 1024 * 1024;

/// How long lines gather while there are many, unless there is [`ROOM`] full of them. The first after a silence is written at
/// once.
const TICK: Duration = Duration::from_millis(5);

/// How much room is kept for them, in bytes.
const ROOM: usize = 64 * 1024;

/// How long nothing may be taken before nobody waits for it any more.
const STUCK: Duration = Duration::from_secs(1);

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
    let lines = LINES.get_or_init(Lines::start);
    let layer = tracing_subscriber::fmt::layer().with_writer(lines);
    // Fails only where a subscriber is set already, as in a test process with several proxies.
    let _ = if json {
        registry.with(layer.event_format(Json)).try_init()
    } else {
        registry.with(layer.with_target(false).with_ansi(io::stderr().is_terminal())).try_init()
    };
    Level(handle)
}

/// Waits until all lines are written, for so long at most.
pub fn flush(limit: Duration) {
    if let Some(Lines(Some(shared))) = LINES.get() {
        shared.flush(limit);
    }
}

/// Waits while there is little room for a line, as long as somebody takes them and `may_wait`.
pub(super) fn await_room(may_wait: impl Fn() -> bool) {
    if let Some(Lines(Some(shared))) = LINES.get() {
        shared.await_room(may_wait, STUCK);
    }
}

/// Lines that there was no room for.
pub(super) fn lost() -> Counter {
    LOST.clone()
}

static LINES: OnceLock<Lines> = OnceLock::new();
static LOST: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Takes lines for the thread that writes them; without one, they are written where they come from.
struct Lines(Option<Arc<Shared>>);

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// A line has come to a thread that sleeps, or many to one that lets them gather.
    came: Condvar,
    /// Some have been taken.
    room: Condvar,
    /// Everything is written.
    done: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Since this was last said.
    lost: u64,
    /// The thread is told once there is so much.
    wanted: Option<usize>,
    writes: bool,
    /// They have not been taken for [`STUCK`].
    is_stuck: bool,
}

impl Lines {
    fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let thread = Arc::clone(&shared);
        // A descriptor of its own: whoever else has something to say on standard error must not wait for this.
        let own = io::stderr().as_fd().try_clone_to_owned().map(File::from);
        let started = own.and_then(|own| {
            thread::Builder::new().name("log".into()).spawn(move || thread.write_to(own))
        });
        Self(started.is_ok().then_some(shared))
    }
}

impl<'a> MakeWriter<'a> for &'static Lines {
    type Writer = &'static Lines;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl Write for &Lines {
    /// Takes one line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Some(shared) => shared.take(line),
            None => io::stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn take(&self, line: &[u8]) {
        let mut waiting = self.waiting.lock();
        if waiting.lines.len() + line.len() > WAITING {
            waiting.lost += 1;
            LOST.inc();
            return;
        }
        waiting.lines.extend_from_slice(line);
        if waiting.wanted.is_some_and(|wanted| waiting.lines.len() >= wanted) {
            waiting.wanted = None;
            self.came.notify_one();
        }
    }

    fn await_room(&self, may_wait: impl Fn() -> bool, stuck: Duration) {
        let mut waiting = self.waiting.lock();
        let begun = Instant::now();
        while waiting.lines.len() > WAITING / 2 && !waiting.is_stuck && may_wait() {
            waiting.is_stuck = begun.elapsed() > stuck;
            self.room.wait_for(&mut waiting, TICK);
        }
    }

    fn write_to(&self, mut out: impl Write) {
        let mut lines = Vec::new();
        let mut failed = false;
        loop {
            let mut waiting = self.waiting.lock();
            waiting.writes = false;
            while waiting.lines.is_empty() {
                self.done.notify_all();
                waiting.wanted = Some(1);
                self.came.wait(&mut waiting);
            }
            std::mem::swap(&mut waiting.lines, &mut lines);
            waiting.writes = true;
            waiting.is_stuck = false;
            self.room.notify_all();
            // Where nothing can be written, a notice would be one more line to be lost.
            let lost = if failed { 0 } else { std::mem::take(&mut waiting.lost) };
            drop(waiting);
            // Now, while there is room for it.
            if lost > 0 {
                tracing::error!(
                    lines = lost,
                    "lines of this log were lost: whoever reads it is too slow, or cannot take them"
                );
            }
            let written = write(&mut out, &lines);
            failed = written < lines.len();
            if failed {
                // What was begun of a line must not run into the next one.
                let _ = out.write(b"\n");
                let unwritten = memchr::memchr_iter(b'\n', &lines[written..]).count() as u64;
                LOST.inc_by(unwritten);
                self.waiting.lock().lost += unwritten;
            }
            lines.clear();
            lines.shrink_to(ROOM);
            self.gather();
        }
    }

    /// Lets lines gather for a while.
    fn gather(&self) {
        let mut waiting = self.waiting.lock();
        waiting.wanted = Some(ROOM);
        let is_little = |waiting: &mut Waiting| waiting.lines.len() < ROOM;
        self.came.wait_while_for(&mut waiting, is_little, TICK);
        waiting.wanted = None;
    }

    fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut waiting = self.waiting.lock();
        while !waiting.lines.is_empty() || waiting.writes {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.done.wait_for(&mut waiting, left);
        }
    }
}

/// Writes as much as can be written. A pipe that somebody made non-blocking is waited for.
fn write(out: &mut impl Write, lines: &[u8]) -> usize {
    let mut written = 0;
    while written < lines.len() {
        match out.write(&lines[written..]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(TICK),
            Err(_) => break,
        }
    }
    written
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written goes to this, a little at a time.
    struct Slow(Arc<Mutex<Vec<u8>>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            thread::yield_now();
            let some = bytes.len().min(4096);
            self.0.lock().extend_from_slice(&bytes[..some]);
            Ok(some)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Regression: what came faster than it was taken was lost, though it was taken.
    #[test]
    fn whoever_may_wait_loses_no_line_to_a_reader_that_is_only_slower() {
        let (shared, written) = (Arc::<Shared>::default(), Arc::default());
        let (thread, out) = (Arc::clone(&shared), Slow(Arc::clone(&written)));
        thread::spawn(move || thread.write_to(out));
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..5 * WAITING / line.len() {
            shared.await_room(|| true, Duration::MAX);
            shared.take(&line);
        }
        shared.flush(Duration::from_secs(60));
        assert_eq!(written.lock().len(), 5 * WAITING / line.len() * line.len());
    }

    #[test]
    fn nobody_waits_for_room_while_nothing_is_taken() {
        let shared = Shared::default();
        shared.waiting.lock().lines = vec![b'\n'; WAITING];
        shared.await_room(|| false, Duration::MAX);
        shared.await_room(|| true, Duration::ZERO);
        // Whoever comes later does not wait either.
        shared.await_room(|| true, Duration::MAX);
        shared.take(b"x\n");
        assert_eq!(shared.waiting.lock().lost, 1);
    }
}
