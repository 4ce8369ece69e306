//! `optin-proxy ext-proc`

use std::io::{self, Write};
use std::sync::Arc;

use clap::Args;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::serve::{
    Ended, Signals, bind_admin, refuse_huge_pages, set_process_limits, start_journal, steer,
};
use super::steer::{Hand, ORDERS, Source, Steering};
use super::{ConfigArgs, Failure};
use crate::config::Config;
use crate::ext_proc::Processor;
use crate::observe::admin::Desk;
use crate::observe::journal::Journal;
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::Control;

#[derive(Debug, Args)]
pub(super) struct ExtProc {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address for Envoy; port 0 takes any that is free
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9002", value_parser = super::address)]
    listen: String,
    /// Address for operators: probes and metrics [admin.address]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
}

impl ExtProc {
    pub fn run(self) -> Result<(), Failure> {
        refuse_huge_pages();
        let flags: Vec<_> = self
            .admin
            .into_iter()
            .map(|admin| ("--admin", format!("admin.address={admin}")))
            .collect();
        let source = Source::new(self.config, Vec::new(), flags);
        let config = Arc::new(source.load()?);
        let level = log::start(&config.log);
        set_process_limits();
        let (ended, journal) = super::block_on_one(process(source, config, level, &self.listen))??;
        super::block_on(ended.finish(journal))?
    }
}

/// What [`Processor::serve`] looks up once.
const AT_START: [&str; 3] = ["limits.idle_timeout", "limits.max_buffered", "limits.max_requests"];

async fn process(
    source: Source,
    config: Arc<Config>,
    level: log::Level,
    listen: &str,
) -> Result<(Ended, Journal), Failure> {
    let signals = Signals::listen()?;
    let metrics = Arc::new(Metrics::default());
    let journal = start_journal(&config, &metrics)?;
    let listener = TcpListener::bind(listen).await.map_err(|error| {
        let advice = "choose another address with --listen";
        Failure::Failed(format!("cannot listen on {listen}: {error}; {advice}"))
    })?;
    let address = listener.local_addr()?;
    let control = Control::new(address, Arc::clone(&config), false)
        .map_err(|error| Failure::Failed(error.to_string()))?;
    let (orders, asked) = mpsc::channel(ORDERS);
    let hand = Hand {
        source,
        control: control.clone(),
        level,
        metrics: Arc::clone(&metrics),
        at_start: &AT_START,
    };
    let steering = Steering::new(hand, signals, asked);
    let admin = bind_admin(&config.admin).await?;
    let _ = writeln!(io::stdout(), "listening on {address}");
    if let Some(admin) = admin {
        let _ = writeln!(io::stdout(), "listening on {} (admin)", admin.address());
        let (metrics, control) = (Arc::clone(&metrics), control.clone());
        let journal = journal.clone();
        tokio::spawn(admin.run(Desk { metrics, control, journal, orders }));
    }
    let ready_in_ms = super::running_for().as_secs_f64() * 1000.0;
    tracing::info!(%address, ready_in_ms, version = env!("CARGO_PKG_VERSION"), "started");
    let stop = CancellationToken::new();
    let processor = Processor { control: control.clone(), metrics, journal: journal.clone() };
    let serving = tokio::spawn(processor.serve(listener, stop.clone()));
    Ok((steer(serving, steering, control, stop).await, journal))
}
