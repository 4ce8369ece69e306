//! One request of the proxy's own, to find out whether somebody can be reached.

use std::sync::Arc;

use http::header::HOST;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};

use super::body::Body;
use super::error::Error;
use super::pool::Origin;
use super::upstream::Upstream;
use super::verify::tls;
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
    let parts = uri.into_parts();
    let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
        return Err(ProbeError(Error::BadTarget));
    };
    let tls = tls(&config.upstream).map_err(|error| ProbeError(Error::Setup(error)))?;
    let guard = Guard::new(
        config.intercept.rules.clone(),
        vec![],
        config.upstream.connect_timeout,
        Arc::new(System),
    );
    let upstream = Upstream::new(Arc::clone(config), tls, guard);
    let mut request = Request::new(Body::empty());
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        request.headers_mut().insert(HOST, host);
    }
    request.headers_mut().extend(headers);
    let origin = Origin { scheme, authority };
    let (answer, _) =
        upstream.ask(&origin, &mut request, false).await.map_err(ProbeError)?.into_parts();
    Ok(Probe { status: answer.status, headers: answer.headers })
}
