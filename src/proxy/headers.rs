//! What an intermediary owes both sides (RFC 9110 section 7): hop-by-hop fields end here, `Host` names
//! the upstream, `Via` the proxy, and redirects stay on the proxy.

use std::sync::Arc;

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_LOCATION, EXPECT, HOST, LOCATION, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Response, Uri, Version};

use super::body::Body;
use super::error::Error;
use super::stack::Forward;
use super::stage::{Call, Handle, Stage};
use crate::config::Config;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// How the message came here, and the pseudonym of RFC 9110 section 7.6.3: a vendor need not learn
/// internal names.
fn via(version: Version) -> HeaderValue {
    HeaderValue::from_static(match version {
        Version::HTTP_2 => "2 optin-proxy",
        Version::HTTP_10 => "1.0 optin-proxy",
        _ => "1.1 optin-proxy",
    })
}

/// Makes a request the upstream's, and its answer the client's.
#[derive(Clone)]
pub(super) struct Headers {
    config: Arc<Config>,
    /// The upstream's authority.
    host: HeaderValue,
}

impl Headers {
    pub fn new(config: Arc<Config>) -> Self {
        let host = HeaderValue::from_str(config.upstream.authority.as_str());
        Self { config, host: host.expect("an authority is visible ASCII") }
    }
}

impl Headers {
    /// Whether a `Host` names the upstream in other words.
    fn is_upstreams(&self, host: &HeaderValue) -> bool {
        let upstream = &self.config.upstream;
        let default = if upstream.scheme == Scheme::HTTPS { 443 } else { 80 };
        Authority::try_from(host.as_bytes()).is_ok_and(|host| {
            host.host().eq_ignore_ascii_case(upstream.authority.host())
                && host.port_u16().unwrap_or(default)
                    == upstream.authority.port_u16().unwrap_or(default)
        })
    }
}

impl<S> Stage<Call, S> for Headers
where
    S: Handle<Call, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, mut request: Call, inner: &S) -> Result<Response<Body>, Error> {
        let upstream = &self.config.upstream;
        let forward = request.extensions().get::<Forward>().cloned();
        // The client's own address of the proxy: what a Location must come back as. A client of the forward
        // proxy knows the API by its own name.
        let downstream = match forward {
            None => request.headers_mut().insert(HOST, self.host.clone()),
            Some(Forward::Api) => {
                // HTTP/2 names the authority beside Host, and the two must not differ by a port alone.
                let is_upstreams =
                    request.headers().get(HOST).is_some_and(|it| self.is_upstreams(it));
                if is_upstreams {
                    request.headers_mut().insert(HOST, self.host.clone());
                }
                None
            }
            Some(Forward::Elsewhere(_)) => None,
        };

        let wants_trailers = accepts_trailers(request.headers());
        strip_hop_by_hop(request.headers_mut());
        if wants_trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("te"));
        }
        // Answered here already: the server sends the 100 when the body is first asked for.
        if tokens(request.headers(), &EXPECT).any(|it| it.eq_ignore_ascii_case("100-continue")) {
            request.headers_mut().remove(EXPECT);
        }
        let via = via(request.version());
        request.headers_mut().append(VIA, via);
        *request.uri_mut() = match forward {
            Some(Forward::Elsewhere(target)) => {
                let authority = target.to_string().parse().map_err(|_| Error::BadTarget)?;
                upstream_uri(request.uri(), &Scheme::HTTP, &authority)?
            }
            Some(Forward::Api) | None => {
                upstream_uri(request.uri(), &upstream.scheme, &upstream.authority)?
            }
        };
        *request.version_mut() = Version::HTTP_11;

        let mut response = inner.handle(request).await?;

        *response.version_mut() = Version::HTTP_11;
        strip_hop_by_hop(response.headers_mut());
        if !wants_trailers {
            response.headers_mut().remove(TRAILER);
        }
        if let Some(downstream) = downstream {
            for name in [LOCATION, CONTENT_LOCATION] {
                relocate(response.headers_mut(), &name, &upstream.authority, &downstream);
            }
        }
        Ok(response)
    }
}

