//! HTTPS_PROXY mode: which hosts a client may reach, tunnels to them, and the certificates by which the
//! API's own host is opened. The requests within take the same stack as all others
//! ([`crate::proxy`]).

pub mod ca;
mod certificates;
mod decide;
pub(crate) mod guard;
mod host;
pub(crate) mod leaf;
pub(crate) mod stores;
pub mod trust;
pub(crate) mod tunnel;

pub(crate) use certificates::is_ours;
pub use decide::{Denied, OtherHosts, Private, Rules, Way};
pub use guard::{Resolve, System};
pub use host::{Host, HostError, Pattern};
