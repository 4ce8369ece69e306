//! Sending again: a transition refusal that contradicts what was sent is not the client's to see, nor is a
//! connection that was stale.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, RETRY_AFTER};
use http::{Extensions, HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Frame;
use http_body_util::BodyExt;
use percent_encoding::percent_decode_str;
use tokio::time::Instant;

use super::body::{Body, Broken, Rest};
use super::budget::Budget;
use super::call::{Call, Forward};
use super::coding::start_of_answer;
use super::error::Error;
use super::gathered::Gathered;
use super::stage::{Handle, Stage};
use crate::config::{self, Config};
use crate::contact::refusal::{INSPECTED, Sent, Verdict};
use crate::observe::exchange::{Exchange, Retried};

/// How long the start of a refusal's body may take to follow its head, even beyond the deadline.
const GRACE: Duration = Duration::from_secs(1);

/// Sends again what was refused transiently, or never seen.
#[derive(Clone)]
pub(super) struct Retry {
    config: Arc<Config>,
    budget: Arc<Budget>,
}

impl Retry {
    pub fn new(config: Arc<Config>, budget: Arc<Budget>) -> Self {
        Self { config, budget }
    }
}

impl<S> Stage<Box<Call>, S> for Retry
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, call: Box<Call>, inner: &S) -> Result<Response<Body>, Error> {
        let started = Instant::now();
        // What goes elsewhere is nothing to the API.
        if !matches!(call.forward, Some(Forward::Elsewhere(_))) {
            self.budget.deposit(started);
        }
        let (exchange, sent) = (Arc::clone(&call.exchange), call.sent);
        exchange.attempted();
        let spare = is_idempotent(call.request.method()).then(|| Spare::of(&call)).flatten();

        let mut resends = true;
        let first = match ask(inner, call, spare.as_deref(), &exchange, &mut resends).await {
            // Nobody was asked.
            Err(error @ Error::Denied(_)) => {
                exchange.unattempted();
                return Err(error);
            }
            first => first?,
        };
        match sent {
            // Seldom, and large.
            Some(sent) if first.status() == StatusCode::BAD_REQUEST => {
                let first = Attempted { sent, started, spare, resends, answer: first };
                Ok(Box::pin(self.refused(first, &exchange, inner)).await)
            }
            _ => Ok(first),
        }
    }
}

/// A first attempt that may have been refused.
struct Attempted {
    sent: Sent,
    started: Instant,
    spare: Option<Box<Spare>>,
    resends: bool,
    answer: Response<Body>,
}

/// Asks once; and once more on another connection, as every proxy does, if the first one was stale. `resends`: that was not done
/// before for this request, whose attempts are no more than that.
async fn ask<S>(
    inner: &S,
    call: Box<Call>,
    spare: Option<&Spare>,
    exchange: &Arc<Exchange>,
    resends: &mut bool,
) -> Result<Response<Body>, Error>
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    match inner.handle(call).await {
        Err(error) if error.is_stale() && *resends => match spare {
            // Seldom.
            Some(spare) => {
                *resends = false;
                let mut again = spare.call(exchange);
                again.fresh = true;
                Box::pin(inner.handle(again)).await
            }
            None => Err(error),
        },
        answer => answer,
    }
}

