//! Reloading: whole or not at all, on connections that are open, without a request lost.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use optin_proxy::config::{Config, Layers};

use crate::support::binary::{Running, command};
use crate::support::client::Client;
use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::tls::Authority;
use crate::support::{BARE, GET, RECIPE, RECIPE_OUT, no_content, put, refusal};

struct Served {
    running: Running,
    admin: std::net::SocketAddr,
    file: tempfile::TempPath,
}

impl Served {
    fn start(content: &str) -> Self {
        Self::start_with(content, &["--listen", "127.0.0.1:0"])
    }

    fn start_with(content: &str, listen: &[&str]) -> Self {
        Self::start_by(content, listen, |_| {})
    }

    fn start_by(content: &str, listen: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file").into_temp_path();
        std::fs::write(&file, content).expect("ours");
        let named = file.to_str().expect("UTF-8");
        let arguments = [&["serve", "-c", named, "--admin", "127.0.0.1:0"], listen].concat();
        let mut command = command(&arguments);
        change(&mut command);
        let mut running = Running::start(&mut command);
        let admin = running.admin();
        Self { running, admin, file }
    }

    async fn metric(&self, series: &str) -> f64 {
        let asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        let text = Client::connect(self.admin).await.ask(asked).await.body;
        let text = String::from_utf8(text).expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or("0").parse().expect("a number")
    }

    /// Changes the file, tells the program if asked to, and waits until it has looked.
    async fn reload(&self, content: &str, signal: bool) {
        let series =
            |result: &str| format!("optin_proxy_config_reloads_total{{result=\"{result}\"}}");
        let (applied, refused) = (series("applied"), series("refused"));
        let before = self.metric(&applied).await + self.metric(&refused).await;
        replace(&self.file, content);
        if signal {
            self.running.signal("HUP");
        }
        while self.metric(&applied).await + self.metric(&refused).await == before {
            tokio::task::yield_now().await;
        }
    }
}

/// As editors and Kubernetes do it: another file takes the name.
fn replace(path: &Path, content: &str) {
    let other = path.with_extension("new");
    std::fs::write(&other, content).expect("ours");
    std::fs::rename(other, path).expect("ours");
}

