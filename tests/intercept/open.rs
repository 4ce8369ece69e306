//! The API's host, opened: its requests take the same way as all others.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use optin_proxy::intercept::{Host, ca as authority};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::API;
use crate::support::binary::{Running, command};
use crate::support::client::{Client, closed};
use crate::support::clock::{Clock, settle};
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::tls::{Authority, connect, connect_with};
use crate::support::{CONTACT, RECIPE, RECIPE_OUT, answer, no_content, refusal, request};

const TARGET: &str = "api.constantcontact.com:443";

async fn tunnel(proxy: &Proxy) -> TcpStream {
    proxy.client().await.tunnel(TARGET).await.expect("a tunnel")
}

async fn open(proxy: &Proxy) -> Client<TlsStream<TcpStream>> {
    let stream = tunnel(proxy).await;
    let trusted = proxy.folder.path().join("ca.pem");
    Client::over(connect(stream, API, &trusted, &["http/1.1"]).await.expect("it is trusted"))
}

fn put(host: &str) -> Vec<u8> {
    let length = RECIPE.len();
    let head = format!(
        "PUT {CONTACT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/atom+xml\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), RECIPE].concat()
}

#[tokio::test]
async fn an_update_through_a_tunnel_arrives_consistent_and_is_retried() {
    let origin = Origin::start([Reply::Write(refusal()), Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut client = open(&proxy).await;
    let answer = client.ask(&put(API)).await;
    assert_eq!(answer.report(), "findings=2, rewritten=2, attempts=2, outcome=rescued");
    for arrived in origin.requests() {
        assert_eq!(arrived.body, RECIPE_OUT);
        assert_eq!(arrived.fields("host"), [API], "the client's own Host");
        assert_eq!(arrived.fields("via"), ["1.1 optin-proxy"]);
    }
    // The connection goes on.
    assert_eq!(client.ask(&put("API.constantcontact.com:443")).await.status, 204);
}

#[tokio::test]
async fn the_upstreams_own_address_stays_in_answers_to_a_client_that_knows_it() {
    let location = format!("Location: http://{API}/ws/x\r\nContent-Location: https://{API}/y\r\n");
    let origin = Origin::start([Reply::Write(answer("201 Created", &location, b""))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = open(&proxy).await.ask(&put(API)).await;
    assert_eq!(answer.field("location"), Some("http://api.constantcontact.com/ws/x"));
    assert_eq!(answer.field("content-location"), Some("https://api.constantcontact.com/y"));
}

#[tokio::test]
async fn ids_of_the_apis_own_are_no_finding_in_a_tunnel() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let body = include_str!("../corpus/in/own-origin.xml").replace("127.0.0.1:8080", API);
    let head =
        format!("PUT {CONTACT} HTTP/1.1\r\nHost: {API}\r\nContent-Length: {}\r\n\r\n", body.len());
    let answer = open(&proxy).await.ask(&[head.as_bytes(), body.as_bytes()].concat()).await;
    assert_eq!(answer.outcome(), "clean");
    assert_eq!(origin.request().body, body.as_bytes());
}

#[tokio::test]
async fn a_request_for_another_host_than_its_tunnels_gets_421() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for host in ["elsewhere.example", "api.constantcontact.com:8443", "127.0.0.1"] {
        let refused = open(&proxy).await.ask(&put(host)).await;
        assert_eq!(
            (refused.status, refused.problem()),
            (421, "host-mismatch".to_owned()),
            "{host}"
        );
    }
    let absolute = format!("GET https://elsewhere.example/ HTTP/1.1\r\nHost: {API}\r\n\r\n");
    assert_eq!(open(&proxy).await.ask(absolute.as_bytes()).await.status, 421);
    let nested = format!("CONNECT {TARGET} HTTP/1.1\r\nHost: {API}\r\n\r\n");
    let refused = open(&proxy).await.ask(nested.as_bytes()).await;
    assert_eq!((refused.status, refused.problem()), (403, "connect-in-tunnel".to_owned()));
    assert!(origin.requests().is_empty());
    // RFC 9112 section 3.2.2: the target counts, and HTTP/1.0 need not name its host.
    let absolute = format!("GET https://{API}/x HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n");
    assert_eq!(open(&proxy).await.ask(absolute.as_bytes()).await.status, 204);
    assert_eq!(open(&proxy).await.ask(b"GET /x HTTP/1.0\r\n\r\n").await.status, 204);
    assert!(origin.requests().iter().all(|arrived| arrived.fields("host") == [API]));
}

#[tokio::test]
async fn a_client_hello_may_come_byte_by_byte() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    // Only so many bytes at a time fit through.
    let (near, mut far) = tokio::io::duplex(1);
    let mut stream = tunnel(&proxy).await;
    let relaying = tokio::spawn(async move {
        let _ = tokio::io::copy_bidirectional_with_sizes(&mut far, &mut stream, 1, 1024).await;
    });
    let trusted = proxy.folder.path().join("ca.pem");
    let stream = connect(near, API, &trusted, &[]).await.expect("it is trusted");
    assert_eq!(Client::over(stream).ask(&put(API)).await.outcome(), "rewritten");
    relaying.abort();
}

#[tokio::test]
async fn http_2_is_spoken_in_a_tunnel_to_clients_that_offer_it() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let stream = tunnel(&proxy).await;
    let trusted = proxy.folder.path().join("ca.pem");
    let stream = connect(stream, API, &trusted, &["h2", "http/1.1"]).await.expect("trusted");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, io).await.expect("HTTP/2");
    tokio::spawn(connection);
    for (host, status) in [(API, 204), ("elsewhere.example", 421)] {
        let request = http::Request::put(format!("https://{host}{CONTACT}"))
            .body(http_body_util::Full::new(bytes::Bytes::from_static(RECIPE)))
            .expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "{host}");
    }
    assert_eq!(origin.request().body, RECIPE_OUT);
    assert_eq!(origin.request().fields("host"), [API]);
}

