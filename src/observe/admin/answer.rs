//! What the listener answers to each path.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use rustix::process::{Signal, getpid, kill_process};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::events::{self, Body};
use super::guard::{self, Access, Ends, Refused};
use super::{Asked, Desk, Order};
use crate::contact::{Kind, Mode};
use crate::intercept::trust::Export;
use crate::observe::record::Record;
use crate::proxy::error::document;

/// The dashboard: files of their own, so that the page may run no script and no style but these.
const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/dashboard.js");
const STYLE: &str = include_str!("page/dashboard.css");

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The longest body of a change, in bytes, and the longest wait for it and for what comes of it.
const LONGEST_BODY: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(10);

/// How many exchanges are answered with unless asked otherwise.
const EXCHANGES: usize = 100;

/// How many at most. More are had by `before`: they are put together where requests are served.
const MOST: usize = 1_000;

type Answer = Response<Body>;

/// A path that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path<'p> {
    Live,
    Ready,
    Metrics,
    Authority(Export),
    File(&'static str, &'static str),
    Config,
    Stats,
    Exchanges,
    Exchange(&'p str),
    Events,
    Reload,
    Drain,
    Quit,
    Level,
    Mode,
}

impl<'p> Path<'p> {
    fn of(path: &'p str) -> Option<Self> {
        Some(match path {
            "/livez" => Self::Live,
            "/readyz" => Self::Ready,
            "/metrics" => Self::Metrics,
            "/" => Self::File("text/html; charset=utf-8", PAGE),
            "/dashboard.js" => Self::File("text/javascript; charset=utf-8", SCRIPT),
            "/dashboard.css" => Self::File("text/css; charset=utf-8", STYLE),
            "/config" => Self::Config,
            "/api/stats" => Self::Stats,
            "/api/exchanges" => Self::Exchanges,
            "/api/events" => Self::Events,
            "/reload" => Self::Reload,
            "/drain" => Self::Drain,
            "/quitquitquit" => Self::Quit,
            "/log-level" => Self::Level,
            "/mode" => Self::Mode,
            _ => {
                if let Some(id) = path.strip_prefix("/api/exchanges/") {
                    return Some(Self::Exchange(id));
                }
                let form = path.strip_prefix("/ca.")?;
                Self::Authority(Export::ALL.into_iter().find(|it| it.as_str() == form)?)
            }
        })
    }

    const fn access(self) -> Access {
        match self {
            Self::Live | Self::Ready | Self::Metrics | Self::Authority(_) => Access::Open,
            Self::File(..) => Access::Page,
            Self::Config | Self::Stats | Self::Exchanges | Self::Exchange(_) | Self::Events => {
                Access::See
            }
            Self::Reload | Self::Drain | Self::Quit | Self::Level | Self::Mode => Access::Change,
        }
    }

    const fn methods(self) -> &'static str {
        match self {
            Self::Reload | Self::Drain | Self::Quit => "POST",
            Self::Level | Self::Mode => "PUT",
            _ => "GET, HEAD",
        }
    }
}

