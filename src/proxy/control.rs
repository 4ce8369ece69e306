//! Steering a server that runs: another configuration, draining, and its end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::listener::StartError;
use super::upstream::SetupError;
use super::verify::tls;
use crate::config::Config;
use crate::intercept::ca::{Authority, CaError};
use crate::intercept::leaf::Leaves;

/// A configuration that has been found to work.
pub(super) struct Wanted {
    pub config: Arc<Config>,
    pub tls: ClientConfig,
    pub leaves: Arc<Leaves>,
    /// When the authority that was there ends, or why it cannot be used.
    authority: Result<Option<SystemTime>, String>,
}

impl Wanted {
    /// `before` is what was wanted until now: what has not changed is kept.
    ///
    /// `forwards`: clients may ask for tunnels, which takes an authority.
    fn new(config: Arc<Config>, before: Option<&Self>, forwards: bool) -> Result<Self, SetupError> {
        let (folder, hosts) = (&config.intercept.ca_dir, &config.intercept.rules.hosts);
        let kept = before.map(|before| &before.leaves).filter(|it| it.are_for(folder, hosts));
        let leaves =
            kept.map_or_else(|| Arc::new(Leaves::new(folder.clone(), hosts.clone())), Arc::clone);
        let is_chosen = !config.resolved.intercept.ca_dir.is_empty();
        // The one reads some hundred certificates, the other waits for its first random number.
        let (tls, authority) = thread::scope(|scope| {
            let checking = scope.spawn(|| match forwards {
                true => leaves.check(is_chosen).map_err(|error| error.to_string()),
                false => Ok(None),
            });
            let tls = tls(&config.upstream);
            let checked = checking.join();
            (tls, checked.unwrap_or_else(|_| Err("it could not be looked at".into())))
        });
        let tls = tls?;
        if forwards && before.is_none() && folder.is_none() && !hosts.is_empty() {
            tracing::info!("base URLs are served, and HTTPS_PROXY is not: {}", CaError::NoFolder);
        }
        Ok(Self { config, tls, leaves, authority })
    }

    /// When the authority ends, if there is one.
    fn authority_end(&self) -> Result<Option<SystemTime>, String> {
        match self.leaves.not_after() {
            Some(end) => Ok(Some(end)),
            None => self.authority.clone(),
        }
    }

    /// A base URL is served all the same; that the other half is missing shows in the readiness.
    fn tell(self) -> Self {
        if let Err(error) = &self.authority {
            tracing::error!(%error, "HTTPS_PROXY mode will not work");
        }
        self
    }
}

/// Has new requests served by a configuration.
type Apply = Box<dyn Fn(&Wanted) + Send + Sync>;

/// While it is there, configurations are heeded.
pub(super) struct Heeding(Arc<Mutex<Option<Apply>>>);

impl Drop for Heeding {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// A hand on a server that runs.
#[derive(Clone)]
pub struct Control {
    /// What is bound, whatever the new configuration says.
    address: SocketAddr,
    wanted: watch::Sender<Arc<Wanted>>,
    apply: Arc<Mutex<Option<Apply>>>,
    /// One at a time.
    reloading: Arc<Mutex<()>>,
    pub(super) drain: CancellationToken,
    /// What is still open ends now, whatever is in flight.
    pub(super) cut: CancellationToken,
    /// Requests are forwarded for whoever reaches the listener.
    forwards: bool,
}

impl Control {
    /// `forwards`: requests are forwarded for whoever reaches `address`.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub(crate) fn new(
        address: SocketAddr,
        config: Arc<Config>,
        forwards: bool,
    ) -> Result<Self, SetupError> {
        let wanted = watch::Sender::new(Arc::new(Wanted::new(config, None, forwards)?.tell()));
        let (apply, reloading, drain, cut) = Default::default();
        Ok(Self { address, wanted, apply, reloading, drain, cut, forwards })
    }