/// Whether an optin-proxy has forwarded this request before (RFC 9110 section 7.6.3).
pub(super) fn has_been_here(headers: &HeaderMap) -> bool {
    tokens(headers, &VIA).any(|entry| entry.split_ascii_whitespace().nth(1) == Some("optin-proxy"))
}

/// The client's path and query, byte for byte, behind the upstream's origin.
fn upstream_uri(uri: &Uri, scheme: &Scheme, authority: &Authority) -> Result<Uri, Error> {
    let path = uri.path_and_query().cloned();
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(scheme.clone());
    parts.authority = Some(authority.clone());
    parts.path_and_query = Some(path.unwrap_or(PathAndQuery::from_static("/")));
    Uri::from_parts(parts).map_err(|_| Error::BadTarget)
}

/// Whether the client takes trailers (RFC 9110 section 10.1.4).
fn accepts_trailers(headers: &HeaderMap) -> bool {
    tokens(headers, &TE).any(|coding| {
        coding.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("trailers"))
    })
}

/// The members of a list. One that is no text is none that the proxy knows, and hides no other.
fn tokens<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'h str> + use<'h> {
    headers
        .get_all(name)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|token| std::str::from_utf8(token).ok())
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// What is meant for this connection only (RFC 9110 section 7.6.1). `Trailer` is not among it: trailers
/// are passed on.
static HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHORIZATION,
    PROXY_AUTHENTICATE,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // What was read by it is written by it, and in the one way that nobody reads otherwise (RFC 9112 section 6.3).
    match headers.get(CONTENT_LENGTH) {
        Some(_) if headers.contains_key(TRANSFER_ENCODING) => drop(headers.remove(CONTENT_LENGTH)),
        Some(length) if length.len() > 1 && length.as_bytes()[0] == b'0' => {
            if let Some(length) = length.to_str().ok().and_then(|it| it.parse::<u64>().ok()) {
                headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
            }
        }
        _ => {}
    }
    // Many messages have none of them, and a look at each name costs less than eight look-ups.
    if !headers.keys().any(|name| HOP_BY_HOP.contains(name)) {
        return;
    }
    let nominated: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| token.parse().ok())
        .filter(|name| !is_end_to_end(name))
        .collect();
    for name in nominated.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Fields that `Connection` may not take away: without them the message would mean something else.
fn is_end_to_end(name: &HeaderName) -> bool {
    [
        HOST,
        CONTENT_LENGTH,
        http::header::AUTHORIZATION,
        http::header::CONTENT_TYPE,
        http::header::CONTENT_ENCODING,
    ]
    .contains(name)
}

/// Makes a URL that names the upstream's origin name the proxy's.
fn relocate(
    headers: &mut HeaderMap,
    name: &HeaderName,
    upstream: &Authority,
    downstream: &HeaderValue,
) {
    let Some(location) = headers.get(name).and_then(|value| value.to_str().ok()) else { return };
    let Some(rest) = below_origin(location, upstream) else { return };
    let Ok(downstream) = downstream.to_str() else { return };
    if let Ok(value) = HeaderValue::from_str(&format!("http://{downstream}{rest}")) {
        headers.insert(name, value);
    }
}

/// What follows the origin in `location`, if that is the upstream's. The API names itself by http even
/// where it was asked by https, so either scheme will do.
fn below_origin<'l>(location: &'l str, upstream: &Authority) -> Option<&'l str> {
    let (scheme, rest) = location.split_once("://")?;
    let default_port = match scheme.to_ascii_lowercase().as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let authority: Authority = rest[..end].parse().ok()?;
    let is_default = |port: Option<u16>| port.is_none_or(|port| port == 80 || port == 443);
    let same_port = match (authority.port_u16(), upstream.port_u16()) {
        (Some(port), Some(upstream)) => port == upstream,
        (None, Some(upstream)) => upstream == default_port,
        (port, None) => is_default(port),
    };
    let same_host = authority.host().eq_ignore_ascii_case(upstream.host());
    (same_host && same_port && !authority.as_str().contains('@')).then_some(&rest[end..])
}
