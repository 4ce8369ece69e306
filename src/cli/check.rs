//! `optin-proxy check`

use std::io::{self, Write};

use clap::Args;

use super::{ConfigArgs, Failure};
use crate::intercept::leaf::Leaves;

#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Check {
    pub fn run(self) -> Result<(), Failure> {
        let config = self.config.load(&[])?;
        // Not an error of the configuration, nor of base-URL mode.
        let intercept = &config.intercept;
        if let Some(folder) = &intercept.ca_dir
            && !intercept.rules.hosts.is_empty()
            && let Err(error) = Leaves::new(Some(folder.clone()), intercept.rules.hosts.clone())
                .check(!config.resolved.intercept.ca_dir.is_empty())
        {
            writeln!(io::stderr(), "HTTPS_PROXY mode will not work: {error}")?;
        }
        let text = toml::to_string(&config.resolved)
            .map_err(|error| Failure::Failed(format!("cannot print the configuration: {error}")))?;
        Ok(io::stdout().write_all(text.as_bytes())?)
    }
}
