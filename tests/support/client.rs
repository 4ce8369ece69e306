//! A client that writes what it is told and reads one answer after the other.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::origin::{fields, read_chunks, read_exactly, read_head};

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    pub trailers: String,
    /// The connection ended before the answer did, whose body is what came of it. Status 0: before its head did.
    pub broken: bool,
}

impl Answer {
    pub fn field(&self, name: &str) -> Option<&str> {
        fields(&self.head, name).first().copied()
    }

    /// The proxy's report.
    pub fn report(&self) -> &str {
        self.field("optin-proxy").unwrap_or("(none)")
    }

    pub fn outcome(&self) -> &str {
        self.report().rsplit("outcome=").next().expect("rsplit yields something")
    }

    /// The last part of a problem's type.
    pub fn problem(&self) -> String {
        assert_eq!(self.field("content-type"), Some("application/problem+json"), "{self:?}");
        let json: serde_json::Value = serde_json::from_slice(&self.body).expect("JSON");
        assert_eq!(json["status"], self.status);
        assert!(json["detail"].as_str().is_some_and(|detail| detail.ends_with('.')), "{json}");
        assert!(self.field("proxy-status").is_some_and(|it| it.starts_with("optin-proxy; error=")));
        let name = json["type"].as_str().and_then(|it| it.strip_prefix("urn:optin-proxy:problem:"));
        name.expect("our own type").to_owned()
    }
}

pub struct Client<S = TcpStream> {
    pub stream: S,
    buffer: Vec<u8>,
}

/// Waits until nobody listens there any more.
pub async fn closed(address: SocketAddr) {
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        Self::over(stream)
    }

    /// Asks for a tunnel; the connection, if there is one now.
    pub async fn tunnel(mut self, target: &str) -> Result<TcpStream, Answer> {
        self.send(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await;
        let mut answer = self.answer(true).await;
        if answer.status == 200 {
            assert!(self.buffer.is_empty(), "the client speaks first");
            return Ok(self.stream);
        }
        let length = answer.field("content-length").map_or(0, |it| it.parse().expect("a length"));
        answer.body = self.bytes(length).await.unwrap_or_default();
        Err(answer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn over(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the proxy reads");
        self.stream.flush().await.expect("the proxy reads");
    }

    /// Sends a request and reads its answer.
    pub async fn ask(&mut self, request: &[u8]) -> Answer {
        self.send(request).await;
        self.answer(request.starts_with(b"HEAD ")).await
    }

    /// Reads a head, final or interim; `None` at the end of the connection.
    pub async fn head(&mut self) -> Option<String> {
        read_head(&mut self.stream, &mut self.buffer).await
    }

    pub async fn bytes(&mut self, length: usize) -> Option<Vec<u8>> {
        read_exactly(&mut self.stream, &mut self.buffer, length).await
    }

    pub async fn answer(&mut self, to_head: bool) -> Answer {
        let Some(head) = self.head().await else {
            let (head, body, trailers) = Default::default();
            return Answer { status: 0, head, body, trailers, broken: true };
        };
        let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
        let mut answer =
            Answer { status, head, body: Vec::new(), trailers: String::new(), broken: false };
        if to_head || matches!(status, 100..200 | 204 | 304) {
            return answer;
        }
        if let Some(length) = answer.field("content-length") {
            let length = length.parse().expect("a length");
            match self.bytes(length).await {
                Some(body) => answer.body = body,
                None => (answer.body, answer.broken) = (std::mem::take(&mut self.buffer), true),
            }
        } else if answer.field("transfer-encoding") == Some("chunked") {
            match read_chunks(&mut self.stream, &mut self.buffer, &mut answer.body).await {
                Some(trailers) => answer.trailers = trailers,
                None => answer.broken = true,
            }
        } else {
            answer.body.append(&mut self.buffer);
            answer.broken = self.stream.read_to_end(&mut answer.body).await.is_err();
        }
        answer
    }

    /// Whether the proxy closes the connection now.
    pub async fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && matches!(self.stream.read(&mut [0; 1]).await, Ok(0) | Err(_))
    }
}
