//! The same as `httparse_rewrite.rs`, and in the least way what optin-proxy is asked beyond the rewrite: every field looked at, limits, a
//! deadline for each wait, and a record of each exchange and of each list in it, all by one thread for itself.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use optin_proxy::contact::{self, Finding, Findings, Kind, Sanitized, sanitize};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep};

use crate::httparse_rewrite::{Fields, Message, Upstream, accept, next, rewritten, send};
use crate::hyper_rewrite::REFUSAL;

/// The limits' defaults.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
const RESPONSE: Duration = Duration::from_secs(60);
const EXCHANGES: usize = 1_000;
const REQUESTS: usize = 1_024;
const BUFFERED: usize = 64 << 20;

/// The upper ends of a histogram's buckets, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// What is meant for one connection (RFC 9110 section 7.6.1), or written anew.
#[derive(Default)]
struct Looked {
    id: Option<String>,
    agent: Option<String>,
    hosts: usize,
}

impl Fields for Looked {
    fn passes(&mut self, name: &str, value: &[u8]) -> bool {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        // By its length first, as a table would.
        match name.len() {
            2 => !is("te"),
            3 => {
                assert!(!is("via") || !value.ends_with(b"optin-proxy"), "a loop");
                true
            }
            4 if is("host") => {
                self.hosts += 1;
                let is_host = |byte: &u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(byte);
                assert!(self.hosts == 1 && value.iter().all(is_host), "one host");
                false
            }
            6 => {
                assert!(!is("expect"), "no interim answer is known");
                true
            }
            7 => !is("upgrade"),
            10 if is("user-agent") => {
                self.agent = str::from_utf8(value).ok().map(str::to_owned);
                true
            }
            10 if is("connection") => {
                assert!(!value.contains(&b','), "no field is named");
                false
            }
            10 => !is("keep-alive"),
            12 if is("x-request-id") => {
                self.id = str::from_utf8(value).ok().map(str::to_owned);
                true
            }
            14 => {
                assert!(!is("content_length"), "a look-alike");
                true
            }
            16 => !is("proxy-connection"),
            17 => {
                assert!(!is("transfer_encoding"), "a look-alike");
                true
            }
            18 => !is("proxy-authenticate"),
            19 => !is("proxy-authorization"),
            _ => true,
        }
    }
}

/// One timer for all the waits of a connection: most never last, and to put it off costs next to nothing.
struct Deadline(Pin<Box<Sleep>>);

impl Deadline {
    async fn within<T>(
        &mut self,
        limit: Duration,
        future: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let (mut future, mut until) = (pin!(future), None);
        poll_fn(|cx| {
            if let Poll::Ready(done) = future.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            let until = *until.get_or_insert_with(|| Instant::now() + limit);
            while self.0.as_mut().poll(cx).is_ready() {
                if Instant::now() >= until {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                self.0.as_mut().reset(until);
            }
            Poll::Pending
        })
        .await
    }
}

/// The record of an exchange.
#[derive(Default)]
struct Record {
    started: Option<Instant>,
    duration: Duration,
    id: String,
    line: Vec<u8>,
    agent: Option<String>,
    status: Option<u16>,
    attempts: u32,
    findings: Vec<(Finding, usize)>,
    lists: Vec<u32>,
}

/// What all exchanges have in common.
struct Watch {
    slots: Cell<usize>,
    room: Cell<usize>,
    kept: RefCell<VecDeque<Record>>,
    ids: Cell<u64>,
    requests: Cell<u64>,
    edits: Cell<usize>,
    found: RefCell<[usize; Kind::ALL.len()]>,
    durations: RefCell<[u64; BUCKETS.len() + 1]>,
}

/// Takes so many of what is left, until it is dropped.
struct Held<'a>(&'a Cell<usize>, usize);

impl<'a> Held<'a> {
    fn take(of: &'a Cell<usize>, many: usize) -> Self {
        of.set(of.get().checked_sub(many).expect("there is no more than fits"));
        Self(of, many)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() + self.1);
    }
}

/// The number at the end of a list's id.
fn number(id: &[u8]) -> u32 {
    let (mut number, mut worth) = (0_u32, 1_u32);
    for digit in id.iter().rev().take_while(|byte| byte.is_ascii_digit()) {
        number = number.wrapping_add(worth.wrapping_mul(u32::from(digit - b'0')));
        worth = worth.wrapping_mul(10);
    }
    number
}

