//! What a proxied update costs beside a proxy that only passes it on, and what it costs to be watched.
//!
//! `cargo bench --bench proxy` runs optin-proxy, the same with an audit trail and a dashboard that is connected, and a
//! pass-through of hyper's server and hyper-util's pooled client, each on one thread of its own, before the same origin and
//! under the same clients, in turns. Where the log is on, the first has a journal for its lines, as `serve` has. The figure is the thread's own CPU time per request: wall time says little
//! on a machine that others use too.
#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use optin_proxy::config::{Layers, Log, LogFormat, LogLevel};
use optin_proxy::observe::admin::{Admin, Desk};
use optin_proxy::observe::audit::Audit;
use optin_proxy::observe::journal::Journal;
use optin_proxy::observe::log;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::{Control, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

mod hyper_proxy;
mod support;

use hyper_proxy::{AnyBody, serve};
use support::{Worker, median, stay_on};

const CLIENTS: usize = 32;
/// Short turns, and many of them: what the machine does beside them changes more slowly.
const REQUESTS: usize = 512;
const ROUNDS: usize = 50;
/// So many of each: where its memory happens to lie makes a server take two hundredths more or less than another, watched
/// or not.
const SETS: usize = 6;
const PATH: &str = "/ws/customers/oakmill/contacts/1904";

async fn bind() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

fn origin(worker: &Worker) -> SocketAddr {
    worker.run(async {
        let (listener, address) = bind().await;
        tokio::spawn(serve(listener, |request: Request<Incoming>| async move {
            let length = request.into_body().collect().await.expect("a body").to_bytes().len();
            assert!(length > 0);
            let mut response = Response::new(AnyBody::Left(Full::default()));
            *response.status_mut() = http::StatusCode::NO_CONTENT;
            Ok(response)
        }));
        address
    })
}

fn pass_through(worker: &Worker, upstream: SocketAddr) -> SocketAddr {
    worker.run(async move {
        let (listener, address) = bind().await;
        tokio::spawn(hyper_proxy::pass_through(listener, upstream));
        address
    })
}

/// What is made of exchanges beside serving them.
enum Told<'b> {
    /// Nothing.
    Nobody,
    /// Lines of the log.
    Log,
    /// The same, an audit trail in this file, and a dashboard that is connected.
    All(&'b Worker, std::path::PathBuf),
}

fn optin_proxy(worker: &Worker, upstream: SocketAddr, told: &Told<'_>) -> SocketAddr {
    let mut layers = Layers::default();
    layers.set("bench", "listen.address=127.0.0.1:0");
    layers.set("bench", &format!("upstream.url=http://{upstream}"));
    let config = Arc::new(layers.build().expect("valid"));
    let metrics = Arc::new(Metrics::default());
    let start = |exchanges, audit| {
        Journal::start(exchanges, audit, Arc::clone(&metrics)).expect("a thread")
    };
    let journal = match told {
        Told::Nobody => None,
        Told::Log => Some(start(0, None)),
        Told::All(_, trail) => {
            let audit = Audit::start(trail, &config.audit, Arc::clone(&metrics)).expect("a file");
            Some(start(config.admin.exchanges, Some(audit)))
        }
    };
    let (kept, measured) = (journal.clone(), Arc::clone(&metrics));
    let (address, control) = worker.run(async move {
        let mut server = Server::bind(config, measured).await.expect("it starts");
        if let Some(journal) = kept {
            server.keep(journal);
        }
        let found = (server.address(), server.control());
        tokio::spawn(server.run(CancellationToken::new()));
        found
    });
    if let (Told::All(worker, _), Some(journal)) = (told, journal) {
        worker.run(watch(metrics, control, journal));
    }
    address
}

/// A dashboard that is connected: it reads what it is told.
async fn watch(metrics: Arc<Metrics>, control: Control, journal: Journal) {
    let admin = Admin::bind("127.0.0.1:0").await.expect("a free port");
    let address = admin.address();
    let orders = tokio::sync::mpsc::channel(1).0;
    tokio::spawn(admin.run(Desk { metrics, control, journal, orders }));
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
    let asked = format!("GET /api/events HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.expect("it reads");
    tokio::spawn(async move {
        let mut told = vec![0; 64 * 1024];
        while matches!(stream.read(&mut told).await, Ok(1..)) {}
    });
}

/// Sends this many updates over a few kept connections.
fn load(worker: &Worker, proxy: SocketAddr, body: &'static [u8], requests: usize) {
    worker.run(async move {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(async move {
                let stream = tokio::net::TcpStream::connect(proxy).await.expect("it listens");
                stream.set_nodelay(true).expect("a socket");
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream))
                        .await
                        .expect("HTTP");
                tokio::spawn(connection);
                for _ in 0..requests / CLIENTS {
                    let request = Request::put(PATH)
                        .header("host", "127.0.0.1:8080")
                        .header("authorization", "Basic QVBJS0VZJWpvZXNmbG93ZXJzOnNlY3JldA==")
                        .header("content-type", "application/atom+xml")
                        .header("user-agent", "bench/1.0")
                        .body(Full::new(Bytes::from_static(body)))
                        .expect("a request");
                    let answer = sender.send_request(request).await.expect("an answer");
                    assert_eq!(answer.status(), 204);
                    answer.into_body().collect().await.expect("a body");
                }
            });
        }
        clients.join_all().await;
    });
}

