//! Certificates for the hosts that are intercepted, made when first asked for and again before they end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustix::fs::Access;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};

use super::ca::{Authority, CaError, NEARLY_OVER};
use super::host::Host;

/// A leaf is made anew when so little is left of it.
const RENEWED_BEFORE: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// The longest wait for the authority's files, and for whoever reads them already.
const PATIENCE: Duration = Duration::from_secs(10);

/// The TLS side of every host that is intercepted.
pub(crate) struct Leaves {
    folder: Option<PathBuf>,
    hosts: Vec<Host>,
    /// Opened when first needed: who uses the proxy as a base URL never needs it.
    authority: ArcSwapOption<Authority>,
    /// One for each of `hosts`.
    minted: Vec<ArcSwapOption<Minted>>,
    /// One reads files and makes what is missing, for all who wait: if the file system hangs, it takes one thread.
    making: Arc<Mutex<()>>,
    /// When the last one began.
    begun: ArcSwapOption<Instant>,
}

struct Minted {
    config: Arc<ServerConfig>,
    /// When it was made, by a clock that may have been ahead then.
    at: SystemTime,
    not_after: SystemTime,
}

impl Leaves {
    pub fn new(folder: Option<PathBuf>, hosts: Vec<Host>) -> Self {
        let minted = hosts.iter().map(|_| ArcSwapOption::empty()).collect();
        let (authority, making, begun) = Default::default();
        Self { folder, hosts, authority, minted, making, begun }
    }

    /// What is needed to accept TLS as `host`, which is one of those to intercept. Reads files the
    /// first time, and makes a certificate when one is due.
    ///
    /// # Errors
    /// If there is no usable authority, or its files cannot be read in time. The next call tries again.
    pub async fn config(
        self: &Arc<Self>,
        host: &Host,
        now: SystemTime,
    ) -> Result<Arc<ServerConfig>, CaError> {
        let place = self.hosts.iter().position(|it| it == host);
        let place = place.ok_or_else(|| CaError::Make(format!("{host} is not ours")))?;
        if let Some(kept) = self.kept(place, now) {
            return Ok(kept);
        }
        self.make(move |leaves| {
            // Whoever was before may have made it.
            if let Some(kept) = leaves.kept(place, now) {
                return Ok(kept);
            }
            let made = Arc::new(leaves.mint(&leaves.hosts[place], now)?);
            leaves.minted[place].store(Some(Arc::clone(&made)));
            Ok(Arc::clone(&made.config))
        })
        .await
    }

    fn kept(&self, place: usize, now: SystemTime) -> Option<Arc<ServerConfig>> {
        let minted = self.minted[place].load();
        let Minted { config, at, not_after } = &**minted.as_ref()?;
        (*at <= now && now + RENEWED_BEFORE < *not_after).then(|| Arc::clone(config))
    }

