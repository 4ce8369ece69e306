//! The commands: one file each.

mod ca;
mod check;
mod demo;
mod doctor;
mod env;
mod exec;
#[cfg(feature = "ext-proc")]
mod ext_proc;
mod healthcheck;
mod report;
mod sanitize;
mod serve;
mod simulate;
mod steer;

use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::{self, Config, ConfigError, Layers};
use crate::observe::log;
use crate::proxy;

/// Keeps the OptInSource of Constant Contact v1 contact writes consistent, and retries the API's
/// spurious transition refusals.
#[derive(Debug, Parser)]
#[command(name = "optin-proxy", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy
    Serve(serve::Serve),
    /// Look at requests for an Envoy (external processing)
    #[cfg(feature = "ext-proc")]
    ExtProc(ext_proc::ExtProc),
    /// Rewrite one contact body: XML in, XML out, findings on standard error
    Sanitize(sanitize::Sanitize),
    /// Validate the configuration and print it resolved
    Check(check::Check),
    /// See it work: the same updates straight to a simulated API and through the proxy
    Demo(demo::Demo),
    /// Run a simulated v1 API, for integration tests of one's own
    Simulate(simulate::Simulate),
    /// Make, show or export the certificate authority of HTTPS_PROXY mode
    Ca(ca::Ca),
    /// Print the environment that leads a program through the proxy
    Env(env::Env),
    /// Run a command whose https requests go through the proxy
    Exec(exec::Exec),
    /// Look for what keeps the proxy from working, and say what to do
    Doctor(doctor::Doctor),
    /// Ask the running proxy whether it is ready, where there is no curl to ask with
    Healthcheck(healthcheck::Healthcheck),
    /// Sum up an audit trail, or verify that it is whole
    Report(report::Report),
    /// Print a completion script for a shell
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder, for packages
    #[command(hide = true)]
    Manual {
        /// The folder; it is made if it is not there
        folder: PathBuf,
    },
}

/// Where settings come from, beside the environment (OPTIN_PROXY_SECTION__KEY).
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file; none is needed
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a key of the configuration, over file and environment
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

