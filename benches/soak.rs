//! Mixed traffic against an origin that fails, with every request accounted for at both ends.
//!
//! `cargo bench --bench soak` runs for a minute; `SOAK_SECONDS=1800 cargo bench --bench soak` for half an
//! hour. The real program stands before an origin that refuses, resets, stalls, breaks off and dawdles in one
//! request of twenty. What the clients were told is held against what the origin did: nothing lost, nothing
//! applied twice that must not be, no byte changed that need not be. At the end the program's memory and
//! descriptors must be what they were after its first seconds.
#![allow(missing_docs, clippy::print_stdout, clippy::panic, reason = "a program for people")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CLIENTS: u64 = 32;
const FAULTS: f64 = 0.05;

/// What the origin did with the requests of one number.
#[derive(Debug, Default, Clone, Copy)]
struct Deeds {
    /// How often it was read to its end.
    arrived: u32,
    /// How often it was answered whole with 204.
    applied: u32,
    /// A body that was not what it should be.
    corrupt: u32,
}

type Ledger = Arc<Mutex<HashMap<u64, Deeds>>>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A contact write with findings: rewritten, and retried if refused.
    Put,
    /// The same as a create: never sent twice.
    Post,
    /// No contact: streamed.
    Other,
}

impl Kind {
    fn of(number: u64) -> Self {
        match number % 4 {
            0 | 1 => Self::Put,
            2 => Self::Post,
            _ => Self::Other,
        }
    }

    fn line(self, number: u64) -> String {
        match self {
            Self::Put => format!("PUT /ws/customers/a/contacts/{number}"),
            Self::Post => "POST /ws/customers/a/contacts".into(),
            Self::Other => "POST /ws/customers/a/activities".into(),
        }
    }
}

/// The body of a request; its number is part of it.
fn body(number: u64, list: &str) -> Vec<u8> {
    let note = "x".repeat((number % 3000) as usize);
    format!(
        "<entry xmlns='http://www.w3.org/2005/Atom'><content type='application/vnd.ctct+xml'>\
         <Contact xmlns='http://ws.constantcontact.com/ns/1.0/'><Note>{number} {note}</Note>\
         <OptInSource>ACTION_BY_CONTACT</OptInSource><ContactLists><ContactList id='l/1'>\
         <OptInSource>{list}</OptInSource></ContactList></ContactLists></Contact></content></entry>"
    )
    .into_bytes()
}

const REFUSAL: &str = "Error 400: Status transition from O to S is not allowed when action by owner and \
                       confirm opt in is off";

/// Serves one connection of the proxy's until it ends, or until a fault ends it.
async fn serve(mut stream: TcpStream, ledger: Ledger) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = memchr::memmem::find(&buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
        let field = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse::<u64>().ok()
        };
        let length = field("content-length:").expect("every body has its length") as usize;
        let number = field("x-number:").expect("every request has its number");
        while buffer.len() < end + length {
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                // Broken off by the client: never a whole request.
                return;
            }
        }
        let got = &buffer[end..end + length];
        let kind = Kind::of(number);
        let list = if kind == Kind::Other { "ACTION_BY_CUSTOMER" } else { "ACTION_BY_CONTACT" };
        let is_right = got == body(number, list);
        let note = |change: fn(&mut Deeds)| {
            change(ledger.lock().expect("no panic").entry(number).or_default());
        };
        note(|deeds| deeds.arrived += 1);
        if !is_right {
            note(|deeds| deeds.corrupt += 1);
        }
        buffer.drain(..end + length);

        let answer: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";
        if fastrand::f64() < FAULTS {
            match fastrand::u8(..6) {
                0 if kind == Kind::Put => {
                    let refusal = format!(
                        "HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{REFUSAL}",
                        REFUSAL.len()
                    );
                    if stream.write_all(refusal.as_bytes()).await.is_err() {
                        return;
                    }
                    continue;
                }
                // Read, and never answered.
                1 => return,
                // A head that breaks off.
                2 => {
                    let _ = stream.write_all(b"HTTP/1.1 2").await;
                    return;
                }
                // A body that breaks off.
                3 => {
                    let _ =
                        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").await;
                    return;
                }
                // Slow.
                4 => tokio::time::sleep(Duration::from_millis(50)).await,
                // Answered, and closed behind it without a word: the next request may race with that.
                _ => {
                    note(|deeds| deeds.applied += 1);
                    let _ = stream.write_all(answer).await;
                    return;
                }
            }
        }
        note(|deeds| deeds.applied += 1);
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

/// What a client was told.
#[derive(Default)]
struct Told {
    requests: AtomicU64,
    fine: AtomicU64,
    refused: AtomicU64,
    faults: AtomicU64,
    broken: AtomicU64,
    gone: AtomicU64,
}

