//! Who may use the forward proxy: Basic authentication (RFC 7617) by `Proxy-Authorization`.

use std::fmt;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Digest, SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::PROXY_AUTHORIZATION;

/// A user name and a password. They are compared by their digests, which have one length and say nothing
/// of where they differ.
#[derive(Clone)]
pub struct Credentials {
    pair: String,
    digest: Digest,
}

impl Credentials {
    /// Credentials written like `user:password`. `None` if that is not what they are.
    pub fn new(pair: &str) -> Option<Self> {
        let (user, password) = pair.split_once(':')?;
        let digest = digest(&SHA256, pair.as_bytes());
        (!user.is_empty() && !password.is_empty()).then(|| Self { pair: pair.to_owned(), digest })
    }

    /// As they stand before the host in a proxy's URL.
    pub(crate) fn for_url(&self) -> String {
        let (user, password) = self.pair.split_once(':').unwrap_or_default();
        let encode = |text: &str| -> String {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            text.bytes()
                .map(|byte| {
                    if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
                })
                .collect()
        };
        format!("{}:{}@", encode(user), encode(password))
    }

    /// As they stand behind `Basic` in a field.
    pub(crate) fn for_header(&self) -> String {
        STANDARD.encode(&self.pair)
    }

    /// Whether a request carries them.
    pub(super) fn are_in(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(PROXY_AUTHORIZATION).into_iter();
        let (Some(value), None) = (values.next(), values.next()) else { return false };
        let value = value.as_bytes();
        let Some((scheme, encoded)) = value.split_at_checked(6) else { return false };
        if !scheme.eq_ignore_ascii_case(b"basic ") {
            return false;
        }
        let Ok(given) = STANDARD.decode(encoded.trim_ascii()) else { return false };
        verify_slices_are_equal(digest(&SHA256, &given).as_ref(), self.digest.as_ref()).is_ok()
    }
}

impl PartialEq for Credentials {
    fn eq(&self, other: &Self) -> bool {
        self.digest.as_ref() == other.digest.as_ref()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}
