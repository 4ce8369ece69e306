//! What a proxy cannot go below: `relay`, bytes from one socket to another and back by epoll, and nothing else; `hyper`,
//! requests and answers by the libraries that optin-proxy stands on, with one thread; `hyper+rewrite`, the same with the rewrite
//! and one more attempt, and with less around it: no timer, no look at the protocol, and hyper-util's client left out;
//! `httparse+rewrite`, the same without hyper; and `hyper+watched` and `httparse+watched`, those two with fields looked at, limits,
//! deadlines and records.
//!
//! `benches/load/run` puts them beside the others. No proxies for any other use: the relay waits for whoever does not read.
#![allow(missing_docs, reason = "a program for people")]

mod httparse_rewrite;
mod httparse_watched;
mod hyper_proxy;
mod hyper_rewrite;
mod hyper_watched;
mod watch;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};

use rustix::event::epoll::{self, EventData, EventFlags};
use tokio::signal::unix::{SignalKind, signal};

/// What is read at once, in bytes.
const BUFFER: usize = 32 * 1024;

/// A client's connection, and the one for it.
type Pair = [TcpStream; 2];

fn relay(listener: &TcpListener, upstream: &str) -> io::Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |socket: &dyn std::os::fd::AsFd, number| {
        epoll::add(&poll, socket.as_fd(), EventData::new_u64(number), EventFlags::IN)
    };
    watch(listener, 0)?;
    // No place is taken twice: what the kernel had told of the one before would be read from the next, and waited for.
    let mut pairs: Vec<Option<Pair>> = Vec::new();
    let (mut buffer, mut events) = (vec![0; BUFFER], Vec::with_capacity(1024));
    loop {
        events.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let Some(number) = event.data.u64().checked_sub(1) else {
                let pair = [listener.accept()?.0, TcpStream::connect(upstream)?];
                for (side, stream) in pair.iter().enumerate() {
                    stream.set_nodelay(true)?;
                    watch(stream, (2 * pairs.len() + side + 1) as u64)?;
                }
                pairs.push(Some(pair));
                continue;
            };
            let (pair, side) = (number as usize / 2, number as usize % 2);
            // The other one's end may have come with the same events.
            let Some(streams) = &mut pairs[pair] else { continue };
            let moved = match streams[side].read(&mut buffer) {
                Ok(length @ 1..) => streams[1 - side].write_all(&buffer[..length]),
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(error),
            };
            if moved.is_err() {
                pairs[pair] = None;
            }
        }
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [what, listen, upstream] = &arguments[..] else { return };
    let listener = TcpListener::bind(listen).expect("a free port");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        // An end at which what was counted is written down.
        let mut end = signal(SignalKind::terminate()).expect("a signal");
        if what == "relay" {
            let upstream = upstream.clone();
            std::thread::spawn(move || relay(&listener, &upstream).expect("sockets"));
            end.recv().await;
            return;
        }
        listener.set_nonblocking(true).expect("a socket");
        let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
        let upstream = upstream.parse().expect("an address");
        let floor = async {
            match &**what {
                "httparse+rewrite" => httparse_rewrite::rewrite(listener, upstream).await,
                "httparse+watched" => httparse_watched::rewrite(listener, upstream).await,
                "hyper+watched" => hyper_watched::rewrite(listener, upstream).await,
                "hyper+rewrite" => hyper_rewrite::rewrite(listener, upstream).await,
                _ => hyper_proxy::pass_through(listener, upstream).await,
            }
        };
        tokio::select! {
            () = floor => {}
            _ = end.recv() => {}
        }
    });
}
