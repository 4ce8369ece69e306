//! Accepting connections, and ending them in order.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::Response;
use rustix::process::{Resource, getrlimit};
use tokio::io::DuplexStream;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::budget::Budget;
use super::connect::{Connect, Open, Opened, Peer, how_to_trust};
use super::connection::{ON_ITS_WAY, Served, Serving};
use super::control::{Control, Wanted};
use super::socket::{Socket, Watch};
use super::stack::{Arrived, Begin, Observed, stack};
use super::stage::Handle;
use super::upstream::{SetupError, Upstream};
use crate::config::{CLOSE_IT, Config, Limits};
use crate::intercept::guard::{Guard, Resolve, System};
use crate::observe::journal::Journal;
use crate::observe::metrics::Metrics;
use crate::observe::redact::Agent;

/// A proxy with its listener bound. Accepts nothing before [`Server::run`].
pub struct Server {
    listener: TcpListener,
    control: Control,
    /// This process's listeners.
    own: Vec<SocketAddr>,
    entrance: (Entrance, mpsc::Receiver<DuplexStream>),
    metrics: Arc<Metrics>,
    journal: Option<Journal>,
    resolver: Arc<dyn Resolve>,
    /// For as many connections at once.
    room: Arc<Semaphore>,
}

/// A way in beside the listener that needs no socket: for a program that embeds the proxy, and for whoever
/// looks at it without the system's part.
#[derive(Debug, Clone)]
pub struct Entrance(mpsc::Sender<DuplexStream>);

impl Entrance {
    /// A connection to the proxy with room for so many bytes each way, as if from 127.0.0.1 and counted like any
    /// other. `None` once the proxy accepts no more.
    pub async fn connect(&self, room: usize) -> Option<DuplexStream> {
        let (client, proxy) = tokio::io::duplex(room);
        self.0.send(proxy).await.ok().map(|()| client)
    }
}

/// A connection that has come, by either way in.
enum Accepted {
    Socket(TcpStream, SocketAddr),
    InMemory(DuplexStream),
}

/// Why the proxy cannot start, or go on by another configuration.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken, or not this machine's.
    #[error(
        "cannot listen on {address}: {error}; choose another address with listen.address or --listen"
    )]
    Bind {
        /// As configured.
        address: String,
        /// What the system says.
        error: io::Error,
    },
    /// The upstream's side.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Another configuration, whose certificate authority cannot be used where the one before can.
    #[error("HTTPS_PROXY mode works, and would not any more: {0}")]
    Authority(String),
    /// It would be a proxy for everybody.
    #[error("listen.address: {address}: {CLOSE_IT}")]
    Open {
        /// What was bound.
        address: SocketAddr,
    },
}

impl Server {
    /// Binds the listener of `config`.
    ///
    /// # Errors
    /// If the address cannot be had or would serve everybody, or the upstream side cannot be set up.
    pub async fn bind(config: Arc<Config>, metrics: Arc<Metrics>) -> Result<Self, StartError> {
        let bind = |error| StartError::Bind { address: config.listen.address.clone(), error };
        let listener = TcpListener::bind(&config.listen.address).await.map_err(bind)?;
        Self::on(listener, config, metrics)
    }

    /// Takes a listener that somebody else has bound, whatever `listen.address` says.
    ///
    /// # Errors
    /// If it would serve everybody, or the upstream side cannot be set up.
    pub fn on(
        listener: TcpListener,
        config: Arc<Config>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let address = listener
            .local_addr()
            .map_err(|error| StartError::Bind { address: config.listen.address.clone(), error })?;
        if config.listen.is_open(address.ip()) {
            return Err(StartError::Open { address });
        }
        let room = Arc::new(Semaphore::new(most_connections(&config.limits)));
        let control = Control::new(address, config, true)?;
        let (entrance, entering) = mpsc::channel(1);
        let entrance = (Entrance(entrance), entering);
        Ok(Self {
            listener,
            control,
            own: vec![address],
            entrance,
            metrics,
            journal: None,
            resolver: Arc::new(System),
            room,
        })
    }

