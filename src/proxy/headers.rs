//! What an intermediary owes both sides (RFC 9110 section 7): hop-by-hop fields end here, `Host` names
//! the upstream, `Via` the proxy, and redirects stay on the proxy.

use std::sync::Arc;

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_LOCATION, COOKIE, EXPECT, HOST, LOCATION, TE, TRAILER,
    TRANSFER_ENCODING, VIA,
};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version};
use http_body::Body as _;

use super::body::Body;
use super::call::Call;
use super::error::Error;
use super::stage::{Handle, Stage};
use crate::config::{Config, Upstream};

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

impl<S> Stage<Box<Call>, S> for Headers
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, mut call: Box<Call>, inner: &S) -> Result<Response<Body>, Error> {
        let Call { request, forward, .. } = &mut *call;
        // The client's own address of the proxy, if it said so: what a Location must come back as. A client of the forward proxy
        // knows the API by its own name.
        let downstream = match forward {
            None => request.headers_mut().insert(HOST, self.host.clone()),
            Some(_) => None,
        };
        let downstream = downstream.filter(|host| !host.is_empty());

        let asked = strip_hop_by_hop(request.headers_mut());
        if asked.takes_trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("te"));
        }
        // Answered here already: the server sends the 100 when the body is first asked for.
        if asked.expects_continue {
            remove(request.headers_mut(), &[EXPECT]);
        }
        // hyper takes it that such a request has no content, unless it is told how that is framed.
        if [Method::GET, Method::HEAD].contains(request.method())
            && request.body().size_hint().exact().is_none()
        {
            let chunked = HeaderValue::from_static("chunked");
            request.headers_mut().insert(TRANSFER_ENCODING, chunked);
        }
        if request.version() == Version::HTTP_2 {
            join_cookies(request.headers_mut());
        }
        let via = via(request.version());
        request.headers_mut().append(VIA, via);
        *request.version_mut() = Version::HTTP_11;

        let mut response = inner.handle(call).await?;

        *response.version_mut() = Version::HTTP_11;
        let answered = strip_hop_by_hop(response.headers_mut());
        // RFC 9110 section 8.6: some clients take it for a mistake, whatever it says.
        if response.status() == StatusCode::NO_CONTENT {
            remove(response.headers_mut(), &[CONTENT_LENGTH]);
        }
        if answered.has_trailer && !asked.takes_trailers {
            remove(response.headers_mut(), &[TRAILER]);
        }
        if let Some(downstream) = downstream.filter(|_| answered.has_location) {
            for name in [LOCATION, CONTENT_LOCATION] {
                relocate(response.headers_mut(), &name, &self.config.upstream, &downstream);
            }
        }
        Ok(response)
    }
}

/// Puts together what HTTP/2 lets a client take apart (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, whole);
    }
}

/// Whether a `Via` says that an optin-proxy has forwarded this message before (RFC 9110 section 7.6.3).
pub(super) fn is_ours(via: &HeaderValue) -> bool {
    members(via).any(|entry| entry.split_ascii_whitespace().nth(1) == Some("optin-proxy"))
}

/// Whether a `TE` takes trailers (RFC 9110 section 10.1.4).
fn takes_trailers(te: &HeaderValue) -> bool {
    members(te).any(|coding| {
        coding.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("trailers"))
    })
}

/// The members of a list. One that is no text is none that the proxy knows, and hides no other.
fn members(list: &HeaderValue) -> impl Iterator<Item = &str> {
    list.as_bytes()
        .split(|byte| *byte == b',')
        .filter_map(|member| std::str::from_utf8(member).ok())
        .map(str::trim)
        .filter(|member| !member.is_empty())
}

/// What a message's fields have that is to be dealt with.
#[derive(Default)]
struct Seen {
    takes_trailers: bool,
    expects_continue: bool,
    has_trailer: bool,
    has_location: bool,
}

