//! By what a request is found again, here and in what its client keeps.

use std::fmt;

use http::{HeaderName, HeaderValue, Request};

/// The field that carries a request's id, in and out.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// W3C Trace Context.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// By what a request is found again: the client's own id, if it looks like one, else one of ours.
#[derive(Debug, Clone)]
pub(crate) enum RequestId {
    Client(HeaderValue),
    Ours(u64),
}

impl RequestId {
    /// A client may write anything: only hexadecimal digits and hyphens, a UUID for one, are taken for an id.
    pub fn of<B>(request: &Request<B>) -> Self {
        let is_id = |value: &&HeaderValue| {
            (8..=64).contains(&value.len())
                && value.as_bytes().iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
        };
        match request.headers().get(REQUEST_ID).filter(is_id) {
            Some(value) => Self::Client(value.clone()),
            None => Self::Ours(fastrand::u64(..)),
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(value) => f.write_str(value.to_str().unwrap_or_default()),
            Self::Ours(number) => {
                f.write_str(std::str::from_utf8(&hexadecimal(*number)).unwrap_or_default())
            }
        }
    }
}

/// A number's sixteen digits, without the machinery of formatting.
pub(super) fn hexadecimal(number: u64) -> [u8; 16] {
    std::array::from_fn(|position| {
        b"0123456789abcdef"[(number >> (60 - 4 * position) & 15) as usize]
    })
}

/// The trace that the client's request belongs to (W3C Trace Context section 3.2), if it is part of one.
pub(super) fn trace_id<B>(request: &Request<B>) -> Option<u128> {
    let value = request.headers().get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = value.split('-');
    let (version, id) = (parts.next()?, parts.next()?);
    let is_hex = |text: &str| text.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'));
    if version.len() != 2 || version == "ff" || id.len() != 32 || !is_hex(version) || !is_hex(id) {
        return None;
    }
    u128::from_str_radix(id, 16).ok().filter(|id| *id != 0)
}
