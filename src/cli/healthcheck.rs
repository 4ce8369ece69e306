//! `optin-proxy healthcheck`

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use clap::Args;

use super::{ConfigArgs, Failure};

/// How long the answer may take in all; probes and HEALTHCHECK have their own limits beyond it.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest answer that is read, in bytes.
const LONGEST: usize = 16 * 1024;

#[derive(Debug, Args)]
pub(super) struct Healthcheck {
    #[command(flatten)]
    config: ConfigArgs,
    /// Where the running proxy listens for operators [admin.address]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
}

impl Healthcheck {
    pub fn run(self) -> Result<(), Failure> {
        let flag = self.admin.map(|admin| ("--admin", format!("admin.address={admin}")));
        let config = self.config.load(flag.as_slice())?;
        let address = &config.admin.address;
        let answer = ask(address).map_err(|error| {
            Failure::Failed(format!(
                "no answer at {address}: {error}; is that admin.address of the proxy that runs?"
            ))
        })?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let mut out = io::stdout();
        // It is the status that counts, whoever reads this.
        let told = write!(out, "{body}").and_then(|()| out.flush());
        let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
        match status {
            Some("200") => Ok(told?),
            Some(status) => {
                Err(Failure::Failed(format!("not ready: /readyz at {address} says {status}")))
            }
            None => Err(Failure::Failed(format!("what listens at {address} speaks no HTTP"))),
        }
    }
}

/// Whether an optin-proxy listens for operators there, ready or not.
pub(super) fn is_ours(address: &str) -> bool {
    ask(address).is_ok_and(|answer| {
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        ["ready\n", "draining\n"].contains(&body) || body.starts_with("certificate authority: ")
    })
}

/// What `/readyz` answers.
fn ask(address: &str) -> io::Result<String> {
    let mut resolved = address.to_socket_addrs()?;
    let bound = resolved.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut stream = TcpStream::connect_timeout(&reachable(bound), PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET /readyz HTTP/1.1\r\nHost: {bound}\r\nConnection: close\r\n\r\n")?;
    let end = Instant::now() + PATIENCE;
    let (mut answer, mut part) = (Vec::new(), [0; 1024]);
    while answer.len() < LONGEST {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(read) => answer.extend_from_slice(&part[..read]),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                // What a socket says of its time limit.
                io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                _ => return Err(error),
            },
        }
    }
    String::from_utf8(answer).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Where something that is bound to all addresses is reached from this machine.
fn reachable(mut bound: SocketAddr) -> SocketAddr {
    if bound.ip().is_unspecified() {
        bound.set_ip(match bound.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    bound
}