/// Takes out what is meant for this connection only (RFC 9110 section 7.6.1), and settles how long the message is. `Trailer`
/// stays: trailers are passed on. One look at each name costs less than to look up all of them: an update takes 4 % fewer
/// instructions.
fn strip_hop_by_hop(headers: &mut HeaderMap) -> Seen {
    let mut seen = Seen::default();
    let (mut gone, mut nominated) = (Vec::new(), Vec::new());
    let (mut lengths, mut is_odd, mut has_coding) = (0, false, false);
    for (name, value) in &*headers {
        let is_hop_by_hop = match name.as_str() {
            "connection" => {
                // Nearly always it names nothing but what goes anyway.
                if !value.as_bytes().eq_ignore_ascii_case(b"keep-alive") {
                    let names = members(value).filter_map(|member| member.parse().ok());
                    nominated.extend(names.filter(|name| !is_end_to_end(name)));
                }
                true
            }
            "te" => {
                seen.takes_trailers |= takes_trailers(value);
                true
            }
            "transfer-encoding" => {
                has_coding = true;
                true
            }
            "keep-alive"
            | "proxy-connection"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "upgrade" => true,
            "content-length" => {
                lengths += 1;
                let value = value.as_bytes();
                is_odd |= value.len() > 1 && (value[0] == b'0' || value.contains(&b','));
                false
            }
            "expect" => {
                let mut expected = members(value);
                seen.expects_continue |= expected.any(|it| it.eq_ignore_ascii_case("100-continue"));
                false
            }
            "trailer" => {
                seen.has_trailer = true;
                false
            }
            "location" | "content-location" => {
                seen.has_location = true;
                false
            }
            _ => false,
        };
        if is_hop_by_hop {
            gone.push(name.clone());
        }
    }
    // What was read by it is written by it, and in the one way that nobody reads otherwise (RFC 9112 section 6.3).
    if has_coding {
        gone.push(CONTENT_LENGTH);
    } else if (is_odd || lengths > 1)
        && let Some(length) = headers.get(CONTENT_LENGTH).and_then(|it| it.to_str().ok())
        && let Some(length) = length.split(',').next()
        && let Ok(length) = length.trim().parse::<u64>()
    {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    gone.extend(nominated);
    remove(headers, &gone);
    seen
}

/// Takes fields out, and leaves the others in their order: taken out one by one, the last would come into the place of each.
///
/// The map has as much room afterwards as before. hyper fills one map again and again on a connection, from what it read of a request
/// to what it reads of an answer; one that is large enough is never made anew.
pub(super) fn remove(headers: &mut HeaderMap, gone: &[HeaderName]) {
    if gone.is_empty() {
        return;
    }
    while let Some(last) = headers.keys().last().filter(|last| gone.contains(last)).cloned() {
        headers.remove(last);
    }
    if !gone.iter().any(|name| headers.contains_key(name)) {
        return;
    }
    let room = HeaderMap::with_capacity(headers.capacity());
    let mut name = None;
    for (next, value) in std::mem::replace(headers, room) {
        // Of several values, the first has the name.
        name = next.or(name);
        if let Some(name) = name.as_ref().filter(|name| !gone.contains(name)) {
            headers.append(name, value);
        }
    }
}

/// Takes out of trailers what is meant for this connection only, or says how long a message is.
pub(super) fn strip_trailers(trailers: &mut HeaderMap) {
    strip_hop_by_hop(trailers);
    trailers.remove(CONTENT_LENGTH);
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
    upstream: &Upstream,
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
/// where it was asked by https, so either scheme will do. Without one, it is that by which it was asked.
fn below_origin<'l>(location: &'l str, upstream: &Upstream) -> Option<&'l str> {
    let (scheme, rest) = match location.strip_prefix("//") {
        Some(rest) => (upstream.scheme.as_str(), rest),
        None => location.split_once("://")?,
    };
    let upstream = &upstream.authority;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_taken_out_the_others_keep_their_order_and_the_map_its_room() {
        const FIELDS: [(&str, &str); 6] =
            [("a", "1"), ("b", "2"), ("b", "3"), ("c", "4"), ("d", "5"), ("d", "6")];
        for chosen in 0..16 {
            let is_gone = |name: &str| chosen >> (name.as_bytes()[0] - b'a') & 1 == 1;
            let mut headers = HeaderMap::with_capacity(12);
            for (name, value) in FIELDS {
                headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            let room = headers.capacity();
            let gone: Vec<_> = ["d", "c", "b", "a", "e"]
                .into_iter()
                .filter(|name| is_gone(name))
                .map(HeaderName::from_static)
                .collect();
            remove(&mut headers, &gone);
            let left = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
            let expected = FIELDS.into_iter().filter(|(name, _)| !is_gone(name));
            assert!(left.eq(expected.map(|(name, value)| (name, value.as_bytes()))), "{gone:?}");
            assert_eq!(headers.capacity(), room);
        }
    }
}
