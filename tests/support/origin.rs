//! An origin that does what its script says and remembers every byte it got.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// What the origin does with one request.
#[derive(Clone)]
pub enum Reply {
    /// Writes these bytes and keeps the connection.
    Write(Vec<u8>),
    /// Writes these bytes and closes.
    WriteAndClose(Vec<u8>),
    /// Writes the first bytes, waits until the test lets go, and writes the others.
    Pause(Vec<u8>, Arc<Notify>, Vec<u8>),
    /// Writes these bytes and resets the connection.
    WriteAndReset(Vec<u8>),
    /// Says nothing, and keeps the connection open.
    Hang,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The connection that it came on, counted from 0.
    pub connection: usize,
    /// Request line and fields, as they were sent.
    pub head: String,
    /// The content, chunks taken apart.
    pub body: Vec<u8>,
}

impl Recorded {
    /// The values of a field, in order.
    pub fn fields(&self, name: &str) -> Vec<&str> {
        fields(&self.head, name)
    }
}

pub fn fields<'h>(head: &'h str, name: &str) -> Vec<&'h str> {
    head.lines()
        .skip(1)
        .filter_map(|line| line.split_once(':'))
        .filter(|(field, _)| field.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
        .collect()
}

#[derive(Default)]
struct Shared {
    script: Mutex<VecDeque<Reply>>,
    requests: Mutex<Vec<Recorded>>,
    arrived: Notify,
}

pub struct Origin {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Origin {
    /// An origin that plays one reply a request; the last one for all further requests.
    pub async fn start(script: impl IntoIterator<Item = Reply>) -> Self {
        Self::start_with(script, None).await
    }

    /// An origin whose script speaks of its own address.
    pub async fn start_knowing<S: IntoIterator<Item = Reply>>(
        script: impl FnOnce(SocketAddr) -> S,
    ) -> Self {
        let origin = Self::start([]).await;
        origin.shared.script.lock().unwrap().extend(script(origin.address));
        origin
    }

    /// The same behind TLS.
    pub async fn start_with(
        script: impl IntoIterator<Item = Reply>,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared::default());
        shared.script.lock().unwrap().extend(script);
        let state = Arc::clone(&shared);
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                stream.set_nodelay(true).expect("a socket");
                let (state, tls) = (Arc::clone(&state), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, connection, &state).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, connection, &state).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, shared, serving }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// The only request so far.
    pub fn request(&self) -> Recorded {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "{requests:#?}");
        requests.remove(0)
    }

    /// Waits until this many requests have arrived.
    pub async fn arrived(&self, count: usize) {
        loop {
            let arrived = self.shared.arrived.notified();
            if self.requests().len() >= count {
                return;
            }
            arrived.await;
        }
    }
}

trait Reset {
    /// Makes the end of the connection a reset.
    fn reset(&self);
}

impl Reset for TcpStream {
    fn reset(&self) {
        self.set_zero_linger().expect("a socket");
    }
}

impl Reset for tokio_rustls::server::TlsStream<TcpStream> {
    fn reset(&self) {
        self.get_ref().0.reset();
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Reset + Unpin>(
    mut stream: S,
    connection: usize,
    shared: &Shared,
) {
    let mut buffer = Vec::new();
    while let Some(recorded) = read_request(&mut stream, &mut buffer, connection).await {
        shared.requests.lock().unwrap().push(recorded);
        shared.arrived.notify_waiters();
        let reply = {
            let mut script = shared.script.lock().unwrap();
            if script.len() > 1 { script.pop_front() } else { script.front().cloned() }
        };
        match reply {
            Some(Reply::Write(bytes)) => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Some(Reply::WriteAndClose(bytes)) => {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Some(Reply::WriteAndReset(bytes)) => {
                let _ = stream.write_all(&bytes).await;
                stream.reset();
                return;
            }
            Some(Reply::Pause(first, go_on, then)) => {
                let _ = stream.write_all(&first).await;
                go_on.notified().await;
                let _ = stream.write_all(&then).await;
            }
            Some(Reply::Hang) | None => {
                // Until the peer closes.
                let _ = stream.read(&mut [0; 1]).await;
                return;
            }
        }
    }
}

/// Reads more; false at the end of the stream.
async fn more<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> bool {
    matches!(stream.read_buf(buffer).await, Ok(1..))
}

pub async fn read_head<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
) -> Option<String> {
    loop {
        if let Some(end) = memchr::memmem::find(buffer, b"\r\n\r\n") {
            let rest = buffer.split_off(end + 4);
            let head = std::mem::replace(buffer, rest);
            return Some(head.iter().map(|&byte| byte as char).collect());
        }
        if !more(stream, buffer).await {
            return None;
        }
    }
}

/// Takes exactly this many bytes; `None` if the stream ends before.
pub async fn read_exactly<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    length: usize,
) -> Option<Vec<u8>> {
    while buffer.len() < length {
        if !more(stream, buffer).await {
            return None;
        }
    }
    let rest = buffer.split_off(length);
    Some(std::mem::replace(buffer, rest))
}

/// Takes a chunked body apart; its trailers come behind it.
pub async fn read_chunks<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    body: &mut Vec<u8>,
) -> Option<String> {
    loop {
        let size = read_line(stream, buffer).await?;
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
        if size == 0 {
            break;
        }
        body.extend(read_exactly(stream, buffer, size).await?);
        read_exactly(stream, buffer, 2).await?;
    }
    let mut trailers = String::new();
    loop {
        let line = read_line(stream, buffer).await?;
        if line == "\r\n" {
            return Some(trailers);
        }
        trailers.push_str(&line);
    }
}

async fn read_line<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = memchr::memmem::find(buffer, b"\r\n") {
            let line = read_exactly(stream, buffer, end + 2).await?;
            return String::from_utf8(line).ok();
        }
        if !more(stream, buffer).await {
            return None;
        }
    }
}

async fn read_request<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    connection: usize,
) -> Option<Recorded> {
    let head = read_head(stream, buffer).await?;
    let body = if let Some(length) = fields(&head, "content-length").first() {
        read_exactly(stream, buffer, length.parse().expect("a length")).await?
    } else if fields(&head, "transfer-encoding").contains(&"chunked") {
        let mut body = Vec::new();
        read_chunks(stream, buffer, &mut body).await?;
        body
    } else {
        Vec::new()
    };
    Some(Recorded { connection, head, body })
}
