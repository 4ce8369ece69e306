//! The least that does this proxy's work without an HTTP library: one task for a client's connection and for the one to the
//! origin, heads told apart by httparse and passed on as they came. It knows content of a given length, and no other; it keeps no
//! records, and has no limits and no deadlines: `httparse_watched.rs` has them.

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
pub struct Message {
    pub head: Bytes,
    pub content: Bytes,
    /// Fields that are not passed on as they came.
    own: Vec<Range<usize>>,
    pub status: Option<u16>,
}

/// What is looked for in the fields of a message.
pub trait Fields: Default {
    /// Looks at one that is none of its content's, and says whether it is passed on as it came.
    fn passes(&mut self, name: &str, value: &[u8]) -> bool;
}

/// What is for the connection only.
#[derive(Default)]
struct Passed;

impl Fields for Passed {
    fn passes(&mut self, name: &str, _: &[u8]) -> bool {
        !name.eq_ignore_ascii_case("connection")
    }
}

/// The first message of what was read, once it is there whole.
fn message(read: &mut BytesMut, request: bool, looked: &mut impl Fields) -> Option<Message> {
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
        if of_content || !looked.passes(name, value) {
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
pub async fn next(
    stream: &mut TcpStream,
    read: &mut BytesMut,
    request: bool,
    looked: &mut impl Fields,
) -> io::Result<Option<Message>> {
    loop {
        // What was seen of a message that was not there whole is seen again.
        *looked = Default::default();
        if !read.is_empty()
            && let Some(message) = message(read, request, looked)
        {
            return Ok(Some(message));
        }
        read.reserve(READ);
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

pub async fn send(stream: &mut TcpStream, head: &[u8], content: &[u8]) -> io::Result<()> {
    let mut left = Buf::chain(head, content);
    while left.has_remaining() {
        stream.write_buf(&mut left).await?;
    }
    Ok(())
}

/// A head with the length of what is sent and with these fields, and without what is not passed on.
pub fn rewritten(
    Message { head, own, .. }: &Message,
    length: usize,
    added: &[[&str; 2]],
    out: &mut Vec<u8>,
) {
    out.clear();
    let mut from = 0;
    for field in own {
        out.extend_from_slice(&head[from..field.start]);
        from = field.end;
    }
    out.extend_from_slice(&head[from..head.len() - b"\r\n".len()]);
    for [name, value] in added {
        for part in [name, ": ", value, "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
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
    looked: &mut impl Fields,
) -> io::Result<Message> {
    send(stream, head, content).await?;
    Ok(next(stream, read, false, looked).await?.ok_or(io::ErrorKind::UnexpectedEof)?)
}

/// The origin, and the connections to it.
pub struct Upstream {
    address: SocketAddr,
    idle: RefCell<Vec<TcpStream>>,
    pub policy: Policy,
}

impl Upstream {
    pub fn new(address: SocketAddr) -> Rc<Self> {
        Rc::new(Self { address, idle: RefCell::default(), policy: Policy::default() })
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    pub async fn ask(
        &self,
        head: &[u8],
        content: &[u8],
        read: &mut BytesMut,
        looked: &mut impl Fields,
    ) -> io::Result<Message> {
        loop {
            let kept = self.idle.borrow_mut().pop();
            let is_kept = kept.is_some();
            let mut stream = match kept {
                Some(kept) => kept,
                None => self.connect().await?,
            };
            match exchange(&mut stream, head, content, read, looked).await {
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
        while let Some(request) = next(&mut client, &mut requests, true, &mut Passed).await? {
            let sent = consistent(&request.content, Some("api"), &self.policy);
            rewritten(&request, sent.len(), &[], &mut head);
            let mut answer = self.ask(&head, &sent, &mut answers, &mut Passed).await?;
            if answer.status == Some(400)
                && memchr::memmem::find(&answer.content, REFUSAL).is_some()
            {
                answer = self.ask(&head, &sent, &mut answers, &mut Passed).await?;
            }
            send(&mut client, &answer.head, &answer.content).await?;
        }
        Ok(())
    }
}

/// Serves each connection that comes by a task of its own.
pub async fn accept<F>(listener: TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + 'static,
{
    let accept = async {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a socket");
            spawn_local(serve(stream));
        }
    };
    LocalSet::new().run_until(accept).await;
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let upstream = Upstream::new(address);
    accept(listener, |stream| Rc::clone(&upstream).serve(stream)).await;
}
