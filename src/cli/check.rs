//! `optin-proxy check`

use std::io::{self, Write};

use clap::Args;

use super::{ConfigArgs, Failure};

#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Check {
    pub fn run(self) -> Result<(), Failure> {
        let config = self.config.load(&[])?;
        let text = toml::to_string(&config.resolved)
            .map_err(|error| Failure::Failed(format!("cannot print the configuration: {error}")))?;
        Ok(io::stdout().write_all(text.as_bytes())?)
    }
}
