mod faults;
mod framing;
mod headers;
mod lifecycle;
mod retry;
mod rewrite;
mod secrets;
mod streaming;
