//! What the operator sees: one log line a request, an event per mismatch, and counters. Nothing that a
//! client sent gets here but through [`redact`].

pub mod admin;
pub mod audit;
pub mod cause;
mod clocks;
pub mod exchange;
pub(crate) mod finished;
pub mod found;
pub(crate) mod ids;
pub mod journal;
mod json;
mod lines;
pub mod log;
pub mod metrics;
#[cfg(feature = "otel")]
pub(crate) mod otlp;
mod process;
pub mod record;
pub mod redact;
pub mod stats;
