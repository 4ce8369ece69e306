//! CONNECT (RFC 9110 section 9.3.6): the API's host is opened, any other is tunnelled to or refused.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::USER_AGENT;
use http::uri::Authority;
use http::{HeaderValue, Request, Response, Version};
use rustls::{AlertDescription, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::{Body, Unread};
use super::connection::TakesOver;
use super::error::Error;
use super::socket::Watch;
use super::streams;
use crate::intercept::guard::{ConnectError, Guard};
use crate::intercept::leaf::Leaves;
use crate::intercept::tunnel::{End, Traffic, relay};
use crate::intercept::{Host, Way};
use crate::observe::exchange::Exchange;
use crate::observe::metrics::Metrics;
use crate::observe::record::Decision;
use crate::observe::redact::Agent;

/// Where a connection comes from: known to every request on it.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// The client's address.
    pub address: SocketAddr,
    /// The target of the tunnel that it came through, TLS taken off.
    pub tunnel: Option<Arc<Target>>,
    /// Sees whether the client is still there.
    pub(super) watch: Watch,
    /// What it is sending.
    pub(super) unread: Unread,
    /// Whatever comes of the connection keeps it counted.
    pub(super) open: Arc<Open>,
}

impl Peer {
    /// Who is at the other end of a connection that was just accepted.
    pub(super) fn new(address: SocketAddr, watch: Watch, open: Open) -> Self {
        Self { address, tunnel: None, watch, unread: Unread::default(), open: Arc::new(open) }
    }

    /// Whether the proxy has come to its end, and ends the connection with it.
    pub fn is_cut(&self) -> bool {
        self.open.is_cut()
    }
}

/// A connection of a client, in the gauge and under the limit until all that came of it has ended.
#[derive(Debug)]
pub(super) struct Open {
    metrics: Arc<Metrics>,
    /// The time to drain is over.
    cut: CancellationToken,
    _permit: Option<OwnedSemaphorePermit>,
    /// Of a stream of HTTP/2, if it is a tunnel.
    _stream: Option<streams::Upgrade>,
}

impl Open {
    pub fn new(
        metrics: Arc<Metrics>,
        cut: CancellationToken,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        metrics.connections.inc();
        Self { metrics, cut, _permit: permit, _stream: None }
    }

    /// One more, of the same client: what the stream becomes that is polled now.
    fn beside(&self, permit: OwnedSemaphorePermit) -> Self {
        let mut open = Self::new(Arc::clone(&self.metrics), self.cut.clone(), Some(permit));
        open._stream = streams::Upgrade::begin();
        open
    }

