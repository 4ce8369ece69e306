//! The listener for operators: probes and metrics. Loopback by default, and never reachable through the
//! proxy's own port.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;

/// The most connections served at once. Probes and a scraper need two.
const MAX_CONNECTIONS: usize = 32;

/// The longest wait for a request's head, and between two requests.
const IDLE: Duration = Duration::from_secs(30);

/// An admin listener, bound.
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    metrics: Arc<Metrics>,
    /// Cancelled once the proxy drains.
    draining: CancellationToken,
}

impl Admin {
    /// Binds the listener; port 0 takes any that is free.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub async fn bind(
        address: &str,
        metrics: Arc<Metrics>,
        draining: CancellationToken,
    ) -> io::Result<Self> {
        Self::on(TcpListener::bind(address).await?, metrics, draining)
    }

    /// Takes a listener that somebody else has bound.
    ///
    /// # Errors
    /// If it does not know its address.
    pub fn on(
        listener: TcpListener,
        metrics: Arc<Metrics>,
        draining: CancellationToken,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { listener, address, metrics, draining })
    }

    /// The address that was bound, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as the process lives: probes must be answered while it drains.
    pub async fn run(self) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        // Closed by nobody, so a permit always comes.
        while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
            let Ok((stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            };
            let (metrics, draining) = (Arc::clone(&self.metrics), self.draining.clone());
            tokio::spawn(async move {
                let _permit = permit;
                let service = service_fn(move |request| {
                    let answer = answer(&request, &metrics, draining.is_cancelled());
                    async move { Ok::<_, Infallible>(answer) }
                });
                // Who asks and goes away loses nothing but the answer.
                let _ = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(IDLE)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }
}

fn answer<B>(request: &Request<B>, metrics: &Metrics, draining: bool) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD here\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match request.uri().path() {
        "/livez" => text(StatusCode::OK, "live\n"),
        // Not the upstream's health: an API that is down is no reason to take the proxy away.
        "/readyz" if draining => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        "/readyz" => text(StatusCode::OK, "ready\n"),
        "/metrics" => {
            let mut answer = Response::new(Full::from(metrics.encode()));
            let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format));
            answer
        }
        _ => text(StatusCode::NOT_FOUND, "there is /livez, /readyz and /metrics\n"),
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::from(text));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, plain);
    answer
}