    /// Does what may take as long as the file system does, where no other task has to wait for it.
    async fn make<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, CaError> + Send + 'static,
    ) -> Result<T, CaError> {
        let late = |_| {
            let path = self.folder.clone().unwrap_or_default();
            CaError::File { path, error: io::ErrorKind::TimedOut.into() }
        };
        // Who comes long after it began need not wait for it.
        let begun = self.begun.load().as_deref().copied().unwrap_or_else(Instant::now);
        let turn = timeout_at(begun + PATIENCE, Arc::clone(&self.making).lock_owned());
        let one = turn.await.map_err(late)?;
        self.begun.store(Some(Arc::new(Instant::now())));
        let leaves = Arc::clone(self);
        let making = spawn_blocking(move || {
            let _until_it_ends = one;
            let made = work(&leaves);
            leaves.begun.store(None);
            made
        });
        let made = timeout(PATIENCE, making).await.map_err(late)?;
        made.unwrap_or_else(|error| Err(CaError::Make(error.to_string())))
    }

    /// Whether these are the hosts, and this is the folder.
    pub fn are_for(&self, folder: &Option<PathBuf>, hosts: &[Host]) -> bool {
        self.folder == *folder && self.hosts == hosts
    }

    /// When the authority ends, if there is one already. `is_chosen`: somebody named the folder, and will want one.
    ///
    /// # Errors
    /// Why it cannot be used, or could not be made in a folder that was named.
    pub fn check(&self, is_chosen: bool) -> Result<Option<SystemTime>, CaError> {
        let there = self.folder.as_ref().filter(|_| !self.hosts.is_empty());
        let Some(folder) = there else { return Ok(None) };
        let loaded = Authority::load(folder, &self.hosts)?;
        if loaded.is_none() && is_chosen {
            can_be_made(folder)?;
        }
        Ok(loaded.map(|authority| authority.not_after()))
    }

    /// When the authority that is in use ends.
    pub fn not_after(&self) -> Option<SystemTime> {
        self.authority.load().as_ref().map(|authority| authority.not_after())
    }

    /// The authority, opened if it is not yet.
    ///
    /// # Errors
    /// If it cannot be used, or its files cannot be read in time.
    pub async fn authority(self: &Arc<Self>) -> Result<Arc<Authority>, CaError> {
        self.make(Self::open).await
    }

    fn open(&self) -> Result<Arc<Authority>, CaError> {
        // One that has ended may have been replaced by now; if not, opening it says so.
        if let Some(authority) = &*self.authority.load()
            && SystemTime::now() < authority.not_after()
        {
            return Ok(Arc::clone(authority));
        }
        let folder = self.folder.as_ref().ok_or(CaError::NoFolder)?;
        let opened = Arc::new(Authority::open(folder, &self.hosts)?);
        let left = opened.not_after().duration_since(SystemTime::now()).unwrap_or_default();
        if left < NEARLY_OVER {
            tracing::warn!(
                folder = %folder.display(),
                days = left.as_secs() / 86_400,
                "the certificate authority ends soon: move its folder away, run `optin-proxy ca init`, restart `serve`, and let clients trust the new one"
            );
        }
        self.authority.store(Some(Arc::clone(&opened)));
        Ok(opened)
    }

    fn mint(&self, host: &Host, now: SystemTime) -> Result<Minted, CaError> {
        let leaf = self.open()?.mint(host, now)?;
        let fault = |error: rustls::Error| CaError::Make(error.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let certified = CertifiedKey::from_der(leaf.chain, leaf.key, &provider).map_err(fault)?;
        let resolver = Resolver { host: host.clone(), certified: Arc::new(certified) };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(fault)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Minted { config: Arc::new(config), at: now, not_after: leaf.not_after })
    }
}

/// Whether an authority could be made in a folder that may not be there yet.
fn can_be_made(folder: &Path) -> Result<(), CaError> {
    let there = folder.ancestors().find(|above| above.exists());
    // A relative one begins where the process is.
    let there = there.unwrap_or(Path::new("."));
    rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| CaError::File { path: there.to_owned(), error: error.into() })
}

/// Serves one host, and nobody who asks for another.
#[derive(Debug)]
struct Resolver {
    host: Host,
    certified: Arc<CertifiedKey>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // A client may leave it out, and must for an address (RFC 6066 section 3).
        let agrees = hello
            .server_name()
            .is_none_or(|name| name.parse::<Host>().is_ok_and(|named| named == self.host));
        agrees.then(|| Arc::clone(&self.certified))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves() -> (tempfile::TempDir, Arc<Leaves>) {
        let folder = tempfile::tempdir().expect("a folder");
        let hosts = vec!["api.example".parse().expect("a host")];
        let leaves = Leaves::new(Some(folder.path().join("ca")), hosts);
        (folder, Arc::new(leaves))
    }

    #[tokio::test]
    async fn a_leaf_is_kept_until_two_days_before_its_end() {
        let (_folder, leaves) = leaves();
        let host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let first = leaves.config(&host, now).await.expect("a leaf");
        let day = Duration::from_secs(24 * 60 * 60);
        let last = now + 5 * day - Duration::from_secs(1);
        let kept = leaves.config(&host, last).await.expect("a leaf");
        assert!(Arc::ptr_eq(&first, &kept));
        let renewed = leaves.config(&host, now + 5 * day).await.expect("a leaf");
        assert!(!Arc::ptr_eq(&first, &renewed));
    }

    /// Regression: until its end or a restart, clients were served one that was not valid yet.
    #[tokio::test]
    async fn a_leaf_that_was_made_by_a_clock_that_was_ahead_is_made_anew() {
        let (_folder, leaves) = leaves();
        let host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let ahead = leaves.config(&host, now + Duration::from_secs(3600)).await.expect("a leaf");
        assert!(!Arc::ptr_eq(&ahead, &leaves.config(&host, now).await.expect("a leaf")));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_who_ask_at_once_get_one_leaf() {
        let (_folder, leaves) = leaves();
        let host: Host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (leaves, host) = (Arc::clone(&leaves), host.clone());
            asking.spawn(async move { leaves.config(&host, now).await.expect("a leaf") });
        }
        let configs = asking.join_all().await;
        assert!(configs.iter().all(|config| Arc::ptr_eq(config, &configs[0])));
    }
}
