//! The floor beneath every proxy: bytes from one socket to another and back by epoll, and nothing else.
//!
//! `benches/load/run` puts it beside the others. Not a proxy for any other use: it waits for whoever does not read.
#![allow(missing_docs, reason = "a program for people")]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};

use rustix::event::epoll::{self, EventData, EventFlags};

/// What is read at once, in bytes.
const BUFFER: usize = 64 * 1024;

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
    let [listen, upstream] = &arguments[..] else { return };
    if !listen.starts_with("--") {
        let listener = TcpListener::bind(listen).expect("a free port");
        relay(&listener, upstream).expect("sockets");
    }
}
