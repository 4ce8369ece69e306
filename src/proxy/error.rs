//! What can go wrong with a request, and the only place where an error becomes a response.

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, PROXY_AUTHENTICATE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use super::body::{Body, BodyError};
use super::upstream::{Fault, SetupError, UpstreamError};
use crate::contact::Uninspectable;
use crate::intercept::ca::CaError;
use crate::intercept::{Denied, HostError};

/// RFC 9209
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Why the proxy answers by itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API could not be asked, or did not answer.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The client's body could not be read.
    #[error(transparent)]
    RequestBody(BodyError),
    /// `sanitize.uninspectable = "reject"`
    #[error("the body cannot be inspected: {0}")]
    Uninspectable(Uninspectable),
    /// A target that the rules refuse.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The target of a CONNECT is no host and port.
    #[error("the target of CONNECT is no host and port{}", .0.map(|why| format!(": {why}")).unwrap_or_default())]
    BadAuthority(Option<HostError>),
    /// A CONNECT that announces content.
    #[error("CONNECT with content")]
    ConnectContent,
    /// CONNECT within a tunnel that was opened.
    #[error("CONNECT within a tunnel")]
    NestedConnect,
    /// An absolute-form target with https.
    #[error("an https target without CONNECT")]
    ConnectRequired,
    /// A tunnel's request for another host.
    #[error("the request names another host than its tunnel")]
    OtherHost,
    /// The client is not in `listen.allow_from`.
    #[error("the client's address is not in listen.allow_from")]
    ClientDenied,
    /// The client did not say `listen.proxy_auth`.
    #[error("no or wrong proxy credentials")]
    ProxyAuth,
    /// The request has been here before.
    #[error("the request came from an optin-proxy")]
    Loop,
    /// The TLS library refuses its own defaults.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// `limits.max_requests`
    #[error("{0} requests are in flight already")]
    TooManyRequests(usize),
    /// `limits.max_connections`
    #[error("there are as many connections and tunnels as limits.max_connections allows")]
    TooManyConnections,
    /// `limits.max_buffered`
    #[error("{0} bytes of bodies are held already")]
    TooMuchBuffered(usize),
    /// `limits.max_target`
    #[error("the request target is longer than {0} bytes")]
    TargetTooLong(usize),
    /// There is no authority to open the API's host with.
    #[error(transparent)]
    Authority(#[from] CaError),
    /// What came is no request.
    #[error("the head of the request cannot be read")]
    BadHead,
    /// `limits.max_head`, or more fields than hyper takes.
    #[error("the head of the request is too long")]
    HeadTooLong,
    /// `limits.header_timeout`, once a head was begun.
    #[error("the head of the request did not end in time")]
    HeadTimeout,
    /// TRACE
    #[error("TRACE is not served")]
    Trace,
    /// A field whose name is nearly that of a framing field.
    #[error("a field looks like one that frames the message")]
    LookAlike,
    /// More than one `Host`.
    #[error("the request names several hosts")]
    SeveralHosts,
    /// No `Host`, or one that is none.
    #[error("the request names no host, or what is no host")]
    BadHost,
    /// A transfer coding beside chunked.
    #[error("the transfer coding is not known")]
    TransferCoding,
    /// A target that cannot be put behind the API's origin.
    #[error("the request target is not a path")]
    BadTarget,
}

/// A problem as RFC 9457 and RFC 9209 have it.
pub(crate) struct Problem {
    pub status: StatusCode,
    /// The last part of `type`, and the error's name in the log.
    pub name: &'static str,
    title: &'static str,
    pub detail: String,
    /// The error token of RFC 9209 section 2.3.
    token: &'static str,
}

