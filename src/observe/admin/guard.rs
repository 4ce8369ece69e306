//! Who may see and change what.
//!
//! Probes and metrics are for everybody who reaches the listener. The rest is not for pages of other sites that a
//! browser on this machine has open: they can send requests here by a name of theirs (DNS rebinding) or without
//! reading the answer (CSRF). And it is not for other machines, unless they know `admin.token`.

use std::fmt;
use std::net::IpAddr;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Digest, SHA256, digest};
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderName};

use crate::config;
use crate::intercept::Host;

/// Fetch Metadata: said by browsers of where a request comes from, and by nobody else.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The shortest token that is worth the name, in characters.
const SHORTEST: usize = 16;

/// What proves that somebody is an operator. Compared by its digest, which says nothing of where it differs.
#[derive(Clone)]
pub struct Token(Digest);

impl Token {
    /// `None` if it is too short to be a secret, or cannot stand in a field.
    pub fn new(text: &str) -> Option<Self> {
        let is_visible = text.bytes().all(|byte| byte.is_ascii_graphic());
        (text.len() >= SHORTEST && is_visible).then(|| Self(digest(&SHA256, text.as_bytes())))
    }

    fn is_in(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(AUTHORIZATION) else { return false };
        let Some((scheme, given)) = value.as_bytes().split_at_checked(7) else { return false };
        scheme.eq_ignore_ascii_case(b"bearer ")
            && verify_slices_are_equal(
                digest(&SHA256, given.trim_ascii()).as_ref(),
                self.0.as_ref(),
            )
            .is_ok()
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_ref() == other.0.as_ref()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Both ends of a connection to the listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub peer: IpAddr,
    pub local: IpAddr,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Numbers, and what is public anyway.
    Open,
    /// The page itself, which holds no data.
    Page,
    /// What clients sent, as far as it may be known.
    See,
    /// What the proxy does.
    Change,
}

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Host,
    Origin,
    Token,
    Elsewhere,
}

impl Refused {
    /// A name, and what to do.
    pub const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Host => (
                "foreign-host",
                "The Host of this request is no name of the admin listener. Use its address, or add the name to admin.hosts.",
            ),
            Self::Origin => (
                "foreign-origin",
                "This request was sent by a page of another site. Send it from the dashboard, or without a browser.",
            ),
            Self::Token => {
                ("token-required", "Send the token of admin.token: Authorization: Bearer TOKEN.")
            }
            Self::Elsewhere => (
                "loopback-only",
                "Other machines see this only with a token. Set admin.token, and send Authorization: Bearer TOKEN.",
            ),
        }
    }
}

/// Whether a request is to be answered.
pub(super) fn judge(
    access: Access,
    headers: &HeaderMap,
    ends: Ends,
    config: &config::Admin,
) -> Result<(), Refused> {
    if access == Access::Open {
        return Ok(());
    }
    let host = headers.get(HOST).map_or(&[][..], |host| host.as_bytes());
    if headers.get_all(HOST).iter().count() != 1 || !is_ours(host, ends, config) {
        return Err(Refused::Host);
    }
    if access == Access::Page {
        return Ok(());
    }
    let foreign_origin = headers.get_all(ORIGIN).iter().any(|origin| {
        let origin = origin.as_bytes();
        let authority = origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://"));
        authority.is_none_or(|authority| !authority.eq_ignore_ascii_case(host))
    });
    let foreign_site = headers
        .get_all(FETCH_SITE)
        .iter()
        .any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"));
    if foreign_origin || foreign_site {
        return Err(Refused::Origin);
    }
    let is_local = ends.peer.to_canonical().is_loopback();
    match &config.token {
        Some(token) if token.is_in(headers) => Ok(()),
        // Who is on this machine may look.
        Some(_) | None if is_local && access == Access::See => Ok(()),
        Some(_) => Err(Refused::Token),
        None if is_local => Ok(()),
        None => Err(Refused::Elsewhere),
    }
}

