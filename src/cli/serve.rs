//! `optin-proxy serve`

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use listenfd::ListenFd;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::disable_transparent_huge_pages;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use super::steer::{Hand, ORDERS, Source, Steering};
use super::{ConfigArgs, Failure};
use crate::config::{self, Config};
use crate::observe::admin::{Admin, Desk};
use crate::observe::audit::Audit;
use crate::observe::journal::{Journal, Outlet};
use crate::observe::log;
use crate::observe::metrics::Metrics;
#[cfg(feature = "otel")]
use crate::observe::otlp::Spans;
use crate::proxy::{Control, Server};

#[derive(Debug, Args)]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address to listen on; port 0 takes any that is free [listen.address]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where requests go [upstream.url]
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Address for operators: probes and metrics [admin.address]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
}

impl Serve {
    pub fn run(self) -> Result<(), Failure> {
        refuse_huge_pages();
        let flags = [
            ("--listen", "listen.address", self.listen),
            ("--upstream", "upstream.url", self.upstream),
            ("--admin", "admin.address", self.admin),
        ];
        let flags: Vec<_> = flags
            .into_iter()
            .filter_map(|(flag, key, value)| Some((flag, format!("{key}={}", value?))))
            .collect();
        let source = Source::new(self.config, Vec::new(), flags);
        let config = Arc::new(source.load()?);
        let level = log::start(&config.log);
        // Before any other thread asks for it: what is taken from the environment is removed from it.
        let manager = Manager::meet()?;
        set_process_limits();
        let (ended, journal) = super::block_on(serve(source, config, level, manager))??;
        // What was cut has left its record by now.
        super::block_on(ended.finish(journal))?
    }
}

/// How the records of what came last are waited for: with `listen.drain_timeout`, [`super::LAST_TASKS`] and
/// [`super::LAST_LINES`] it stays below the 30 s that Kubernetes gives. Who is in a hurry gets what can be had at once.
pub(super) const FLUSH: Duration = Duration::from_secs(3);
const FLUSH_IN_HURRY: Duration = Duration::from_millis(200);

/// Ends the process at once.
pub(super) fn exit(code: i32) -> ! {
    log::flush(FLUSH_IN_HURRY);
    std::process::exit(code)
}

/// How serving came to its end.
pub(super) enum Ended {
    /// After all was finished, or its time was up.
    Drained(Result<usize, JoinError>),
    /// By a second signal: with this exit status.
    Cut(i32),
}

impl Ended {
    /// Writes what is still to be written of it, and says how it went.
    pub async fn finish(self, journal: Journal) -> Result<(), Failure> {
        let mut signals = Stop::listen()?;
        let limit = if let Self::Cut(_) = self { FLUSH_IN_HURRY } else { FLUSH };
        let written = tokio::task::spawn_blocking(move || journal.flush(limit));
        tokio::select! {
            _ = written => {}
            code = signals.next() => exit(code),
        }
        match self {
            Self::Drained(Ok(0)) => tracing::info!("stopped"),
            Self::Drained(Ok(cut)) => {
                tracing::warn!(
                    connections = cut,
                    "stopped with requests unfinished at listen.drain_timeout"
                );
            }
            Self::Drained(Err(error)) => {
                return Err(Failure::Failed(format!("the listener failed: {error}")));
            }
            Self::Cut(code) => exit(code),
        }
        Ok(())
    }
}

/// What started this process, if it is a service manager: sd_listen_fds(3), sd_notify(3).
struct Manager {
    /// The proxy's listener, bound already and kept open beyond this process.
    proxy: Option<std::net::TcpListener>,
    /// The one for operators.
    admin: Option<std::net::TcpListener>,
}

impl Manager {
    fn meet() -> Result<Self, Failure> {
        let mut sockets = ListenFd::from_env();
        if sockets.len() > 2 {
            return Err(Failure::Failed(format!(
                "{} sockets were passed on: the first is for the proxy, the second, if any, for operators",
                sockets.len()
            )));
        }
        let mut take = |index| -> Result<Option<std::net::TcpListener>, Failure> {
            if index >= sockets.len() {
                return Ok(None);
            }
            let fault = |error| {
                Failure::Failed(format!(
                    "socket {index} that was passed on is no TCP listener: {error}"
                ))
            };
            let listener = sockets.take_tcp_listener(index).map_err(fault)?;
            if let Some(listener) = &listener {
                listener.set_nonblocking(true).map_err(fault)?;
            }
            Ok(listener)
        };
        Ok(Self { proxy: take(0)?, admin: take(1)? })
    }
}

/// Tells the service manager how it goes; nobody, if nobody asked.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot reach the service manager at NOTIFY_SOCKET");
    }
}

/// Before there is much memory: where a system gives huge pages to all, an idle process would hold twice as much.
pub(super) fn refuse_huge_pages() {
    // Where that cannot be had, it is memory that is lost, and nothing else.
    let _ = disable_transparent_huge_pages(true);
}

/// A tunnel has two descriptors, and the usual soft limit is 1,024 for the sake of programs that use
/// `select`, which this one does not. A core dump would hold credentials and contacts.
pub(super) fn set_process_limits() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "cannot turn core dumps off");
    }
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(limit = ?limit.current, %error, "cannot raise the limit of open descriptors");
    }
}

