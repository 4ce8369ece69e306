//! A simulated v1 API: in memory, seeded, over real HTTP. For integration tests and for `demo`.
//!
//! What it does is marked where it is coded:
//!
//! * **documented**: the vendor's documentation, or its staff in the support forum, says so;
//! * **observed**: seen on the wire, or reported by a user, but documented nowhere;
//! * **assumed**: our own deduction or invention, so that there is something to test against. Above all,
//!   *why* the real API answers at random is not known. Our hypothesis, which is all that the
//!   simulator can offer: it evaluates one of the `OptInSource` values in the body, no matter which
//!   (see [`state`]). No statement about the real API can be drawn from the simulator.

mod http;
mod sent;
pub mod state;
mod tls;
mod xml;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use state::State;
pub use tls::TlsError;

/// The account that exists from the start, and what its requests authenticate with.
pub const ACCOUNT: &str = "joesflowers";
/// API key, user name and password as Basic authentication carries them (documented).
pub const CREDENTIALS: &str = "APIKEY%joesflowers:secret";

/// How a simulated API behaves.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// With this probability, an update of a Do-Not-Mail contact by the contact is refused as if it
    /// were the owner's.
    pub flake_rate: f64,
    /// Same seed and same requests to each contact, same answers.
    pub seed: u64,
    /// How many contacts there are from the start, numbered from 1. Every third is Active, the others
    /// are Do Not Mail.
    pub contacts: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { flake_rate: 0.0, seed: 1, contacts: 60 }
    }
}

/// The longest wait for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A connection, encrypted or not.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A simulated API with its listener bound.
pub struct Simulator {
    listener: TcpListener,
    address: SocketAddr,
    world: World,
    tls: Option<TlsAcceptor>,
}

/// Looks into a running simulator from outside.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// The body of the last PUT to a contact, as it arrived.
    pub fn last_update(&self, contact: u64) -> Option<Bytes> {
        self.0.lock().last_update(contact)
    }

    /// A contact's status, in the API's words.
    pub fn status(&self, contact: u64) -> Option<&'static str> {
        self.0.lock().status(contact)
    }
}

impl Simulator {
    /// Binds a listener; port 0 takes any that is free.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub async fn bind(address: &str, options: Options) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let world = World(Arc::new(Mutex::new(State::new(options))));
        Ok(Self { listener, address, world, tls: None })
    }

    /// Speaks TLS instead of plain text, for `localhost` and for the API's own name. Returns the
    /// certificate authority to trust, as PEM: it is made anew each time.
    ///
    /// # Errors
    /// If no certificate can be made.
    pub fn with_tls(&mut self) -> Result<String, TlsError> {
        let (acceptor, authority) = tls::acceptor()?;
        self.tls = Some(acceptor);
        Ok(authority)
    }

    /// The address that was bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A view into the simulated account.
    pub fn world(&self) -> World {
        self.world.clone()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                // No descriptors left, most likely: without a pause this would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let world = self.world.clone();
            let stop = stop.clone();
            let tls = self.tls.clone();
            connections.spawn(async move {
                let _ = stream.set_nodelay(true);
                let scheme = if tls.is_some() { "https" } else { "http" };
                let stream: Box<dyn Stream> = match tls {
                    None => Box::new(stream),
                    Some(tls) => match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
                        Ok(Ok(stream)) => Box::new(stream),
                        // Whoever does not trust it goes away.
                        _ => return,
                    },
                };
                let mut builder = auto::Builder::new(TokioExecutor::new());
                builder.http1().timer(TokioTimer::new());
                let service = hyper::service::service_fn(move |request| {
                    let world = world.clone();
                    async move {
                        Ok::<_, std::convert::Infallible>(
                            http::answer(&world, scheme, request).await,
                        )
                    }
                });
                let connection = builder.serve_connection(TokioIo::new(stream), service);
                // What a client does to its connection is its own affair.
                tokio::select! { _ = connection => {} () = stop.cancelled() => {} }
            });
        }
        connections.close();
        connections.wait().await;
    }
}
