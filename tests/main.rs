//! Everything is tested through public doors: the domain by its functions, the proxy over real sockets,
//! the commands by the real binary.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod cli;
mod contact;
#[cfg(feature = "ext-proc")]
mod ext_proc;
mod fuzz;
mod intercept;
mod observe;
mod proxy;
mod support;
