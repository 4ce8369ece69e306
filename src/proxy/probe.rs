//! One request of the proxy's own, to find out whether somebody can be reached.

use std::sync::Arc;

use http::header::HOST;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};

use super::body::Body;
use super::error::Error;
use super::stage::Handle;
use super::upstream::{Upstream, tls};
use crate::config::Config;
use crate::intercept::guard::{Guard, System};

/// The head of an answer.
#[derive(Debug)]
pub struct Probe {
    /// Its status.
    pub status: StatusCode,
    /// Its fields.
    pub headers: HeaderMap,
}

/// Why there was no answer.
#[derive(Debug)]
pub struct ProbeError(Error);

impl ProbeError {
    /// What is wrong, and what to do about it.
    pub fn explained(&self) -> (String, String) {
        match &self.0 {
            Error::Upstream(error) => (error.to_string(), error.fault.remedy().to_owned()),
            error => (error.to_string(), error.problem().detail),
        }
    }
}

/// Asks for the root of an origin, with the connections, the trust and the deadlines of requests to the API.
///
/// # Errors
/// If there is no answer.
pub async fn probe(
    config: &Arc<Config>,
    origin: &str,
    headers: HeaderMap,
) -> Result<Probe, ProbeError> {
    let uri: Uri = origin.parse().map_err(|_| ProbeError(Error::BadTarget))?;
    let tls = tls(&config.upstream).map_err(|error| ProbeError(Error::Setup(error)))?;
    let guard = Guard::new(
        config.intercept.rules.clone(),
        vec![],
        config.upstream.connect_timeout,
        Arc::new(System),
    );
    let upstream = Upstream::new(Arc::clone(config), tls, guard);
    let mut request = Request::new(Body::empty());
    if let Some(host) = uri.authority().and_then(|it| HeaderValue::from_str(it.as_str()).ok()) {
        request.headers_mut().insert(HOST, host);
    }
    *request.uri_mut() = uri;
    request.headers_mut().extend(headers);
    let (answer, _) = upstream.handle(Box::new(request)).await.map_err(ProbeError)?.into_parts();
    Ok(Probe { status: answer.status, headers: answer.headers })
}
