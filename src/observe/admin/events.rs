//! Server-sent events: what happens, as it happens, for who watches.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body::{Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::Desk;
use super::answer::problem;
use crate::observe::record::Record;

/// How many may watch at once: the other connections are for probes.
const MAX_WATCHERS: usize = 16;
static WATCHERS: AtomicUsize = AtomicUsize::new(0);

/// How often it is looked for news, and how many exchanges are told of each time. Of more than that, those are
/// told of that had something to tell; all are counted.
const LOOK: Duration = Duration::from_millis(250);
const AT_ONCE: usize = 20;

/// How often the counts are told, if they have changed; and how long the silence may be, by which the other side
/// would notice that nobody is there any more.
const COUNT: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(15);

/// A body: whole, or in pieces as they come.
pub(super) enum Body {
    Whole(Option<Bytes>),
    Pieces(mpsc::Receiver<Bytes>),
}

impl Body {
    pub fn whole(content: Bytes) -> Self {
        Self::Whole(Some(content).filter(|content| !content.is_empty()))
    }

    pub const fn empty() -> Self {
        Self::Whole(None)
    }

    /// Whether it goes on for as long as somebody takes it.
    pub const fn is_stream(&self) -> bool {
        matches!(self, Self::Pieces(_))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Self::Whole(content) => Poll::Ready(content.take().map(|it| Ok(Frame::data(it)))),
            Self::Pieces(pieces) => {
                pieces.poll_recv(cx).map(|piece| piece.map(|it| Ok(Frame::data(it))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(content) => {
                SizeHint::with_exact(content.as_ref().map_or(0, |content| content.len() as u64))
            }
            Self::Pieces(_) => SizeHint::new(),
        }
    }
}

/// Counts one who watches.
struct Watcher;

impl Watcher {
    fn admit() -> Option<Self> {
        let watchers = WATCHERS.fetch_add(1, Ordering::Relaxed);
        // Dropped, it is counted no more.
        let watcher = Self;
        (watchers < MAX_WATCHERS).then_some(watcher)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        WATCHERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The events from now on; with `since=N` from the exchange of that number on.
pub(super) fn stream(desk: &Arc<Desk>, query: &str) -> Response<Body> {
    let Some(watcher) = Watcher::admit() else {
        return problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "too-many-watchers",
            "So many dashboards are open that probes might go unanswered. Close one.",
        );
    };
    let (tell, pieces) = mpsc::channel(2);
    let since = query.split('&').find_map(|it| it.strip_prefix("since=")?.parse().ok());
    let count = desk.journal.kept().count();
    let seen = since.map_or(count, |since: u64| since.min(count));
    tokio::spawn(watch(Arc::clone(desk), seen, tell, watcher));
    let mut answer = Response::new(Body::Pieces(pieces));
    let events = HeaderValue::from_static("text/event-stream");
    answer.headers_mut().insert(CONTENT_TYPE, events);
    answer
}

/// Tells until nobody listens.
async fn watch(desk: Arc<Desk>, mut seen: u64, tell: mpsc::Sender<Bytes>, _watcher: Watcher) {
    let mut counted: Option<((u64, String), Instant)> = None;
    let mut told = Instant::now();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = look.tick() => {}
            () = tell.closed() => return,
        }
        let (news, skipped, count) = news(&desk, seen);
        let mut text = String::new();
        for record in &news {
            event(&mut text, "exchange", record);
        }
        if skipped > 0 {
            event(&mut text, "skipped", &skipped);
        }
        seen = count;
        if counted.as_ref().is_none_or(|(_, at)| at.elapsed() >= COUNT) {
            // The state may change without an exchange.
            let stats = desk.stats();
            let now = (count, stats["state"].to_string());
            let changed = counted.as_ref().is_none_or(|(before, _)| *before != now);
            if changed {
                event(&mut text, "stats", &stats);
            }
            counted = Some((now, Instant::now()));
        }
        if text.is_empty() && told.elapsed() >= SILENCE {
            text.push_str(":\n\n");
        }
        if !text.is_empty() {
            told = Instant::now();
            if tell.send(text.into()).await.is_err() {
                return;
            }
        }
    }
}

/// What has come since, how many of it are left out, and how many there have been.
fn news(desk: &Desk, seen: u64) -> (Vec<Record>, u64, u64) {
    let kept = desk.journal.kept();
    let count = kept.count();
    let (mut telling, mut others) = (Vec::new(), Vec::new());
    for record in kept.newest().take_while(|record| record.seq > seen) {
        let tells = record.found > 0 || record.problem.is_some() || record.verdicts.any();
        let into = if tells { &mut telling } else { &mut others };
        if into.len() < AT_ONCE {
            into.push(record.clone());
        }
    }
    drop(kept);
    others.truncate(AT_ONCE - telling.len());
    telling.append(&mut others);
    telling.sort_by_key(|record| record.seq);
    let skipped = (count - seen).saturating_sub(telling.len() as u64);
    (telling, skipped, count)
}

fn event(text: &mut String, name: &str, data: &impl serde::Serialize) {
    // Strings and numbers: they can be written. JSON has no line breaks.
    let Ok(data) = serde_json::to_string(data) else { return };
    let _ = write!(text, "event: {name}\ndata: {data}\n\n");
}