/// One request and its answer; `None` if the connection is of no further use.
async fn ask(stream: &mut TcpStream, number: u64, told: &Told, ledger: &Ledger) -> Option<()> {
    let kind = Kind::of(number);
    let body = body(number, "ACTION_BY_CUSTOMER");
    let head = format!(
        "{} HTTP/1.1\r\nHost: p\r\nX-Number: {number}\r\nContent-Type: application/atom+xml\r\nContent-Length: {}\r\n\r\n",
        kind.line(number),
        body.len()
    );
    told.requests.fetch_add(1, Ordering::Relaxed);
    // Now and then a client goes away in the middle.
    let leaves = fastrand::f64() < FAULTS / 10.0;
    if leaves {
        let _ = stream.write_all(&[head.as_bytes(), &body[..body.len() / 2]].concat()).await;
        told.gone.fetch_add(1, Ordering::Relaxed);
        return None;
    }
    stream.write_all(&[head.as_bytes(), &body].concat()).await.expect("the proxy reads");
    let mut answer = Vec::new();
    let end = loop {
        if let Some(end) = memchr::memmem::find(&answer, b"\r\n\r\n") {
            break end + 4;
        }
        let read = stream.read_buf(&mut answer).await.expect("the proxy answers");
        assert!(read > 0, "request {number} was lost: {:?}", String::from_utf8_lossy(&answer));
    };
    let text = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let status: u16 = text[9..12].parse().expect("a status");
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.map_or(0, |length| length.trim().parse().expect("a length"));
    while answer.len() < end + length {
        if stream.read_buf(&mut answer).await.unwrap_or(0) == 0 {
            // The origin broke off, and so does the answer: never a whole one.
            told.broken.fetch_add(1, Ordering::Relaxed);
            return None;
        }
    }
    let deeds = ledger.lock().expect("no panic").remove(&number).unwrap_or_default();
    assert_eq!(deeds.corrupt, 0, "request {number} arrived changed");
    match status {
        204 => {
            told.fine.fetch_add(1, Ordering::Relaxed);
            assert_eq!(deeds.applied, 1, "request {number} was told to be fine");
        }
        400 => {
            told.refused.fetch_add(1, Ordering::Relaxed);
            assert_eq!((kind, deeds.applied), (Kind::Put, 0), "request {number} was refused");
        }
        502 => {
            told.faults.fetch_add(1, Ordering::Relaxed);
            assert!(deeds.applied <= 1, "request {number} was applied twice");
        }
        other => {
            let told = String::from_utf8_lossy(&answer);
            panic!("request {number} got {other}, and the origin did {deeds:?}: {told}")
        }
    }
    // A create reaches the origin once, whatever became of it.
    assert!(
        kind != Kind::Post || deeds.arrived <= 1,
        "create {number} arrived {} times",
        deeds.arrived
    );
    Some(())
}

fn resident(pid: u32) -> (u64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    let memory = line.trim().trim_end_matches(" kB").parse().expect("a number");
    (memory, std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count())
}

/// How long its threads were on a CPU, in us.
fn cpu_time(pid: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let times = threads.filter_map(|thread| {
        let stat = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<f64>().ok()
    });
    times.sum::<f64>() / 1e3
}

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(upstream: SocketAddr) -> (Program, SocketAddr) {
    let mut program = Command::new(env!("CARGO_BIN_EXE_optin-proxy"))
        .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--upstream", &format!("http://{upstream}"), "--set", "log.level=off"])
        .args(["--set", "retry.base_delay=5ms", "--set", "retry.budget=1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut line = String::new();
    BufReader::new(program.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let address = line.trim().trim_start_matches("listening on ").parse().expect("an address");
    (Program(program), address)
}

async fn soak(seconds: u64) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = listener.local_addr().expect("bound");
    let ledger = Ledger::default();
    let shared = Arc::clone(&ledger);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("a socket");
            tokio::spawn(serve(stream, Arc::clone(&shared)));
        }
    });
    let (program, proxy) = start(upstream);
    let pid = program.0.id();
    let told = Arc::new(Told::default());
    let numbers = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let deadline = started + Duration::from_secs(seconds);
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (told, numbers, ledger) =
            (Arc::clone(&told), Arc::clone(&numbers), Arc::clone(&ledger));
        clients.spawn(async move {
            while Instant::now() < deadline {
                let mut stream = TcpStream::connect(proxy).await.expect("it listens");
                stream.set_nodelay(true).expect("a socket");
                while Instant::now() < deadline {
                    let number = numbers.fetch_add(1, Ordering::Relaxed);
                    if ask(&mut stream, number, &told, &ledger).await.is_none() {
                        break;
                    }
                }
            }
        });
    }
    // After the first sixth, pools and allocator have what they need.
    let (mut early, mut costs) = (0, Vec::new());
    let mut before = (0.0, 0);
    for sixth in 0..6 {
        tokio::time::sleep(Duration::from_secs_f64(seconds as f64 / 6.0)).await;
        let now = (cpu_time(pid), told.requests.load(Ordering::Relaxed));
        costs.push(format!("{:.1}", (now.0 - before.0) / (now.1 - before.1) as f64));
        before = now;
        if sixth == 0 {
            early = resident(pid).0;
        }
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("every request was accounted for");
    }
    let (late, _) = resident(pid);
    // Idle connections to the origin end by themselves.
    let mut descriptors = resident(pid).1;
    for _ in 0..80 {
        if descriptors < 80 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        descriptors = resident(pid).1;
    }
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} requests in {:.0} s: {} fine, {} refused, {} told of a fault, {} seen to break off, {} whose client left; none lost, none changed, no create twice",
        get(&told.requests),
        started.elapsed().as_secs_f64(),
        get(&told.fine),
        get(&told.refused),
        get(&told.faults),
        get(&told.broken),
        get(&told.gone),
    );
    println!(
        "resident {:.1} MB after a sixth, {:.1} MB at the end; {descriptors} descriptors when quiet",
        early as f64 / 1e3,
        late as f64 / 1e3,
    );
    println!("CPU time a request, in us, in each sixth: {}", costs.join(" "));
    assert!(late < early + early / 5 + 2_000, "memory grows");
    assert!(descriptors < 120, "descriptors leak");
}

fn main() {
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|it| it.parse().ok()).unwrap_or(60);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(soak(seconds));
}
