//! `optin-proxy serve`

use std::io::{self, Write};
use std::sync::Arc;

use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{ConfigArgs, Failure};
use crate::config::{self, Config};
use crate::observe::admin::Admin;
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::Server;

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
        let config = Arc::new(self.config.load(&flags)?);
        log::start(&config.log);
        raise_descriptor_limit();
        super::block_on(serve(config))?
    }
}

/// A tunnel has two descriptors, and the usual soft limit is 1,024 for the sake of programs that use
/// `select`, which this one does not.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(limit = ?limit.current, %error, "cannot raise the limit of open descriptors");
    }
}

async fn serve(config: Arc<Config>) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let metrics = Arc::new(Metrics::default());
    let stop = CancellationToken::new();
    let mut server = Server::bind(Arc::clone(&config), Arc::clone(&metrics))
        .await
        .map_err(|error| Failure::Failed(error.to_string()))?;
    let admin = bind_admin(&config.admin, metrics, stop.clone()).await?;
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
    let finished = tokio::select! {
        finished = &mut serving => finished,
        _ = signals.next() => {
            tracing::info!(within = ?config.listen.drain_timeout, "draining");
            stop.cancel();
            tokio::select! {
                finished = &mut serving => finished,
                code = signals.next() => std::process::exit(code),
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
