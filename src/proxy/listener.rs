//! Accepting connections, and ending them in order.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::io::Deadlines;
use super::stack::{Observed, stack};
use super::stage::Handle;
use super::upstream::{SetupError, Upstream};
use crate::config::{Config, Limits};
use crate::observe::metrics::Metrics;

/// A proxy with its listener bound. Accepts nothing before [`Server::run`].
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    upstream: Upstream,
}

/// Why the proxy cannot start.
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
}

impl Server {
    /// Binds the listener of `config`.
    ///
    /// # Errors
    /// If the address cannot be had, or the upstream side cannot be set up.
    pub async fn bind(config: Arc<Config>, metrics: Arc<Metrics>) -> Result<Self, StartError> {
        let upstream = Upstream::new(Arc::clone(&config))?;
        let bind = |error| StartError::Bind { address: config.listen.address.clone(), error };
        let listener = TcpListener::bind(&config.listen.address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address, config, metrics, upstream })
    }

    /// The address that was bound, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then finishes what is in flight within `listen.drain_timeout`. Returns how
    /// many connections were cut because they did not end by then.
    pub async fn run(self, stop: CancellationToken) -> usize {
        let stack = Arc::new(stack(&self.config, &self.metrics, self.upstream));
        let connections = TaskTracker::new();
        let builder = connection_builder(&self.config.limits);
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            };
            let serving = serve(
                stream,
                builder.clone(),
                Arc::clone(&stack),
                stop.clone(),
                self.config.limits.clone(),
            );
            let metrics = Arc::clone(&self.metrics);
            connections.spawn(async move {
                let _counted = Counted::new(metrics);
                serving.await;
            });
        }
        drop(self.listener);
        connections.close();
        let drained = tokio::time::timeout(self.config.listen.drain_timeout, connections.wait());
        if drained.await.is_ok() { 0 } else { connections.len() }
    }
}

/// An open connection in the gauge, however it ends.
struct Counted(Arc<Metrics>);

impl Counted {
    fn new(metrics: Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Self(metrics)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.dec();
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

fn connection_builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .preserve_header_case(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.header_timeout)
        .keep_alive_timeout(limits.header_timeout);
    builder
}

/// One connection, HTTP/1 or HTTP/2 by its first bytes, until its end.
async fn serve<H>(
    stream: TcpStream,
    builder: auto::Builder<TokioExecutor>,
    stack: Arc<H>,
    stop: CancellationToken,
    limits: Limits,
) where
    H: Handle<Request<Incoming>, Response = Response<Observed>, Error = Infallible>,
{
    // Answers are written whole: waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Deadlines::new(stream, limits.header_timeout, limits.idle_timeout));
    let service = service_fn(move |request| {
        let stack = Arc::clone(&stack);
        async move { stack.handle(request).await }
    });
    let connection = builder.serve_connection(io, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "connection ended");
    }
}
