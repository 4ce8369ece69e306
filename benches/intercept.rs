//! What HTTPS_PROXY mode costs beside the bare parts that it is made of.
//!
//! `cargo bench --bench intercept` measures, each in turns with its yardstick in the same run:
//!
//! * the throughput of a blind tunnel, beside a relay that is nothing but `tokio::io::copy_bidirectional`;
//! * a client's full TLS handshake through CONNECT, from its TCP connection to its end, beside an acceptor
//!   that does nothing but read a CONNECT and accept TLS over the same sockets, and beside the server's half
//!   of a handshake of rustls in memory, by the CPU time of the proxy's thread.
#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use optin_proxy::config::Layers;
use optin_proxy::intercept::Host;
use optin_proxy::intercept::ca::Authority;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::Server;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

mod support;

use support::{Worker, median};

const API: &str = "api.constantcontact.com";
const ROUNDS: usize = 9;
const MEGABYTES: usize = 512;
const HANDSHAKES: usize = 400;

async fn bind() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

fn optin_proxy(worker: &Worker, folder: &std::path::Path, port: u16) -> SocketAddr {
    let folder = folder.to_owned();
    worker.run(async move {
        let mut layers = Layers::default();
        for setting in [
            "listen.address=127.0.0.1:0",
            "intercept.allow_private=127.0.0.1",
            &format!("intercept.ports=443,{port}"),
            &format!("intercept.ca_dir={}", folder.display()),
        ] {
            layers.set("bench", setting);
        }
        let config = Arc::new(layers.build().expect("valid"));
        let server = Server::bind(config, Arc::new(Metrics::default())).await.expect("it starts");
        let address = server.address();
        tokio::spawn(server.run(CancellationToken::new()));
        address
    })
}

/// A relay that does nothing else.
fn bare_relay(worker: &Worker, server: SocketAddr) -> SocketAddr {
    worker.run(async move {
        let (listener, address) = bind().await;
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.expect("a connection");
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(server).await.expect("it listens");
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        address
    })
}

/// An acceptor that looks at nothing: what sockets and TLS themselves cost.
fn bare_acceptor(worker: &Worker, config: Arc<ServerConfig>) -> SocketAddr {
    let acceptor = TlsAcceptor::from(config);
    worker.run(async move {
        let (listener, address) = bind().await;
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.expect("a connection");
                client.set_nodelay(true).expect("a socket");
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let mut head = Vec::with_capacity(8192);
                    while !head.ends_with(b"\r\n\r\n") {
                        assert!(client.read_buf(&mut head).await.expect("a head") > 0);
                    }
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("open");
                    let mut stream = acceptor.accept(client).await.expect("TLS");
                    while matches!(stream.read(&mut [0; 16]).await, Ok(1..)) {}
                    let _ = stream.shutdown().await;
                });
            }
        });
        address
    })
}

async fn connect(proxy: SocketAddr, target: Option<&str>) -> TcpStream {
    let mut stream = TcpStream::connect(proxy).await.expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    if let Some(target) = target {
        let asked = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        stream.write_all(asked.as_bytes()).await.expect("open");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut answer).await.expect("an answer") > 0);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
    stream
}

/// Sends megabytes through; how many a second.
fn push(clients: &Worker, via: SocketAddr, target: Option<String>) -> f64 {
    clients.run(async move {
        let mut stream = connect(via, target.as_deref()).await;
        let chunk = vec![7; 256 * 1024];
        let started = Instant::now();
        for _ in 0..MEGABYTES * 4 {
            stream.write_all(&chunk).await.expect("open");
        }
        stream.shutdown().await.expect("open");
        // The server closes when it has read all.
        let _ = stream.read(&mut [0]).await;
        MEGABYTES as f64 / started.elapsed().as_secs_f64()
    })
}

fn throughput(folder: &std::path::Path) {
    let (clients, servers) = (Worker::start(), Worker::start());
    let (plain, ours) = (Worker::start(), Worker::start());
    let server = servers.run(async {
        let (listener, address) = bind().await;
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                tokio::spawn(async move {
                    let mut buffer = vec![0; 256 * 1024];
                    while matches!(stream.read(&mut buffer).await, Ok(1..)) {}
                });
            }
        });
        address
    });
    let relay = bare_relay(&plain, server);
    let proxy = optin_proxy(&ours, folder, server.port());
    let (mut speeds, mut costs) = (Vec::new(), Vec::new());
    let (mut bare, mut tunnelled) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let before = (plain.cpu_time(), ours.cpu_time());
        let without = push(&clients, relay, None);
        let with = push(&clients, proxy, Some(server.to_string()));
        let cpu = (plain.cpu_time() - before.0, ours.cpu_time() - before.1);
        speeds.push(with / without);
        costs.push(cpu.1.as_secs_f64() / cpu.0.as_secs_f64());
        bare.push(without);
        tunnelled.push(with);
    }
    println!(
        "blind tunnel: {:.0} MB/s, bare relay {:.0} MB/s: {:.2} of its throughput, {:.2} of its CPU time",
        median(tunnelled),
        median(bare),
        median(speeds),
        median(costs)
    );
}