impl Desk {
    pub(super) async fn handle(self: Arc<Self>, request: Request<Incoming>, ends: Ends) -> Answer {
        let to_head = request.method() == Method::HEAD;
        let mut answer = self.answer(request, ends).await;
        let headers = answer.headers_mut();
        for (name, value) in [
            (CACHE_CONTROL, "no-store"),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            (REFERRER_POLICY, "no-referrer"),
            (CONTENT_SECURITY_POLICY, POLICY),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if to_head { answer.map(|_| Body::empty()) } else { answer }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>, ends: Ends) -> Answer {
        let uri = request.uri().clone();
        let Some(path) = Path::of(uri.path()) else {
            return problem(
                StatusCode::NOT_FOUND,
                "not-found",
                "There is / (the dashboard), /livez, /readyz, /metrics, /config, /api/stats, /api/exchanges, \
                 /api/events, /ca.pem, .der, .p12, .jks and .bundle; POST /reload, /drain, /quitquitquit; PUT \
                 /log-level, /mode.",
            );
        };
        let config = self.control.config();
        let mut headers = Cow::Borrowed(request.headers());
        // A target in absolute form counts more (RFC 9112 section 3.2.2).
        if let Some(named) = uri.authority()
            && let Ok(host) = HeaderValue::from_str(named.as_str())
        {
            headers.to_mut().insert(HOST, host);
        }
        if let Err(refused) = guard::judge(path.access(), &headers, ends, &config.admin) {
            return refuse(refused);
        }
        if !path.methods().split(", ").any(|method| method == request.method().as_str()) {
            let detail = format!("Only {} here.", path.methods());
            let mut answer = problem(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", &detail);
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static(path.methods()));
            return answer;
        }
        match path {
            Path::Live => text(StatusCode::OK, "live\n".into()),
            Path::Ready => self.readiness(),
            Path::Metrics => self.metrics(),
            Path::Authority(form) => self.authority(form).await,
            Path::File(content_type, content) => {
                reply(StatusCode::OK, content_type, Bytes::from_static(content.as_bytes()))
            }
            Path::Config => json(StatusCode::OK, &config.resolved),
            Path::Stats => json(StatusCode::OK, &self.stats()),
            Path::Exchanges => self.exchanges(uri.query().unwrap_or_default()),
            Path::Exchange(id) => self.exchange(id),
            Path::Events => events::stream(&self, uri.query().unwrap_or_default()),
            Path::Reload => self.ask(Order::Reload).await,
            Path::Drain => {
                self.control.drain();
                tracing::info!("draining: connections close after their answer");
                done("Draining: /readyz says so, and connections close after their answer.")
            }
            Path::Quit => quit(),
            Path::Level => self.change(request.into_body(), Order::Level, "log.level").await,
            Path::Mode => self.change(request.into_body(), Order::Mode, "sanitize.mode").await,
        }
    }

    /// Not the upstream's health: an API that is down is no reason to take the proxy away. Listeners are bound and
    /// the configuration is valid, or there would be nobody to answer.
    fn readiness(&self) -> Answer {
        if self.control.is_draining() {
            return text(StatusCode::SERVICE_UNAVAILABLE, "draining\n".into());
        }
        match usable(self.control.authority_end(), SystemTime::now()) {
            Err(fault) => {
                let fault = format!("certificate authority: {fault}\n");
                text(StatusCode::SERVICE_UNAVAILABLE, fault)
            }
            Ok(()) => text(StatusCode::OK, "ready\n".into()),
        }
    }

    fn metrics(&self) -> Answer {
        let end = self.control.authority_end().ok().flatten();
        self.metrics.authority_ends(end);
        let is_enforcing = self.control.config().sanitize.policy.mode == Mode::Enforce;
        self.metrics.is(is_enforcing, self.control.is_draining());
        let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        reply(StatusCode::OK, format, self.metrics.encode().into())
    }

    async fn authority(self: Arc<Self>, form: Export) -> Answer {
        let authority = match self.control.authority().await {
            Ok(authority) => authority,
            Err(error) => {
                let (status, detail) = (StatusCode::SERVICE_UNAVAILABLE, error.to_string());
                return problem(status, "ca-unavailable", &detail);
            }
        };
        // The system's roots are read.
        match tokio::task::spawn_blocking(move || form.of(&authority)).await {
            Ok(content) => {
                let content_type = match form {
                    Export::Pem | Export::Bundle => "application/x-pem-file",
                    Export::Der => "application/pkix-cert",
                    Export::P12 => "application/x-pkcs12",
                    Export::Jks => "application/octet-stream",
                };
                reply(StatusCode::OK, content_type, content.into())
            }
            Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, "failed", &error.to_string()),
        }
    }

    /// All counts, and how it stands.
    pub(super) fn stats(&self) -> Value {
        let config = self.control.config();
        let audit = self.journal.audit().map(
            |audit| json!({ "path": audit.path().display().to_string(), "fault": audit.fault() }),
        );
        let kept = self.journal.kept();
        let mut stats = kept.stats.to_json();
        drop(kept);
        stats["now"] = json!(humantime::format_rfc3339_millis(SystemTime::now()).to_string());
        stats["state"] = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "mode": config.sanitize.policy.mode,
            "draining": self.control.is_draining(),
            "address": self.control.address().to_string(),
            "upstream": format!("{}://{}", config.upstream.scheme, config.upstream.authority),
            "log_level": config.log.level,
            "token": config.admin.token.is_some(),
            "audit": audit,
            "audit_lost": self.metrics.audit_lost_in_all(),
            "journal_dropped": self.metrics.journal_dropped.get(),
            "config_fault": self.metrics.is_reload_refused(),
        });
        stats
    }

    fn exchanges(&self, query: &str) -> Answer {
        let asked = match Query::parse(query) {
            Ok(asked) => asked,
            Err(why) => return problem(StatusCode::BAD_REQUEST, "query-malformed", &why),
        };
        let kept = self.journal.kept();
        let records: Vec<_> = kept
            .newest()
            .filter(|record| asked.before.is_none_or(|before| record.seq < before))
            .filter(|record| asked.matches(record))
            .take(asked.limit)
            .cloned()
            .collect();
        let count = kept.count();
        drop(kept);
        json(StatusCode::OK, &Exchanges { exchanges: &records, count })
    }

    fn exchange(&self, id: &str) -> Answer {
        let found = self.journal.kept().newest().find(|it| &*it.request_id == id).cloned();
        match found {
            Some(record) => json(StatusCode::OK, &record),
            None => problem(
                StatusCode::NOT_FOUND,
                "not-found",
                "No exchange with this request id is kept: it is too old, or of another process.",
            ),
        }
    }

    /// An order whose value is the body: a word.
    async fn change<T: DeserializeOwned>(
        &self,
        body: Incoming,
        order: impl FnOnce(T) -> Order,
        key: &str,
    ) -> Answer {
        let collected = tokio::time::timeout(PATIENCE, Limited::new(body, LONGEST_BODY).collect());
        let word = match collected.await {
            Ok(Ok(collected)) => collected.to_bytes(),
            Ok(Err(_)) | Err(_) => Bytes::new(),
        };
        let word = String::from_utf8_lossy(&word);
        match serde_json::from_value(json!(word.trim())) {
            Ok(value) => self.ask(order(value)).await,
            // What it says of the values that there are is for whoever sent another.
            Err(error) => {
                let known = error.to_string();
                let known = known.split_once("expected ").map_or("", |(_, known)| known);
                let detail = format!("Send one word, as in {key}: {known}.");
                problem(StatusCode::BAD_REQUEST, "value-unknown", &detail)
            }
        }
    }

    async fn ask(&self, order: Order) -> Answer {
        let (answer, answered) = oneshot::channel();
        let asking = async {
            self.orders.send(Asked { order, answer }).await.ok()?;
            answered.await.ok()
        };
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(Some(Ok(sentence))) => done(&sentence),
            Ok(Some(Err(why))) => problem(StatusCode::UNPROCESSABLE_ENTITY, "not-done", &why),
            Ok(None) | Err(_) => problem(
                StatusCode::SERVICE_UNAVAILABLE,
                "not-done",
                "The process is stopping, has too much to do, or waits for a file. If it is done later, the log says so.",
            ),
        }
    }
}

