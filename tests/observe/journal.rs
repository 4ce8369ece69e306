//! What the journal takes, and what it does when more comes than it can.

use std::io::Write;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, Once};
use std::thread::JoinHandle;

use optin_proxy::config::Layers;
use optin_proxy::observe::audit::Audit;
use optin_proxy::observe::journal::Journal;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::observe::record::Outcome;
use optin_proxy::proxy::Server;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::audit::sha256;
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{CONTACT, RECIPE, RECIPE_OUT, answer, request};

/// A proxy in this process, and its journal.
struct Kept {
    journal: Journal,
    metrics: Arc<Metrics>,
    client: Client,
    /// Of its audit trail.
    folder: tempfile::TempDir,
    _running: tokio_util::sync::DropGuard,
}

impl Kept {
    async fn before(origin: &Origin) -> Self {
        Self::with(origin, true).await
    }

    async fn with(origin: &Origin, has_trail: bool) -> Self {
        let mut layers = Layers::default();
        layers.set("test", "listen.address=127.0.0.1:0");
        layers.set("test", &format!("upstream.url={}", origin.url()));
        let config = Arc::new(layers.build().expect("valid"));
        let metrics = Arc::new(Metrics::default());
        let folder = tempfile::tempdir().expect("a folder");
        let trail = folder.path().join("audit.jsonl");
        let audit = has_trail.then(|| Audit::start(&trail, &config.audit, Arc::clone(&metrics)));
        let audit = audit.transpose().expect("a file");
        let journal = Journal::start(200, audit, Arc::clone(&metrics)).expect("a thread");
        let mut server = Server::bind(config, Arc::clone(&metrics)).await.expect("a free port");
        server.keep(journal.clone());
        let client = Client::connect(server.address()).await;
        let stop = CancellationToken::new();
        tokio::spawn(server.run(stop.clone()));
        Self { journal, metrics, client, folder, _running: stop.drop_guard() }
    }

    fn counter(&self, series: &str) -> u64 {
        let text = self.metrics.encode();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.expect("a series").parse().expect("a number")
    }

    /// All has been recorded.
    async fn settled(&self) {
        let journal = self.journal.clone();
        let minute = std::time::Duration::from_secs(60);
        tokio::task::spawn_blocking(move || journal.flush(minute)).await.expect("no panic");
    }

