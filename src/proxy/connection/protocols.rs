//! What a configuration says of connections.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper_util::rt::TokioTimer;
use tokio::time::Instant;

use super::super::io::READ;
use super::super::stack::Begin;
use super::super::streams::Streams;
use crate::config::Config;

/// Connections that fall silent within the same of these are taken back at once, since a thread that has little to do is woken
/// for each: by 1,000 that are silent for half a second before each update, an update takes 7 % less CPU time, that of fewer
/// wakes of the journal's thread included.
const TOGETHER: Duration = Duration::from_millis(8);

const _: () = assert!(1_000_000_000 % TOGETHER.subsec_nanos() == 0, "counted within a second");

/// hyper takes no longer targets, whatever `limits.max_target` says.
const HYPER_MAX_TARGET: usize = 65_534;

/// hyper's own limit, for which it needs no allocation.
const HYPER_MAX_HEADERS: usize = 100;

/// How connections are served.
pub(super) struct Protocols {
    pub http1: http1::Builder,
    pub http2: http2::Builder<Streams>,
    pub head: Duration,
    pub keep_alive: Duration,
    pub idle: Duration,
    pub whole: Duration,
    pub max_target: usize,
    pub max_head: usize,
    /// What may be kept of a body, in bytes.
    pub max_body: usize,
    /// What [`TOGETHER`] is counted from.
    since: Instant,
}

impl Protocols {
    pub fn new(config: &Config) -> Self {
        let limits = &config.limits;
        let mut http1 = http1::Builder::new();
        http1
            // The deadline itself is kept by `Serving::http1`; without one, hyper would not say when it waits.
            .header_read_timeout(limits.header_timeout)
            .max_header_size(limits.max_head)
            // What is read at once. By the 16 KiB of a head, an upload took a third more CPU time.
            .max_buf_size(limits.max_head.max(READ))
            .preserve_header_case(true);
        if limits.max_headers != HYPER_MAX_HEADERS {
            http1.max_headers(limits.max_headers);
        }
        let streams = Streams { whole: limits.request_timeout, stall: limits.idle_timeout };
        let mut http2 = http2::Builder::new(streams);
        http2
            .timer(TokioTimer::new())
            .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX))
            .keep_alive_interval(limits.header_timeout)
            .keep_alive_timeout(limits.header_timeout);
        Self {
            http1,
            http2,
            head: limits.header_timeout,
            keep_alive: config.listen.keep_alive,
            idle: limits.idle_timeout,
            whole: limits.request_timeout,
            max_target: limits.max_target.min(HYPER_MAX_TARGET),
            max_head: limits.max_head,
            max_body: config.sanitize.max_body,
            since: Instant::now(),
        }
    }

    /// The first moment after `end` that others have in common with it, at most [`TOGETHER`] later.
    pub fn together(&self, end: Instant) -> Instant {
        let since = end.saturating_duration_since(self.since).subsec_nanos();
        let beyond = since % TOGETHER.subsec_nanos();
        end + TOGETHER - Duration::from_nanos(beyond.into())
    }
}

/// What a configuration makes of connections and requests.
pub(in crate::proxy) struct Served<H> {
    pub begin: Begin,
    pub stack: H,
    pub(super) protocols: Arc<Protocols>,
}

impl<H> Served<H> {
    pub fn new(begin: Begin, stack: H, config: &Config) -> Self {
        Self { begin, stack, protocols: Arc::new(Protocols::new(config)) }
    }
}

/// Why a connection of HTTP/2 was ended from here: what its client did is not allowed (RFC 9113 section 5.4.1), or came too often.
pub(super) fn breach(error: &hyper::Error) -> Option<h2::Reason> {
    let error = error.source()?.downcast_ref::<h2::Error>()?;
    let is_breach = error.is_go_away() && error.is_library();
    error.reason().filter(|_| is_breach)
}
