//! One function for each target: it returns, or it panics.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use optin_proxy::config::Layers;
use optin_proxy::contact::refusal::{DEFAULT_PATTERN, Pattern as Refusal, Sent, Verdict};
use optin_proxy::contact::{
    Ambiguous, Kind, Lists, Mode, Policy, Removal, Request, Sanitized, Source, Undeclared, sanitize,
};
use optin_proxy::intercept::{Host, Pattern};
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::{Entrance, Server};
use roxmltree::Document;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::reference::{contacts, opinion, skeleton, sources, value};

/// A body, behind three bytes that choose request and policy: nothing but sources and their times ever changes,
/// the result has nothing left to act on, and by default it is what a second opinion over another parser says.
pub fn document(data: &[u8]) {
    let Some((&[request, first, second], body)) = data.split_first_chunk() else { return };
    let body = Bytes::copy_from_slice(body);
    let update = request & 1 == 1;
    let request = Request { update, own_host: None, charset: None };
    let one_of = |byte: u8, count: u8| byte % count;
    let policy = if first == 0 {
        Policy::default()
    } else {
        Policy {
            mode: if first & 0x80 == 0 { Mode::Enforce } else { Mode::Observe },
            lists: [Lists::Align, Lists::Strip, Lists::Leave][one_of(first, 3) as usize],
            removal: [Removal::Customer, Removal::Leave][one_of(second >> 6, 2) as usize],
            undeclared: [
                Undeclared::Leave,
                Undeclared::FromLists,
                Undeclared::Customer,
                Undeclared::Contact,
            ][one_of(second, 4) as usize],
            ambiguous: [
                Ambiguous::Leave,
                Ambiguous::First,
                Ambiguous::Last,
                Ambiguous::Customer,
                Ambiguous::Contact,
            ][one_of(second >> 2, 5) as usize],
            keep_own_ids: false,
            aliases: BTreeMap::from([("ACTION_BY_CLIENT".to_owned(), Source::Contact)]),
        }
    };
    let Sanitized::Contact(once) = sanitize(&body, &request, &policy) else { return };
    let Sanitized::Contact(twice) = sanitize(&once.body, &request, &policy) else {
        panic!("it can no longer be inspected");
    };
    assert!(twice.edits.is_empty());
    assert_eq!(twice.claims_contact, once.claims_contact);
    if once.edits.is_empty() || policy.mode == Mode::Observe {
        assert_eq!(once.body.as_ptr(), body.as_ptr());
    }

    let text = |body: &Bytes| {
        std::str::from_utf8(body).ok().map(|text| text.trim_start_matches('\u{FEFF}').to_owned())
    };
    let (Some(before), Some(after)) = (text(&body), text(&once.body)) else { return };
    // A name that begins with a colon is none, and a declaration to the other parser.
    if before.contains(":xmlns") {
        return;
    }
    // What another parser does not take has no second opinion.
    let Ok(before) = Document::parse(&before) else { return };
    let after = Document::parse(&after).expect("still XML");
    assert_eq!(joined(&before), joined(&after));
    // A contact within a value is none to us, and one to the second opinion.
    let is_value = |node: &roxmltree::Node<'_, '_>| node.tag_name().name() == "OptInSource";
    if first != 0 || contacts(&before).any(|it| it.ancestors().any(|above| is_value(&above))) {
        return;
    }
    let expected = opinion(&before, update);
    let mut found = BTreeMap::new();
    for finding in once.findings.iter().filter(|finding| finding.kind != Kind::OwnOrigin) {
        *found.entry(finding.kind.as_str()).or_insert(0) += 1;
    }
    assert_eq!(found, expected.findings);
    let all = |document| {
        contacts(document).flat_map(|contact| {
            let (declared, listed) = sources(contact);
            declared.into_iter().chain(listed)
        })
    };
    let said: Vec<_> = all(&after).map(|node| value(node).unwrap_or_default()).collect();
    let must_say: Vec<_> =
        all(&before).map(|node| expected.values[&node.id().get_usize()].clone()).collect();
    assert_eq!(said, must_say);
}