/// The documented recipe with eight lists, 2.6 KB: what a detail GET returns, put back.
fn update(declared: &str) -> Vec<u8> {
    let (start, end) =
        include_str!("../tests/corpus/in/recipe.xml").split_once("</ContactLists>").expect("lists");
    let start = start.replacen("ACTION_BY_CONTACT", declared, 1);
    let list = "<ContactList id=\"http://api.constantcontact.com/ws/customers/oakmill/lists/21\">\
                <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>\n";
    [&start, &list.repeat(6), "</ContactLists>", end].concat().into_bytes()
}

fn main() {
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let differing: &'static [u8] = update("ACTION_BY_CONTACT").leak();
    let clean: &'static [u8] = update("ACTION_BY_CUSTOMER").leak();
    let recipe = include_bytes!("../tests/corpus/in/recipe.xml");
    // All that is not measured is on the other core.
    stay_on(1);
    let (clients, origins) = (Worker::start(), Worker::start());
    let folder = tempfile::tempdir().expect("a folder");
    let watching = Worker::start();
    let upstream = origin(&origins);
    let measured = |start: &dyn Fn(&Worker) -> SocketAddr| {
        let worker = Worker::start_on(Some(0));
        let address = start(&worker);
        (worker, address)
    };
    let plain = measured(&|worker| pass_through(worker, upstream));
    let sets: Vec<_> = (0..SETS)
        .map(|number| {
            let trail = folder.path().join(format!("audit-{number}.jsonl"));
            [Told::Nobody, Told::Log, Told::All(&watching, trail)]
                .map(|told| measured(&|worker| optin_proxy(worker, upstream, &told)))
        })
        .collect();
    println!(
        "{:<22}{:>14}{:>14}{:>7}{:>14}{:>7}",
        "CPU time per PUT", "pass-through", "optin-proxy", "ratio", "watched", "ratio"
    );
    let mut logged = Layers::default().build().expect("valid").log;
    let silent = Log { level: LogLevel::Off, ..logged.clone() };
    logged.format = LogFormat::Json;
    let level = log::start(&logged);
    for (name, body, log) in [
        ("8 lists, all differ", differing, &silent),
        ("2 lists, both differ", recipe, &silent),
        ("8 lists, clean", clean, &silent),
        ("all 8 differ, logged", differing, &logged),
        ("both differ, logged", recipe, &logged),
        ("8 clean, logged", clean, &logged),
    ] {
        level.set(log);
        for (_, address) in sets.iter().flatten().chain([&plain]) {
            load(&clients, *address, body, 1_000);
        }
        let take = |(worker, address): &(Worker, SocketAddr)| {
            let before = worker.cpu_time();
            load(&clients, *address, body, REQUESTS);
            (worker.cpu_time() - before).as_secs_f64() * 1e6 / REQUESTS as f64
        };
        let mut times: [Vec<f64>; 3] = Default::default();
        // Who logs has somebody for it.
        let unwatched = usize::from(log.level != LogLevel::Off);
        for round in 0..ROUNDS * SETS {
            let set = &sets[round % SETS];
            // Each comes after each other one as often.
            for turn in 0..3 {
                let at = (turn * (1 + round / SETS % 2) + round / SETS / 2) % 3;
                let server = [&plain, &set[unwatched], &set[2]][at];
                times[at].push(take(server));
            }
        }
        let ratio = |over: &[f64], under: &[f64]| {
            median(over.iter().zip(under).map(|(over, under)| over / under).collect())
        };
        let ratios = [ratio(&times[1], &times[0]), ratio(&times[2], &times[1])];
        let [plain, ours, watched] = times.map(median);
        println!(
            "{name:<22}{plain:>11.1} us{ours:>11.1} us{:>7.2}{watched:>11.1} us{:>7.3}",
            ratios[0], ratios[1]
        );
    }
}
