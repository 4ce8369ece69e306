//! `optin-proxy env`

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use clap::{Args, ValueEnum};

use super::{ConfigArgs, Failure, ca};
use crate::config::Config;
use crate::intercept::trust::{Files, Reached, variables};

#[derive(Debug, Args)]
pub(super) struct Env {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address of the running proxy [listen.address]
    #[arg(long, value_name = "HOST:PORT")]
    proxy: Option<String>,
    /// For whom to write it
    #[arg(long, value_enum, default_value_t = Shell::Sh)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    /// eval "$(optin-proxy env)"
    Sh,
    /// optin-proxy env --shell fish | source
    Fish,
    /// optin-proxy env --shell powershell | Out-String | Invoke-Expression
    Powershell,
    /// A file for docker run --env-file
    Docker,
    /// The env list of a Kubernetes container
    K8s,
}

impl Env {
    pub fn run(self) -> Result<(), Failure> {
        let config = self.config.load(&[])?;
        let proxy = self.proxy.unwrap_or_else(|| config.listen.address.clone());
        let proxy = reached(&config, &proxy)?;
        if proxy.authority.ends_with(":0") {
            return Err(Failure::Failed(
                "listen.address takes any port: name the one that `serve` printed with --proxy"
                    .into(),
            ));
        }
        let authority = ca::open(&config)?;
        let environment = |name: &str| std::env::var_os(name);
        let folder = ca::folder(&config)?.join("trust");
        let files = Files::write(&folder, &authority, &environment).map_err(ca::failed)?;
        let all = variables(&proxy, &files, &config.intercept.rules.hosts, &environment);
        Ok(io::stdout().write_all(self.shell.write(&all)?.as_bytes())?)
    }
}

/// The proxy at `address`, with the credentials that the configuration asks for.
pub(super) fn reached(config: &Config, address: &str) -> Result<Reached, Failure> {
    let address = address.trim_start_matches("http://").trim_end_matches('/');
    let (host, port) =
        address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).ok_or_else(|| {
            Failure::Failed(format!("{address}: write the proxy's address as host:port"))
        })?;
    // Where it listens on all addresses, this machine reaches it by the nearest.
    let host = match host {
        "0.0.0.0" => "127.0.0.1",
        "[::]" => "[::1]",
        host => host,
    };
    let credentials = config.listen.proxy_auth.as_ref().map(|it| it.for_url()).unwrap_or_default();
    Ok(Reached { authority: format!("{host}:{port}"), credentials })
}

impl Shell {
    fn write(self, variables: &[(&str, OsString)]) -> Result<String, Failure> {
        let mut text = String::new();
        for (name, value) in variables {
            let value = value.to_str().ok_or_else(|| {
                Failure::Failed(format!("{name}: its value is not UTF-8: use `optin-proxy exec`"))
            })?;
            if value.contains('\n') {
                return Err(Failure::Failed(format!(
                    "{name}: its value has several lines: use `optin-proxy exec`"
                )));
            }
            let _ = match self {
                Self::Sh => writeln!(text, "export {name}='{}'", value.replace('\'', r"'\''")),
                Self::Fish => {
                    let value = value.replace('\\', r"\\").replace('\'', r"\'");
                    writeln!(text, "set -gx {name} '{value}'")
                }
                Self::Powershell => {
                    writeln!(text, "$env:{name} = '{}'", value.replace('\'', "''"))
                }
                Self::Docker => writeln!(text, "{name}={value}"),
                // A JSON string is a YAML string.
                Self::K8s => {
                    writeln!(text, "- name: {name}\n  value: {}", serde_json::json!(value))
                }
            };
        }
        Ok(text)
    }
}
