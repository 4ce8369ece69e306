//! The listener for operators: probes, metrics, the dashboard, and what steers the proxy. Loopback by default, and
//! never reachable through the proxy's own port.

mod answer;
mod events;
mod guard;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};

use super::journal::Journal;
use super::metrics::Metrics;
use crate::config::LogLevel;
use crate::contact::Mode;
use crate::proxy::Control;
use crate::proxy::io::Downstream;

pub use guard::Token;

/// The most connections served at once. Probes and a scraper need two, a dashboard two or three.
const MAX_CONNECTIONS: usize = 32;

/// The longest wait for a request's head, and between two requests.
const IDLE: Duration = Duration::from_secs(30);

/// How long a client may take nothing of an answer: it has a place that a probe may need.
const STALLED: Duration = Duration::from_secs(10);

/// An admin listener, bound.
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

/// What the listener answers from.
pub struct Desk {
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// The proxy itself.
    pub control: Control,
    /// What became of exchanges.
    pub journal: Journal,
    /// Takes what only the process can do.
    pub orders: mpsc::Sender<Asked>,
}

/// What an operator may ask of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As SIGHUP.
    Reload,
    /// Another `sanitize.mode`, until the next reload.
    Mode(Mode),
    /// Another `log.level`, until the next reload.
    Level(LogLevel),
}

/// An order, and where to say what came of it: what was done, or why it was not.
pub struct Asked {
    /// What to do.
    pub order: Order,
    /// Takes one sentence.
    pub answer: oneshot::Sender<Result<String, String>>,
}

impl Admin {
    /// Binds the listener; port 0 takes any that is free.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub async fn bind(address: &str) -> io::Result<Self> {
        Self::on(TcpListener::bind(address).await?)
    }

    /// Takes a listener that somebody else has bound.
    ///
    /// # Errors
    /// If it does not know its address.
    pub fn on(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The address that was bound, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as the process lives: probes must be answered while it drains. To be told to end it, the process has to
    /// heed SIGTERM.
    pub async fn run(self, desk: Desk) {
        let desk = Arc::new(desk);
        let places = Places::default();
        loop {
            let Ok((stream, peer)) = self.listener.accept().await else {
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            };
            // Nobody is idle, and all are served this moment: whoever asks has to ask again.
            let Some(place) = places.take() else { continue };
            let local = stream.local_addr().unwrap_or(self.address);
            let ends = guard::Ends { peer: peer.ip(), local: local.ip() };
            let (desk, asked) = (Arc::clone(&desk), Arc::clone(&place));
            let places = places.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let (desk, place) = (Arc::clone(&desk), Arc::clone(&asked));
                    async move {
                        place.is_busy.store(true, Ordering::Relaxed);
                        let answer = desk.handle(request, ends).await;
                        // Who watches is being told for as long as the connection lasts.
                        place.is_busy.store(answer.body().is_stream(), Ordering::Relaxed);
                        Ok::<_, Infallible>(answer)
                    }
                });
                let stream = Downstream::new(stream, Bytes::new(), STALLED, Arc::default());
                let serving = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(IDLE)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    // Who asks and goes away loses nothing but the answer.
                    _ = serving => {}
                    () = place.given_up.notified() => {}
                }
                places.leave(&place);
            });
        }
    }
}

/// The connections that are served, the oldest first. Those that are silent, or slow to read, must not keep a probe out:
/// the oldest of them makes room.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<VecDeque<Arc<Place>>>>);

#[derive(Default)]
struct Place {
    /// A request on it is being answered.
    is_busy: AtomicBool,
    given_up: Notify,
}

impl Places {
    fn take(&self) -> Option<Arc<Place>> {
        let mut taken = self.0.lock();
        if taken.len() >= MAX_CONNECTIONS {
            let idle = taken.iter().position(|place| !place.is_busy.load(Ordering::Relaxed))?;
            taken.remove(idle)?.given_up.notify_one();
        }
        let place = Arc::<Place>::default();
        taken.push_back(Arc::clone(&place));
        Some(place)
    }

    fn leave(&self, place: &Arc<Place>) {
        self.0.lock().retain(|it| !Arc::ptr_eq(it, place));
    }
}
