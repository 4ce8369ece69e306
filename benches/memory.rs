//! What the real program holds in memory, and how soon it serves again after a flood.
//!
//! `cargo bench --bench memory` measures, each in a process of its own, and fails beyond the bound that the
//! README promises:
//!
//! * 10,000 connections that have asked once and are silent since;
//! * 2,000 tunnels that are silent;
//! * 500 clients that send 1 MiB of a contact write each, slowly, and never its end; then how long a good
//!   client waits for its answer once they are gone.
#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[allow(dead_code, reason = "each bench uses its part")]
mod support;

use support::Worker;

const CONNECTIONS: usize = 10_000;
const TUNNELS: usize = 2_000;
const ATTACKERS: usize = 500;
const BODY: usize = 1 << 20;

/// The real program; killed when dropped.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn start(origin: SocketAddr, folder: &std::path::Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_optin-proxy"))
            .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(["--upstream", &format!("http://{origin}")])
            .args(["--set", "intercept.allow_private=127.0.0.1", "--set", "log.level=off"])
            .args(["--set", &format!("intercept.ports={}", origin.port())])
            .args(["--set", &format!("limits.max_connections={}", 2 * CONNECTIONS)])
            .args(["--set", &format!("intercept.ca_dir={}", folder.display())])
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let address = line.trim().trim_start_matches("listening on ");
        Self { address: address.parse().expect("an address"), child }
    }

    /// `VmRSS` or `VmHWM` of the process, in megabytes.
    fn memory(&self, field: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a line");
        let kilobytes = line.trim_matches([':', ' ', '\t', 'k', 'B']);
        kilobytes.parse::<f64>().expect("a number") * 1.024 / 1e3
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers every request without a body; keeps every other connection.
async fn origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while matches!(stream.read_buf(&mut head).await, Ok(1..)) {
                    if head.ends_with(b"\r\n\r\n") {
                        let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
                        stream.write_all(answer).await.expect("the proxy reads");
                        head.clear();
                    }
                }
            });
        }
    });
    address
}

async fn connect(proxy: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(proxy).await.expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    stream
}

/// Sends a request without a body, and waits for the head of its answer.
async fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.expect("open");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut answer).await.expect("an answer") > 0, "closed");
    }
    String::from_utf8_lossy(&answer).into_owned()
}

const GET: &str = "GET /x HTTP/1.1\r\nHost: p\r\nAccept: */*\r\nUser-Agent: bench\r\n\r\n";

fn idle_connections(clients: &Worker, program: &Program) {
    let (before, proxy) = (program.memory("VmRSS"), program.address);
    let open = clients.run(async move {
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = connect(proxy).await;
            assert!(ask(&mut stream, GET).await.starts_with("HTTP/1.1 204"));
            open.push(stream);
        }
        open
    });
    let after = program.memory("VmRSS");
    let each = (after - before) / open.len() as f64 * 1e3;
    println!("{} idle connections: {after:.0} MB resident, {each:.1} KB each", open.len());
    assert!(after < 100.0, "less than 100 MB were promised");
}

fn idle_tunnels(clients: &Worker, program: &Program, origin: SocketAddr) {
    let (before, proxy) = (program.memory("VmRSS"), program.address);
    let open = clients.run(async move {
        let asked = format!("CONNECT {origin} HTTP/1.1\r\nHost: {origin}\r\n\r\n");
        let mut open = Vec::new();
        for _ in 0..TUNNELS {
            let mut stream = connect(proxy).await;
            assert!(ask(&mut stream, &asked).await.starts_with("HTTP/1.1 200"));
            open.push(stream);
        }
        open
    });
    let after = program.memory("VmRSS");
    let each = (after - before) / open.len() as f64 * 1e3;
    println!("{} idle tunnels: {after:.0} MB resident, {each:.1} KB each", open.len());
}

fn slow_bodies(clients: &Worker, program: &Program) {
    let proxy = program.address;
    let attackers = clients.run(async move {
        let head = format!(
            "PUT /ws/customers/x/contacts/1 HTTP/1.1\r\nHost: p\r\nContent-Type: application/atom+xml\r\n\
             Content-Length: {BODY}\r\n\r\n"
        );
        let mut open = Vec::new();
        for _ in 0..ATTACKERS {
            let mut stream = connect(proxy).await;
            stream.write_all(head.as_bytes()).await.expect("open");
            open.push(stream);
        }
        // Refused ones may be cut: who attacks goes on with the others.
        for _ in 0..BODY / 4096 - 1 {
            for stream in &mut open {
                let _ = stream.try_write(&[b'x'; 4096]);
            }
            tokio::task::yield_now().await;
        }
        open
    });
    let peak = program.memory("VmHWM");
    let waited = clients.run(async move {
        drop(attackers);
        let gone = Instant::now();
        loop {
            let asked = async { ask(&mut connect(proxy).await, GET).await };
            let answer = tokio::time::timeout(Duration::from_secs(1), asked).await;
            if answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 204")) {
                return gone.elapsed();
            }
        }
    });
    let waited = waited.as_secs_f64() * 1e3;
    println!(
        "{ATTACKERS} slow bodies of 1 MiB: peak {peak:.0} MB; a good client is served {waited:.0} ms later"
    );
    assert!(peak < 64.0 + 67.1, "64 MB beside limits.max_buffered were promised");
    assert!(waited < 1e3, "a second was promised");
}

fn main() {
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (clients, servers) = (Worker::start(), Worker::start());
    let origin = servers.run(origin());
    let start = || Program::start(origin, folder.path());
    idle_connections(&clients, &start());
    idle_tunnels(&clients, &start(), origin);
    slow_bodies(&clients, &start());
}
