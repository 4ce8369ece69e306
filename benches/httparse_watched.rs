//! The same as `httparse_rewrite.rs`, and in the least way what optin-proxy is asked beyond the rewrite: every field looked at, limits, a
//! deadline for each wait, and a record of each exchange and of each list in it, all by one thread for itself.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use bytes::BytesMut;
use smallvec::SmallVec;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::httparse_rewrite::{Fields, Upstream, accept, next, rewritten, send};
use crate::hyper_rewrite::REFUSAL;
use crate::watch::{Deadline, KEEP_ALIVE, RESPONSE, Record, Watch};

/// What is meant for one connection (RFC 9110 section 7.6.1), or written anew.
#[derive(Default)]
struct Looked {
    id: Option<SmallVec<[u8; 24]>>,
    agent: Option<SmallVec<[u8; 24]>>,
    hosts: usize,
}

impl Fields for Looked {
    fn passes(&mut self, name: &str, value: &[u8]) -> bool {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        // By its length first, as a table would.
        match name.len() {
            2 => !is("te"),
            3 => {
                assert!(!is("via") || !value.ends_with(b"optin-proxy"), "a loop");
                true
            }
            4 if is("host") => {
                self.hosts += 1;
                let is_host = |byte: &u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(byte);
                assert!(self.hosts == 1 && value.iter().all(is_host), "one host");
                false
            }
            6 => {
                assert!(!is("expect"), "no interim answer is known");
                true
            }
            7 => !is("upgrade"),
            10 if is("user-agent") => {
                self.agent = Some(SmallVec::from_slice(value));
                true
            }
            10 if is("connection") => {
                assert!(!value.contains(&b','), "no field is named");
                false
            }
            10 => !is("keep-alive"),
            12 if is("x-request-id") => {
                self.id = Some(SmallVec::from_slice(value));
                true
            }
            14 => {
                assert!(!is("content_length"), "a look-alike");
                true
            }
            16 => !is("proxy-connection"),
            17 => {
                assert!(!is("transfer_encoding"), "a look-alike");
                true
            }
            18 => !is("proxy-authenticate"),
            19 => !is("proxy-authorization"),
            _ => true,
        }
    }
}

async fn serve(watch: Rc<Watch>, upstream: Rc<Upstream>, mut client: TcpStream) -> io::Result<()> {
    let (mut requests, mut answers, mut head) = (BytesMut::new(), BytesMut::new(), Vec::new());
    let mut deadline = Deadline::new();
    loop {
        let mut looked = Looked::default();
        let request = next(&mut client, &mut requests, true, &mut looked);
        let Some(request) = deadline.within(KEEP_ALIVE, request).await?? else {
            return Ok(());
        };
        let started = Instant::now();
        let _held = watch.take(request.content.len());
        let line = memchr::memchr(b'\r', &request.head).unwrap_or_default();
        let mut record = Record::begun(started);
        record.id = looked.id.unwrap_or_else(|| watch.id());
        record.line.extend_from_slice(&request.head[..line]);
        record.agent = looked.agent;
        let sent = watch.rewritten(&request.content, &upstream.policy, &mut record);
        rewritten(&request, sent.len(), &[["Host", "api"], ["Via", "1.1 optin-proxy"]], &mut head);
        let mut looked = Looked::default();
        let asked = upstream.ask(&head, &sent, &mut answers, &mut looked);
        let mut answer = deadline.within(RESPONSE, asked).await??;
        if answer.status == Some(400) && memchr::memmem::find(&answer.content, REFUSAL).is_some() {
            record.attempts += 1;
            let asked = upstream.ask(&head, &sent, &mut answers, &mut looked);
            answer = deadline.within(RESPONSE, asked).await??;
        }
        record.status = answer.status;
        let added = [
            ["X-Request-Id", str::from_utf8(&record.id).unwrap_or_default()],
            ["optin-proxy", &record.report()],
        ];
        rewritten(&answer, answer.content.len(), &added, &mut head);
        deadline.within(RESPONSE, send(&mut client, &head, &answer.content)).await??;
        watch.keep(record);
    }
}

pub async fn rewrite(listener: TcpListener, address: SocketAddr) {
    let (upstream, watch) = (Upstream::new(address), Watch::new());
    accept(listener, |stream| serve(Rc::clone(&watch), Rc::clone(&upstream), stream)).await;
}