/// Whether a Host names this listener: by the address that the connection came to, a loopback one, or a name that
/// nobody else can have. The port may be another one, if it was forwarded.
fn is_ours(host: &[u8], ends: Ends, config: &config::Admin) -> bool {
    let Ok(authority) = Authority::try_from(host) else { return false };
    if authority.as_str().contains('@') {
        return false;
    }
    let Ok(named) = authority.host().parse::<Host>() else { return false };
    match &named {
        Host::Address(address) => {
            let address = address.to_canonical();
            address.is_loopback()
                || address == ends.local.to_canonical()
                || config.hosts.contains(&named)
        }
        Host::Name(name) => &**name == "localhost" || config.hosts.contains(&named),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    fn verdict(
        access: Access,
        peer: &str,
        settings: &[&str],
        fields: &[(&'static str, &str)],
    ) -> Result<(), Refused> {
        let mut layers = Layers::default();
        for setting in settings {
            layers.set("test", setting);
        }
        let config = layers.build().expect("valid");
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, value.parse().expect("a value"));
        }
        let ends = Ends {
            peer: peer.parse().expect("an address"),
            local: "10.1.2.3".parse().expect("an address"),
        };
        judge(access, &headers, ends, &config.admin)
    }

    const TOKEN: &str = "admin.token=0123456789abcdef";
    const BEARER: (&str, &str) = ("authorization", "Bearer 0123456789abcdef");

    #[test]
    fn a_host_that_anybody_could_name_is_refused() {
        let of = |host: &str| verdict(Access::See, "127.0.0.1", &[], &[("host", host)]);
        for host in ["127.0.0.1:9901", "localhost", "localhost:1", "[::1]:9901", "10.1.2.3:9901"] {
            assert_eq!(of(host), Ok(()), "{host}");
        }
        for host in
            ["evil.example", "10.9.9.9", "localhost.evil.example", "me@localhost", "", "a b"]
        {
            assert_eq!(of(host), Err(Refused::Host), "{host}");
        }
        let named = verdict(
            Access::See,
            "127.0.0.1",
            &["admin.hosts=sidecar.internal"],
            &[("host", "sidecar.internal:80")],
        );
        assert_eq!(named, Ok(()));
        assert_eq!(verdict(Access::See, "127.0.0.1", &[], &[]), Err(Refused::Host));
        let two = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(verdict(Access::See, "127.0.0.1", &[], &two), Err(Refused::Host));
        assert_eq!(verdict(Access::Open, "10.9.9.9", &[], &[("host", "evil.example")]), Ok(()));
    }

    #[test]
    fn a_page_of_another_site_changes_nothing() {
        let host = ("host", "localhost:9901");
        let of =
            |field: (&'static str, &str)| verdict(Access::Change, "127.0.0.1", &[], &[host, field]);
        for origin in ["http://evil.example", "null", "http://localhost:3000", "http://localhost"] {
            assert_eq!(of(("origin", origin)), Err(Refused::Origin), "{origin}");
        }
        assert_eq!(of(("sec-fetch-site", "cross-site")), Err(Refused::Origin));
        assert_eq!(of(("sec-fetch-site", "same-site")), Err(Refused::Origin));
        assert_eq!(of(("origin", "http://localhost:9901")), Ok(()));
        assert_eq!(of(("sec-fetch-site", "same-origin")), Ok(()));
        // curl
        assert_eq!(verdict(Access::Change, "127.0.0.1", &[], &[host]), Ok(()));
    }

    #[test]
    fn other_machines_need_the_token_and_changes_do_wherever_there_is_one() {
        let host = ("host", "10.1.2.3:9901");
        for access in [Access::See, Access::Change] {
            let of = |peer: &str, settings: &[&str], fields: &[(&'static str, &str)]| {
                verdict(access, peer, settings, &[&[host], fields].concat())
            };
            assert_eq!(of("10.9.9.9", &[], &[]), Err(Refused::Elsewhere));
            assert_eq!(of("10.9.9.9", &[], &[BEARER]), Err(Refused::Elsewhere));
            assert_eq!(of("10.9.9.9", &[TOKEN], &[]), Err(Refused::Token));
            assert_eq!(of("10.9.9.9", &[TOKEN], &[BEARER]), Ok(()));
            let wrong = ("authorization", "Bearer 0123456789abcdeF");
            assert_eq!(of("10.9.9.9", &[TOKEN], &[wrong]), Err(Refused::Token));
        }
        assert_eq!(verdict(Access::Change, "127.0.0.1", &[TOKEN], &[host]), Err(Refused::Token));
        assert_eq!(verdict(Access::See, "127.0.0.1", &[TOKEN], &[host]), Ok(()));
        assert_eq!(verdict(Access::Page, "10.9.9.9", &[TOKEN], &[host]), Ok(()));
    }
}