impl Retry {
    /// The answer to a request that was refused, or something like it: to another attempt, if there is one.
    async fn refused<S>(
        &self,
        first: Attempted,
        exchange: &Arc<Exchange>,
        inner: &S,
    ) -> Response<Body>
    where
        S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
    {
        let Attempted { sent, started, spare, mut resends, answer } = first;
        let retry = &self.config.retry;
        let schedule = Schedule::from(started, retry);
        let mut answer = self.judge(answer, sent, schedule.deadline).await;
        answer.count(exchange);
        let spare = spare.as_deref().filter(|it| !carries_nonce(&it.headers, exchange.uri()));
        for attempt in 1.. {
            let Some(Verdict::Transient) = answer.verdict else { break };
            let pause = schedule.pause(attempt, answer.retry_after());
            let (Some(spare), Some(pause)) = (spare, pause) else { break };
            if !self.budget.has(retry.budget, retry.budget_floor) {
                exchange.budget_spent();
                break;
            }
            // A timer waits for the next millisecond, even for none.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            if is_gone(exchange) {
                break;
            }
            // Only now: it is of what the API gets in a time, not of what somebody waits for.
            if !self.budget.withdraw(retry.budget, retry.budget_floor) {
                exchange.budget_spent();
                break;
            }
            exchange.attempted();
            let retrying = Retrying::begin(exchange);
            // What cannot be sent again for that shall meet no other stale connection.
            let mut next = spare.call(exchange);
            next.fresh = !resends;
            let asking = ask(inner, next, Some(spare), exchange, &mut resends);
            match tokio::time::timeout_at(schedule.deadline, asking).await {
                Ok(Ok(response)) => {
                    let next = self.judge(response, sent, schedule.deadline).await;
                    // The client gets the last refusal that came whole.
                    if let Some(error) = next.response.body().broken() {
                        exchange.retry_broke(error);
                        break;
                    }
                    if next.is_late {
                        exchange.retry_overran();
                        break;
                    }
                    answer = next;
                    answer.count(exchange);
                    retrying.ended(match answer.verdict {
                        Some(_) => Retried::Refused,
                        None if answer.response.status().as_u16() < 400 => Retried::Rescued,
                        None => Retried::Failed,
                    });
                }
                // The client gets the last refusal: known and complete.
                Ok(Err(error)) => {
                    exchange.retry_broke(&error);
                    break;
                }
                Err(_) => {
                    exchange.retry_overran();
                    break;
                }
            }
        }
        answer.response
    }

    /// Looks whether an answer is a refusal, without taking anything from it.
    async fn judge(&self, response: Response<Body>, sent: Sent, deadline: Instant) -> Answer {
        if response.status() != StatusCode::BAD_REQUEST {
            return Answer { response, verdict: None, is_late: false };
        }
        // An answer whose head came late, or with no deadline left, is judged all the same.
        let deadline = deadline.max(Instant::now() + GRACE);
        let Peeked { response, start, is_late } = peek(response, deadline).await;
        let text = start_of_answer(response.headers(), &start, INSPECTED);
        Answer { response, verdict: self.config.retry.pattern.judge(&text, sent), is_late }
    }
}

/// An attempt beyond the first. Unless it ends otherwise it has failed, if only because nobody waits for it any more.
struct Retrying<'e>(Option<&'e Exchange>);

impl<'e> Retrying<'e> {
    fn begin(exchange: &'e Exchange) -> Self {
        Self(Some(exchange))
    }

    fn ended(mut self, retried: Retried) {
        if let Some(exchange) = self.0.take() {
            exchange.retried(retried);
        }
    }
}

impl Drop for Retrying<'_> {
    fn drop(&mut self) {
        if let Some(exchange) = self.0 {
            exchange.retried(Retried::Failed);
        }
    }
}

struct Answer {
    response: Response<Body>,
    verdict: Option<Verdict>,
    /// Not enough of it came in time to tell.
    is_late: bool,
}

impl Answer {
    fn count(&self, exchange: &Exchange) {
        match self.verdict {
            Some(verdict) => exchange.refused(verdict),
            None => exchange.not_refused(),
        }
    }

    /// How long the API asks to be left alone (RFC 9110 section 10.2.3).
    fn retry_after(&self) -> Option<Duration> {
        let value = self.response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
        if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
            // More than can be counted is beyond any deadline.
            return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
        }
        let date = httpdate::parse_http_date(value).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

/// When attempts may be made.
struct Schedule<'c> {
    config: &'c config::Retry,
    deadline: Instant,
}

impl<'c> Schedule<'c> {
    fn from(started: Instant, config: &'c config::Retry) -> Self {
        Self { config, deadline: started + config.deadline }
    }

    /// How long to wait after this attempt, the first being 1. `None` if it was the last.
    fn pause(&self, attempt: u32, retry_after: Option<Duration>) -> Option<Duration> {
        if attempt >= self.config.max_attempts {
            return None;
        }
        let doubled = self.config.base_delay.saturating_mul(1 << (attempt - 1).min(20));
        let delay = doubled.min(self.config.max_delay);
        let jittered = delay.mul_f64(0.5 + fastrand::f64() / 2.0);
        let pause = jittered.max(retry_after.unwrap_or_default());
        let in_time = Instant::now().checked_add(pause).is_some_and(|at| at < self.deadline);
        in_time.then_some(pause)
    }
}