impl Watch {
    fn new() -> Rc<Self> {
        Rc::new(Self {
            slots: Cell::new(REQUESTS),
            room: Cell::new(BUFFERED),
            kept: RefCell::default(),
            ids: Cell::default(),
            requests: Cell::default(),
            edits: Cell::default(),
            found: RefCell::default(),
            durations: RefCell::default(),
        })
    }

    fn count(&self, findings: &Findings, edits: usize) {
        self.edits.set(self.edits.get() + edits);
        for (finding, count) in findings.rows() {
            self.found.borrow_mut()[finding.kind as usize] += count;
        }
    }

    /// One to be filled, with the memory of the oldest.
    fn blank(&self) -> Record {
        let mut kept = self.kept.borrow_mut();
        if kept.len() < EXCHANGES {
            Record::default()
        } else {
            kept.pop_front().unwrap_or_default()
        }
    }

    fn keep(&self, record: Record) {
        self.requests.set(self.requests.get() + 1);
        let seconds = record.duration.as_secs_f64();
        let bucket = BUCKETS.iter().position(|end| seconds <= *end).unwrap_or(BUCKETS.len());
        self.durations.borrow_mut()[bucket] += 1;
        self.kept.borrow_mut().push_back(record);
    }

    fn id(&self) -> String {
        self.ids.set(self.ids.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        format!("{:032x}", self.ids.get())
    }

    async fn serve(
        self: Rc<Self>,
        upstream: Rc<Upstream>,
        mut client: TcpStream,
    ) -> io::Result<()> {
        let (mut requests, mut answers, mut head) = (BytesMut::new(), BytesMut::new(), Vec::new());
        let mut deadline = Deadline(Box::pin(sleep(KEEP_ALIVE)));
        loop {
            let mut looked = Looked::default();
            let request = next(&mut client, &mut requests, true, &mut looked);
            let Some(request) = deadline.within(KEEP_ALIVE, request).await? else {
                return Ok(());
            };
            let started = Instant::now();
            let _slot = Held::take(&self.slots, 1);
            let _bytes = Held::take(&self.room, request.content.len());
            let line = memchr::memchr(b'\r', &request.head).unwrap_or_default();
            let mut record = self.blank();
            record.started = Some(started);
            record.id = looked.id.unwrap_or_else(|| self.id());
            record.line.clear();
            record.line.extend_from_slice(&request.head[..line]);
            record.agent = looked.agent;
            record.attempts = 1;
            let sent = self.rewritten(&request, &upstream, &mut record);
            rewritten(
                &request,
                sent.len(),
                &[["Host", "api"], ["Via", "1.1 optin-proxy"]],
                &mut head,
            );
            let mut looked = Looked::default();
            let asked = upstream.ask(&head, &sent, &mut answers, &mut looked);
            let mut answer = deadline.within(RESPONSE, asked).await?;
            if answer.status == Some(400)
                && memchr::memmem::find(&answer.content, REFUSAL).is_some()
            {
                record.attempts += 1;
                let asked = upstream.ask(&head, &sent, &mut answers, &mut looked);
                answer = deadline.within(RESPONSE, asked).await?;
            }
            record.status = answer.status;
            let report = format!(
                "findings={}, rewritten={}, attempts={}",
                record.lists.len(),
                record.lists.len(),
                record.attempts
            );
            rewritten(
                &answer,
                answer.content.len(),
                &[["X-Request-Id", &record.id], ["optin-proxy", &report]],
                &mut head,
            );
            deadline.within(RESPONSE, send(&mut client, &head, &answer.content)).await?;
            record.duration = started.elapsed();
            self.keep(record);
        }
    }

    /// What is sent for the content of a request, and what is told of it.
    fn rewritten(&self, request: &Message, upstream: &Upstream, record: &mut Record) -> Bytes {
        record.findings.clear();
        record.lists.clear();
        let asked = contact::Request { update: true, own_host: Some("api"), charset: None };
        let Sanitized::Contact(found) = sanitize(&request.content, &asked, &upstream.policy) else {
            return request.content.clone();
        };
        self.count(&found.findings, found.edits.len());
        record.findings.extend_from_slice(found.findings.rows());
        let ids = found.findings.places().iter().filter_map(|place| place.list_id);
        record.lists.extend(ids.map(|id| number(&request.content[id.range()])));
        found.body
    }
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let (upstream, watch) = (Upstream::new(address), Watch::new());
    accept(listener, |stream| Rc::clone(&watch).serve(Rc::clone(&upstream), stream)).await;
}
