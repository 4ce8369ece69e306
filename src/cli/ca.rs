//! `optin-proxy ca`

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{ConfigArgs, Failure};
use crate::config::Config;
use crate::intercept::ca::{Authority, CaError, root_file};
use crate::intercept::{Host, trust};

#[derive(Debug, Args)]
pub(super) struct Ca {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the certificate authority; one that is there is never overwritten
    Init(Init),
    /// Say where it is, what it may sign, and how long
    Show(Show),
    /// Write what clients have to trust
    Export(Export),
}

#[derive(Debug, Args)]
struct Init {
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct Export {
    #[command(flatten)]
    config: ConfigArgs,
    /// What to write
    #[arg(long, value_enum, default_value_t = trust::Export::Pem)]
    format: trust::Export,
    /// Where to; standard output if not given
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Ca {
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Init(init) => {
                let config = init.config.load(&[])?;
                let hosts = &config.intercept.rules.hosts;
                let folder = folder(&config)?;
                let authority = Authority::create(folder, hosts).map_err(failed)?;
                write!(io::stdout(), "{}", description(folder, &authority)?)?;
            }
            Command::Show(show) => {
                let config = show.config.load(&[])?;
                let folder = folder(&config)?;
                let there =
                    Authority::load(folder, &config.intercept.rules.hosts).map_err(failed)?;
                let Some(authority) = there else {
                    return Err(Failure::Failed(format!(
                        "there is no certificate authority in {} yet: it is made at its first use, or by \
                         `optin-proxy ca init`",
                        folder.display()
                    )));
                };
                write!(io::stdout(), "{}", description(folder, &authority)?)?;
            }
            Command::Export(export) => export.run()?,
        }
        Ok(())
    }
}

impl Export {
    fn run(self) -> Result<(), Failure> {
        let config = self.config.load(&[])?;
        let authority = open(&config)?;
        let content = self.format.of(&authority);
        match self.output {
            Some(file) => std::fs::write(&file, content)
                .map_err(|error| Failure::Failed(format!("{}: {error}", file.display()))),
            None if !self.format.is_text() && io::stdout().is_terminal() => Err(Failure::Failed(
                "this format is no text: name a file with --output, or redirect".into(),
            )),
            None => Ok(io::stdout().write_all(&content)?),
        }
    }
}

/// The folder of the authority.
pub(super) fn folder(config: &Config) -> Result<&Path, Failure> {
    config.intercept.ca_dir.as_deref().ok_or_else(|| failed(CaError::NoFolder))
}

/// The authority, made if there is none yet.
pub(super) fn open(config: &Config) -> Result<Authority, Failure> {
    Authority::open(folder(config)?, &config.intercept.rules.hosts).map_err(failed)
}

pub(super) fn failed(error: CaError) -> Failure {
    Failure::Failed(error.to_string())
}

fn description(folder: &Path, authority: &Authority) -> Result<String, Failure> {
    let parsed = |der| {
        X509Certificate::from_der(der)
            .map(|(_, certificate)| certificate)
            .map_err(|error| Failure::Failed(error.to_string()))
    };
    let (root, issuing) = (parsed(authority.root())?, parsed(authority.issuing())?);
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, authority.root());
    let fingerprint: Vec<_> = digest.as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
    let left = authority.not_after().duration_since(SystemTime::now()).unwrap_or_default();
    let hosts = authority.hosts();
    let hosts: Vec<_> = hosts.iter().map(Host::to_string).collect();
    Ok(format!(
        "folder       {}\n\
         trust this   {}\n\
         subject      {}\n\
         SHA-256      {}\n\
         signs for    {}, names below, and nothing else\n\
         valid        {} to {} ({} days left)\n",
        folder.display(),
        root_file(folder).display(),
        root.subject(),
        fingerprint.join(":"),
        hosts.join(", "),
        issuing.validity().not_before,
        issuing.validity().not_after,
        left.as_secs() / 86_400,
    ))
}