impl Error {
    /// The upstream never saw the request, as far as can be told: whoever may send it again does so once.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Upstream(error) if error.fault == Fault::Stale)
    }

    pub fn problem(&self) -> Problem {
        match self {
            Self::Upstream(error) => {
                let fault = error.fault;
                Problem {
                    status: fault.status(),
                    name: fault.name(),
                    title: if error.is_api {
                        "The API could not be reached"
                    } else {
                        "The host could not be reached"
                    },
                    detail: if error.is_api {
                        format!("{error}. {}", fault.remedy())
                    } else {
                        format!("{error}. Check its name, and that this machine may reach it.")
                    },
                    token: fault.token(),
                }
            }
            Self::RequestBody(BodyError::Idle(..)) => Problem {
                status: StatusCode::REQUEST_TIMEOUT,
                name: "request-body-timeout",
                title: "The request body stood still",
                detail: "Nothing of the body came for limits.idle_timeout. Send the request again."
                    .into(),
                token: "http_request_error",
            },
            Self::RequestBody(BodyError::Dripping(..)) => Problem {
                status: StatusCode::REQUEST_TIMEOUT,
                name: "request-body-timeout",
                title: "The request body came too slowly",
                detail: "It came with fewer bytes a second than limits.min_rate. Send the request again."
                    .into(),
                token: "http_request_error",
            },
            Self::RequestBody(BodyError::Slow(..)) => Problem {
                status: StatusCode::REQUEST_TIMEOUT,
                name: "request-body-timeout",
                title: "The request body came too slowly",
                detail: "It was not there within limits.body_timeout. Send the request again.".into(),
                token: "http_request_error",
            },
            Self::RequestBody(BodyError::Broken(..) | BodyError::Reset(_)) => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "request-body-broken",
                title: "The request body broke off",
                detail: "It ended before its announced end, or its chunks could not be read. Send the request again."
                    .into(),
                token: "http_request_error",
            },
            Self::Uninspectable(reason) => {
                let too_much = matches!(reason, Uninspectable::TooLarge | Uninspectable::Depth);
                Problem {
                    status: if too_much {
                        StatusCode::PAYLOAD_TOO_LARGE
                    } else {
                        StatusCode::UNSUPPORTED_MEDIA_TYPE
                    },
                    name: match reason {
                        Uninspectable::Malformed => "body-malformed",
                        Uninspectable::Doctype => "body-doctype",
                        Uninspectable::Encoding => "body-encoding",
                        Uninspectable::TooLarge => "body-too-large",
                        Uninspectable::Depth => "body-depth",
                        Uninspectable::ContentEncoding => "body-content-encoding",
                    },
                    title: "The body cannot be inspected",
                    detail: remedy(*reason).into(),
                    token: "http_request_denied",
                }
            }
            Self::Denied(denied) => Problem {
                status: StatusCode::FORBIDDEN,
                name: "target-denied",
                title: "This target is not served here",
                detail: format!("{denied}."),
                token: match denied {
                    Denied::Private { .. } => "destination_ip_prohibited",
                    _ => "http_request_denied",
                },
            },
            // Some resolvers would take it for an address that is not to be reached.
            Self::BadAuthority(Some(why @ HostError::Numeric)) => Problem {
                status: StatusCode::FORBIDDEN,
                name: "target-denied",
                title: "This target is not served here",
                detail: format!("Its host cannot be one: {why}."),
                token: "http_request_denied",
            },
            Self::BadAuthority(why) => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "target-malformed",
                title: "The request target is malformed",
                detail: match why {
                    Some(why) => format!("Its host cannot be one: {why}."),
                    None => "Write CONNECT host:port, with a port from 1 to 65535 and no user name.".into(),
                },
                token: "http_request_error",
            },
            Self::ConnectContent => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "connect-with-content",
                title: "CONNECT has no content",
                detail: "Send it without Content-Length and Transfer-Encoding.".into(),
                token: "http_request_error",
            },
            Self::NestedConnect => Problem {
                status: StatusCode::FORBIDDEN,
                name: "connect-in-tunnel",
                title: "CONNECT is not served in a tunnel",
                detail: "Ask the proxy itself for a tunnel, not the API.".into(),
                token: "http_request_denied",
            },
            Self::ConnectRequired => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "connect-required",
                title: "https needs CONNECT",
                detail: "Ask for a tunnel with CONNECT, and speak TLS within it.".into(),
                token: "http_request_error",
            },
            Self::OtherHost => Problem {
                status: StatusCode::MISDIRECTED_REQUEST,
                name: "host-mismatch",
                title: "The request names another host than its tunnel",
                detail: "Send it through a tunnel of its own host, or with the host of this one.".into(),
                token: "http_request_error",
            },
            Self::ClientDenied => Problem {
                status: StatusCode::FORBIDDEN,
                name: "client-denied",
                title: "This client is not served",
                detail: "Its address is in no network of listen.allow_from.".into(),
                token: "http_request_denied",
            },
            Self::ProxyAuth => Problem {
                status: StatusCode::PROXY_AUTHENTICATION_REQUIRED,
                name: "proxy-auth-required",
                title: "The proxy's credentials are needed",
                detail: "Put the user and password of listen.proxy_auth into the proxy's URL.".into(),
                token: "http_request_denied",
            },
            Self::Loop => Problem {
                status: StatusCode::LOOP_DETECTED,
                name: "loop",
                title: "The request came from an optin-proxy",
                detail: "It has Via: optin-proxy already. Check that upstream.url is the API and not a \
                         proxy, and send requests through one optin-proxy only."
                    .into(),
                token: "proxy_loop_detected",
            },
            Self::TooManyRequests(_) | Self::TooManyConnections | Self::TooMuchBuffered(_) => Problem {
                status: StatusCode::SERVICE_UNAVAILABLE,
                name: "overloaded",
                title: "The proxy has enough to do",
                detail: "Nothing of the request was sent on. Send it again after a second.".into(),
                token: "proxy_internal_response",
            },
            Self::TargetTooLong(limit) => Problem {
                status: StatusCode::URI_TOO_LONG,
                name: "target-too-long",
                title: "The request target is too long",
                detail: format!("Keep path and query within {limit} bytes, or raise limits.max_target."),
                token: "http_request_error",
            },
            Self::BadHead => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "request-malformed",
                title: "The request cannot be read",
                detail: "Its request line or a field is not as RFC 9112 has it. Send plain HTTP/1.1, or HTTP/2 \
                         by prior knowledge, and no TLS."
                    .into(),
                token: "http_request_error",
            },
            Self::HeadTooLong => Problem {
                status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                name: "head-too-long",
                title: "The head of the request is too long",
                detail: "Keep it within limits.max_head and limits.max_headers, or raise them.".into(),
                token: "http_request_error",
            },
            Self::HeadTimeout => Problem {
                status: StatusCode::REQUEST_TIMEOUT,
                name: "request-head-timeout",
                title: "The head of the request came too slowly",
                detail: "It was not there within limits.header_timeout. Send the request again.".into(),
                token: "http_request_error",
            },
            Self::Setup(error) => Problem {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                name: "tls-unavailable",
                title: "TLS cannot be set up",
                detail: error.to_string(),
                token: "proxy_internal_error",
            },
            Self::Authority(_) => Problem {
                status: StatusCode::SERVICE_UNAVAILABLE,
                name: "ca-unavailable",
                title: "The API's host cannot be opened",
                detail: "The proxy has no usable certificate authority: its log says why, and \
                         `optin-proxy doctor` what to do."
                    .into(),
                token: "proxy_configuration_error",
            },
            Self::TransferCoding => Problem {
                status: StatusCode::NOT_IMPLEMENTED,
                name: "transfer-coding-unknown",
                title: "The transfer coding is not known",
                detail: "Send the body chunked or with its length; compress it with Content-Encoding."
                    .into(),
                token: "http_request_error",
            },
            Self::Trace => Problem {
                status: StatusCode::METHOD_NOT_ALLOWED,
                name: "trace-not-served",
                title: "TRACE is not served here",
                detail: "It would show credentials to whoever reads the answer. Use another method.".into(),
                token: "http_request_denied",
            },
            Self::LookAlike => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "field-look-alike",
                title: "A field looks like one that frames the message",
                detail: "Content_Length and Transfer_Encoding can be read in two ways. Write them with a \
                         hyphen, or leave them out."
                    .into(),
                token: "http_request_error",
            },
            Self::SeveralHosts => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "several-hosts",
                title: "The request names several hosts",
                detail: "Send one Host field.".into(),
                token: "http_request_error",
            },
            Self::BadHost => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "host-malformed",
                title: "The request names no host",
                detail: "Send a Host field with a host and, if it is not the scheme's own, a port.".into(),
                token: "http_request_error",
            },
            Self::BadTarget => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "target-malformed",
                title: "The request target is malformed",
                detail: "Write the target as a path that starts with a slash; before it, if at all, a host without a user name, and a port from 1 to 65535.".into(),
                token: "http_request_error",
            },
        }
    }
}

