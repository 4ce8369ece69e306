//! Inspection: contact writes are read whole and made consistent; all else streams past.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, TRAILER, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use http_body::Body as _;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::body::{self, Ahead, Body, BodyError, Rest, Side, Streaming};
use super::call::{Call, Forward};
use super::coding::{Coding, DecodeError};
use super::error::Error;
use super::headers::remove;
use super::room::{Room, Share};
use super::route::Route;
use super::stage::{Handle, Stage};
use super::turn::write_due;
use crate::config::{Config, Uninspectable as OnUninspectable};
use crate::contact::refusal::Sent;
use crate::contact::{self, Mode, Sanitized, Uninspectable};
use crate::observe::exchange::{Exchange, Inspection};
use crate::observe::finished::Inspected;

/// Makes the opt-in sources of a contact write consistent.
#[derive(Clone)]
pub(super) struct Sanitize {
    config: Arc<Config>,
    room: Room,
}

/// A body that is looked at in next to no time, in bytes: in some 20 us.
const SHORT: usize = 16 * 1024;

/// Digests of a body that is no longer the client's (RFC 9530, RFC 3230, RFC 1864).
pub(crate) static DIGESTS: [HeaderName; 4] = [
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("repr-digest"),
];

impl<S> Stage<Box<Call>, S> for Sanitize
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, mut call: Box<Call>, inner: &S) -> Result<Response<Body>, Error> {
        let route = Route::of(call.request.method(), call.request.uri());
        let is_elsewhere = matches!(call.forward, Some(Forward::Elsewhere(_)));
        if route != Route::Other && self.config.sanitize.policy.mode != Mode::Off && !is_elsewhere {
            // Known only from a Content-Length: a body in chunks is framed anew below.
            let announced = call.request.body().size_hint().exact();
            let update = route == Route::Update;
            let found = self.inspect(&mut call, update).await?;
            self.note(&mut call, found, update)?;
            if let Body::Buffered(bytes) = call.request.body() {
                let length = bytes.len();
                let headers = call.request.headers_mut();
                if announced == Some(length as u64) {
                    remove(headers, &[TRAILER]);
                } else {
                    remove(headers, &[TRAILER, TRANSFER_ENCODING]);
                    // Of a number itself, it would take memory twice.
                    let mut digits = itoa::Buffer::new();
                    let length = HeaderValue::from_str(digits.format(length));
                    headers.insert(CONTENT_LENGTH, length.expect("digits are visible ASCII"));
                }
            }
        }
        inner.handle(call).await
    }
}

/// What inspection found out.
pub(crate) enum Found {
    /// No contact in the body.
    NotOurs,
    /// Not inspected, and why.
    Uninspectable(Uninspectable),
    /// A contact write, its content coding undone, and the body to send if it is another.
    Contact { contact: contact::SanitizedContact, original: Bytes, edited: Option<Bytes> },
}

impl Sanitize {
    pub fn new(config: Arc<Config>) -> Self {
        let room = Room::new(config.limits.max_buffered);
        Self { config, room }
    }

    /// Reads a body whole, within the limits of time and of memory.
    async fn read(&self, stream: Box<Streaming>, share: &mut Share) -> Result<Ahead, Error> {
        let limits = &self.config.limits;
        let reading = body::read_ahead(stream, self.config.sanitize.max_body, share);
        match within(limits.body_timeout, reading).await {
            Ok(ahead) => ahead.map_err(Error::RequestBody),
            Err(_) => {
                let slow = BodyError::Slow(Side::Downstream, limits.body_timeout);
                Err(Error::RequestBody(slow))
            }
        }
    }

    /// Looks at a body, and puts the one to send in its place. What that takes of the memory for bodies is held for as long
    /// as the exchange.
    async fn inspect(&self, call: &mut Call, update: bool) -> Result<Found, Error> {
        let mut share = self.room.share();
        let found = self.read_and_look(call, update, &mut share).await;
        if let Some(held) = share.hand_over() {
            call.exchange.holds_bytes(held);
        }
        found
    }

