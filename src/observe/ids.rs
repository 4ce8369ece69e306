//! By what a request is found again, here and in what its client keeps.

use std::fmt;

use http::{HeaderName, HeaderValue};

/// The field that carries a request's id, in and out.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// By what a request is found again: the client's own id, if it looks like one, else one of ours.
#[derive(Debug, Clone)]
pub(crate) enum RequestId {
    Client(HeaderValue),
    Ours(u64),
}

impl RequestId {
    /// A client may write anything: only hexadecimal digits and hyphens, a UUID for one, are taken for an id.
    pub fn of(field: Option<&HeaderValue>) -> Self {
        let is_id = |value: &&HeaderValue| {
            (8..=64).contains(&value.len())
                && value.as_bytes().iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
        };
        match field.filter(is_id) {
            Some(value) => Self::Client(value.clone()),
            None => Self::Ours(fastrand::u64(..)),
        }
    }

    /// The same for a field.
    pub fn value(&self) -> Option<HeaderValue> {
        match self {
            Self::Client(value) => Some(value.clone()),
            Self::Ours(number) => HeaderValue::from_bytes(&hexadecimal(*number)).ok(),
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

/// The trace that a request belongs to (W3C Trace Context section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    pub id: u128,
    /// The span that made the request. None, and the trace is one of ours.
    pub parent: Option<u64>,
    /// Whether whoever began it records it.
    pub sampled: bool,
}

impl Trace {
    /// The client's, if its field names one.
    pub fn of(field: &HeaderValue) -> Option<Self> {
        let mut parts = field.to_str().ok()?.split('-');
        let mut hex = |digits| {
            let is_hex = |text: &&str| {
                text.len() == digits
                    && text.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'))
            };
            u128::from_str_radix(parts.next().filter(is_hex)?, 16).ok()
        };
        let (version, id, parent, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        // Later versions may have more parts, this one has not.
        if version == 0xff || version == 0 && parts.next().is_some() || id == 0 || parent == 0 {
            return None;
        }
        Some(Self { id, parent: Some(parent as u64), sampled: flags & 1 == 1 })
    }

    /// A new one.
    pub fn begin() -> Self {
        Self { id: fastrand::u128(1..), parent: None, sampled: true }
    }
}
