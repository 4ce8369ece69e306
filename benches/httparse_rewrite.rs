//! The least that does this proxy's work without an HTTP library: one task for a client's connection and for the one to the
//! origin, heads told apart by httparse and passed on as they came. It knows content of a given length, and no other; it keeps no
//! records, and has no limits and no deadlines.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::rc::Rc;

use bytes::{Buf, Bytes, BytesMut};
use httparse::{EMPTY_HEADER, Header, Status};
use optin_proxy::contact::Policy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use crate::hyper_rewrite::{REFUSAL, consistent};

/// What is read at once, in bytes.
const READ: usize = 16 * 1024;
/// How many fields a head may have.
const FIELDS: usize = 64;

/// A head, and the content behind it.
struct Message {
    head: Bytes,
    content: Bytes,
    /// Fields that are not passed on as they came: the content's length, and what is for the connection only.
    own: Vec<Range<usize>>,
    status: Option<u16>,
}

/// The first message of what was read, once it is there whole.
fn message(read: &mut BytesMut, request: bool) -> Option<Message> {
    let mut fields = [EMPTY_HEADER; FIELDS];
    let (parsed, fields, status) = if request {
        let mut head = httparse::Request::new(&mut fields);
        (head.parse(read).expect("a request"), &*head.headers, None)
    } else {
        let mut head = httparse::Response::new(&mut fields);
        (head.parse(read).expect("a response"), &*head.headers, head.code)
    };
    let Status::Complete(head) = parsed else { return None };
    let (mut content, mut own) = (0, Vec::new());
    for Header { name, value } in fields {
        let of_content = name.eq_ignore_ascii_case("content-length");
        if of_content {
            content =
                str::from_utf8(value).ok().and_then(|value| value.parse().ok()).expect("a number");
        }
        assert!(
            !name.eq_ignore_ascii_case("transfer-encoding"),
            "no content but of a given length"
        );
        if of_content || name.eq_ignore_ascii_case("connection") {
            let start = name.as_ptr().addr() - read.as_ptr().addr();
            own.push(
                start..value.as_ptr().addr() - read.as_ptr().addr() + value.len() + b"\r\n".len(),
            );
        }
    }
    if read.len() < head + content {
        read.reserve(head + content - read.len());
        return None;
    }
    Some(Message {
        head: read.split_to(head).freeze(),
        content: read.split_to(content).freeze(),
        own,
        status,
    })
}

/// Reads until there is a message, or no more is to come.
async fn next(
    stream: &mut TcpStream,
    read: &mut BytesMut,
    request: bool,
) -> io::Result<Option<Message>> {
    loop {
        if !read.is_empty()
            && let Some(message) = message(read, request)
        {
            return Ok(Some(message));
        }
        read.reserve(READ);
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

async fn send(stream: &mut TcpStream, head: &[u8], content: &[u8]) -> io::Result<()> {
    let mut left = Buf::chain(head, content);
    while left.has_remaining() {
        stream.write_buf(&mut left).await?;
    }
    Ok(())
}

/// A head with the length of what is sent, and without what was for the connection it came by.
fn rewritten(Message { head, own, .. }: &Message, length: usize, out: &mut Vec<u8>) {
    out.clear();
    let mut from = 0;
    for field in own {
        out.extend_from_slice(&head[from..field.start]);
        from = field.end;
    }
    out.extend_from_slice(&head[from..head.len() - b"\r\n".len()]);
    if length > 0 {
        out.extend_from_slice(b"Content-Length: ");
        out.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

async fn exchange(
    stream: &mut TcpStream,
    head: &[u8],
    content: &[u8],
    read: &mut BytesMut,
) -> io::Result<Message> {
    send(stream, head, content).await?;
    Ok(next(stream, read, false).await?.ok_or(io::ErrorKind::UnexpectedEof)?)
}

struct Upstream {
    address: SocketAddr,
    idle: RefCell<Vec<TcpStream>>,
    policy: Policy,
}

impl Upstream {
    async fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn ask(&self, head: &[u8], content: &[u8], read: &mut BytesMut) -> io::Result<Message> {
        loop {
            let kept = self.idle.borrow_mut().pop();
            let is_kept = kept.is_some();
            let mut stream = match kept {
                Some(kept) => kept,
                None => self.connect().await?,
            };
            match exchange(&mut stream, head, content, read).await {
                Ok(answer) => {
                    self.idle.borrow_mut().push(stream);
                    return Ok(answer);
                }
                // The origin may have closed it meanwhile.
                Err(_) if is_kept => read.clear(),
                Err(error) => return Err(error),
            }
        }
    }

    async fn serve(self: Rc<Self>, mut client: TcpStream) -> io::Result<()> {
        let (mut requests, mut answers, mut head) = (BytesMut::new(), BytesMut::new(), Vec::new());
        while let Some(request) = next(&mut client, &mut requests, true).await? {
            let sent = consistent(&request.content, Some("api"), &self.policy);
            rewritten(&request, sent.len(), &mut head);
            let mut answer = self.ask(&head, &sent, &mut answers).await?;
            if answer.status == Some(400)
                && memchr::memmem::find(&answer.content, REFUSAL).is_some()
            {
                answer = self.ask(&head, &sent, &mut answers).await?;
            }
            send(&mut client, &answer.head, &answer.content).await?;
        }
        Ok(())
    }
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let upstream =
        Rc::new(Upstream { address, idle: RefCell::default(), policy: Policy::default() });
    let accept = async {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a socket");
            spawn_local(Rc::clone(&upstream).serve(stream));
        }
    };
    LocalSet::new().run_until(accept).await;
}