impl ConfigArgs {
    /// The configuration, with what the command's own flags set: pairs of flag and assignment.
    fn load(&self, flags: &[(&'static str, String)]) -> Result<Config, ConfigError> {
        self.load_over(&[], flags)
    }

    /// What stands in the file, if there is one that can be read again and again.
    fn file_content(&self) -> Option<Vec<u8>> {
        let path = self.config.as_ref()?;
        std::fs::metadata(path).ok()?.is_file().then(|| std::fs::read(path).ok())?
    }

    /// Whether the configuration can be read as it was before.
    ///
    /// # Errors
    /// If its file is there, and is a pipe or a device.
    fn check_again(&self) -> Result<(), String> {
        match self.config.as_ref().map(|path| (path, std::fs::metadata(path))) {
            Some((path, Ok(found))) if !found.is_file() && !found.is_dir() => Err(format!(
                "{}: a pipe is read once; give serve a file if it is to be reloaded",
                path.display()
            )),
            _ => Ok(()),
        }
    }

    /// The same, over defaults of the command's own.
    fn load_over(
        &self,
        defaults: &[(&'static str, String)],
        flags: &[(&'static str, String)],
    ) -> Result<Config, ConfigError> {
        let mut layers = Layers::default();
        for (flag, assignment) in defaults {
            layers.set(flag, assignment);
        }
        if let Some(path) = &self.config {
            layers.file(path);
        }
        layers.environment(std::env::vars_os());
        for (flag, assignment) in flags {
            layers.set(flag, assignment);
        }
        for assignment in &self.set {
            layers.set("--set", assignment);
        }
        layers.build()
    }
}

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Exit status 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Exit status 2 too.
    #[error("{0}")]
    Usage(String),
    /// Exit status 1.
    #[error("{0}")]
    Failed(String),
    /// A command that could not be run, and the exit status for that.
    #[error("{message}")]
    Command { message: String, status: u8 },
    /// The exit status of a command that was run, and nothing to say.
    #[error("status {0}")]
    Status(u8),
    /// Exit status 1, and nothing more to say.
    #[error("no")]
    Negative,
    /// Standard input, output or a file.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs the command that the arguments name; its exit status.
pub fn run() -> ExitCode {
    STARTED.get_or_init(Instant::now);
    let done = match Cli::parse().command {
        Command::Serve(serve) => serve.run(),
        #[cfg(feature = "ext-proc")]
        Command::ExtProc(ext_proc) => ext_proc.run(),
        Command::Sanitize(sanitize) => sanitize.run(),
        Command::Check(check) => check.run(),
        Command::Demo(demo) => demo.run(),
        Command::Simulate(simulate) => simulate.run(),
        Command::Ca(ca) => ca.run(),
        Command::Env(env) => env.run(),
        Command::Exec(exec) => exec.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Healthcheck(healthcheck) => healthcheck.run(),
        Command::Report(report) => report.run(),
        Command::Completions { shell } => completions(shell),
        Command::Manual { folder } => manual(&folder),
    };
    // What is said of the end comes behind what was said before.
    log::flush(LAST_LINES);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output may stop reading.
        Err(Failure::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Negative) => ExitCode::from(1),
        Err(Failure::Status(status)) => ExitCode::from(status),
        Err(failure) => {
            // Nobody may be left to hear it.
            let _ = writeln!(io::stderr(), "optin-proxy: {failure}");
            ExitCode::from(match failure {
                Failure::Config(_) | Failure::Usage(_) => 2,
                Failure::Command { status, .. } => status,
                _ => 1,
            })
        }
    }
}

/// An address to listen on.
fn address(text: &str) -> Result<String, String> {
    config::check_address("listen", text).map_err(|(_, why)| why)?;
    Ok(text.to_owned())
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    // Written into memory first: the generator panics on a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "optin-proxy", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

fn manual(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    Ok(clap_mangen::generate_to(command, folder)?)
}

/// A bar of so much, on a terminal only; none where that is not known or not worth one.
fn progress(of: Option<u64>, template: &str) -> ProgressBar {
    let Some(of) = of.filter(|_| io::stderr().is_terminal()) else { return ProgressBar::hidden() };
    let bar = ProgressBar::with_draw_target(Some(of), ProgressDrawTarget::stderr());
    // What a template of ours could be wrong in, the default is not.
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar
}

/// How long this process has been there.
fn running_for() -> Duration {
    STARTED.get().map_or(Duration::ZERO, Instant::elapsed)
}

static STARTED: OnceLock<Instant> = OnceLock::new();

/// How long the end waits for whoever reads the log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How long the end waits for tasks that were cut.
const LAST_TASKS: Duration = Duration::from_millis(500);

/// Runs what speaks HTTP, on a runtime of its own: on as many threads as tokio's own variable says, else one for each CPU
/// that this process may use. Where that is one, it is this one.
fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let threads = match std::env::var("TOKIO_WORKER_THREADS") {
        Ok(threads) => threads.parse().map_err(|_| {
            let wrong =
                "TOKIO_WORKER_THREADS: not a number of threads; leave it out for one for each CPU";
            io::Error::new(io::ErrorKind::InvalidInput, wrong)
        })?,
        Err(_) => std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
    };
    if threads.get() == 1 {
        return block_on_one(future);
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    run_on(builder.worker_threads(threads.get()), future)
}

/// How many events one thread takes from the system at once. What so many wake, and what that wakes, is most often done before
/// tokio looks for more, which it does after 61 tasks at the latest: so a request is on its way while it is still in the caches,
/// and none waits for those behind it. Of an update by 1,000 connections, 0.83 to 0.88 of the CPU time by tokio's 1,024, 99 in 100
/// are answered in 0.55 to 0.7 of the time, and who uploads beside them gets 1.6 times as much through; a feed by 32 connections
/// takes 0.92 and 0.97 of the CPU time, an update as much.
const EVENTS: usize = 16;

/// The same on this thread alone: for what waits more than it works, being handed from thread to thread costs more.
fn block_on_one<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    run_on(builder.max_io_events_per_tick(EVENTS), future)
}

fn run_on<T>(
    builder: &mut tokio::runtime::Builder,
    future: impl Future<Output = T>,
) -> io::Result<T> {
    let runtime = builder.enable_all().on_thread_park(proxy::end_turn).build()?;
    let done = runtime.block_on(future);
    // Tasks end here, and leave their records. A look-up that nobody waits for any more must not hold up the end.
    runtime.shutdown_timeout(LAST_TASKS);
    proxy::end_turns();
    Ok(done)
}