#[tokio::test]
async fn a_server_name_that_is_not_the_tunnels_is_refused() {
    let proxy = Proxy::start("http://127.0.0.1:9", &[]).await;
    let trusted = proxy.folder.path().join("ca.pem");
    drop(open(&proxy).await);
    let refused = connect(tunnel(&proxy).await, "www.example.org", &trusted, &[]).await;
    let error = refused.expect_err("refused").to_string();
    assert!(error.contains("AccessDenied"), "{error}");
    let series = "optin_proxy_tls_handshakes_total{result=\"wrong_name\"}";
    assert_eq!(proxy.metric(series), 1.0);
}

/// Such clients leave the name out, and hold the certificate against it all the same.
#[tokio::test]
async fn a_client_that_names_no_server_gets_the_certificate_of_the_tunnels_host() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    drop(open(&proxy).await);
    let trusted = proxy.folder.path().join("ca.pem");
    let silent = |config: &mut rustls::ClientConfig| config.enable_sni = false;
    let stream = connect_with(tunnel(&proxy).await, API, &trusted, &["http/1.1"], silent).await;
    let mut client = Client::over(stream.expect("it is for the tunnel's host"));
    assert_eq!(client.ask(&put(API)).await.outcome(), "rewritten");
    let other = connect_with(tunnel(&proxy).await, "www.example.org", &trusted, &[], silent).await;
    let error = other.expect_err("it is for no other").to_string();
    assert!(error.contains("NotValidForName") || error.contains("not valid for name"), "{error}");
}

/// hyper sees the end of a tunnel's client through TLS only.
#[tokio::test]
async fn nothing_is_sent_again_for_a_client_that_has_left_its_tunnel() {
    let settings = ["retry.base_delay=1h", "retry.max_delay=1h", "retry.deadline=3h"];
    for says_so in [false, true] {
        let origin = Origin::start([Reply::Write(refusal()), Reply::Write(no_content())]).await;
        let proxy = Proxy::before(&origin, &settings).await;
        let mut client = open(&proxy).await;
        client.send(&put(API)).await;
        while proxy.metric("optin_proxy_refusals_total{verdict=\"transient\"}") == 0.0 {
            tokio::task::yield_now().await;
        }
        if says_so {
            client.stream.shutdown().await.expect("open");
        }
        drop(client);
        while proxy.metric("optin_proxy_contact_writes_total{outcome=\"exhausted\"}") == 0.0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(origin.requests().len(), 1, "close_notify: {says_so}");
    }
}

