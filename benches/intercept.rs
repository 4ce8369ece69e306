//! What HTTPS_PROXY mode costs beside the bare parts that it is made of.
//!
//! `cargo bench --bench intercept` measures, each in turns with its yardstick in the same run:
//!
//! * the throughput of a blind tunnel, beside a relay that is nothing but `tokio::io::copy_bidirectional`;
//! * a client's full TLS handshake through CONNECT, from its connection to its end, by CPU time: in memory,
//!   client and proxy in one thread, beside both halves of rustls in memory; and over sockets, the proxy's
//!   thread beside that of an acceptor that does nothing but read a CONNECT and accept TLS.
#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use optin_proxy::config::Layers;
use optin_proxy::intercept::Host;
use optin_proxy::intercept::ca::Authority;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::{Entrance, Server};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
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

fn optin_proxy(worker: &Worker, folder: &std::path::Path, port: u16) -> (SocketAddr, Entrance) {
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
        let ways_in = (server.address(), server.entrance());
        tokio::spawn(server.run(CancellationToken::new()));
        ways_in
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

async fn socket(proxy: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(proxy).await.expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    stream
}

async fn connect(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), target: &str) {
    let asked = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.expect("open");
    let mut answer = Vec::with_capacity(1024);
    while !answer.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut answer).await.expect("an answer") > 0);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}

/// Sends megabytes through; how many a second.
fn push(clients: &Worker, via: SocketAddr, target: Option<String>) -> f64 {
    clients.run(async move {
        let mut stream = socket(via).await;
        if let Some(target) = target {
            connect(&mut stream, &target).await;
        }
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
    let (proxy, _) = optin_proxy(&ours, folder, server.port());
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

/// A full handshake through CONNECT, and the end of the connection.
async fn handshake(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    connector: &TlsConnector,
    name: &ServerName<'static>,
) {
    connect(&mut stream, "api.constantcontact.com:443").await;
    let mut stream = connector.connect(name.clone(), stream).await.expect("trusted");
    stream.shutdown().await.expect("open");
    let _ = stream.read(&mut [0]).await;
}

/// Handshakes over sockets, one after the other; the CPU time of the server's thread for each.
fn handshakes_over_sockets(
    clients: &Worker,
    server: &Worker,
    address: SocketAddr,
    config: &Arc<ClientConfig>,
) -> f64 {
    let connector = TlsConnector::from(Arc::clone(config));
    let before = server.cpu_time();
    clients.run(async move {
        let name = ServerName::try_from(API).expect("a name");
        for _ in 0..HANDSHAKES {
            handshake(socket(address).await, &connector, &name).await;
        }
    });
    each(server.cpu_time() - before)
}

/// Handshakes through memory with the proxy in the same thread; its CPU time for both ends of each.
fn handshakes_through_memory(
    both: &Worker,
    entrance: &Entrance,
    config: &Arc<ClientConfig>,
) -> f64 {
    let (connector, entrance) = (TlsConnector::from(Arc::clone(config)), entrance.clone());
    let before = both.cpu_time();
    both.run(async move {
        let name = ServerName::try_from(API).expect("a name");
        for _ in 0..HANDSHAKES {
            let stream = entrance.connect(64 * 1024).await.expect("it runs");
            handshake(stream, &connector, &name).await;
        }
    });
    each(both.cpu_time() - before)
}

/// In microseconds.
fn each(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6 / HANDSHAKES as f64
}

/// Handshakes of rustls alone; the CPU time of a thread for both halves of each.
fn handshakes_of_rustls(
    both: &Worker,
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> f64 {
    let (client, server) = (Arc::clone(client), Arc::clone(server));
    let before = both.cpu_time();
    both.run(async move {
        let name = ServerName::try_from(API).expect("a name");
        for _ in 0..HANDSHAKES {
            let mut client =
                ClientConnection::new(Arc::clone(&client), name.clone()).expect("a client");
            let mut server = ServerConnection::new(Arc::clone(&server)).expect("a server");
            let mut wire = Vec::new();
            while client.is_handshaking() || server.is_handshaking() {
                pass(&mut client, &mut server, &mut wire);
                pass(&mut server, &mut client, &mut wire);
            }
        }
    });
    each(both.cpu_time() - before)
}

/// Gives one side what the other has to say.
fn pass<F, T>(
    from: &mut rustls::ConnectionCommon<F>,
    to: &mut rustls::ConnectionCommon<T>,
    wire: &mut Vec<u8>,
) {
    wire.clear();
    while from.wants_write() {
        from.write_tls(wire).expect("memory");
    }
    let mut sent = &wire[..];
    while !sent.is_empty() {
        to.read_tls(&mut sent).expect("memory");
        to.process_new_packets().expect("a handshake");
    }
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
    let (proxy, entrance) = optin_proxy(&ours, folder, 443);
    let acceptor = bare_acceptor(&plain, Arc::clone(&server));
    let round = || {
        [
            handshakes_through_memory(&ours, &entrance, &client),
            handshakes_of_rustls(&clients, &client, &server),
            handshakes_over_sockets(&clients, &ours, proxy, &client),
            handshakes_over_sockets(&clients, &plain, acceptor, &client),
        ]
    };
    round();
    let mut figures: [Vec<f64>; 6] = Default::default();
    for _ in 0..ROUNDS {
        let [ours, rustls, ours_over, bare_over] = round();
        let one = [ours, rustls, rustls / ours, ours_over, bare_over, bare_over / ours_over];
        for (all, one) in figures.iter_mut().zip(one) {
            all.push(one);
        }
    }
    let [ours, rustls, in_memory, ours_over, bare_over, over_sockets] = figures.map(median);
    println!("full handshake through CONNECT, CPU time:");
    println!(
        "  in memory, both ends: {ours:.0} us, rustls alone {rustls:.0} us: {in_memory:.2} of its rate"
    );
    println!(
        "  over sockets, the server's end: {ours_over:.0} us, bare acceptor {bare_over:.0} us: {over_sockets:.2} of its rate"
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
