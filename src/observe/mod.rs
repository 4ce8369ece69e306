//! What the operator sees: one log line a request, an event per mismatch, and counters. Nothing that a
//! client sent gets here but through [`redact`].

pub mod admin;
pub mod exchange;
pub mod log;
pub mod metrics;
pub mod redact;
