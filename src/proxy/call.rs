//! What passes through the stages.

use std::sync::Arc;

use http::Request;

use super::body::Body;
use super::connect::Target;
use crate::contact::refusal::Sent;
use crate::observe::exchange::Exchange;

/// A request on its way through the stages, and what they tell each other of it. Boxed, since it is passed on from each to
/// the next, and a future has room for it wherever it is passed on.
pub(super) struct Call {
    pub request: Request<Body>,
    pub exchange: Arc<Exchange>,
    /// Whom it is for, if its client knows this proxy as a proxy.
    pub forward: Option<Forward>,
    /// What it says, if its answer may be a transition refusal.
    pub sent: Option<Sent>,
    /// It is for a connection that no request was on before: it met one that was closed already.
    pub fresh: bool,
}

/// Marks a request of a client that knows this proxy as a proxy, not as the API itself: the client's own
/// `Host` goes upstream, and no id carries the proxy's origin.
#[derive(Debug, Clone)]
pub(super) enum Forward {
    /// It is for the API.
    Api,
    /// It is for another host, by plain http.
    Elsewhere(Arc<Target>),
}
