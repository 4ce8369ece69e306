//! `optin-proxy simulate`

use std::io::{self, Write};
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use super::serve::Stop;
use crate::simulator::{ACCOUNT, CREDENTIALS, Options, Simulator};

#[derive(Debug, Args)]
pub(super) struct Simulate {
    /// Address to listen on; port 0 takes any that is free
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081", value_parser = super::address)]
    listen: String,
    /// How often an update of a Do-Not-Mail contact by the contact is refused as if by the owner
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.0, value_parser = probability)]
    flake_rate: f64,
    /// Same seed and same requests, same answers
    #[arg(long, default_value_t = Options::default().seed)]
    seed: u64,
    /// Speak TLS, with a certificate authority made for this run
    #[arg(long)]
    tls: bool,
    /// Where to write that authority's certificate, for upstream.ca_file
    #[arg(long, value_name = "FILE", requires = "tls", default_value = "simulated-api-ca.pem")]
    ca_out: PathBuf,
}

fn probability(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|rate| (0.0..=1.0).contains(rate))
        .ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

impl Simulate {
    pub fn run(self) -> Result<(), Failure> {
        super::block_on(async {
            let mut signals = Stop::listen()?;
            let options =
                Options { flake_rate: self.flake_rate, seed: self.seed, ..Options::default() };
            let mut simulator = Simulator::bind(&self.listen, options).await.map_err(|error| {
                let listen = &self.listen;
                Failure::Failed(format!(
                    "cannot listen on {listen}: {error}; choose another with --listen"
                ))
            })?;
            let address = simulator.address();
            let mut scheme = "http";
            let mut trust = String::new();
            if self.tls {
                let failed = |error: &dyn std::fmt::Display| Failure::Failed(error.to_string());
                let authority = simulator.with_tls().map_err(|error| failed(&error))?;
                let file = self.ca_out.display();
                std::fs::write(&self.ca_out, authority).map_err(|error| {
                    failed(&format_args!("{file}: {error}; name another with --ca-out"))
                })?;
                scheme = "https";
                trust = format!("certificate authority: {file}\n");
            }
            let said = format!(
                "listening on {address}\n\
                 account {ACCOUNT}: {scheme}://{address}/ws/customers/{ACCOUNT}/contacts\n\
                 credentials {CREDENTIALS}\n\
                 Authorization: Basic {}\n\
                 {trust}",
                STANDARD.encode(CREDENTIALS)
            );
            // Whoever started it need not listen to it: it serves all the same.
            let _ = io::stdout().write_all(said.as_bytes());
            let stop = CancellationToken::new();
            let serving = tokio::spawn(simulator.run(stop.clone()));
            signals.next().await;
            stop.cancel();
            // Ended by its token; a panic in it was reported already.
            let _ = serving.await;
            Ok(())
        })?
    }
}