    fn is_cut(&self) -> bool {
        self.cut.is_cancelled()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

/// What a client asked to be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub host: Host,
    pub port: u16,
}

impl Target {
    /// What an authority names. Where it may be left out, `default` is the port of one that has none.
    ///
    /// # Errors
    /// If its host or its port is none, or a user's name stands before it, which is meant for somebody else to see.
    pub fn of(authority: &Authority, default: Option<u16>) -> Result<Self, Error> {
        let host = authority.host().parse().map_err(|error| Error::BadAuthority(Some(error)))?;
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("" | ":") => default,
            Some(port) if port[1..].bytes().all(|byte| byte.is_ascii_digit()) => {
                authority.port_u16().filter(|port| *port > 0)
            }
            _ => None,
        };
        Ok(Self { host, port: port.ok_or(Error::BadAuthority(None))? })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Any stream that bytes can take.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A tunnel whose TLS was accepted: one more connection for the stack.
pub(super) struct Opened {
    pub stream: Box<dyn Stream>,
    pub peer: Peer,
    /// Of the CONNECT.
    pub user_agent: Option<HeaderValue>,
}

/// Serves CONNECT.
pub(super) struct Connect {
    pub guard: Guard,
    pub leaves: Arc<Leaves>,
    pub metrics: Arc<Metrics>,
    /// The longest wait for a TLS handshake.
    pub handshake_timeout: Duration,
    /// The longest silence of a blind tunnel.
    pub idle: Duration,
    /// Outlive the connections that they began on, and are drained with them.
    pub tunnels: TaskTracker,
    /// Takes what was opened back to the listener.
    pub opened: mpsc::Sender<Opened>,
    /// For as many connections as there may be.
    pub room: Arc<Semaphore>,
}

impl Connect {
    /// Answers a CONNECT, and leaves behind the task that serves its tunnel.
    pub async fn handle(
        &self,
        request: &Request<Body>,
        exchange: &Exchange,
    ) -> Result<Response<Body>, Error> {
        let target = target(request)?;
        exchange.concerns(&target);
        let way = self.guard.rules().judge(&target.host, target.port, false)?;
        let mut peer = exchange.peer().cloned();
        // Of HTTP/1, the tunnel is what its connection has become.
        if let Some(peer) = &mut peer
            && request.version() == Version::HTTP_2
        {
            let permit = Arc::clone(&self.room).try_acquire_owned();
            let open = peer.open.beside(permit.map_err(|_| Error::TooManyConnections)?);
            *peer = Arc::new(Peer { open: Arc::new(open), ..Peer::clone(peer) });
        }
        // A copy: the field is a part of the whole head, which a tunnel must not keep.
        let agent = request.headers().get(USER_AGENT);
        let agent = agent.and_then(|it| HeaderValue::from_bytes(it.as_bytes()).ok());
        let (takes_over, stream) = mpsc::channel(1);
        match way {
            Way::Intercept => {
                let config = self.leaves.config(&target.host, SystemTime::now()).await?;
                exchange.decided(Decision::Intercepted);
                let handshake = Handshake {
                    config,
                    limit: self.handshake_timeout,
                    metrics: Arc::clone(&self.metrics),
                    opened: self.opened.clone(),
                };
                self.tunnels.spawn(handshake.run(stream, target, peer, agent));
            }
            Way::Elsewhere => {
                let server = self.guard.connect(&target.host, target.port).await;
                let server = server.map_err(|error| unreachable(error, &target))?;
                exchange.decided(Decision::Tunneled);
                let (metrics, idle) = (Arc::clone(&self.metrics), self.idle);
                let id = exchange.id().to_string();
                let mut client: Given = stream;
                self.tunnels.spawn(async move {
                    let _open = peer;
                    let Some(client) = client.recv().await else { return };
                    Tunnel::open(target, metrics, id).relay(client, server, idle).await;
                });
            }
        }
        let mut response = Response::new(Body::empty());
        response.extensions_mut().insert(TakesOver(takes_over));
        Ok(response)
    }
}

/// The authority-form target (RFC 9112 section 3.2.3).
fn target(request: &Request<Body>) -> Result<Target, Error> {
    let uri = request.uri();
    if uri.scheme().is_some() || uri.path_and_query().is_some() {
        return Err(Error::BadAuthority(None));
    }
    Target::of(uri.authority().ok_or(Error::BadAuthority(None))?, None)
}

/// Why a host of the client's choosing could not be connected to.
pub(super) fn unreachable(error: ConnectError, target: &Target) -> Error {
    use super::upstream::{Fault, UpstreamError};
    let fault = match &error {
        ConnectError::Denied(denied) => return Error::Denied(denied.clone()),
        ConnectError::Unresolved(_) => Fault::Dns,
        ConnectError::Timeout(_) => Fault::ConnectTimeout,
        ConnectError::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Fault::Refused
        }
        ConnectError::Io(error) if error.kind() == io::ErrorKind::TimedOut => Fault::ConnectTimeout,
        ConnectError::Io(_) => Fault::Unreachable,
    };
    let host = target.to_string();
    Error::Upstream(UpstreamError { host, is_api: false, fault, message: error.to_string() })
}

/// The client's side of a tunnel, once it was told that there is one; nothing if that could not be.
type Given = mpsc::Receiver<Box<dyn Stream>>;

/// A blind tunnel. What is to be known of it is told when it ends, also where the proxy ends.
struct Tunnel {
    target: Target,
    metrics: Arc<Metrics>,
    request_id: String,
    started: Instant,
    traffic: Traffic,
    end: End,
}

impl Tunnel {
    fn open(target: Target, metrics: Arc<Metrics>, request_id: String) -> Self {
        metrics.tunnels.inc();
        let (started, traffic) = (Instant::now(), Traffic::default());
        Self { target, metrics, request_id, started, traffic, end: End::Cut }
    }

