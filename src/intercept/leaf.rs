//! Certificates for the hosts that are intercepted, made when first asked for and again before they end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::Access;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::ca::{Authority, CaError, NEARLY_OVER};
use super::host::Host;

/// A leaf is made anew when so little is left of it.
const RENEWED_BEFORE: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// The TLS side of every host that is intercepted.
pub(crate) struct Leaves {
    folder: Option<PathBuf>,
    hosts: Vec<Host>,
    /// Opened when first needed: who uses the proxy as a base URL never needs it.
    authority: Mutex<Option<Arc<Authority>>>,
    /// One for each of `hosts`, so that hosts do not wait for each other.
    minted: Vec<Mutex<Option<Minted>>>,
}

struct Minted {
    config: Arc<ServerConfig>,
    /// When it was made, by a clock that may have been ahead then.
    at: SystemTime,
    not_after: SystemTime,
}

impl Leaves {
    pub fn new(folder: Option<PathBuf>, hosts: Vec<Host>) -> Self {
        let minted = hosts.iter().map(|_| Mutex::default()).collect();
        Self { folder, hosts, authority: Mutex::default(), minted }
    }

    /// What is needed to accept TLS as `host`, which is one of those to intercept. Reads files the
    /// first time, and makes a certificate when one is due: some tens of microseconds.
    ///
    /// # Errors
    /// If there is no usable authority. The next call tries again.
    pub fn config(&self, host: &Host, now: SystemTime) -> Result<Arc<ServerConfig>, CaError> {
        let position = self.hosts.iter().position(|it| it == host);
        let position = position.ok_or_else(|| CaError::Make(format!("{host} is not ours")))?;
        // Whoever holds the lock mints for all who wait. What it guards is written in one step, so a
        // poisoned lock is as good as any.
        let mut minted = self.minted[position].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Minted { config, at, not_after }) = &*minted
            && *at <= now
            && now + RENEWED_BEFORE < *not_after
        {
            return Ok(Arc::clone(config));
        }
        let (config, not_after) = self.mint(host, now)?;
        *minted = Some(Minted { config: Arc::clone(&config), at: now, not_after });
        Ok(config)
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
        let authority = self.authority.lock().unwrap_or_else(PoisonError::into_inner);
        authority.as_ref().map(|authority| authority.not_after())
    }

    /// The authority, opened if it is not yet.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn authority(&self) -> Result<Arc<Authority>, CaError> {
        let mut authority = self.authority.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has ended may have been replaced by now; if not, opening it says so.
        if let Some(authority) = &*authority
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
        *authority = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn mint(
        &self,
        host: &Host,
        now: SystemTime,
    ) -> Result<(Arc<ServerConfig>, SystemTime), CaError> {
        let leaf = self.authority()?.mint(host, now)?;
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
        Ok((Arc::new(config), leaf.not_after))
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

    fn leaves() -> (tempfile::TempDir, Leaves) {
        let folder = tempfile::tempdir().expect("a folder");
        let hosts = vec!["api.example".parse().expect("a host")];
        let leaves = Leaves::new(Some(folder.path().join("ca")), hosts);
        (folder, leaves)
    }

    #[test]
    fn a_leaf_is_kept_until_two_days_before_its_end() {
        let (_folder, leaves) = leaves();
        let host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let first = leaves.config(&host, now).expect("a leaf");
        let day = Duration::from_secs(24 * 60 * 60);
        let kept = leaves.config(&host, now + 5 * day - Duration::from_secs(1)).expect("a leaf");
        assert!(Arc::ptr_eq(&first, &kept));
        let renewed = leaves.config(&host, now + 5 * day).expect("a leaf");
        assert!(!Arc::ptr_eq(&first, &renewed));
    }

    /// Regression: until its end or a restart, clients were served one that was not valid yet.
    #[test]
    fn a_leaf_that_was_made_by_a_clock_that_was_ahead_is_made_anew() {
        let (_folder, leaves) = leaves();
        let host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let ahead = leaves.config(&host, now + Duration::from_secs(3600)).expect("a leaf");
        assert!(!Arc::ptr_eq(&ahead, &leaves.config(&host, now).expect("a leaf")));
    }

    #[test]
    fn many_who_ask_at_once_get_one_leaf() {
        let (_folder, leaves) = leaves();
        let host: Host = "api.example".parse().expect("a host");
        let now = SystemTime::now();
        let configs: Vec<_> = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..16)
                .map(|_| scope.spawn(|| leaves.config(&host, now).expect("a leaf")))
                .collect();
            asking.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert!(configs.iter().all(|config| Arc::ptr_eq(config, &configs[0])));
    }
}
