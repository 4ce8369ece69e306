//! Connections to hosts of the client's choosing: a name is resolved once, what it stands for is judged,
//! and that very address is connected to.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::decide::{Denied, Rules};
use super::host::Host;

/// Connects to what the rules allow.
#[derive(Clone)]
pub(crate) struct Guard {
    rules: Arc<Rules>,
    /// The proxy's own listeners.
    own: Arc<[SocketAddr]>,
    timeout: Duration,
    /// Each look-up blocks a thread of the runtime's, for longer than anybody waits for it if a name server
    /// is silent. Those for the API come from the same pool.
    lookups: Arc<Semaphore>,
    resolver: Arc<dyn Resolve>,
}

/// Knows what names stand for.
pub trait Resolve: Send + Sync {
    /// The addresses of `name`, each with `port`. May take its time: it is called on a thread that may block.
    ///
    /// # Errors
    /// If nobody knows the name.
    fn resolve(&self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

/// The operating system's own resolver.
#[derive(Debug, Clone, Copy)]
pub struct System;

impl Resolve for System {
    fn resolve(&self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok((name, port).to_socket_addrs()?.collect())
    }
}

/// The most look-ups at once for hosts of the clients' choosing.
const MAX_LOOKUPS: usize = 64;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("{0}")]
    Unresolved(io::Error),
    #[error("no connection within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Guard {
    pub fn new(
        rules: Rules,
        own: Vec<SocketAddr>,
        timeout: Duration,
        resolver: Arc<dyn Resolve>,
    ) -> Self {
        let lookups = Arc::new(Semaphore::new(MAX_LOOKUPS));
        Self { rules: Arc::new(rules), own: own.into(), timeout, lookups, resolver }
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// A connection to `host`, within the deadline for all its addresses together.
    ///
    /// # Errors
    /// If one of its addresses is denied, so that no name can hide one behind another; or if none of
    /// them answers.
    pub async fn connect(&self, host: &Host, port: u16) -> Result<TcpStream, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let addresses = self.addresses(host, port, deadline).await?;
        let mut last = ConnectError::Timeout(self.timeout);
        for (position, address) in addresses.iter().enumerate() {
            // A dead address must not use up the time of those behind it.
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / (addresses.len() - position) as u32;
            last = match tokio::time::timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Ok(Err(error)) => error.into(),
                Err(_) => ConnectError::Timeout(self.timeout),
            };
        }
        Err(last)
    }

    /// Whether there might be a connection to `host`.
    ///
    /// # Errors
    /// As of [`Self::connect`], but that nobody is asked to answer.
    pub async fn admit(&self, host: &Host, port: u16) -> Result<(), ConnectError> {
        self.addresses(host, port, Instant::now() + self.timeout).await.map(drop)
    }

    /// What `host` stands for, if all of it is allowed.
    async fn addresses(
        &self,
        host: &Host,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, ConnectError> {
        let addresses = tokio::time::timeout_at(deadline, self.resolve(host, port))
            .await
            .map_err(|_| ConnectError::Timeout(self.timeout))?
            .map_err(ConnectError::Unresolved)?;
        if addresses.is_empty() {
            return Err(ConnectError::Unresolved(io::Error::other("the name has no address")));
        }
        for address in &addresses {
            self.rules.judge_address(host, *address, &self.own)?;
        }
        Ok(addresses)
    }

    async fn resolve(&self, host: &Host, port: u16) -> io::Result<Vec<SocketAddr>> {
        let name = match host {
            Host::Address(address) => return Ok(vec![SocketAddr::new(*address, port)]),
            Host::Name(name) => name.clone(),
        };
        let permit = Arc::clone(&self.lookups).acquire_owned().await.map_err(io::Error::other)?;
        let resolver = Arc::clone(&self.resolver);
        let lookup = tokio::task::spawn_blocking(move || {
            let _until_it_ends = permit;
            resolver.resolve(&name, port)
        });
        lookup.await.map_err(io::Error::other)?
    }
}