    /// What is made of the configuration now, and of each that comes: at once, so that what is served after
    /// [`Control::reload`] is served by it.
    pub(super) fn heed<H: Send + Sync + 'static>(
        &self,
        make: impl Fn(&Wanted) -> H + Send + Sync + 'static,
    ) -> (Arc<ArcSwap<H>>, watch::Receiver<Arc<Wanted>>, Heeding) {
        let mut apply = self.apply.lock();
        let changes = self.wanted.subscribe();
        let first = Arc::clone(&changes.borrow());
        let made = Arc::new(ArcSwap::from_pointee(make(&first)));
        let kept = Arc::clone(&made);
        *apply = Some(Box::new(move |wanted| kept.store(Arc::new(make(wanted)))));
        (made, changes, Heeding(Arc::clone(&self.apply)))
    }

    /// The address that was bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The configuration by which new requests are served.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.wanted.borrow().config)
    }

    /// The certificate authority, made if there is none yet.
    ///
    /// # Errors
    /// If it cannot be used, or its files cannot be read in time.
    pub async fn authority(&self) -> Result<Arc<Authority>, CaError> {
        let leaves = Arc::clone(&self.wanted.borrow().leaves);
        leaves.authority().await
    }

    /// When the certificate authority ends, if there is one.
    ///
    /// # Errors
    /// Why it could not be used when the configuration was read.
    pub fn authority_end(&self) -> Result<Option<SystemTime>, String> {
        self.wanted.borrow().authority_end()
    }

    /// From now on connections close after their answer. New ones are still served.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Says that the process ends now: the records of what is cut by that do not blame clients for it.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Cancelled once [`Control::cut`] was said.
    #[cfg(feature = "ext-proc")]
    pub(crate) fn cutting(&self) -> CancellationToken {
        self.cut.clone()
    }

    /// Cancelled when it is told to drain or to stop.
    #[cfg(feature = "ext-proc")]
    pub(crate) fn draining(&self) -> CancellationToken {
        self.drain.clone()
    }

    /// Whether it was told to drain or to stop.
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// From now on new requests are served by this configuration; those in flight keep theirs. The listener's
    /// own address and the limit of connections stay as they were.
    ///
    /// # Errors
    /// If TLS cannot be set up, the listener would serve everybody, or HTTPS_PROXY mode works and would not any more. Nothing has
    /// changed then.
    pub fn reload(&self, config: Arc<Config>) -> Result<(), StartError> {
        if self.forwards && config.listen.is_open(self.address.ip()) {
            return Err(StartError::Open { address: self.address });
        }
        self.change(|before| {
            let wanted = Wanted::new(config, Some(before), self.forwards)?;
            let is_another = !Arc::ptr_eq(&wanted.leaves, &before.leaves);
            match wanted.authority_end() {
                // What works is not given up for what does not.
                Err(why) if is_another && matches!(before.authority_end(), Ok(Some(_))) => {
                    Err(StartError::Authority(why))
                }
                _ => Ok(wanted.tell()),
            }
        })
    }

    /// The same for a configuration that differs in what is kept in no file, as the mode.
    pub fn adjust(&self, config: Arc<Config>) {
        let Ok(()) = self.change(|before| {
            let Wanted { tls, leaves, authority, .. } = before;
            let (tls, leaves, authority) = (tls.clone(), Arc::clone(leaves), authority.clone());
            Ok::<_, Infallible>(Wanted { config, tls, leaves, authority })
        });
    }

    fn change<E>(&self, make: impl FnOnce(&Wanted) -> Result<Wanted, E>) -> Result<(), E> {
        // Of two at once, the last one is in force everywhere. It may take its time, for which a server that ends does not wait.
        let _one = self.reloading.lock();
        let before = Arc::clone(&self.wanted.borrow());
        let wanted = Arc::new(make(&before)?);
        let apply = self.apply.lock();
        self.wanted.send_replace(Arc::clone(&wanted));
        if let Some(apply) = &*apply {
            apply(&wanted);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    fn config(most: usize) -> Arc<Config> {
        let mut layers = Layers::default();
        layers.set("test", &format!("limits.max_requests={most}"));
        Arc::new(layers.build().expect("valid"))
    }

    /// Regression: what was served after a reload could be served by what was there before.
    #[test]
    fn a_configuration_is_in_force_when_its_reload_returns_and_as_long_as_somebody_heeds_it() {
        let address = SocketAddr::from(([127, 0, 0, 1], 8080));
        let control = Control::new(address, config(1), false).expect("it can be set up");
        let served = Arc::new(());
        let is_served = Arc::clone(&served);
        let (made, changes, heeding) = control.heed(move |wanted| {
            let _ = &is_served;
            wanted.config.limits.max_requests
        });
        assert_eq!(**made.load(), 1);
        control.reload(config(2)).expect("it can be set up");
        assert_eq!(**made.load(), 2);
        assert!(changes.has_changed().expect("it is there"));
        drop(heeding);
        control.reload(config(3)).expect("it can be set up");
        assert_eq!((**made.load(), control.config().limits.max_requests), (2, 3));
        assert_eq!(Arc::strong_count(&served), 1, "nothing of a server is kept beyond it");
    }
}