fn remedy(reason: Uninspectable) -> &'static str {
    match reason {
        Uninspectable::Malformed => {
            "It is not well-formed XML with one root element. Escape & and < in its text."
        }
        Uninspectable::Doctype => "It has a document type declaration. Send it without one.",
        Uninspectable::Encoding => "Its character encoding is not inspected. Send it as UTF-8.",
        Uninspectable::TooLarge => {
            "It is longer than sanitize.max_body. Write fewer contacts at once, or raise the limit."
        }
        Uninspectable::Depth => "Its elements are nested too deep. Send a plain Atom entry.",
        Uninspectable::ContentEncoding => {
            "Its content coding cannot be decoded. Send it as gzip, deflate or without a coding."
        }
    }
}

/// A problem document (RFC 9457), with the error token of RFC 9209.
pub(crate) fn document(
    status: StatusCode,
    name: &str,
    title: &str,
    detail: &str,
    token: &'static str,
) -> Response<Bytes> {
    let json = serde_json::json!({
        "type": format!("urn:optin-proxy:problem:{name}"),
        "title": title,
        "status": status.as_u16(),
        "detail": detail,
    });
    let mut response = Response::new(Bytes::from(json.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    let status = HeaderValue::from_str(&format!("optin-proxy; error={token}"));
    headers.insert(PROXY_STATUS, status.expect("tokens are visible ASCII"));
    response
}

impl Problem {
    pub fn into_response(self) -> Response<Body> {
        let Self { status, name, title, detail, token } = &self;
        let mut response = document(*status, name, title, detail, token).map(Body::Buffered);
        let headers = response.headers_mut();
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            let allowed = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT";
            headers.insert(ALLOW, HeaderValue::from_static(allowed));
        }
        if self.name == "overloaded" {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            let challenge =
                HeaderValue::from_static("Basic realm=\"optin-proxy\", charset=\"UTF-8\"");
            headers.insert(PROXY_AUTHENTICATE, challenge);
        }
        response
    }
}
