//! `optin-proxy exec -- command`: runs a command whose https requests go through the proxy.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustix::process::{Pid, kill_process};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::serve::{FLUSH, start_journal};
use super::{ConfigArgs, Failure, ca, env};
use crate::config::Config;
use crate::intercept::trust::{Files, variables};
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::Server;

/// How long a proxy that is to be used may take to accept a connection.
const READY_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct Exec {
    #[command(flatten)]
    config: ConfigArgs,
    /// Use the proxy that runs at this address, instead of one for this command alone
    #[arg(long, value_name = "HOST:PORT")]
    proxy: Option<String>,
    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

impl Exec {
    pub fn run(self) -> Result<(), Failure> {
        // The command's own output is what people want to see.
        let quiet = ("exec", "log.level=warn".to_owned());
        // A proxy for this command alone is not the one that the file is about: it takes any port, is on
        // loopback, and asks nobody who they are.
        let alone = [
            ("exec", "listen.address=127.0.0.1:0".to_owned()),
            ("exec", "listen.allow_from=[]".to_owned()),
            ("exec", "listen.proxy_auth=".to_owned()),
        ];
        let own: &[_] = if self.proxy.is_none() { &alone } else { &[] };
        let config = Arc::new(self.config.load_over(&[quiet], own)?);
        log::start(&config.log);
        let status = super::block_on(exec(config, self.proxy, &self.command))??;
        Err(Failure::Status(status))
    }
}

/// Runs the command; its exit status as a shell would give it.
async fn exec(
    config: Arc<Config>,
    proxy: Option<String>,
    command: &[OsString],
) -> Result<u8, Failure> {
    let authority = ca::open(&config)?;
    let stop = CancellationToken::new();
    let mut journal = None;
    let (address, own) = match proxy {
        Some(proxy) => {
            let reached = env::reached(&config, &proxy)?;
            wait_for(&reached.authority).await?;
            env::agrees(&config, &reached, &authority).await?;
            (proxy, None)
        }
        None => {
            let metrics = Arc::new(Metrics::default());
            let kept = journal.insert(start_journal(&config, &metrics)?).clone();
            let mut server = Server::bind(Arc::clone(&config), metrics)
                .await
                .map_err(|error| Failure::Failed(error.to_string()))?;
            server.keep(kept);
            // Bound: whoever connects from now on is served.
            let address = server.address().to_string();
            (address, Some(tokio::spawn(server.run(stop.clone()))))
        }
    };
    let environment = |name: &str| std::env::var_os(name);
    // The command's alone: another one may run with another environment.
    let folder = tempfile::tempdir().map_err(|error| {
        Failure::Failed(format!("cannot make a temporary folder: {error}; name another in TMPDIR"))
    })?;
    let files = Files::write(folder.path(), &authority, &environment).map_err(ca::failed)?;
    let proxy = env::reached(&config, &address)?;
    let (all, left_out) = variables(&proxy, &files, &config.intercept.rules.hosts, &environment);
    for why in left_out {
        tracing::warn!("{why}");
    }

    let mut signals = Forwarded::listen()?;
    let (program, arguments) = command.split_first().ok_or(Failure::Status(2))?;
    let child = Command::new(program).args(arguments).envs(all).spawn();
    let status = match child {
        Ok(child) => Ok(code(signals.until_end(child).await?)),
        Err(error) => Err(Failure::Command {
            message: format!("cannot run {}: {error}", program.display()),
            // As shells have it.
            status: if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 },
        }),
    };
    stop.cancel();
    let Some(own) = own else { return status };
    tokio::select! {
        served = own => match served {
            Ok(0) => {}
            Ok(cut) => tracing::warn!(
                connections = cut,
                "stopped with requests unfinished at listen.drain_timeout"
            ),
            Err(error) => tracing::error!(%error, "the listener failed"),
        },
        // There is no command any more to pass it on to.
        _ = signals.next() => tracing::warn!("stopped with requests unfinished, by a signal"),
    }
    if let Some(journal) = journal {
        let _ = tokio::task::spawn_blocking(move || journal.flush(FLUSH)).await;
    }
    status
}

/// Waits until somebody accepts connections at this address.
async fn wait_for(authority: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut is_first = true;
    loop {
        match tokio::time::timeout_at(deadline, TcpStream::connect(authority)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(_)) if Instant::now() < deadline => {
                if std::mem::take(&mut is_first) {
                    tracing::warn!(within = ?READY_WITHIN, "no proxy accepts connections at {authority} yet: waiting for it");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            _ => {
                return Err(Failure::Failed(format!(
                    "no proxy accepts connections at {authority}: start it, or leave --proxy out"
                )));
            }
        }
    }
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// The signals that are the command's to answer.
struct Forwarded(Vec<(Option<rustix::process::Signal>, Signal)>);

impl Forwarded {
    fn listen() -> io::Result<Self> {
        use rustix::process::Signal as To;
        let kinds = [
            (To::TERM, SignalKind::terminate()),
            (To::HUP, SignalKind::hangup()),
            (To::USR1, SignalKind::user_defined1()),
            (To::USR2, SignalKind::user_defined2()),
            (To::INT, SignalKind::interrupt()),
            (To::QUIT, SignalKind::quit()),
        ];
        // A terminal sends the last two to the command as well: once is enough.
        let by_terminal = |to| io::stdin().is_terminal() && matches!(to, To::INT | To::QUIT);
        let listening = kinds.into_iter().map(|(to, kind)| {
            let to = Some(to).filter(|to| !by_terminal(*to));
            Ok((to, signal(kind)?))
        });
        listening.collect::<io::Result<_>>().map(Self)
    }

    /// Passes signals on until the command ends.
    async fn until_end(&mut self, mut child: Child) -> io::Result<ExitStatus> {
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        loop {
            tokio::select! {
                status = child.wait() => return status,
                to = self.next() => if let (Some(pid), Some(to)) = (pid, to) {
                    // It may have ended by now, and then it is its status that counts.
                    let _ = kill_process(pid, to);
                }
            }
        }
    }

    async fn next(&mut self) -> Option<rustix::process::Signal> {
        std::future::poll_fn(|cx| {
            for (to, signal) in &mut self.0 {
                if signal.poll_recv(cx).is_ready() {
                    return std::task::Poll::Ready(*to);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