/// All that must stay of a document: its elements, and its text in one piece, since a node that is stripped joins the
/// texts on both sides of it.
fn joined(document: &Document<'_>) -> (Vec<String>, String) {
    let lines = skeleton(document, true).into_iter();
    let (texts, others): (Vec<_>, Vec<_>) =
        lines.partition(|line| line.contains(" Text  [] Some("));
    let text =
        |line: String| line.split_once("Some(\"").map(|it| it.1.trim_end_matches("\")").to_owned());
    (others, texts.into_iter().filter_map(text).collect())
}

/// The text of an answer, behind a byte that says what was sent: only an update that declared the contact can be
/// refused for a moment, and white space and what comes beyond the inspected part change no verdict.
pub fn refusal(data: &[u8]) {
    static DEFAULT: LazyLock<Refusal> =
        LazyLock::new(|| Refusal::new(DEFAULT_PATTERN).expect("the default"));
    let Some((&sent, text)) = data.split_first() else { return };
    let sent = Sent { update: sent & 1 == 1, claims_contact: sent & 2 == 2 };
    let verdict = DEFAULT.judge(text, sent);
    if verdict == Some(Verdict::Transient) {
        assert!(sent.update && sent.claims_contact);
    }
    let spread: Vec<u8> = text
        .iter()
        .flat_map(|byte| if *byte == b' ' { b"\r\n\t".to_vec() } else { vec![*byte] })
        .collect();
    assert_eq!(DEFAULT.judge(&spread, sent), verdict);
    if sent.update && sent.claims_contact {
        for other in [(false, true), (true, false), (false, false)] {
            let other = Sent { update: other.0, claims_contact: other.1 };
            let legitimate = verdict.map(|_| Verdict::Legitimate);
            assert_eq!(DEFAULT.judge(text, other), legitimate);
        }
    }
    // A pattern of the operator's own is refused or works.
    if let Some((pattern, text)) = std::str::from_utf8(text).ok().and_then(|it| it.split_once('\n'))
        && let Ok(pattern) = Refusal::new(pattern)
    {
        let _ = pattern.judge(text.as_bytes(), sent);
    }
}

/// The target of a CONNECT: a host has one spelling, which is read as itself, and a pattern of it means it.
pub fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(host) = text.parse::<Host>() {
        let spelled = host.to_string();
        assert_eq!(spelled.parse::<Host>().as_ref(), Ok(&host), "{spelled}");
        assert!(!spelled.ends_with('.') && !spelled.contains(|it: char| it.is_ascii_uppercase()));
        assert!(!spelled.contains(['/', '@', '?', '#', '%', ' ', '\r', '\n', '\0']));
        if let Host::Name(_) = host {
            assert!(spelled.parse::<std::net::IpAddr>().is_err(), "an address is no name");
        }
        let pattern: Pattern = spelled.parse().expect("a host is a pattern");
        assert!(pattern.means(&host, 443));
        let with_port: Pattern = format!("{spelled}:8443").parse().expect("and with a port");
        assert!(with_port.means(&host, 8443) && !with_port.means(&host, 443));
        let below: Result<Pattern, _> = format!("*.{spelled}").parse();
        assert!(below.is_ok_and(|it| !it.means(&host, 443)) || matches!(host, Host::Address(_)));
    }
    if let Ok(pattern) = text.parse::<Pattern>() {
        let _ = pattern.means(&Host::Name("api.constantcontact.com".into()), 443);
    }
    if let Ok(authority) = http::uri::Authority::try_from(data) {
        let _ = authority.host().parse::<Host>();
    }
}

/// A configuration file: refused with a reason that has a place, or built; and what `check` prints of it builds
/// the same.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Files that it names are none of the fuzzer's.
    if ["file", "dir", "\\u", "\\U", "\\x"].iter().any(|it| text.contains(it)) {
        return;
    }
    let mut layers = Layers::default();
    layers.toml("proxy.toml", text);
    match layers.build() {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(config) => {
            let printed = toml::to_string(&config.resolved).expect("it can be written");
            let mut layers = Layers::default();
            layers.toml("printed", &printed);
            // A secret is not printed, and so cannot come back.
            if config.listen.proxy_auth.is_none() {
                let again = layers.build().expect("what is printed is valid");
                assert_eq!(again.resolved, config.resolved);
            }
        }
    }
}