    /// The address that was bound, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.control.address()
    }

    /// What steers the server once it runs.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Hands every exchange to a journal once it is over.
    pub fn keep(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    /// Has the names of hosts of the clients' choosing looked up by this, instead of by the system.
    pub fn resolve_by(&mut self, resolver: Arc<dyn Resolve>) {
        self.resolver = resolver;
    }

    /// The way in that needs no socket.
    pub fn entrance(&self) -> Entrance {
        self.entrance.0.clone()
    }

    /// Names one more listener of this process, that no tunnel may lead to.
    pub fn also_own(&mut self, address: SocketAddr) {
        self.own.push(address);
    }

    /// Serves until `stop`, then finishes what is in flight, tunnels too, within `listen.drain_timeout`.
    /// Returns how many connections were cut because they did not end by then.
    pub async fn run(self, stop: CancellationToken) -> usize {
        let Self {
            listener,
            control,
            own,
            entrance: (_, mut entering),
            metrics,
            journal,
            resolver,
            room,
        } = self;
        let (drain, cut) = (control.drain.clone(), control.cut.clone());
        let connections = TaskTracker::new();
        let (opened, mut tunnels) = mpsc::channel(OPENED);
        let budget = Arc::new(Budget::new());
        let assemble = {
            let (metrics, connections) = (Arc::clone(&metrics), connections.clone());
            let room = Arc::clone(&room);
            move |wanted: &Wanted| {
                let config = &wanted.config;
                let rules = config.intercept.rules.clone();
                let timeout = config.upstream.connect_timeout;
                let guard = Guard::new(rules, own.clone(), timeout, Arc::clone(&resolver));
                let upstream = Upstream::new(Arc::clone(config), wanted.tls.clone(), guard.clone());
                let connect = Connect {
                    guard,
                    leaves: Arc::clone(&wanted.leaves),
                    metrics: Arc::clone(&metrics),
                    handshake_timeout: config.limits.header_timeout,
                    idle: config.intercept.tunnel_idle_timeout,
                    tunnels: connections.clone(),
                    opened: opened.clone(),
                    room: Arc::clone(&room),
                };
                let begin = Begin::new(config, &metrics, journal.as_ref());
                Served::new(begin, stack(config, upstream, connect, &budget), config)
            }
        };
        let (served, mut changes, _heeding) = control.heed(assemble);
        let mut config = Arc::clone(&changes.borrow().config);
        let serving = Serving::new(served, Arc::clone(&metrics), stop.clone(), drain.clone());
        let open = |permit| Open::new(Arc::clone(&metrics), cut.clone(), permit);
        let mut full = Seldom::default();
        loop {
            let room = async {
                if room.available_permits() == 0 {
                    full.warn();
                }
                // Never closed, so a permit always comes.
                let permit = Arc::clone(&room).acquire_owned().await.ok();
                let accepted = tokio::select! {
                    accepted = listener.accept() => {
                        accepted.map(|(stream, address)| Accepted::Socket(stream, address))
                    }
                    Some(stream) = entering.recv() => Ok(Accepted::InMemory(stream)),
                };
                accepted.map(|accepted| (accepted, permit))
            };
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => {
                    drain.cancel();
                    break;
                }
                Ok(()) = changes.changed() => {
                    config = Arc::clone(&changes.borrow_and_update().config);
                    continue;
                }
                // The channel's other end is in the stack.
                Some(opened) = tunnels.recv() => {
                    connections.spawn(serving.clone().opened(opened));
                    continue;
                }
                accepted = room => accepted,
            };
            match accepted {
                Ok((Accepted::Socket(stream, address), permit)) => {
                    let stream = ready(stream);
                    let peer = Peer::new(address, stream.watch(), open(permit));
                    connections.spawn(serving.clone().connection(stream, peer));
                }
                Ok((Accepted::InMemory(stream), permit)) => {
                    let peer = Peer::new(IN_MEMORY, Watch::default(), open(permit));
                    connections.spawn(serving.clone().connection(stream, peer));
                }
                Err(error) => pause_after(&error).await,
            }
        }
        // The system has told the clients that wait here that they are connected: closing now would reset them.
        let listener = listener.into_std();
        while let (Ok(listener), Ok(permit)) = (&listener, Arc::clone(&room).try_acquire_owned()) {
            let Ok((stream, address)) = listener.accept() else { break };
            let Ok(stream) = nonblocking(stream) else { continue };
            let stream = ready(stream);
            let peer = Peer::new(address, stream.watch(), open(Some(permit)));
            connections.spawn(serving.clone().connection(stream, peer));
        }
        drop(listener);
        connections.close();
        let draining = async {
            loop {
                tokio::select! {
                    biased;
                    // Who was promised a tunnel gets it.
                    Some(opened) = tunnels.recv() => {
                        connections.spawn(serving.clone().opened(opened));
                    }
                    // The last connection may have been one that had just opened a tunnel.
                    () = connections.wait() => match tunnels.try_recv() {
                        Ok(opened) => drop(connections.spawn(serving.clone().opened(opened))),
                        Err(_) => break,
                    },
                }
            }
        };
        let drained = tokio::time::timeout(config.listen.drain_timeout, draining).await;
        if drained.is_ok() {
            return 0;
        }
        cut.cancel();
        connections.len()
    }
}

