//! `optin-proxy env`

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{ConfigArgs, Failure, ca};
use crate::config::{self, Config};
use crate::intercept::Host;
use crate::intercept::ca::Authority;
use crate::intercept::trust::{Files, Reached, variables};

#[derive(Debug, Args)]
pub(super) struct Env {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address of the running proxy [listen.address]
    #[arg(long, value_name = "HOST:PORT")]
    proxy: Option<String>,
    /// Where the files are written that the variables name, for other containers [trust, in intercept.ca_dir]
    #[arg(long, value_name = "FOLDER")]
    files: Option<PathBuf>,
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

/// The longest head of an answer that is read, in bytes.
const LONGEST_HEAD: u64 = 64 * 1024;

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
        // One that does not run yet will have this authority: they have one folder.
        super::block_on(async {
            let connecting = TcpStream::connect(&proxy.authority);
            match tokio::time::timeout(config.upstream.connect_timeout, connecting).await {
                Ok(Ok(_)) => agrees(&config, &proxy, &authority).await,
                _ => Ok(()),
            }
        })??;
        let environment = |name: &str| std::env::var_os(name);
        let folder = match self.files {
            Some(folder) => std::path::absolute(folder)?,
            None => ca::folder(&config)?.join("trust"),
        };
        let files = Files::write(&folder, &authority, &environment).map_err(ca::failed)?;
        let (all, left_out) =
            variables(&proxy, &files, &config.intercept.rules.hosts, &environment);
        for why in left_out {
            writeln!(io::stderr(), "optin-proxy: {why}")?;
        }
        if matches!(self.shell, Shell::Docker | Shell::K8s) {
            let folder = folder.display();
            writeln!(
                io::stderr(),
                "optin-proxy: mount {folder} into the container at the same path (another one: --files), where \
                 its user may read it; {} must lead from there to the proxy (another address: --proxy)",
                proxy.authority
            )?;
        }
        Ok(io::stdout().write_all(self.shell.write(&all)?.as_bytes())?)
    }
}

/// The proxy at `address`, with the credentials that the configuration asks for.
pub(super) fn reached(config: &Config, address: &str) -> Result<Reached, Failure> {
    let address = address.trim_start_matches("http://").trim_end_matches('/');
    // Not repeated: it is a secret.
    if address.contains('@') {
        return Err(Failure::Usage(
            "the proxy's address has credentials in it: write host:port, and them in listen.proxy_auth".into(),
        ));
    }
    let parts = address.rsplit_once(':').filter(|_| config::is_address(address));
    let (host, port) = parts.ok_or_else(|| {
        Failure::Usage(format!("{address}: write the proxy's address as host:port"))
    })?;
    // Where it listens on all addresses, this machine reaches it by the nearest.
    let host = match host {
        "0.0.0.0" => "127.0.0.1",
        "[::]" => "[::1]",
        host => host,
    };
    let auth = config.listen.proxy_auth.as_ref();
    Ok(Reached {
        authority: format!("{host}:{port}"),
        credentials: auth.map(|it| it.for_url()).unwrap_or_default(),
        basic: auth.map(|it| it.for_header()),
    })
}

/// Whether the proxy that runs there has this authority: another user's, or another container's, has one of
/// its own, and clients would refuse it.
pub(super) async fn agrees(
    config: &Config,
    proxy: &Reached,
    authority: &Authority,
) -> Result<(), Failure> {
    let Some(host) = config.intercept.rules.hosts.first() else { return Ok(()) };
    let checking = handshake(proxy, host, authority);
    match tokio::time::timeout(config.limits.header_timeout, checking).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::Failed(format!(
            "the proxy at {} does not serve {host} by the certificate authority in {}: {error}; name that \
             proxy's own folder in intercept.ca_dir, or restart it if the folder has changed",
            proxy.authority,
            ca::folder(config)?.display()
        ))),
        Err(_) => Err(Failure::Failed(format!("the proxy at {} does not answer", proxy.authority))),
    }
}

async fn handshake(proxy: &Reached, host: &Host, authority: &Authority) -> io::Result<()> {
    let target = format!("{host}:443");
    let mut stream = TcpStream::connect(&proxy.authority).await?;
    let mut asked = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
    if let Some(credentials) = &proxy.basic {
        let _ = write!(asked, "Proxy-Authorization: Basic {credentials}\r\n");
    }
    asked.push_str("\r\n");
    stream.write_all(asked.as_bytes()).await?;
    let mut head = String::new();
    {
        let mut lines = BufReader::new((&mut stream).take(LONGEST_HEAD));
        while lines.read_line(&mut head).await? > 2 {}
    }
    if !head.starts_with("HTTP/1.1 200 ") {
        let status = head.lines().next().unwrap_or("nothing").to_owned();
        return Err(io::Error::other(format!("it answers CONNECT with {status}")));
    }
    let mut roots = RootCertStore::empty();
    roots.add(authority.root().clone()).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(drop)
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
                    // Each of these ends what one of them began, if it is not there twice.
                    let mut quoted = String::new();
                    for char in value.chars() {
                        quoted.push(char);
                        if "'\u{2018}\u{2019}\u{201a}\u{201b}".contains(char) {
                            quoted.push(char);
                        }
                    }
                    writeln!(text, "$env:{name} = '{quoted}'")
                }
                Self::Docker => writeln!(text, "{name}={value}"),
                // A JSON string is a YAML string. Kubernetes puts other variables in, but for `$$`.
                Self::K8s => {
                    let value = value.replace('$', "$$");
                    writeln!(text, "- name: {name}\n  value: {}", serde_json::json!(value))
                }
            };
        }
        Ok(text)
    }
}