/// What a client sends, as far as its connection lasts: what the origin gets is strict HTTP/1.1, never more requests
/// than the client got answers, and nothing panics.
pub fn exchange(data: &[u8]) {
    static PROXY: LazyLock<Exchange> = LazyLock::new(Exchange::start);
    // A request of the input before, whose client was cut, may arrive late and be counted here. What is wrong with
    // this one stays wrong when it comes again.
    let is_fine = (0..3).any(|_| PROXY.answers_all(data));
    assert!(is_fine, "more requests were passed on than were answered");
    let faults = PROXY.faults.lock().expect("no thread panics with it");
    assert!(faults.is_empty(), "the origin got what is no strict HTTP: {faults:?}");
}

/// Sent behind each input: what came before must not become part of it, nor it of that.
const CANARY: &[u8] = b"\r\nGET /canary HTTP/1.1\r\nHost: p\r\nConnection: close\r\n\r\n";

/// How much may be under way in each direction.
const ROOM: usize = 64 * 1024;

/// A proxy, reached through memory, before an origin that looks at every byte.
struct Exchange {
    runtime: Runtime,
    entrance: Entrance,
    arrived: Arc<AtomicUsize>,
    faults: Arc<Mutex<Vec<String>>>,
}

impl Exchange {
    /// Whether no more requests reach the origin than the client gets answers.
    fn answers_all(&self, data: &[u8]) -> bool {
        let before = self.arrived.load(Ordering::SeqCst);
        let mut answered = Vec::new();
        self.runtime.block_on(async {
            let client = self.entrance.connect(ROOM).await.expect("it runs");
            let (mut reading, mut writing) = tokio::io::split(client);
            let sending = async {
                // It may be closed early.
                if writing.write_all(data).await.is_ok() {
                    let _ = writing.write_all(CANARY).await;
                }
            };
            // The proxy ends every connection: by its word, or by its deadlines.
            let _ = tokio::join!(sending, reading.read_to_end(&mut answered));
        });
        // HTTP/2 has its answers in frames.
        let is_answer = |it: &&[u8]| it.starts_with(b"HTTP/1.") && it[8] == b' ';
        let answers = answered.windows(9).filter(is_answer).count();
        data.starts_with(b"PRI * ") || self.arrived.load(Ordering::SeqCst) - before <= answers
    }

    fn start() -> Self {
        let origin = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let upstream = format!("upstream.url=http://{}", origin.local_addr().expect("bound"));
        let (arrived, faults) = <(Arc<AtomicUsize>, Arc<Mutex<Vec<_>>>)>::default();
        let (counted, wrong) = (Arc::clone(&arrived), Arc::clone(&faults));
        std::thread::spawn(move || {
            for stream in origin.incoming() {
                let (counted, wrong) = (Arc::clone(&counted), Arc::clone(&wrong));
                std::thread::spawn(move || {
                    if let Err(fault) = serve(stream.expect("a connection"), &counted) {
                        wrong.lock().expect("no thread panics with it").push(fault);
                    }
                });
            }
        });
        let folder = tempfile::tempdir().expect("a folder").keep();
        let mut layers = Layers::default();
        for setting in [
            "listen.address=127.0.0.1:0",
            "listen.keep_alive=100ms",
            "limits.header_timeout=100ms",
            "limits.idle_timeout=100ms",
            "limits.body_timeout=100ms",
            // An upload that stands still is to end before it.
            "upstream.response_timeout=1s",
            "intercept.other_hosts=deny",
            &upstream,
            &format!("intercept.ca_dir={}", folder.display()),
        ] {
            layers.set("fuzz", setting);
        }
        let config = Arc::new(layers.build().expect("a valid configuration"));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(PROXY_THREAD)
            .enable_all()
            .build()
            .expect("a runtime");
        let server = runtime.block_on(Server::bind(config, Arc::new(Metrics::default())));
        let server = server.expect("a free port");
        let entrance = server.entrance();
        runtime.spawn(server.run(CancellationToken::new()));
        Self { runtime, entrance, arrived, faults }
    }
}