/// By the signal itself, so that nothing which keeps an order waiting keeps it.
fn quit() -> Answer {
    match kill_process(getpid(), Signal::TERM) {
        Ok(()) => done("Finishing what is in flight, then ending."),
        Err(error) => {
            let why = format!("No SIGTERM can be sent: {error}.");
            problem(StatusCode::SERVICE_UNAVAILABLE, "not-done", &why)
        }
    }
}

#[derive(Serialize)]
struct Exchanges<'r> {
    /// The newest first.
    exchanges: &'r [Record],
    /// How many there have been.
    count: u64,
}

/// What of the exchanges is wanted.
struct Query<'q> {
    limit: usize,
    before: Option<u64>,
    kind: Option<&'q str>,
    outcome: Option<&'q str>,
}

impl<'q> Query<'q> {
    fn parse(query: &'q str) -> Result<Self, String> {
        let mut asked = Self { limit: EXCHANGES, before: None, kind: None, outcome: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let number = || value.parse().map_err(|_| format!("`{name}` must be a number."));
            match name {
                "limit" => asked.limit = usize::try_from(number()?).map_or(MOST, |it| it.min(MOST)),
                "before" => asked.before = Some(number()?),
                "kind" => asked.kind = Some(value),
                "outcome" => asked.outcome = Some(value),
                _ => return Err("There is limit, before (a seq), kind and outcome.".into()),
            }
        }
        Ok(asked)
    }

    fn matches(&self, record: &Record) -> bool {
        self.outcome.is_none_or(|asked| record.outcome.is_some_and(|it| it.as_str() == asked))
            && self.kind.is_none_or(|name| {
                Kind::ALL.iter().any(|kind| kind.as_str() == name && record.has(*kind))
            })
    }
}

fn reply(status: StatusCode, content_type: &'static str, content: Bytes) -> Answer {
    let mut answer = Response::new(Body::whole(content));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn text(status: StatusCode, text: String) -> Answer {
    reply(status, "text/plain; charset=utf-8", text.into())
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(content) => reply(status, "application/json", content.into()),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, "failed", &error.to_string()),
    }
}

fn done(sentence: &str) -> Answer {
    json(StatusCode::OK, &json!({ "done": sentence }))
}

/// Whether an authority that ends then can be used now. It may have ended while nobody read the configuration anew.
fn usable(authority: Result<Option<SystemTime>, String>, now: SystemTime) -> Result<(), String> {
    match authority? {
        Some(end) if end <= now => {
            Err("it has ended; move intercept.ca_dir away, run `optin-proxy ca init`, and restart"
                .into())
        }
        _ => Ok(()),
    }
}

/// RFC 9457.
pub(super) fn problem(status: StatusCode, name: &str, detail: &str) -> Answer {
    let token = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "http_request_denied",
        status if status.is_client_error() => "http_request_error",
        _ => "proxy_internal_error",
    };
    let title = status.canonical_reason().unwrap_or_default();
    document(status, name, title, detail, token).map(Body::whole)
}

fn refuse(refused: Refused) -> Answer {
    let (name, detail) = refused.words();
    let status = match refused {
        Refused::Token => StatusCode::UNAUTHORIZED,
        Refused::Host | Refused::Origin | Refused::Elsewhere => StatusCode::FORBIDDEN,
    };
    let mut answer = problem(status, name, detail);
    if refused == Refused::Token {
        let challenge = HeaderValue::from_static("Bearer realm=\"optin-proxy\"");
        answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_authority_is_usable_until_it_ends_even_if_nobody_has_looked_at_it_since() {
        let now = SystemTime::now();
        let moment = Duration::from_secs(1);
        assert_eq!(usable(Ok(None), now), Ok(()));
        assert_eq!(usable(Ok(Some(now + moment)), now), Ok(()));
        let ended = usable(Ok(Some(now)), now).expect_err("it has ended");
        assert!(ended.contains("ca init"), "{ended}");
        assert_eq!(usable(Err("no key".into()), now), Err("no key".into()));
    }
}