fn client_config(authority: &Authority) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.root().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Full handshakes, each time.
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Handshakes through the proxy, one after the other; the CPU time of its thread for each, and of the
/// client's.
fn handshakes_through(
    clients: &Worker,
    ours: &Worker,
    proxy: SocketAddr,
    config: &Arc<ClientConfig>,
) -> (f64, f64) {
    let connector = TlsConnector::from(Arc::clone(config));
    let before = (ours.cpu_time(), clients.cpu_time());
    clients.run(async move {
        let name = ServerName::try_from(API).expect("a name");
        for _ in 0..HANDSHAKES {
            let stream = connect(proxy, Some("api.constantcontact.com:443")).await;
            let mut stream = connector.connect(name.clone(), stream).await.expect("trusted");
            stream.shutdown().await.expect("open");
            let _ = stream.read(&mut [0]).await;
        }
    });
    let each = |time: Duration| time.as_secs_f64() * 1e6 / HANDSHAKES as f64;
    (each(ours.cpu_time() - before.0), each(clients.cpu_time() - before.1))
}

/// Handshakes in memory; the CPU time of the server's half of each, and of both.
fn handshakes_in_memory(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> (f64, f64) {
    let mut spent = Duration::ZERO;
    let began = Instant::now();
    let name = ServerName::try_from(API).expect("a name");
    for _ in 0..HANDSHAKES {
        let mut client = ClientConnection::new(Arc::clone(client), name.clone()).expect("a client");
        let mut wire = Vec::new();
        let started = Instant::now();
        let mut server = ServerConnection::new(Arc::clone(server)).expect("a server");
        spent += started.elapsed();
        while client.is_handshaking() || server.is_handshaking() {
            wire.clear();
            while client.wants_write() {
                client.write_tls(&mut wire).expect("memory");
            }
            let started = Instant::now();
            let mut sent = &wire[..];
            while !sent.is_empty() {
                server.read_tls(&mut sent).expect("memory");
                server.process_new_packets().expect("a handshake");
            }
            let mut answer = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut answer).expect("memory");
            }
            spent += started.elapsed();
            let mut answer = &answer[..];
            while !answer.is_empty() {
                client.read_tls(&mut answer).expect("memory");
                client.process_new_packets().expect("a handshake");
            }
        }
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / HANDSHAKES as f64;
    (each(spent), each(began.elapsed()))
}

fn handshakes(folder: &std::path::Path) {
    let host: Host = API.parse().expect("a host");
    let authority = Authority::open(folder, std::slice::from_ref(&host)).expect("an authority");
    let client = client_config(&authority);
    let leaf = authority.mint(&host, std::time::SystemTime::now()).expect("a leaf");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(leaf.chain, leaf.key)
        .expect("a certificate");
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    let server = Arc::new(server);
    let (clients, ours, plain) = (Worker::start(), Worker::start(), Worker::start());
    let proxy = optin_proxy(&ours, folder, 443);
    let acceptor = bare_acceptor(&plain, Arc::clone(&server));
    handshakes_through(&clients, &ours, proxy, &client);
    handshakes_through(&clients, &plain, acceptor, &client);
    handshakes_in_memory(&client, &server);
    let mut figures: [Vec<f64>; 9] = Default::default();
    for _ in 0..ROUNDS {
        let (ours, client_of_ours) = handshakes_through(&clients, &ours, proxy, &client);
        let (bare, client_of_bare) = handshakes_through(&clients, &plain, acceptor, &client);
        let (half, whole) = handshakes_in_memory(&client, &server);
        // Like with like: one end beside the server's half, both ends beside both halves.
        let (both, bare_both) = (ours + client_of_ours, bare + client_of_bare);
        let round =
            [ours, bare, half, both, bare_both, whole, bare / ours, half / ours, half / bare];
        for (all, one) in figures.iter_mut().zip(round) {
            all.push(one);
        }
    }
    let [ours, bare, half, both, bare_both, whole, to_bare, to_half, bare_to_half] =
        figures.map(median);
    println!("full handshake through CONNECT, CPU time of the server's end (of both ends):");
    println!("  optin-proxy               {ours:.0} us ({both:.0} us)");
    println!("  bare TLS over sockets     {bare:.0} us ({bare_both:.0} us)");
    println!("  rustls in memory          {half:.0} us ({whole:.0} us)");
    println!(
        "  rate of optin-proxy: {to_bare:.2} of bare TLS over sockets, {to_half:.2} of rustls in memory; of bare TLS: \
         {bare_to_half:.2} of rustls in memory"
    );
}

fn main() {
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    throughput(folder.path());
    handshakes(folder.path());
}