    async fn read_and_look(
        &self,
        call: &mut Call,
        update: bool,
        share: &mut Share,
    ) -> Result<Found, Error> {
        let Call { request, forward, .. } = call;
        if request.body().size_hint().lower() > self.config.sanitize.max_body as u64 {
            return Ok(Found::Uninspectable(Uninspectable::TooLarge));
        }
        let received = match std::mem::replace(request.body_mut(), Body::empty()) {
            Body::Streaming(stream) => match self.read(stream, share).await? {
                Ahead::Whole(bytes) => bytes,
                Ahead::NoRoom => {
                    return Err(Error::TooMuchBuffered(self.config.limits.max_buffered));
                }
                Ahead::More { start, rest } => {
                    *request.body_mut() = Body::resumed(start, Rest::Stream(rest));
                    return Ok(Found::Uninspectable(Uninspectable::TooLarge));
                }
            },
            // It was here with its head.
            Body::Buffered(bytes) => bytes,
            // Found too long before.
            resumed @ Body::Resumed(_) => {
                *request.body_mut() = resumed;
                return Ok(Found::Uninspectable(Uninspectable::TooLarge));
            }
        };
        // Only a base URL puts it into ids.
        let own_host = if forward.is_some() { None } else { own_host(request.headers()) };
        let is_packed = request.headers().contains_key(CONTENT_ENCODING);
        if received.len() > SHORT || is_packed {
            // It takes longer than other requests' writes should wait.
            write_due();
        }
        let found = look(&received, request.headers(), own_host, update, &self.config);
        // Kept for the record, beside what was received: of what is packed, that may be a thousand times as much.
        if let Found::Contact { original, .. } = &found
            && is_packed
            && !share.take(original.len())
        {
            return Err(Error::TooMuchBuffered(self.config.limits.max_buffered));
        }
        let sent = match &found {
            Found::Contact { edited: Some(edited), .. } => edited.clone(),
            _ => received,
        };
        *request.body_mut() = Body::Buffered(sent);
        Ok(found)
    }

    /// Reports what was found, and tells the stages beneath what is sent.
    fn note(&self, call: &mut Call, found: Found, update: bool) -> Result<(), Error> {
        if let Found::Contact { edited: Some(_), .. } = found {
            let gone: Vec<_> = digests(call.request.headers()).cloned().collect();
            remove(call.request.headers_mut(), &gone);
        }
        let claims_contact = found.report(&call.exchange, &self.config)?;
        call.sent = claims_contact.map(|claims_contact| Sent { update, claims_contact });
        Ok(())
    }
}

/// Waits for what most often is here already: then there is no clock to look at.
async fn within<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    match poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => timeout(limit, future).await,
    }
}

/// Looks at a whole body, packed or not.
pub(crate) fn look(
    received: &Bytes,
    headers: &HeaderMap,
    own_host: Option<&str>,
    update: bool,
    config: &Config,
) -> Found {
    let cap = config.sanitize.max_body;
    let decoded = Coding::of(headers).ok_or(Uninspectable::ContentEncoding).and_then(|coding| {
        coding.decode(received, cap).map_err(|error| match error {
            DecodeError::Corrupt => Uninspectable::ContentEncoding,
            DecodeError::TooLarge => Uninspectable::TooLarge,
        })
    });
    let (original, coding) = match decoded {
        Ok(decoded) => decoded,
        Err(reason) => return Found::Uninspectable(reason),
    };
    let around = contact::Request { update, own_host, charset: charset(headers) };
    match contact::sanitize(&original, &around, &config.sanitize.policy) {
        Sanitized::NoContact => Found::NotOurs,
        Sanitized::Uninspectable(reason) => Found::Uninspectable(reason),
        Sanitized::Contact(mut contact) => {
            let body = std::mem::take(&mut contact.body);
            let edited = (!contact.edits.is_empty()).then(|| coding.encode(body));
            Found::Contact { contact, original, edited }
        }
    }
}

impl Found {
    /// Tells the exchange. Whether what is sent claims the contact, if it is a contact write or may be one.
    pub(crate) fn report(
        self,
        exchange: &Exchange,
        config: &Arc<Config>,
    ) -> Result<Option<bool>, Error> {
        match self {
            Self::NotOurs => {
                exchange.inspected(Inspection::NotOurs);
                Ok(None)
            }
            Self::Uninspectable(reason) => {
                exchange.inspected(Inspection::Uninspectable(reason));
                // Who only observes refuses nothing.
                if config.sanitize.uninspectable == OnUninspectable::Reject
                    && config.sanitize.policy.mode == Mode::Enforce
                {
                    return Err(Error::Uninspectable(reason));
                }
                Ok(Some(false))
            }
            Self::Contact { contact, original, .. } => {
                let claims_contact = contact.claims_contact;
                exchange.inspected(Inspection::Contact(Inspected {
                    findings: contact.findings,
                    edits: contact.edits,
                    original,
                    config,
                }));
                Ok(Some(claims_contact))
            }
        }
    }
}

/// The digests among the fields. Most messages have none, and a look at each name costs less than four look-ups.
pub(crate) fn digests(headers: &HeaderMap) -> impl Iterator<Item = &HeaderName> {
    headers.keys().filter(|name| DIGESTS.contains(name))
}

/// The name under which the client knows the proxy.
pub(crate) fn own_host(headers: &HeaderMap) -> Option<&str> {
    headers.get(HOST)?.to_str().ok().filter(|host| !host.is_empty())
}

/// The `charset` of the Content-Type (RFC 9110 section 8.3.2).
fn charset(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    // Most have no parameter, which a search tells sooner.
    memchr::memchr(b';', value.as_bytes())?;
    let mut is_quoted = false;
    let (_, charset) = value
        .split(|char| {
            is_quoted ^= char == '"';
            char == ';' && !is_quoted
        })
        .skip(1)
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"))?;
    Some(charset.trim().trim_matches(['"', '\''])).filter(|it| !it.is_empty())
}