/// Whether nobody waits for the answer any more.
fn is_gone(exchange: &Exchange) -> bool {
    exchange.peer().is_some_and(|peer| peer.watch.is_gone())
}

/// RFC 9110 section 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::PUT, Method::DELETE, Method::OPTIONS].contains(method)
}

/// What is kept of a request to send it again. Its target stands in its exchange.
struct Spare {
    method: Method,
    version: Version,
    headers: HeaderMap,
    /// How the names of its fields were written, which is hyper's secret.
    extensions: Extensions,
    body: Bytes,
    forward: Option<Forward>,
}

impl Spare {
    /// `None` if its body is gone once sent.
    fn of(call: &Call) -> Option<Box<Self>> {
        let Call { request, exchange, forward, .. } = call;
        let Body::Buffered(body) = request.body() else { return None };
        debug_assert!(request.uri() == exchange.uri(), "no stage above changes it");
        Some(Box::new(Self {
            method: request.method().clone(),
            version: request.version(),
            headers: request.headers().clone(),
            extensions: request.extensions().clone(),
            body: body.clone(),
            forward: forward.clone(),
        }))
    }

    /// The same request again.
    fn call(&self, exchange: &Arc<Exchange>) -> Box<Call> {
        let mut request = Request::new(Body::Buffered(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = exchange.uri().clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers.clone();
        *request.extensions_mut() = self.extensions.clone();
        let (exchange, forward) = (Arc::clone(exchange), self.forward.clone());
        // What it says is known already, further up.
        Box::new(Call { request, exchange, forward, sent: None, fresh: false })
    }
}

/// Whether the request is signed by OAuth 1.0a, whose nonce the server takes only once (RFC 5849
/// section 3.3).
fn carries_nonce(headers: &HeaderMap, uri: &Uri) -> bool {
    let is_nonce = |parameter: &str| {
        let (name, _) = parameter.split_once('=').unwrap_or((parameter, ""));
        percent_decode_str(name.trim()).eq(b"oauth_nonce".iter().copied())
    };
    let in_header = headers.get_all(AUTHORIZATION).into_iter().any(|value| {
        let value = String::from_utf8_lossy(value.as_bytes());
        let oauth = value.split_once([' ', '\t']).filter(|it| it.0.eq_ignore_ascii_case("oauth"));
        oauth.is_some_and(|(_, parameters)| parameters.split(',').any(is_nonce))
    });
    in_header || uri.query().is_some_and(|query| query.split('&').any(is_nonce))
}

/// The start of a response's body, and the response as it was, body and all.
struct Peeked {
    response: Response<Body>,
    start: Bytes,
    /// It dawdled beyond the deadline: this is not all that was to be seen.
    is_late: bool,
}

async fn peek(response: Response<Body>, deadline: Instant) -> Peeked {
    let (parts, body) = response.into_parts();
    let Body::Streaming(mut stream) = body else {
        let response = Response::from_parts(parts, body);
        return Peeked { response, start: Bytes::new(), is_late: false };
    };
    let mut is_late = false;
    let mut start = Gathered::default();
    let mut trailers = None;
    let rest = loop {
        if start.len() >= INSPECTED {
            break Rest::Stream(stream);
        }
        match tokio::time::timeout_at(deadline, stream.frame()).await {
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => start.push(data),
                Err(frame) => trailers = Some(frame),
            },
            Ok(None) => break Rest::End,
            // The client is to see that it broke off, after all that came before.
            Ok(Some(Err(error))) => break Rest::Broken(Broken::new(error)),
            Err(_) => {
                is_late = true;
                break Rest::Stream(stream);
            }
        }
    };
    let start = start.into_bytes();
    let frames = Some(Frame::data(start.clone())).into_iter().chain(trailers).collect();
    let response = Response::from_parts(parts, Body::resumed(frames, rest));
    Peeked { response, start, is_late }
}
