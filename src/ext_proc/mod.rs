//! The same inspection for an Envoy that is there already: `envoy.service.ext_proc.v3`.
//!
//! Envoy asks about each request in a stream of its own. The head decides: only the body of a contact write is asked for,
//! whole (BUFFERED, or BUFFERED_PARTIAL where nothing announces its length), and what goes back is the body to send, with its length. Answers' heads get the report. Envoy
//! sends requests itself, so nothing is retried here: that takes a hop through `optin-proxy serve`.

mod gather;
mod messages;
mod room;

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request as Asked;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response as Answer;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse, ProtocolConfiguration,
};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, HeaderName};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::Service;
use tonic::{Code, Request, Response, Status, Streaming};

use self::gather::Gathering;
use self::messages::Mode;
use self::room::{Held, Metered};
use crate::config::Config;
use crate::contact::{self, Uninspectable};
use crate::observe::exchange::{Exchange, Line, cut};
use crate::observe::journal::Journal;
use crate::observe::metrics::Metrics;
use crate::proxy::Control;
use crate::proxy::connection::ON_ITS_WAY;
use crate::proxy::connection::first::first_bytes;
use crate::proxy::error::Error;
use crate::proxy::io::Downstream;
use crate::proxy::room::Room;
use crate::proxy::route::Route;
use crate::proxy::sanitize::{Found, digests, look, own_host};

/// The same configuration, but that it changes no body.
fn observing(config: &Config) -> Arc<Config> {
    let mut config = config.clone();
    if config.sanitize.policy.mode == contact::Mode::Enforce {
        config.sanitize.policy.mode = contact::Mode::Observe;
    }
    Arc::new(config)
}

/// How often a silent connection is asked whether anybody is there, and how long that may take.
const PING: Duration = Duration::from_secs(30);

/// Answers an Envoy.
pub struct Processor {
    /// The configuration in force.
    pub control: Control,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Takes every exchange once it is over.
    pub journal: Journal,
}

impl Processor {
    /// Serves until `stop`, and then what has begun, within `listen.drain_timeout`. Returns how many connections were cut
    /// because they did not end by then.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) -> usize {
        let control = self.control.clone();
        let limits = control.config().limits.clone();
        // For what is longer, there is no room anyway.
        let service =
            ExternalProcessorServer::new(self).max_decoding_message_size(limits.max_buffered);
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2.timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PING);
        // gRPC has none.
        http2.auto_date_header(false);
        // Envoy puts all that it asks on few connections.
        http2.max_concurrent_streams(u32::try_from(limits.max_requests).unwrap_or(u32::MAX));
        let room = Arc::new(Semaphore::new(limits.max_connections));
        let bytes = Room::new(limits.max_buffered);
        let connections = TaskTracker::new();
        loop {
            let accept = async {
                // Never closed, so a permit always comes.
                let permit = Arc::clone(&room).acquire_owned().await.ok();
                listener.accept().await.map(|(stream, _)| (stream, permit))
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accept => accepted,
            };
            let Ok((mut stream, permit)) = accepted else {
                // No descriptors are left: it would fail again at once.
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            let (service, bytes) = (service.clone(), bytes.clone());
            let service = service_fn(move |request: http::Request<Incoming>| {
                let held = Held::of(&bytes);
                let (mut parts, body) = request.into_parts();
                parts.extensions.insert(Arc::clone(&held));
                let body = Metered { body, held };
                service.clone().call(http::Request::from_parts(parts, body))
            });
            let (http2, limit) = (http2.clone(), limits.idle_timeout);
            let patience = control.config().limits.header_timeout;
            // A stop drains too. One that comes while it drains, and stays, is served until it is to stop.
            let ends = if control.is_draining() { stop.clone() } else { control.draining() };
            connections.spawn(async move {
                let _permit = permit;
                // hyper waits for the preface for ever, and does not end before it.
                let start = {
                    let mut first = pin!(timeout(patience, first_bytes(&mut stream)));
                    tokio::select! {
                        // What has come already is served.
                        biased;
                        start = first.as_mut() => start,
                        () = ends.cancelled() => {
                            timeout(ON_ITS_WAY, first).await.unwrap_or(Ok(None))
                        }
                    }
                };
                let Ok(Some(start)) = start else { return };
                // The peer has to take what is written.
                let wire = Gathering::new(Downstream::new(stream, start, limit, Arc::default()));
                let connection = http2.serve_connection(TokioIo::new(wire.clone()), service);
                let mut connection = pin!(connection);
                let ended = tokio::select! {
                    ended = wire.drive(connection.as_mut()) => ended,
                    () = ends.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        wire.drive(connection).await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                }
            });
        }
        drop(listener);
        control.drain();
        connections.close();
        let limit = control.config().listen.drain_timeout;
        match timeout(limit, connections.wait()).await {
            Ok(()) => 0,
            Err(_) => {
                control.cut();
                connections.len()
            }
        }
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = Conversation;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Conversation>, Status> {
        let held = request.extensions().get().cloned();
        Ok(Response::new(Conversation {
            messages: request.into_inner(),
            config: self.control.config(),
            metrics: Arc::clone(&self.metrics),
            journal: self.journal.clone(),
            held,
            cutting: self.control.cutting(),
            configured: None,
            only_watches: false,
            exchange: None,
            is_over: false,
        }))
    }
}