    /// Passes bytes on unseen, until either side or the idle time ends it.
    async fn relay(mut self, client: Box<dyn Stream>, server: TcpStream, idle: Duration) {
        self.end = relay(client, server, idle, &self.traffic).await;
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let (sent, received) = (self.traffic.sent(), self.traffic.received());
        self.metrics.tunnels.dec();
        self.metrics.tunneled(sent, received);
        tracing::info!(
            request_id = self.request_id,
            host = %self.target.host,
            port = self.target.port,
            sent,
            received,
            end = self.end.as_str(),
            duration_ms = self.started.elapsed().as_micros() as f64 / 1000.0,
            "tunnel"
        );
    }
}

/// Takes the TLS off a tunnel to the API's host.
struct Handshake {
    config: Arc<ServerConfig>,
    limit: Duration,
    metrics: Arc<Metrics>,
    opened: mpsc::Sender<Opened>,
}

impl Handshake {
    async fn run(
        self,
        mut client: Given,
        target: Target,
        peer: Option<Arc<Peer>>,
        user_agent: Option<HeaderValue>,
    ) {
        let (Some(client), Some(peer)) = (client.recv().await, peer) else { return };
        let accepting = TlsAcceptor::from(self.config).accept(client);
        let accepted = match tokio::time::timeout(self.limit, accepting).await {
            Ok(accepted) => accepted.map_err(|error| Refused::from(&error)),
            Err(_) => Err(Refused::Timeout),
        };
        let result = accepted.as_ref().map_or_else(Refused::name, |_| "completed");
        self.metrics.handshake(result);
        let agent = user_agent.as_ref().and_then(|agent| agent.to_str().ok());
        match accepted {
            Ok(stream) => {
                let (tunnel, unread) = (Some(Arc::new(target)), Unread::default());
                let peer = Peer { tunnel, unread, ..Peer::clone(&peer) };
                let opened = Opened { stream: Box::new(stream), peer, user_agent };
                // Fails only where the listener has ended.
                let _ = self.opened.send(opened).await;
            }
            Err(refused) => tracing::warn!(
                client = %peer.address,
                host = %target.host,
                user_agent = agent.map(|it| Agent(it).to_string()),
                reason = refused.name(),
                alert = refused.alert().map(tracing::field::debug),
                remedy = refused.remedy(agent),
                "TLS handshake failed"
            ),
        }
    }
}

/// Why a client's TLS was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Timeout,
    /// It went away.
    Gone,
    /// It sent an alert: about our certificate, as a rule.
    Alert(AlertDescription),
    /// What it sent is no TLS.
    NotTls,
    /// It asked for another host than the CONNECT had named.
    WrongName,
    /// No common version, cipher or protocol.
    Incompatible,
}

impl From<&io::Error> for Refused {
    fn from(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
        match tls {
            None => Self::Gone,
            Some(rustls::Error::AlertReceived(alert)) => Self::Alert(*alert),
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls,
            // Said where the resolver has no certificate, and nowhere else before a client's first
            // flight was answered.
            Some(rustls::Error::General(_)) => Self::WrongName,
            Some(_) => Self::Incompatible,
        }
    }
}

impl Refused {
    const fn name(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Gone => "client_gone",
            Self::Alert(_) => "alert",
            Self::NotTls => "not_tls",
            Self::WrongName => "wrong_name",
            Self::Incompatible => "incompatible",
        }
    }

    const fn alert(self) -> Option<AlertDescription> {
        if let Self::Alert(alert) = self { Some(alert) } else { None }
    }

    fn remedy(self, agent: Option<&str>) -> String {
        match self {
            Self::Alert(AlertDescription::CertificateExpired) => {
                "compare the clocks of the client and of this machine"
            }
            Self::Alert(_) | Self::Gone => return how_to_trust(agent),
            Self::Timeout => "the client opened a tunnel and said nothing in limits.header_timeout",
            Self::NotTls => {
                "this host is served by https only: let the application speak TLS in its tunnel"
            }
            Self::WrongName => "the server name in TLS must be the host of the CONNECT",
            Self::Incompatible => {
                "the client must speak TLS 1.2 or later, and HTTP/1.1 or HTTP/2 if it names protocols"
            }
        }
        .to_owned()
    }
}

/// What makes a client trust our root, as far as its runtime is known.
pub(super) fn how_to_trust(agent: Option<&str>) -> String {
    let agent = agent.unwrap_or_default().to_ascii_lowercase();
    let known = [
        ("curl", "CURL_CA_BUNDLE"),
        ("python-requests", "REQUESTS_CA_BUNDLE"),
        ("python", "SSL_CERT_FILE"),
        ("node", "NODE_EXTRA_CA_CERTS"),
        ("undici", "NODE_EXTRA_CA_CERTS"),
        ("java", "-Djavax.net.ssl.trustStore in JAVA_TOOL_OPTIONS"),
        ("php", "curl.cainfo and openssl.cafile in php.ini"),
        ("perl", "PERL_LWP_SSL_CA_FILE"),
        ("ruby", "SSL_CERT_FILE"),
    ];
    let setting = known.into_iter().find(|(name, _)| agent.contains(name)).map_or(
        "CURL_CA_BUNDLE, REQUESTS_CA_BUNDLE, SSL_CERT_FILE, NODE_EXTRA_CA_CERTS or JAVA_TOOL_OPTIONS",
        |(_, setting)| setting,
    );
    format!(
        "if it does not trust the proxy: start it with `optin-proxy exec`, or set {setting} as `optin-proxy \
         env` prints it"
    )
}