#[tokio::test]
async fn an_address_may_be_the_apis_host() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["intercept.hosts=127.0.0.1,[::1]"]).await;
    for (target, name) in [("127.0.0.1:443", "127.0.0.1"), ("[::1]:443", "::1")] {
        let stream = proxy.client().await.tunnel(target).await.expect("a tunnel");
        let trusted = proxy.folder.path().join("ca.pem");
        let stream = connect(stream, name, &trusted, &[]).await.expect("trusted");
        // Regression: of an IPv4 address, OpenSSL takes a common name for a host's, which the authority must not vouch for.
        let certificates = stream.get_ref().1.peer_certificates().expect("there are");
        let (_, leaf) = X509Certificate::from_der(&certificates[0]).expect("DER");
        let common = leaf.subject().iter_common_name().next().expect("there is one");
        assert_eq!(common.as_str().expect("text"), "optin-proxy");
        let host = target.trim_end_matches(":443");
        assert_eq!(Client::over(stream).ask(&put(host)).await.status, 204);
    }
}

#[tokio::test]
async fn what_is_no_tls_is_refused() {
    let proxy = Proxy::start("http://127.0.0.1:9", &[]).await;
    let mut stream = tunnel(&proxy).await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: api.constantcontact.com\r\n\r\n")
        .await
        .expect("open");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.len() < 16, "an alert at most: {answer:?}");
    let series = "optin_proxy_tls_handshakes_total{result=\"not_tls\"}";
    while proxy.metric(series) < 1.0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_opens_a_tunnel_and_dawdles_is_let_go() {
    let settings = ["limits.header_timeout=30s"];
    let proxy = Proxy::start("http://127.0.0.1:9", &settings).await;
    let clock = Clock::hold();
    let mut silent = tunnel(&proxy).await;
    let mut slow = tunnel(&proxy).await;
    while proxy.metric("optin_proxy_connections") < 2.0 {
        tokio::task::yield_now().await;
    }
    // The start of a ClientHello, by one byte a second.
    let mut hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter().chain(std::iter::repeat(7));
    let mut byte = [0];
    let ended = loop {
        let _ = slow.write_all(&[hello.next().expect("endless")]).await;
        tokio::select! {
            biased;
            ended = silent.read(&mut byte) => break ended,
            () = clock.advance(Duration::from_secs(1)) => {}
        }
    };
    assert_eq!(ended.unwrap_or(0), 0);
    while proxy.metric("optin_proxy_connections") > 0.0 {
        clock.advance(Duration::from_secs(1)).await;
    }
    assert_eq!(proxy.metric("optin_proxy_tls_handshakes_total{result=\"timeout\"}"), 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_trust_us_is_named_with_what_to_set() {
    let other = Authority::new();
    let folder = tempfile::tempdir().expect("a folder");
    let ca_dir = format!("intercept.ca_dir={}", folder.path().display());
    let running =
        Running::start(&mut command(&["serve", "--listen", "127.0.0.1:0", "--set", &ca_dir]));
    let mut clients = Vec::new();
    for agent in ["python-requests/2.31", "Java-http-client/17.0"] {
        let mut client = Client::connect(running.address).await;
        let asked =
            format!("CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\nUser-Agent: {agent}\r\n\r\n");
        client.send(asked.as_bytes()).await;
        assert_eq!(client.answer(true).await.status, 200);
        clients.push(client.stream.local_addr().expect("a socket"));
        let refused = connect(client.stream, API, other.file(), &[]).await;
        refused.expect_err("not trusted");
    }
    running.signal("TERM");
    let (_, log) = running.finish();
    for line in log.lines().filter(|line| line.contains("\"message\":\"request\"")) {
        // Regression: a field of ours had the name of one of the library's, and readers saw theirs.
        let mut keys: Vec<_> =
            line.split(['{', ',']).filter_map(|it| it.split_once("\":")).map(|it| it.0).collect();
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count, "{line}");
        assert!(
            line.contains(&format!("\"authority\":\"{TARGET}\",\"decision\":\"intercepted\"")),
            "{line}"
        );
    }
    let lines: Vec<serde_json::Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &serde_json::Value| line["message"] == "TLS handshake failed")
        .collect();
    assert_eq!(lines.len(), 2, "{log}");
    for (client, setting) in
        clients.into_iter().zip(["REQUESTS_CA_BUNDLE", "javax.net.ssl.trustStore"])
    {
        let line = lines.iter().find(|line| line["client"] == client.to_string());
        let line = line.unwrap_or_else(|| panic!("{client} in {log}"));
        assert_eq!(line["alert"], "UnknownCA", "{line}");
        assert!(line["remedy"].as_str().is_some_and(|remedy| remedy.contains(setting)), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_are_drained_and_those_that_do_not_end_are_cut() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address: SocketAddr = server.local_addr().expect("bound");
    let allowed = format!("intercept.allow={address}");
    for (drain, ends) in [("listen.drain_timeout=1h", true), ("listen.drain_timeout=50ms", false)] {
        let running = Running::start(&mut command(&[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--set",
            &allowed,
            "--set",
            "intercept.allow_private=127.0.0.1",
            "--set",
            drain,
        ]));
        let client = Client::connect(running.address).await;
        let mut client = client.tunnel(&address.to_string()).await.expect("a tunnel");
        let (mut far, _) = server.accept().await.expect("the proxy connects");
        running.signal("TERM");
        closed(running.address).await;
        if ends {
            // What is in flight comes through.
            client.write_all(b"x").await.expect("open");
            far.read_exact(&mut [0]).await.expect("open");
            drop((client, far));
        }
        let (status, log) = running.finish();
        assert_eq!(status.code(), Some(0), "{log}");
        assert_eq!(log.contains("stopped with requests unfinished"), !ends, "{log}");
        // Regression: of one that was cut, nothing was told.
        let told = log.lines().find(|line| line.contains(r#""message":"tunnel""#)).expect("a line");
        let (sent, end) = if ends { (1, "closed") } else { (0, "cut") };
        let wanted = format!(r#""sent":{sent},"received":0,"end":"{end}""#);
        assert!(told.contains(&wanted), "{told}");
    }
}

#[tokio::test]
async fn who_was_promised_a_tunnel_gets_it_though_the_proxy_is_to_stop() {
    // Regression: a tunnel whose handshake, or whose first request, came after the signal was dropped.
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let mut proxy = Proxy::before(&origin, &[]).await;
    // No wait ends before its time.
    let _clock = Clock::hold();
    let connected = proxy.client().await.tunnel(TARGET).await.expect("a tunnel");
    let opened = proxy.client().await.tunnel(TARGET).await.expect("a tunnel");
    let trusted = proxy.folder.path().join("ca.pem");
    let opened = connect(opened, API, &trusted, &["http/1.1"]).await.expect("trusted");
    // Accepted by the system, not yet by the proxy: there is one thread.
    let address = proxy.address;
    let plain = std::net::TcpStream::connect(address).expect("it listens");
    let running = proxy.stop();
    closed(address).await;
    plain.set_nonblocking(true).expect("a socket");
    let plain = TcpStream::from_std(plain).expect("a socket");
    let (opened, connected, plain) = tokio::join!(
        async { Client::over(opened).ask(&put(API)).await },
        async {
            let stream = connect(connected, API, &trusted, &["http/1.1"]).await.expect("trusted");
            Client::over(stream).ask(&put(API)).await
        },
        async { Client::over(plain).ask(&put("p")).await },
    );
    for answer in [opened, connected, plain] {
        assert_eq!(answer.outcome(), "rewritten");
        assert_eq!(answer.field("connection"), Some("close"));
    }
    assert_eq!(running.await.expect("it ends"), 0);
}

#[tokio::test]
async fn without_a_usable_authority_the_api_is_refused_and_base_urls_are_served() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["intercept.ca_dir=/proc/nowhere"]).await;
    let refused = proxy
        .client()
        .await
        .ask(format!("CONNECT {TARGET} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await;
    assert_eq!((refused.status, refused.problem()), (503, "ca-unavailable".to_owned()));
    assert!(!String::from_utf8_lossy(&refused.body).contains("/proc"), "paths are the operator's");
    assert_eq!(proxy.ask(&request("PUT", CONTACT, "", RECIPE)).await.outcome(), "rewritten");
}

/// A pipe that nobody writes. At its end, who has opened it is let go, and who is yet to open it finds none: it would wait for ever.
struct Hanging(std::path::PathBuf, #[expect(dead_code, reason = "it is open")] std::fs::File);

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Regression: the first CONNECT held a worker for as long as the file system did not answer, and with it the probes, all other
/// requests, and the end.
#[tokio::test]
async fn files_that_cannot_be_read_cost_a_connect_its_answer_and_nobody_else_anything() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let name: Host = API.parse().expect("a host");
    authority::Authority::create(proxy.folder.path(), &[name]).expect("a folder");
    let hanging = proxy.folder.path().join("ca.pem");
    std::fs::remove_file(&hanging).expect("ours");
    let made = Command::new("mkfifo").arg(&hanging).status().expect("coreutils");
    assert!(made.success());
    let held = std::fs::OpenOptions::new().read(true).write(true).open(&hanging);
    let _until_the_end = Hanging(hanging, held.expect("a pipe"));
    let clock = Clock::hold();
    let connect = format!("CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\n\r\n");
    let mut waiting = proxy.client().await;
    waiting.send(connect.as_bytes()).await;
    // All that it has to do is done, and others are served.
    settle().await;
    assert_eq!(proxy.ask(&request("PUT", CONTACT, "", RECIPE)).await.outcome(), "rewritten");
    let begun = Instant::now();
    let refused = clock.until(waiting.answer(false)).await;
    assert_eq!((refused.status, refused.problem()), (503, "ca-unavailable".to_owned()));
    assert!((9..=12).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    // Nobody waits as long a second time, and takes up room meanwhile.
    let begun = Instant::now();
    assert_eq!(proxy.ask(connect.as_bytes()).await.status, 503);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn the_proxy_does_not_take_its_own_authority_for_the_apis() {
    let folder = tempfile::tempdir().expect("a folder");
    let host: Host = "localhost".parse().expect("a host");
    let authority = authority::Authority::create(folder.path(), std::slice::from_ref(&host));
    let authority = authority.expect("an authority");
    let leaf = authority.mint(&host, std::time::SystemTime::now()).expect("a leaf");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(leaf.chain, leaf.key)
        .expect("a certificate");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let thief = Origin::start_with([Reply::Write(no_content())], Some(acceptor)).await;
    let url = format!("https://localhost:{}", thief.address.port());
    // Even where somebody says that it is to be trusted.
    let both = folder.path().join("both.pem");
    let issuing = pem::encode(&pem::Pem::new("CERTIFICATE", authority.issuing().to_vec()));
    std::fs::write(&both, authority.root_pem() + &issuing).expect("ours");
    let ca_file = format!("upstream.ca_file={}", both.display());
    let proxy = Proxy::start(&url, &[&ca_file]).await;
    let refused = proxy.ask(&request("PUT", CONTACT, "", RECIPE)).await;
    let problem = (refused.status, refused.problem());
    assert_eq!(problem, (502, "upstream-certificate-untrusted".to_owned()));
    assert!(thief.requests().is_empty());
}

/// What is read at once goes on at once: read by less than a record, each would become two chunks.
#[tokio::test]
async fn a_record_of_an_upload_is_not_cut_in_two() {
    const RECORD: usize = 16_384;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let origin = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = Proxy::start(&origin, &["limits.max_head=8KiB"]).await;
    let mut client = open(&proxy).await;
    let head = format!(
        "POST /ws/customers/x/activities HTTP/1.1\r\nHost: {API}\r\nContent-Type: text/csv\r\n\
         Transfer-Encoding: chunked\r\n\r\n{:x}\r\n",
        8 * RECORD
    );
    client.send(head.as_bytes()).await;
    let (mut upstream, _) = listener.accept().await.expect("the proxy connects");
    let mut received = Vec::new();
    for records in 1..=8 {
        client.send(&[b'~'; RECORD]).await;
        while received.iter().filter(|&&byte| byte == b'~').count() < records * RECORD {
            assert!(upstream.read_buf(&mut received).await.expect("open") > 0, "closed");
        }
    }
    let received = String::from_utf8(received).expect("text");
    let chunks = received.split("\r\n").filter(|line| line.starts_with('~')).count();
    // Where the head ends in its buffer may cost one more.
    assert!(chunks <= 8 + 1, "{chunks}");
}
