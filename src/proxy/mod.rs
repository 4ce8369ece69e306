//! HTTP: the way of a request through the proxy. It asks [`crate::contact`] what to do, and acts.
//!
//! `stack.rs` is the spine; start reading there.

mod auth;
pub(crate) mod body;
mod budget;
mod call;
mod coding;
pub(crate) mod connect;
pub(crate) mod connection;
mod control;
pub(crate) mod error;
mod gathered;
mod headers;
pub(crate) mod io;
mod listener;
mod pool;
mod probe;
mod retry;
pub(crate) mod room;
pub(crate) mod route;
pub(crate) mod sanitize;
mod socket;
mod stack;
mod stage;
mod streams;
mod taker;
mod turn;
mod upstream;
mod verify;
mod wakes;

pub use auth::Credentials;
pub use control::Control;
pub use listener::{Entrance, Server, StartError};
pub use probe::{Probe, ProbeError, probe};
pub(crate) use turn::{end_turn, end_turns};
pub(crate) use upstream::Fault;
pub use upstream::SetupError;