/// What Envoy asks about one request, and the answers: one for each message, in order.
pub struct Conversation {
    messages: Streaming<ProcessingRequest>,
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    journal: Journal,
    /// What its messages take of `limits.max_buffered`.
    held: Option<Arc<Held>>,
    /// The process ends, and the stream with it.
    cutting: CancellationToken,
    /// How the filter is set up: told with the first message.
    configured: Option<ProtocolConfiguration>,
    /// No answer is waited for.
    only_watches: bool,
    exchange: Option<Begun>,
    /// It has broken off, and that was said.
    is_over: bool,
}

/// The request that it is about.
struct Begun {
    line: Line,
    headers: HeaderMap,
    /// Whether its body is to be looked at, as an update or a create.
    update: Option<bool>,
    /// How it was asked for.
    mode: Mode,
}

impl Stream for Conversation {
    type Item = Result<ProcessingResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let message = match ready!(Pin::new(&mut self.messages).poll_next(cx)) {
                Some(Ok(message)) => message,
                Some(Err(_)) if self.is_over => return Poll::Ready(None),
                Some(Err(status)) => {
                    self.is_over = true;
                    return Poll::Ready(self.broke(status));
                }
                None => return Poll::Ready(None),
            };
            self.only_watches = message.observability_mode;
            let answer = self.answer(message);
            // Who only watches waits for no answer.
            if !self.only_watches {
                return Poll::Ready(Some(Ok(answer)));
            }
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        if self.cutting.is_cancelled() {
            cut(self.exchange.take());
        }
    }
}

impl Conversation {
    fn answer(&mut self, message: ProcessingRequest) -> ProcessingResponse {
        if message.observability_mode && self.exchange.is_none() {
            self.config = observing(&self.config);
        }
        if let Some(configured) = message.protocol_config {
            self.configured = Some(configured);
        }
        match message.request {
            Some(Asked::RequestHeaders(head)) => self.head(&head),
            Some(Asked::RequestBody(body)) => self.body(body),
            Some(Asked::ResponseHeaders(head)) => self.answered(&head),
            Some(Asked::ResponseBody(_)) => messages::go_on(Answer::ResponseBody),
            Some(Asked::RequestTrailers(_)) => messages::trailers(Answer::RequestTrailers),
            Some(Asked::ResponseTrailers(_)) => messages::trailers(Answer::ResponseTrailers),
            None => ProcessingResponse::default(),
        }
    }

