//! A client of HTTP/2 that writes the frames that it is told, right or wrong (RFC 9113, RFC 7541).

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The status in a HEADERS frame of an answer: its first field.
    pub fn status(&self) -> u16 {
        match self.payload[0] {
            0x88 => 200,
            0x89 => 204,
            0x8c => 400,
            0x8d => 404,
            0x8e => 500,
            // A literal with the name `:status`; its value in Huffman's code.
            0x08 | 0x48 => {
                assert_eq!(self.payload[1] & 0x80, 0x80);
                let bits: Vec<u8> = self.payload[2..]
                    .iter()
                    .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
                    .collect();
                let take = |at: usize, count: usize| {
                    bits[at..at + count].iter().fold(0, |sum, bit| sum << 1 | u16::from(*bit))
                };
                let (mut at, mut status) = (0, 0);
                for _ in 0..3 {
                    // 0 to 2 have five bits, 3 to 9 six.
                    let (digit, length) = match take(at, 5) {
                        short @ 0..=2 => (short, 5),
                        _ => (take(at, 6) - 0b01_1001 + 3, 6),
                    };
                    (at, status) = (at + length, status * 10 + digit);
                }
                status
            }
            other => panic!("no status: {other:x}"),
        }
    }

    /// The error code of RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("four bytes"))
    }
}

/// Fields as literals that nobody remembers, each byte as it is.
pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).ok().filter(|it| *it < 127).expect("short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

pub struct Http2 {
    pub stream: TcpStream,
}

impl Http2 {
    /// Connects by prior knowledge, and says so much window for each stream.
    pub async fn connect(address: SocketAddr, window: u32) -> Self {
        let stream = TcpStream::connect(address).await.expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        let mut client = Self { stream };
        client.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("it reads");
        client.send(SETTINGS, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat()).await;
        client
    }

    /// Sends a frame, if the proxy still reads.
    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("short");
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        let _ = self.stream.write_all(&frame).await;
        let _ = self.stream.flush().await;
    }

    /// The next frame that is none of housekeeping; `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            self.stream.read_exact(&mut payload).await.ok()?;
            let stream = u32::from_be_bytes(head[5..].try_into().expect("four bytes"));
            let frame = Frame { kind: head[3], flags: head[4], stream, payload };
            match frame.kind {
                PING if frame.flags & ACK == 0 => self.send(PING, ACK, 0, &frame.payload).await,
                SETTINGS if frame.flags & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]).await,
                DATA | HEADERS | RST_STREAM | GOAWAY => return Some(frame),
                _ => {}
            }
        }
    }

    /// What becomes of a stream: its status, or that it or the connection was ended.
    pub async fn fate(&mut self, stream: u32) -> Fate {
        while let Some(frame) = self.next().await {
            match frame.kind {
                HEADERS if frame.stream == stream => return Fate::Answered(frame.status()),
                RST_STREAM if frame.stream == stream => return Fate::Reset(frame.code()),
                GOAWAY if frame.code() != 0 => return Fate::Closed(frame.code()),
                _ => {}
            }
        }
        Fate::Gone
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    Answered(u16),
    /// The stream, with this error.
    Reset(u32),
    /// The connection, with this error.
    Closed(u32),
    /// The connection, without a word.
    Gone,
}