/// The name of the threads in which nothing may panic.
pub const PROXY_THREAD: &str = "fuzzed-proxy";

/// Reads requests as strictly as can be, and answers each.
fn serve(stream: TcpStream, arrived: &AtomicUsize) -> Result<(), String> {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    let _ = stream.set_nodelay(true);
    let mut writing = stream.try_clone().expect("a socket");
    let mut reading = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            // Between requests, or broken off with its client.
            if !matches!(reading.read_until(b'\n', &mut head), Ok(1..)) {
                return Ok(());
            }
        }
        arrived.fetch_add(1, Ordering::SeqCst);
        let fault = |what: &str| Err(format!("{what}: {}", head.escape_ascii()));
        let body = &head[..head.len() - 4];
        let lines: Vec<&[u8]> = split(body);
        if lines.iter().any(|line| line.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n'))) {
            return fault("a control byte");
        }
        let mut parsed = [httparse::EMPTY_HEADER; 200];
        let mut request = httparse::Request::new(&mut parsed);
        if !request.parse(&head).is_ok_and(|it| it.is_complete()) || request.version != Some(1) {
            return fault("no HTTP/1.1");
        }
        let values = |name: &str| {
            let named = request.headers.iter().filter(|it| it.name.eq_ignore_ascii_case(name));
            named.map(|it| it.value).collect::<Vec<_>>()
        };
        if values("host").len() != 1 {
            return fault("not one Host");
        }
        // TE is hop by hop itself, and said to be.
        if values("connection").iter().any(|it| *it != b"te") {
            return fault("a hop-by-hop field");
        }
        for hop in ["proxy-connection", "keep-alive", "upgrade", "proxy-authorization"] {
            if !values(hop).is_empty() {
                return fault("a hop-by-hop field");
            }
        }
        let (lengths, codings) = (values("content-length"), values("transfer-encoding"));
        let copied = match (&lengths[..], &codings[..]) {
            ([], []) => Ok(0),
            ([length], []) => {
                let length = std::str::from_utf8(length)
                    .ok()
                    .filter(|it| it.bytes().all(|it| it.is_ascii_digit()));
                match length.and_then(|it| it.parse().ok()) {
                    Some(length) => skip(&mut reading, length),
                    None => return fault("no length"),
                }
            }
            ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") => match chunks(&mut reading)
            {
                Some(copied) => Ok(copied),
                None => return fault("no chunks"),
            },
            _ => return fault("two framings"),
        };
        if copied.is_err() || writing.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").is_err() {
            return Ok(());
        }
    }
}

fn split(text: &[u8]) -> Vec<&[u8]> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(2).position(|it| it == b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    lines
}

/// Passes over so many bytes; fewer come if the client went away.
fn skip(reading: &mut impl BufRead, length: u64) -> std::io::Result<u64> {
    let copied = std::io::copy(&mut reading.by_ref().take(length), &mut std::io::sink())?;
    if copied == length { Ok(copied) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Passes over chunks; `None` if they are none. An end before the end is none of our business.
fn chunks(reading: &mut impl BufRead) -> Option<u64> {
    let mut all = 0;
    loop {
        let mut line = Vec::new();
        if !matches!(reading.read_until(b'\n', &mut line), Ok(1..)) || !line.ends_with(b"\n") {
            return Some(all);
        }
        let size = line.strip_suffix(b"\r\n").and_then(|it| std::str::from_utf8(it).ok())?;
        // No extensions, no signs, no spaces.
        if !size.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let size = u64::from_str_radix(size, 16).ok()?;
        all += size;
        let mut end = [0; 2];
        if skip(reading, size).is_err() || reading.read_exact(&mut end).is_err() {
            return Some(all);
        }
        if &end != b"\r\n" {
            return None;
        }
        if size == 0 {
            return Some(all);
        }
    }
}
