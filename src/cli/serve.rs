//! `optin-proxy serve`

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use listenfd::ListenFd;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{ConfigArgs, Failure};
use crate::config::{self, Change, Config, ConfigError};
use crate::observe::admin::Admin;
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::{Reloader, Server};

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
        let flags = [
            ("--listen", "listen.address", self.listen),
            ("--upstream", "upstream.url", self.upstream),
            ("--admin", "admin.address", self.admin),
        ];
        let flags: Vec<_> = flags
            .into_iter()
            .filter_map(|(flag, key, value)| Some((flag, format!("{key}={}", value?))))
            .collect();
        let source = Source { args: self.config, flags };
        let config = Arc::new(source.load()?);
        let level = log::start(&config.log);
        // While there is one thread: what is taken from the environment is removed from it.
        let manager = Manager::meet()?;
        set_process_limits();
        super::block_on(serve(source, config, level, manager))?
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

    /// Says how it goes; to nobody, if nobody asked.
    fn notify(states: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(states) {
            tracing::warn!(%error, "cannot reach the service manager at NOTIFY_SOCKET");
        }
    }
}

/// Where the configuration comes from, now and when it is reloaded.
struct Source {
    args: ConfigArgs,
    flags: Vec<(&'static str, String)>,
}

impl Source {
    fn load(&self) -> Result<Config, ConfigError> {
        self.args.load(&self.flags)
    }
}

/// How often the configuration file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Reloads the configuration on SIGHUP, and when the content of its file has changed.
struct Reload {
    source: Source,
    hangup: Signal,
    content: Option<Vec<u8>>,
    config: Arc<Config>,
    server: Reloader,
    level: log::Level,
    metrics: Arc<Metrics>,
}

impl Reload {
    /// Waits until there is a reason to.
    async fn due(&mut self) {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => {
                    self.content = self.source.args.file_content();
                    return;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            let content = self.source.args.file_content();
            // A file that is just being replaced is not there for a moment.
            if content.is_some() && content != self.content {
                self.content = content;
                return;
            }
        }
    }

    /// Takes effect whole, or not at all.
    fn run(&mut self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            Manager::notify(&[NotifyState::Reloading, now]);
        }
        self.apply();
        Manager::notify(&[NotifyState::Ready]);
    }

    fn apply(&mut self) {
        let config = match self.source.load() {
            Ok(config) => Arc::new(config),
            Err(error) => return self.refuse(&error),
        };
        if let Err(error) = self.server.reload(Arc::clone(&config)) {
            return self.refuse(&error);
        }
        self.level.set(&config.log);
        self.metrics.reloaded(true);
        let changes = self.config.resolved.changes(&config.resolved);
        tracing::info!(changes = changes.len(), "configuration reloaded");
        for change in changes {
            let Change { key, was, now, needs_restart } = change;
            if needs_restart {
                tracing::warn!(key, was, now, "changed, but heeded at the next start only");
            } else {
                tracing::info!(key, was, now, "changed");
            }
        }
        self.config = config;
    }

    fn refuse(&self, error: &dyn std::fmt::Display) {
        self.metrics.reloaded(false);
        tracing::error!(%error, "configuration not reloaded: the last good one stays in force");
    }
}

/// A tunnel has two descriptors, and the usual soft limit is 1,024 for the sake of programs that use
/// `select`, which this one does not. A core dump would hold credentials and contacts.
fn set_process_limits() {
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
) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let metrics = Arc::new(Metrics::default());
    let stop = CancellationToken::new();
    let (shared, measured) = (Arc::clone(&config), Arc::clone(&metrics));
    let server = match manager.proxy {
        Some(listener) => Server::on(TcpListener::from_std(listener)?, shared, measured),
        None => Server::bind(shared, measured).await,
    };
    let mut server = server.map_err(|error| Failure::Failed(error.to_string()))?;
    let mut reload = Reload {
        hangup: signal(SignalKind::hangup())?,
        content: source.args.file_content(),
        source,
        config: Arc::clone(&config),
        server: server.reloader(),
        level,
        metrics: Arc::clone(&metrics),
    };
    let admin = match manager.admin {
        Some(listener) => Some(Admin::on(TcpListener::from_std(listener)?, metrics, stop.clone())?),
        None => bind_admin(&config.admin, metrics, stop.clone()).await?,
    };
    // Whoever started the proxy need not listen to it: it serves all the same.
    let _ = writeln!(io::stdout(), "listening on {}", server.address());
    if let Some(admin) = admin {
        server.also_own(admin.address());
        let _ = writeln!(io::stdout(), "listening on {} (admin)", admin.address());
        tokio::spawn(admin.run());
    }
    tracing::info!(
        address = %server.address(),
        upstream = %format_args!("{}://{}", config.upstream.scheme, config.upstream.authority),
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    let serving = tokio::spawn(server.run(stop.clone()));
    tokio::pin!(serving);
    Manager::notify(&[NotifyState::Ready]);
    let finished = loop {
        tokio::select! {
            finished = &mut serving => break finished,
            () = reload.due() => reload.run(),
            _ = signals.next() => {
                tracing::info!(within = ?reload.config.listen.drain_timeout, "draining");
                Manager::notify(&[NotifyState::Stopping]);
                stop.cancel();
                tokio::select! {
                    finished = &mut serving => break finished,
                    code = signals.next() => std::process::exit(code),
                }
            }
        }
    };
    match finished {
        Ok(0) => tracing::info!("stopped"),
        Ok(cut) => {
            tracing::warn!(
                connections = cut,
                "stopped with requests unfinished at listen.drain_timeout"
            );
        }
        Err(error) => return Err(Failure::Failed(format!("the listener failed: {error}"))),
    }
    Ok(())
}

/// The listener for operators. Where nobody chose its address, the proxy's work does not hang on it:
/// another sidecar on the same host may have the default port already.
async fn bind_admin(
    config: &config::Admin,
    metrics: Arc<Metrics>,
    draining: CancellationToken,
) -> Result<Option<Admin>, Failure> {
    let address = &config.address;
    match Admin::bind(address, metrics, draining).await {
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

/// The signals that end the process, as the exit status that a shell gives each.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
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