async fn serve(
    source: Source,
    config: Arc<Config>,
    level: log::Level,
    manager: Manager,
) -> Result<(Ended, Journal), Failure> {
    let signals = Signals::listen()?;
    let metrics = Arc::new(Metrics::default());
    let journal = start_journal(&config, &metrics)?;
    let stop = CancellationToken::new();
    let (shared, measured) = (Arc::clone(&config), Arc::clone(&metrics));
    let server = match manager.proxy {
        Some(listener) => Server::on(TcpListener::from_std(listener)?, shared, measured),
        None => Server::bind(shared, measured).await,
    };
    let mut server = server.map_err(|error| Failure::Failed(error.to_string()))?;
    server.keep(journal.clone());
    let (orders, asked) = mpsc::channel(ORDERS);
    let control = server.control();
    let hand = Hand {
        source,
        control: control.clone(),
        level,
        metrics: Arc::clone(&metrics),
        at_start: &[],
    };
    let steering = Steering::new(hand, signals, asked);
    let admin = match manager.admin {
        Some(listener) => Some(Admin::on(TcpListener::from_std(listener)?)?),
        None => bind_admin(&config.admin).await?,
    };
    // Whoever started the proxy need not listen to it: it serves all the same.
    let _ = writeln!(io::stdout(), "listening on {}", server.address());
    if let Some(admin) = admin {
        server.also_own(admin.address());
        let _ = writeln!(io::stdout(), "listening on {} (admin)", admin.address());
        let journal = journal.clone();
        tokio::spawn(admin.run(Desk { metrics, control: control.clone(), journal, orders }));
    }
    tracing::info!(
        address = %server.address(),
        upstream = %format_args!("{}://{}", config.upstream.scheme, config.upstream.authority),
        ready_in_ms = super::running_for().as_secs_f64() * 1000.0,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    let serving = tokio::spawn(server.run(stop.clone()));
    Ok((steer(serving, steering, control, stop).await, journal))
}

/// Heeds signals and operators until serving has come to its end.
pub(super) async fn steer(
    mut serving: JoinHandle<usize>,
    mut steering: Steering,
    control: Control,
    stop: CancellationToken,
) -> Ended {
    notify(&[NotifyState::Ready]);
    loop {
        tokio::select! {
            finished = &mut serving => return Ended::Drained(finished),
            code = steering.until_stop() => {
                if stop.is_cancelled() {
                    control.cut();
                    return Ended::Cut(code);
                }
                let within = control.config().listen.drain_timeout;
                tracing::info!(?within, "draining");
                notify(&[NotifyState::Stopping]);
                stop.cancel();
            }
        }
    }
}

/// What keeps the exchanges, and the audit trail if there is to be one.
pub(super) fn start_journal(config: &Config, metrics: &Arc<Metrics>) -> Result<Journal, Failure> {
    let audit = config.audit.path.as_ref().map(|path| {
        Audit::start(path, &config.audit, Arc::clone(metrics)).map_err(|error| {
            Failure::Failed(format!(
                "audit.path: {}: {error}; see that this user may write there, or choose another file",
                path.display()
            ))
        })
    });
    let (audit, metrics) = (audit.transpose()?, Arc::clone(metrics));
    Ok(Journal::start_with(config.admin.exchanges, audit, outlet()?, metrics)?)
}

/// Who else is told of each exchange: a collector of spans, if the environment names one.
#[cfg(feature = "otel")]
fn outlet() -> Result<Option<Box<dyn Outlet>>, Failure> {
    let spans = Spans::from_env().map_err(|error| {
        Failure::Failed(format!(
            "OTEL_EXPORTER_OTLP_ENDPOINT: {error}; it has to be the http:// address of a collector's gRPC port, as in http://127.0.0.1:4317"
        ))
    });
    Ok(spans?.map(|spans| Box::new(spans) as Box<dyn Outlet>))
}

#[cfg(not(feature = "otel"))]
fn outlet() -> Result<Option<Box<dyn Outlet>>, Failure> {
    Ok(None)
}

/// The listener for operators. Where nobody chose its address, the proxy's work does not hang on it:
/// another sidecar on the same host may have the default port already.
pub(super) async fn bind_admin(config: &config::Admin) -> Result<Option<Admin>, Failure> {
    let address = &config.address;
    match Admin::bind(address).await {
        Ok(admin) => Ok(Some(admin)),
        Err(error) if config.required => Err(Failure::Failed(format!(
            "cannot listen on {address}: {error}; choose another address with admin.address or --admin"
        ))),
        Err(error) => {
            tracing::warn!(%address, %error, "no admin listener: set admin.address to one that is free");
            Ok(None)
        }
    }
}

/// What a process is told by signals.
pub(super) struct Signals {
    pub stop: Stop,
    /// Reload the configuration.
    pub hangup: Signal,
}

impl Signals {
    /// To be asked for early: until then they end the process. So does, for good, one that comes of a file that grew beyond
    /// the limit of `ulimit -f`; from now on that is a fault of the write.
    pub fn listen() -> io::Result<Self> {
        let too_large = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
        drop(signal(too_large)?);
        Ok(Self { stop: Stop::listen()?, hangup: signal(SignalKind::hangup())? })
    }
}

/// The signals that end the process, as the exit status that a shell gives each.
pub(super) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => 128 + 2,
            _ = self.terminate.recv() => 128 + 15,
        }
    }
}