fn nonblocking(stream: std::net::TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

/// Where connections through the [`Entrance`] come from.
const IN_MEMORY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Answers are written whole: waiting for more would only delay them.
fn ready(stream: TcpStream) -> Socket {
    let _ = stream.set_nodelay(true);
    Socket::new(stream)
}

/// How many descriptors are left to other things than connections: files, listeners, operators.
const OTHER_DESCRIPTORS: usize = 64;

/// `limits.max_connections`, or as many as the process has descriptors for beside those that requests need towards the API: what
/// cannot be asked has to wait, rather than to fail.
fn most_connections(limits: &Limits) -> usize {
    let Limits { max_connections: wanted, max_requests, .. } = *limits;
    let Some(descriptors) = getrlimit(Resource::Nofile).current else { return wanted };
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let others = max_requests.min(descriptors / 2) + OTHER_DESCRIPTORS;
    let most = descriptors.saturating_sub(others).clamp(1, wanted);
    if most < wanted {
        tracing::warn!(
            descriptors,
            connections = most,
            "limits.max_connections is {wanted}, for which this process has too few descriptors: raise its limit (ulimit -n, LimitNOFILE)"
        );
    }
    most
}

/// How many opened tunnels may wait to be served. Each has its task, which waits with it.
const OPENED: usize = 64;

/// Says that the limit is reached, once a second at most.
#[derive(Default)]
struct Seldom(Option<Instant>);

impl Seldom {
    fn warn(&mut self) {
        if self.0.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            self.0 = Some(Instant::now());
            tracing::warn!("limits.max_connections is reached: further connections have to wait");
        }
    }
}

/// A fault of one connection is nothing to wait for; one of the system (no descriptors left) would
/// otherwise spin.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        return;
    }
    tracing::error!(error = %error, "cannot accept connections; trying again in a second");
    tokio::time::sleep(Duration::from_secs(1)).await;
}

impl<H> Serving<H>
where
    H: Handle<Arrived, Response = Response<Observed>, Error = Infallible>,
{
    /// The inside of a tunnel that was opened.
    async fn opened(self, Opened { stream, peer, user_agent }: Opened) {
        let (client, stop, started) = (peer.address, self.stop.clone(), Instant::now());
        let spoke = self.connection(stream, peer).await;
        // Some clients judge a certificate only after the handshake, and then go at once.
        if !spoke && started.elapsed() < ON_ITS_WAY && !stop.is_cancelled() {
            let agent = user_agent.as_ref().and_then(|agent| agent.to_str().ok());
            tracing::warn!(
                %client,
                user_agent = agent.map(|it| Agent(it).to_string()),
                remedy = how_to_trust(agent),
                "a client went away right after the TLS handshake"
            );
        }
    }
}
