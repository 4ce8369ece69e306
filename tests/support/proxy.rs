//! A proxy in this process, on a free port.

use std::net::SocketAddr;
use std::sync::Arc;

use optin_proxy::config::Layers;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::Server;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::client::{Answer, Client};
use super::origin::Origin;

pub struct Proxy {
    pub address: SocketAddr,
    pub metrics: Arc<Metrics>,
    /// The folder of its certificate authority.
    pub folder: TempDir,
    running: Option<(DropGuard, JoinHandle<usize>)>,
}

impl Proxy {
    /// A proxy before `origin`, with these keys set. Backoff takes no time unless set otherwise.
    pub async fn before(origin: &Origin, settings: &[&str]) -> Self {
        Self::start(&origin.url(), settings).await
    }

    pub async fn start(upstream: &str, settings: &[&str]) -> Self {
        Self::start_with(upstream, settings, |_| {}).await
    }

    /// The same, with the server made ready by `prepare`.
    pub async fn start_with(
        upstream: &str,
        settings: &[&str],
        prepare: impl FnOnce(&mut Server),
    ) -> Self {
        let mut layers = Layers::default();
        layers.set("test", "listen.address=127.0.0.1:0");
        layers.set("test", "retry.base_delay=0s");
        layers.set("test", &format!("upstream.url={upstream}"));
        let folder = tempfile::tempdir().expect("a folder");
        layers.set("test", &format!("intercept.ca_dir={}", folder.path().display()));
        for setting in settings {
            layers.set("test", setting);
        }
        let config = Arc::new(layers.build().expect("a valid configuration"));
        let metrics = Arc::new(Metrics::default());
        let mut server = Server::bind(config, Arc::clone(&metrics)).await.expect("a free port");
        prepare(&mut server);
        let address = server.address();
        let stop = CancellationToken::new();
        let running = tokio::spawn(server.run(stop.clone()));
        Self { address, metrics, folder, running: Some((stop.drop_guard(), running)) }
    }

    /// Tells the proxy to stop; what it returns at its end.
    pub fn stop(&mut self) -> JoinHandle<usize> {
        self.running.take().expect("it runs").1
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// One request on a connection of its own.
    pub async fn ask(&self, request: &[u8]) -> Answer {
        self.client().await.ask(request).await
    }

    /// The value of a series, as `/metrics` would have it.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.encode();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or("0").parse().expect("a number")
    }

    /// Waits until so many requests are over.
    pub async fn finished(&self, requests: u32) {
        while self.metric("optin_proxy_requests_total") < f64::from(requests) {
            tokio::task::yield_now().await;
        }
    }
}
