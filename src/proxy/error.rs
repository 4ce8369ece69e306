//! What can go wrong with a request, and the only place where an error becomes a response.

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use super::body::{Body, BodyError};
use super::upstream::{Fault, UpstreamError};
use crate::contact::Uninspectable;

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
    /// CONNECT
    #[error("CONNECT is not served")]
    Connect,
    /// An absolute-form target that is not the API.
    #[error("the target is not the API's host")]
    ForeignTarget,
    /// More than one `Host`.
    #[error("the request names several hosts")]
    SeveralHosts,
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
    detail: String,
    /// The error token of RFC 9209 section 2.3.
    token: &'static str,
}

impl Error {
    /// The upstream never saw the request.
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
                    title: "The API could not be reached",
                    detail: format!("{error}. {}", fault.remedy()),
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
            Self::RequestBody(BodyError::Broken(..)) => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "request-body-broken",
                title: "The request body broke off",
                detail: "It ended before its announced end. Send the request again.".into(),
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
            Self::Connect => Problem {
                status: StatusCode::METHOD_NOT_ALLOWED,
                name: "connect-not-served",
                title: "CONNECT is not served here",
                detail:
                    "Give the application this proxy's address as the API's base URL instead of as \
                         its HTTPS proxy."
                        .into(),
                token: "http_request_denied",
            },
            Self::ForeignTarget => Problem {
                status: StatusCode::FORBIDDEN,
                name: "target-denied",
                title: "This host is not served here",
                detail: "The proxy forwards to the host of upstream.url only. Take it out of the \
                         application's proxy settings for other hosts."
                    .into(),
                token: "http_request_denied",
            },
            Self::TransferCoding => Problem {
                status: StatusCode::NOT_IMPLEMENTED,
                name: "transfer-coding-unknown",
                title: "The transfer coding is not known",
                detail: "Send the body chunked or with its length; compress it with Content-Encoding."
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
            Self::BadTarget => Problem {
                status: StatusCode::BAD_REQUEST,
                name: "target-malformed",
                title: "The request target is malformed",
                detail: "Write the target as a path that starts with a slash, and no user name before the host.".into(),
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

impl Problem {
    pub fn into_response(self) -> Response<Body> {
        let json = serde_json::json!({
            "type": format!("urn:optin-proxy:problem:{}", self.name),
            "title": self.title,
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        let mut response = Response::new(Body::Buffered(Bytes::from(json.to_string())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let status = HeaderValue::from_str(&format!("optin-proxy; error={}", self.token));
        headers.insert(PROXY_STATUS, status.expect("tokens are visible ASCII"));
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            let allowed = "GET, HEAD, POST, PUT, DELETE, OPTIONS";
            headers.insert(ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}