    /// Begins an exchange, and says whether its body is wanted.
    fn head(&mut self, head: &HttpHeaders) -> ProcessingResponse {
        let request = messages::request(head.headers.as_ref());
        let route = Route::of(request.method(), request.uri());
        let is_subject = route != Route::Other
            && self.config.sanitize.policy.mode != contact::Mode::Off
            && !head.end_of_stream;
        let (metrics, journal) = (Arc::clone(&self.metrics), Some(self.journal.clone()));
        let exchange = Arc::new(Exchange::begin(&request, None, metrics, journal));
        exchange.attempted();
        let line = Line { exchange, complete: false, sent: 0 };
        let headers = request.into_parts().0.headers;
        let length = headers.get(CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
        let is_too_large = length.is_some_and(|it: usize| it > self.config.sanitize.max_body);
        let update = (is_subject && !is_too_large).then_some(route == Route::Update);
        let mode = match (update, length) {
            (None, _) => Mode::None,
            (Some(_), Some(_)) => Mode::Buffered,
            (Some(_), None) => Mode::BufferedPartial,
        };
        if let Some(held) = self.held.as_ref().filter(|_| update.is_some()) {
            held.awaits_body();
        }
        let begun = self.exchange.insert(Begun { line, headers, update, mode });
        if is_subject && is_too_large {
            let found = Found::Uninspectable(Uninspectable::TooLarge);
            if let Err(error) = found.report(&begun.line.exchange, &self.config) {
                return self.refuse(&error);
            }
        }
        messages::head(mode)
    }

    /// Looks at a body, and answers with the one to send if it is another.
    fn body(&mut self, body: HttpBody) -> ProcessingResponse {
        let Some(Begun { line, headers, update: Some(update), mode }) = &mut self.exchange else {
            return messages::go_on(Answer::RequestBody);
        };
        let exchange = Arc::clone(&line.exchange);
        let (update, mode) = (*update, *mode);
        // It is looked at once.
        let headers = std::mem::take(headers);
        if let Some(begun) = &mut self.exchange {
            begun.update = None;
        }
        let received = Bytes::from(body.body);
        let is_short = received.len() <= self.config.sanitize.max_body;
        let mut found = if is_short && (body.end_of_stream || self.is_whole(mode)) {
            look(&received, &headers, own_host(&headers), update, &self.config)
        } else {
            Found::Uninspectable(Uninspectable::TooLarge)
        };
        let is_packed = headers.contains_key(CONTENT_ENCODING);
        let (edited, unpacked) = match &mut found {
            Found::Contact { edited, original, .. } if is_packed => (edited.take(), original.len()),
            Found::Contact { edited, .. } => (edited.take(), 0),
            _ => (None, 0),
        };
        if let Some(held) = &self.held {
            let has_room = held.take(unpacked);
            // As long as the record of it may need the body.
            if let Some(bytes) = held.hand_over() {
                exchange.holds_bytes(bytes);
            }
            if !has_room {
                return self.no_room().unwrap_or_else(|| messages::go_on(Answer::RequestBody));
            }
        }
        if let Err(error) = found.report(&exchange, &self.config) {
            return self.refuse(&error);
        }
        match edited {
            None => messages::go_on(Answer::RequestBody),
            Some(edited) => {
                let gone = digests(&headers).map(HeaderName::to_string).collect();
                messages::body(edited, headers.contains_key(CONTENT_LENGTH), gone)
            }
        }
    }

    /// Whether a body comes in one message even if more follows, as trailers do.
    fn is_whole(&self, mode: Mode) -> bool {
        mode == Mode::Buffered && self.configured.as_ref().is_none_or(messages::is_whole)
    }

    /// The last word of a stream that broke off. A message that is too long is a body that nobody looks at, and one for which
    /// there is no room is refused, as `serve` does it. Of anything else Envoy is told that it failed, since of a stream that
    /// ends in order it takes it that the request may go on.
    fn broke(&mut self, status: Status) -> Option<Result<ProcessingResponse, Status>> {
        let awaited = self.exchange.as_mut().and_then(|begun| begun.update.take());
        if awaited.is_some() {
            if self.held.as_ref().is_some_and(|held| held.is_full()) {
                return self.no_room().map(Ok);
            }
            if status.code() == Code::OutOfRange {
                return self.too_large().map(Ok);
            }
        }
        // As it does whenever a request was given up.
        let is_reset = status.code() == Code::Cancelled;
        if let Some(Begun { line, .. }) = self.exchange.as_ref().filter(|_| !is_reset) {
            let error = status.code().description();
            tracing::warn!(request_id = %line.exchange.id(), error, "a stream of Envoy's broke off");
        }
        Some(Err(status))
    }

    /// Rejects a body that nobody can look at, if that is asked for and somebody waits for an answer.
    fn too_large(&mut self) -> Option<ProcessingResponse> {
        let Begun { line, .. } = self.exchange.as_ref()?;
        let found = Found::Uninspectable(Uninspectable::TooLarge);
        let reported = found.report(&line.exchange, &self.config);
        let rejected = reported.err().filter(|_| !self.only_watches)?;
        Some(self.refuse(&rejected))
    }

    /// Refuses a body, unless nobody waits for an answer.
    fn no_room(&mut self) -> Option<ProcessingResponse> {
        let error = Error::TooMuchBuffered(self.config.limits.max_buffered);
        if self.only_watches {
            // Envoy goes on by itself; that nobody looked must not go unsaid.
            if let Some(Begun { line, .. }) = &self.exchange {
                line.exchange.failed(error.problem().name, &error);
            }
            return None;
        }
        Some(self.refuse(&error))
    }

    /// Adds the report to an answer's head.
    fn answered(&mut self, head: &HttpHeaders) -> ProcessingResponse {
        let Some(Begun { line, .. }) = &mut self.exchange else {
            return messages::go_on(Answer::ResponseHeaders);
        };
        if let Some(status) = messages::status(head.headers.as_ref()) {
            line.exchange.answered(status);
        }
        // What becomes of its body Envoy does not tell.
        line.complete = true;
        let report = line.exchange.report().filter(|_| self.config.log.report_header);
        messages::report(report)
    }

    /// Answers in the upstream's place.
    fn refuse(&mut self, error: &Error) -> ProcessingResponse {
        let problem = error.problem();
        let mut report = None;
        if let Some(Begun { line, .. }) = &mut self.exchange {
            line.exchange.unattempted();
            line.exchange.failed(problem.name, error);
            line.exchange.answered(problem.status);
            line.complete = true;
            report = line.exchange.report().filter(|_| self.config.log.report_header);
        }
        messages::refusal(problem, report)
    }
}