    /// The lines of the trail, once all is written.
    async fn lines(&self) -> Vec<Value> {
        self.settled().await;
        let text = std::fs::read_to_string(self.folder.path().join("audit.jsonl"));
        let text = text.expect("it is there");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// Who reads what is kept holds the journal up, here until it is dropped.
struct Hold {
    release: Option<mpsc::Sender<()>>,
    holding: Option<JoinHandle<()>>,
}

impl Hold {
    fn of(journal: &Journal) -> Self {
        let (release, released) = mpsc::channel::<()>();
        let (held, is_held) = mpsc::channel();
        let journal = journal.clone();
        let holding = std::thread::spawn(move || {
            let _kept = journal.kept();
            held.send(()).expect("somebody waits");
            let _ = released.recv();
        });
        is_held.recv().expect("it is held");
        Self { release: Some(release), holding: Some(holding) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.release.take();
        self.holding.take().expect("dropped once").join().expect("no panic");
    }
}

/// Lines with ids of this test's, and whether the journal's thread has logged them.
static LOGGED: Mutex<Vec<(String, bool)>> = Mutex::new(Vec::new());

/// Logs for the whole process, since tracing asks any thread's subscriber whether an event is wanted, and heeds the answer
/// on all.
struct Logging;

impl Write for Logging {
    /// Takes one line.
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if text.contains(" request_id=feedface") {
            let is_journals = std::thread::current().name() == Some("journal");
            LOGGED.lock().expect("no panic").push((text.into_owned(), is_journals));
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Logging {
    fn start() {
        static STARTED: Once = Once::new();
        STARTED.call_once(|| {
            let subscriber =
                tracing_subscriber::fmt().with_target(false).with_ansi(false).with_writer(|| Self);
            tracing::subscriber::set_global_default(subscriber.finish()).expect("the only one");
        });
    }

    /// How many lines that say this of exchanges with this id the journal has logged, and how many others.
    fn count(message: &str, id: &str) -> (usize, usize) {
        let lines = LOGGED.lock().expect("no panic");
        let of = |(line, _): &&(String, bool)| line.contains(message) && line.contains(id);
        let all: Vec<_> = lines.iter().filter(of).collect();
        let journals = all.iter().filter(|(_, is_journals)| *is_journals).count();
        (journals, all.len() - journals)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_logs_for_itself_only_where_the_journal_has_fallen_behind_by_a_mebibyte() {
    Logging::start();
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::before(&origin).await;
    let ids = ["feedface00000001", "feedface00000002"];
    let ask = async |kept: &mut Kept, id: &str| {
        let fields = format!("X-Request-Id: {id}\r\nUser-Agent: {}\r\n", "x".repeat(14_000));
        kept.client.ask(&request("PUT", CONTACT, &fields, RECIPE)).await;
    };
    {
        let _hold = Hold::of(&kept.journal);
        for _ in 0..100 {
            ask(&mut kept, ids[0]).await;
        }
    }
    kept.settled().await;
    // Each weighs some 17 KiB.
    let (journals, others) = Logging::count("INFO request ", ids[0]);
    assert!((55..65).contains(&journals) && journals + others == 100, "{journals}, {others}");
    assert_eq!(Logging::count("WARN mismatch ", ids[0]), (2 * journals, 2 * others));
    assert_eq!(kept.counter("optin_proxy_journal_dropped_total"), 0);
    assert_eq!(kept.journal.kept().count(), 100);
    for _ in 0..10 {
        ask(&mut kept, ids[1]).await;
        kept.settled().await;
    }
    assert_eq!(Logging::count("INFO request ", ids[1]), (10, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_journal_an_exchange_logs_for_itself() {
    Logging::start();
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut layers = Layers::default();
    layers.set("test", "listen.address=127.0.0.1:0");
    layers.set("test", &format!("upstream.url={}", origin.url()));
    let config = Arc::new(layers.build().expect("valid"));
    let server = Server::bind(config, Arc::default()).await.expect("a free port");
    let mut client = Client::connect(server.address()).await;
    let stop = CancellationToken::new();
    let running = tokio::spawn(server.run(stop.clone()));
    let id = "feedface00000003";
    client.ask(&request("PUT", CONTACT, &format!("X-Request-Id: {id}\r\n"), RECIPE)).await;
    drop(client);
    stop.cancel();
    running.await.expect("no panic");
    assert_eq!(Logging::count("WARN mismatch ", id), (0, 2));
    assert_eq!(Logging::count("INFO request ", id), (0, 1));
}

fn heavy_get() -> Vec<u8> {
    let agent = "x".repeat(15_000);
    format!("GET /x HTTP/1.1\r\nHost: p\r\nUser-Agent: {agent}\r\n\r\n").into_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_other_requests_takes_no_room_from_what_is_audited() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::before(&origin).await;
    let dropped = "optin_proxy_journal_dropped_total";
    {
        let _hold = Hold::of(&kept.journal);
        while kept.counter(dropped) < 10 {
            kept.client.ask(&heavy_get()).await;
        }
        for _ in 0..5 {
            kept.client.ask(&request("PUT", CONTACT, "", RECIPE)).await;
        }
    }
    let written = kept.lines().await;
    assert_eq!(written.len(), 5, "{written:?}");
    assert_eq!(kept.counter("optin_proxy_audit_lost_total{reason=\"queue\"}"), 0);
    let told = kept.journal.kept().count();
    let gets = kept.counter("optin_proxy_requests_total") - 5;
    assert_eq!(told, gets - kept.counter(dropped) + 5);
    // 8 MiB of them, each with its own weight beside its text.
    assert!((480..600).contains(&(told - 5)), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_audited_is_recorded_though_there_is_no_room_for_its_bodies() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::before(&origin).await;
    let recipe = std::str::from_utf8(RECIPE).expect("UTF-8");
    let large =
        recipe.replacen("<ContactLists>", &format!("{}<ContactLists>", " ".repeat(900_000)), 1);
    {
        let _hold = Hold::of(&kept.journal);
        // 16 MiB hold 18 of them.
        for _ in 0..40 {
            kept.client.ask(&request("PUT", CONTACT, "", large.as_bytes())).await;
        }
    }
    let written = kept.lines().await;
    assert_eq!(written.len(), 40);
    assert_eq!(kept.counter("optin_proxy_journal_dropped_total"), 0);
    let hashes: Vec<_> = written.iter().map(|line| &line["sha256_after"]).collect();
    assert!(hashes[0].is_string() && hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_all_room_the_trail_tells_how_many_are_missing() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::before(&origin).await;
    // Findings weigh much of what is in words, if no two in a row are alike.
    let lists = "<ContactList id=\"http://api.constantcontact.com/ws/customers/joesflowers/lists/21\">\
                 <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>\
                 <ContactList id=\"http://api.constantcontact.com/ws/customers/joesflowers/lists/22\">\
                 <OptInSource/></ContactList>";
    let recipe = std::str::from_utf8(RECIPE).expect("UTF-8");
    let (start, end) = recipe.split_once("</ContactLists>").expect("lists");
    let many = [start, &lists.repeat(2_500), "</ContactLists>", end].concat();
    let lost = "optin_proxy_audit_lost_total{reason=\"queue\"}";
    let mut sent = 0;
    {
        let _hold = Hold::of(&kept.journal);
        while kept.counter(lost) == 0 {
            kept.client.ask(&request("PUT", CONTACT, "", many.as_bytes())).await;
            sent += 1;
        }
    }
    let written = kept.lines().await;
    let gaps = written.iter().filter_map(|line| line["lost"].as_u64()).sum::<u64>();
    let told = written.iter().filter(|line| line["event"] != "gap").count() as u64;
    assert_eq!((told + gaps, gaps), (sent, kept.counter(lost)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_applications_and_fifty_lists_of_each_are_told_apart() {
    tell_apart(true).await;
}

/// Without a trail, only the findings that are kept are put into words.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_trail_all_findings_are_counted_and_sixteen_kept() {
    tell_apart(false).await;
}

async fn tell_apart(has_trail: bool) {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::with(&origin, has_trail).await;
    let recipe = std::str::from_utf8(RECIPE).expect("UTF-8");
    let (start, end) = recipe.split_once("</ContactLists>").expect("lists");
    let lists: String = (100..160)
        .map(|id| {
            format!(
                "<ContactList id=\"http://api.constantcontact.com/ws/customers/joesflowers/lists/{id}\">\
                 <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>"
            )
        })
        .collect();
    let another = "<ContactList id=\"160\"><OptInSource/></ContactList>";
    let many = [start, &lists, another, "</ContactLists>", end].concat();
    for number in 0..105 {
        let fields = format!("User-Agent: shop/{number}\r\n");
        let body = if number == 0 { many.as_bytes() } else { RECIPE };
        kept.client.ask(&request("PUT", CONTACT, &fields, body)).await;
    }
    kept.settled().await;
    let stats = kept.journal.kept().stats.to_json();
    let applications = stats["applications"].as_array().expect("an array");
    assert_eq!(applications.len(), 101);
    let named =
        |name: &str| applications.iter().find(|it| it["user_agent"] == name).expect("it is there");
    assert_eq!(named("(others)")["totals"]["writes"], 5);
    let lists = named("shop/0")["lists"].as_array().expect("an array");
    assert_eq!(lists.len(), 51);
    let others = lists.iter().find(|list| list["list_id"] == "(others)").expect("it is there");
    // The recipe has two of its own.
    assert_eq!(others["findings"], 13);
    assert_eq!(lists.iter().filter_map(|list| list["findings"].as_u64()).sum::<u64>(), 63);
    let numbers = lists.iter().filter_map(|list| list["list_id"].as_str()?.parse::<u64>().ok());
    assert!(numbers.is_sorted(), "as many findings were in each: {lists:?}");
    let kinds = named("shop/0")["kinds"].as_array().expect("an array");
    assert_eq!((&kinds[0]["kind"], &kinds[0]["findings"]), (&"list_differs".into(), &63.into()));
    assert_eq!(kinds[0]["changed"], 63);
    assert!(kinds[0]["cause"].as_str().is_some_and(|cause| cause.contains("of its history")));
    let first = kept.journal.kept().newest().last().cloned().expect("a record");
    assert_eq!((first.found, first.rewritten, first.findings.len()), (63, 63, 16));
    assert_eq!(kinds[0]["request_id"], *first.request_id);
    assert_eq!(stats["totals"]["requests"], 105);
}

/// Records are filled again and again, in two ways: with what is small before its request is sent, with what is large
/// once all is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_an_exchange_is_left_in_the_record_of_another() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::before(&origin).await;
    let wide = |body: &[u8]| {
        let body = std::str::from_utf8(body).expect("UTF-8");
        body.replacen("<ContactLists>", &format!("{}<ContactLists>", " ".repeat(20_000)), 1)
    };
    let (large, large_out) = (wide(RECIPE), wide(RECIPE_OUT));
    for _ in 0..20 {
        kept.client.ask(&request("PUT", CONTACT, "", large.as_bytes())).await;
        kept.client.ask(b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n").await;
        kept.client.ask(&request("PUT", CONTACT, "", RECIPE)).await;
        kept.client.ask(&request("PUT", CONTACT, "", RECIPE_OUT)).await;
        kept.lines().await;
    }
    let written = kept.lines().await;
    assert_eq!(written.len(), 40);
    for pair in written.chunks(2) {
        let hashes = |line: &Value| [line["sha256_before"].clone(), line["sha256_after"].clone()];
        let of = |bodies: [&[u8]; 2]| bodies.map(|body| Value::from(sha256(body)));
        assert_eq!(hashes(&pair[0]), of([large.as_bytes(), large_out.as_bytes()]));
        assert_eq!(hashes(&pair[1]), of([RECIPE, RECIPE_OUT]));
        assert_eq!(pair[0]["findings"], pair[1]["findings"]);
    }
    let kept = kept.journal.kept();
    let records: Vec<_> = kept.newest().collect();
    for four in records.chunks(4) {
        let found: Vec<_> =
            four.iter().map(|record| (record.found, record.outcome.map(Outcome::as_str))).collect();
        let edited = (found[1].0, Some("rewritten"));
        assert_eq!(found, [(0, Some("clean")), edited, (0, None), edited]);
        assert!(edited.0 > 0);
    }
}

/// Records take the place of the oldest, and what is printed of one is not looked for again in the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_comes_in_the_place_of_another_tells_its_own() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let mut kept = Kept::with(&origin, false).await;
    const AGENTS: [(&str, &str); 3] =
        [("shop/1", "shop/1"), ("token=S3CRET", "(credentials)"), ("shop/2", "shop/2")];
    const PATHS: [(&str, &str); 2] = [
        (CONTACT, "joesflowers"),
        ("/ws/customers/jo%40example.org/contacts/7", "(e-mail address)"),
    ];
    // Each twice, one after the other.
    let asked =
        |number: usize| (AGENTS[number / 2 % 3], PATHS[number / 2 % 2], !number.is_multiple_of(4));
    for number in 0..450 {
        let (agent, path, differs) = asked(number);
        let fields = format!("User-Agent: {}\r\n", agent.0);
        let body = if differs { RECIPE } else { RECIPE_OUT };
        kept.client.ask(&request("PUT", path.0, &fields, body)).await;
    }
    kept.settled().await;
    let kept = kept.journal.kept();
    assert!(kept.newest().map(|record| record.seq).eq((251..=450).rev()));
    for record in kept.newest() {
        let (agent, path, differs) = asked(record.seq as usize - 1);
        let found = if differs { 2 } else { 0 };
        assert_eq!((record.found, record.findings.len()), (found, found));
        assert_eq!(record.user_agent.as_deref(), Some(agent.1));
        assert_eq!(record.account.as_deref(), Some(path.1));
    }
}
