//! A sidecar between an application and the Constant Contact v1 API: it makes the `OptInSource` of
//! outgoing contact XML consistent, logs every mismatch, and retries the transition refusal that
//! contradicts what was sent.
//!
//! # The life of a request
//!
//! 1. [`proxy::Server`] accepts a connection from downstream and tells HTTP/1 from HTTP/2.
//!    What a CONNECT opens comes back to it as one more connection, TLS taken off; blind tunnels go
//!    their own way ([`intercept`]).
//! 2. `proxy::stack` is the way of each request, outermost first. `Observe` begins its
//!    [`observe::exchange::Exchange`]; `Problems` stands ready to answer for whatever fails below;
//!    `Shed` refuses what is more than can be done at once; `Admit` decides whether client and target are served.
//! 3. `Sanitize` lets all but contact writes stream past. A contact write is read whole and given to
//!    [`contact::sanitize`], which finds the sources, judges them by the [`contact::Policy`] and
//!    splices its edits into the raw bytes.
//! 4. `Retry` keeps what may be refused transiently, and asks [`contact::refusal`] about each 400.
//! 5. `Headers` makes the message the upstream's: hop-by-hop fields end, `Host` and `Via` are set.
//! 6. `Upstream` sends it, over a pooled and verified connection.
//! 7. The answer takes the same way back. When its body has ended, or its client has gone, the exchange
//!    is handed to the [`observe::journal::Journal`], which logs it and keeps the record.
//!
//! # The rooms
//!
//! [`contact`] is the domain: pure functions over bytes, which know nothing of HTTP. [`proxy`] asks it and
//! acts. [`intercept`] says where a client of the forward proxy may go, and vouches for the API's host.
//! `ext_proc` (a cargo feature) asks the same domain for an Envoy. [`config`] says what is wanted, [`observe`] what happened, [`cli`] are the commands, and
//! [`simulator`] is an API to try it all against.

pub mod cli;
pub mod config;
pub mod contact;
#[cfg(feature = "ext-proc")]
pub mod ext_proc;
pub mod intercept;
pub mod observe;
pub mod proxy;
pub mod simulator;

/// For whatever links this crate: what is tested and measured is what runs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