fn config(origin: &Origin, mode: &str, attempts: u32) -> String {
    format!(
        "[upstream]\nurl = '{}'\n[sanitize]\nmode = '{mode}'\n[retry]\nmax_attempts = {attempts}\n",
        origin.url()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_reaches_connections_that_are_open_and_says_what_changed() {
    let (first, second) = (
        Origin::start([Reply::Write(no_content())]).await,
        Origin::start([Reply::Write(no_content())]).await,
    );
    let served = Served::start(&config(&first, "enforce", 3));
    let mut client = Client::connect(served.running.address).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
    served.reload(&config(&first, "observe", 5), true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
    served.reload(&config(&second, "enforce", 5), true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
    assert_eq!(first.requests().len(), 2);
    assert_eq!(second.request().body, RECIPE_OUT);
    assert_eq!(served.metric("optin_proxy_config_last_reload_successful").await, 1.0);
    served.running.signal("TERM");
    let (status, log) = served.running.finish();
    assert_eq!(status.code(), Some(0));
    for said in [
        "\"key\":\"sanitize.mode\",\"was\":\"\\\"enforce\\\"\",\"now\":\"\\\"observe\\\"\"",
        "\"key\":\"retry.max_attempts\",\"was\":\"3\",\"now\":\"5\"",
        "\"key\":\"upstream.url\"",
    ] {
        assert!(log.contains(said), "{said} in {log}");
    }
}

/// Regression: they were those of when the connection was accepted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_of_heads_reach_connections_that_are_open() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let limited = |most, fields| {
        let base = config(&origin, "enforce", 3);
        base + &format!("[limits]\nmax_head = \"{most}\"\nmax_headers = {fields}\n")
    };
    let served = Served::start(&limited("8KiB", 100));
    let mut client = Client::connect(served.running.address).await;
    let large = format!("GET / HTTP/1.1\r\nHost: p\r\nX: {}\r\n\r\n", "x".repeat(12 << 10));
    // One is silent for long.
    let mut silent = Client::connect(served.running.address).await;
    assert_eq!(silent.ask(&put(RECIPE)).await.status, 204);
    assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
    served.reload(&limited("32KiB", 100), true).await;
    assert_eq!(client.ask(large.as_bytes()).await.status, 204);
    served.reload(&limited("8KiB", 100), true).await;
    assert_eq!(client.ask(large.as_bytes()).await.status, 431);
    served.reload(&limited("32KiB", 100), true).await;
    assert_eq!(silent.ask(large.as_bytes()).await.status, 204);
    let mut client = Client::connect(served.running.address).await;
    let fields = b"GET / HTTP/1.1\r\nHost: p\r\nX: 1\r\nY: 2\r\n\r\n";
    assert_eq!(client.ask(fields).await.status, 204);
    served.reload(&limited("8KiB", 2), true).await;
    assert_eq!(client.ask(fields).await.status, 431);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_reaches_the_time_to_drain() {
    let origin = Origin::start([Reply::Hang]).await;
    let draining = |time: &str| {
        config(&origin, "enforce", 3) + &format!("[listen]\ndrain_timeout = '{time}'\n")
    };
    let served = Served::start(&draining("1h"));
    let mut client = Client::connect(served.running.address).await;
    client.send(&put(RECIPE)).await;
    origin.arrived(1).await;
    served.reload(&draining("100ms"), true).await;
    served.running.signal("TERM");
    // Long before the hour is over.
    assert_eq!(served.running.finish().0.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_file_keeps_the_last_good_configuration_and_says_why() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let served = Served::start(&config(&origin, "observe", 3));
    let mut client = Client::connect(served.running.address).await;
    let broken = config(&origin, "enforce", 3).replace("max_attempts", "max_attempt");
    served.reload(&broken, true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
    assert_eq!(served.metric("optin_proxy_config_last_reload_successful").await, 0.0);
    served.reload(&config(&origin, "enforce", 3), true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
    assert_eq!(served.metric("optin_proxy_config_last_reload_successful").await, 1.0);
    served.running.signal("TERM");
    let (_, log) = served.running.finish();
    assert!(log.contains("did you mean `retry.max_attempts`?"), "{log}");
    assert!(log.contains("the last good one stays in force"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_whose_content_has_changed_needs_no_signal_and_what_needs_a_restart_is_named() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let served = Served::start(&config(&origin, "enforce", 3));
    let more = "[limits]\nmax_connections = 7\n[listen]\nproxy_auth = 'jo:s3cr3t'\n\
                [log]\nlevel = 'debug'\nformat = 'json'\n[admin]\nexchanges = 3\n\
                [audit]\nfsync = '2s'\nkeep = 2\nmax_age = '1h'\nmax_size = '1MiB'\npath = '/x'\n";
    served.reload(&(config(&origin, "observe", 3) + more), false).await;
    let mut client = Client::connect(served.running.address).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
    served.running.signal("TERM");
    let (_, log) = served.running.finish();
    for key in [
        "limits.max_connections",
        "log.format",
        "admin.exchanges",
        "audit.fsync",
        "audit.keep",
        "audit.max_age",
        "audit.max_size",
        "audit.path",
    ] {
        let line = log.lines().find(|line| line.contains(key));
        let is_named = line.is_some_and(|line| line.contains("heeded at the next start only"));
        assert!(is_named, "{key}: {log}");
    }
    assert!(log.contains("listen.proxy_auth") && !log.contains("s3cr3t"), "{log}");
}

/// A root that came into the system's store is trusted from the next reload on, and one that went no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_reads_the_systems_roots_anew() {
    let (trusted, other) = (Authority::new(), Authority::new());
    let acceptor = trusted.acceptor("localhost", &["http/1.1"]);
    let origin = Origin::start_with([Reply::Write(no_content())], Some(acceptor)).await;
    let content = format!("[upstream]\nurl = 'https://localhost:{}'\n", origin.address.port());
    let store = tempfile::NamedTempFile::new().expect("a file").into_temp_path();
    std::fs::copy(other.file(), &store).expect("ours");
    let served = Served::start_by(&content, &["--listen", "127.0.0.1:0"], |command| {
        command.env("SSL_CERT_FILE", &store).env_remove("SSL_CERT_DIR");
    });
    let mut client = Client::connect(served.running.address).await;
    let refused = client.ask(&put(RECIPE)).await;
    assert_eq!((refused.status, &*refused.problem()), (502, "upstream-certificate-untrusted"));
    std::fs::copy(trusted.file(), &store).expect("ours");
    served.reload(&content, true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
    std::fs::copy(other.file(), &store).expect("ours");
    served.reload(&content, true).await;
    assert_eq!(client.ask(&put(RECIPE)).await.status, 502);
    assert_eq!(origin.requests().len(), 1, "not a byte to who is not trusted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_does_not_open_a_listener_to_everybody() {
    // Regression: the address in the new file was judged, not the one that is bound.
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let guarded = "[listen]\naddress = '0.0.0.0:0'\nallow_from = ['127.0.0.0/8']\n";
    let mut served = Served::start_with(&(config(&origin, "observe", 3) + guarded), &[]);
    served.running.address.set_ip([127, 0, 0, 1].into());
    let open = "[listen]\naddress = '127.0.0.1:0'\n";
    served.reload(&(config(&origin, "enforce", 3) + open), true).await;
    let mut client = Client::connect(served.running.address).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed", "nothing has changed");
    served.running.signal("TERM");
    let (_, log) = served.running.finish();
    assert!(
        log.contains("configuration not reloaded") && log.contains("listen.allow_from"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_the_configuration_changes_again_and_again() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let served = Served::start(&config(&origin, "enforce", 3));
    let (address, done) = (served.running.address, Arc::new(AtomicBool::new(false)));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let done = Arc::clone(&done);
        clients.spawn(async move {
            let mut client = Client::connect(address).await;
            let mut answered = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
                answered += 1;
            }
            answered
        });
    }
    for round in 0..10 {
        let mode = if round % 2 == 0 { "observe" } else { "enforce" };
        served.reload(&config(&origin, mode, 3 + round), true).await;
    }
    done.store(true, Ordering::Relaxed);
    let answered: usize = clients.join_all().await.into_iter().sum();
    assert!(answered >= 10);
    assert_eq!(origin.requests().len(), answered, "each arrived once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_in_flight_keeps_the_configuration_that_it_began_with() {
    let go_on = Arc::new(tokio::sync::Notify::new());
    let origin = Origin::start([
        Reply::Pause(vec![], Arc::clone(&go_on), refusal()),
        Reply::Write(no_content()),
        Reply::Write(refusal()),
    ])
    .await;
    let served = Served::start(&config(&origin, "enforce", 3));
    let mut client = Client::connect(served.running.address).await;
    client.send(&put(BARE)).await;
    origin.arrived(1).await;
    served.reload(&config(&origin, "enforce", 1), true).await;
    go_on.notify_one();
    assert_eq!(client.answer(false).await.outcome(), "rescued");
    assert_eq!(client.ask(&put(BARE)).await.outcome(), "exhausted");
    assert_eq!(origin.requests().len(), 3);
}

/// Regression: it was read at the next look, whatever of it was there: an empty file is a valid one, and changes bodies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_empty_is_about_to_be_written() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let served = Served::start(&config(&origin, "observe", 3));
    std::fs::write(&served.file, "").expect("ours");
    let mut client = Client::connect(served.running.address).await;
    let began = std::time::Instant::now();
    while began.elapsed().as_secs() < 3 {
        assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
    }
    served.reload(&config(&origin, "enforce", 3), false).await;
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "rewritten");
}

fn pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().expect("it is there");
    assert!(made.success());
}

/// Regression: what heeds signals and operators waited for the file, and only SIGKILL ended the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_hangs_keeps_neither_requests_nor_a_stop_waiting() {
    for by_signal in [true, false] {
        let origin = Origin::start([Reply::Write(no_content())]).await;
        let folder = tempfile::tempdir().expect("a folder");
        let hanging = folder.path().join("ca.pem");
        let served = Served::start(&config(&origin, "observe", 3));
        pipe(&hanging);
        let by_pipe = format!("ca_file = '{}'\n[sanitize]", hanging.display());
        let changed = config(&origin, "enforce", 3).replacen("[sanitize]", &by_pipe, 1);
        replace(&served.file, &changed);
        served.running.signal("HUP");
        // Somebody reads it now, and waits for what never comes.
        let held = tokio::task::spawn_blocking(move || {
            std::fs::OpenOptions::new().write(true).open(&hanging).expect("it is read")
        });
        let _held = held.await.expect("no panic");
        let mut client = Client::connect(served.running.address).await;
        assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
        drop(client);
        if by_signal {
            served.running.signal("TERM");
        } else {
            let quit =
                b"POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
            assert_eq!(Client::connect(served.admin).await.ask(quit).await.status, 200);
        }
        let (status, log) = served.running.finish();
        assert_eq!(status.code(), Some(0), "{log}");
    }
}

/// Regression: what had been read from a pipe was empty the next time, so that all went back to the defaults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_from_a_pipe_is_not_reloaded() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("proxy.toml");
    pipe(&path);
    let (piped, content) = (path.clone(), config(&origin, "observe", 3));
    let writing = std::thread::spawn(move || std::fs::write(piped, content).expect("it is read"));
    let named = path.to_str().expect("UTF-8");
    let arguments = ["serve", "-c", named, "--admin", "127.0.0.1:0", "--listen", "127.0.0.1:0"];
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();
    writing.join().expect("no panic");
    let mut client = Client::connect(running.address).await;
    let reload = b"POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    let answer = Client::connect(admin).await.ask(reload).await;
    let said = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(
        answer.status >= 400 && said.contains("a pipe is read once"),
        "{} {said}",
        answer.status
    );
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
}

/// A configuration that differs from another by these.
fn but(config: &Config, settings: &[&str]) -> Arc<Config> {
    let mut layers = Layers::default();
    layers.set("test", &format!("upstream.url={}", config.resolved.upstream.url));
    for setting in settings {
        layers.set("test", setting);
    }
    Arc::new(layers.build().expect("a valid configuration"))
}

/// Regression: each reload began a new budget, of which a retry of each request was left.
#[tokio::test]
async fn the_budget_of_retries_is_that_of_ten_seconds_whatever_is_reloaded_in_them() {
    let origin = Origin::start([Reply::Write(refusal())]).await;
    let settings =
        ["retry.base_delay=0s", "retry.budget=0", "retry.budget_floor=1", "retry.max_attempts=2"];
    let mut control = None;
    let proxy =
        Proxy::start_with(&origin.url(), &settings, |server| control = Some(server.control()))
            .await;
    let control = control.expect("it was made ready");
    let _clock = Clock::hold();
    let mut client = proxy.client().await;
    for floor in [1, 1, 2] {
        let floor = format!("retry.budget_floor={floor}");
        control
            .reload(but(&control.config(), &[&settings[..2], &[&*floor], &settings[3..]].concat()))
            .expect("valid");
        for _ in 0..30 {
            client.ask(&put(BARE)).await;
        }
    }
    assert_eq!(proxy.metric("optin_proxy_retries_total{outcome=\"refused\"}"), 20.0);
}

/// Regression: a client that kept its connection busy was served for good.
#[tokio::test]
async fn who_may_use_the_proxy_is_judged_anew_on_connections_that_are_open() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let mut control = None;
    let proxy =
        Proxy::start_with(&origin.url(), &[], |server| control = Some(server.control())).await;
    let control = control.expect("it was made ready");
    let mut client = proxy.client().await;
    for (allowed, status) in [("127.0.0.0/8", 204), ("10.0.0.0/8", 403), ("127.0.0.1/32", 204)] {
        let allowed = format!("listen.allow_from={allowed}");
        control.reload(but(&control.config(), &[&allowed])).expect("valid");
        assert_eq!(client.ask(GET).await.status, status, "{allowed}");
    }
}

/// Regression: a connection that is kept for no time was closed under a request that came right behind a reload.
#[tokio::test]
async fn what_comes_right_behind_a_reload_is_answered_however_short_connections_are_kept() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let mut control = None;
    let proxy = Proxy::start_with(&origin.url(), &["listen.keep_alive=0s"], |server| {
        control = Some(server.control());
    })
    .await;
    let control = control.expect("it was made ready");
    // No connection falls silent.
    let _clock = Clock::hold();
    let mut client = proxy.client().await;
    for mode in ["observe", "enforce", "observe"] {
        assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
        let changed = ["listen.keep_alive=0s", &format!("sanitize.mode={mode}")];
        control.reload(but(&control.config(), &changed)).expect("valid");
    }
    assert_eq!(client.ask(&put(RECIPE)).await.outcome(), "observed");
}

/// Regression: it was taken, and then no host was opened any more.
#[tokio::test]
async fn a_host_that_the_authority_in_use_may_not_sign_for_is_refused() {
    let mut control = None;
    let proxy = Proxy::start_with("http://127.0.0.1:1", &[], |server| {
        control = Some(server.control());
    })
    .await;
    let control = control.expect("it was made ready");
    control.authority().await.expect("it is made");
    let folder = format!("intercept.ca_dir={}", proxy.folder.path().display());
    let hosts = "intercept.hosts=[\"api.constantcontact.com\", \"other.example\"]";
    let refused = control.reload(but(&control.config(), &[&folder, hosts]));
    let why = refused.expect_err("it may not").to_string();
    assert!(why.contains("other.example"), "{why}");
    assert_eq!(control.config().intercept.rules.hosts.len(), 1);
    assert!(control.authority_end().expect("as before").is_some());
}
