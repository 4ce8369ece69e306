//! Writes that wait for the end of their thread's turn.
//!
//! A turn is what a thread does between two waits for the system. Whoever is to read what is written has to be woken,
//! by an interrupt if its core sleeps, and under load it would fall asleep again before the next write: so all that a turn
//! writes is given to the system at once. An update by 32 connections takes 0.96 of the CPU time with it (the median of
//! seven runs, of 0.83 to 0.98), by 1,000 connections 0.94, and by one, where a turn has one write, as much as without: all of
//! that when a turn took 1,024 events, which several threads still do.
//!
//! Who writes is told at once that all is written. What the system does not take is written by a task, for as long as there
//! is the socket, and [`Outlet::poll_written`] waits for it, on which a shutdown relies.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};

use parking_lot::Mutex;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

/// The most that one socket puts off, in bytes. Pieces of what streams are longer: with them put off too, up to 16 KiB, an
/// upload takes 1.13 to 1.2 times the CPU time.
pub(super) const MOST: usize = 8 * 1024;

/// After how many reads and writes, by any of its sockets, a thread does not put off any longer what it has: it may be
/// so busy that it never comes to a wait. By 16, next to nothing is gained (0.99 and 1.04 of the CPU time without, for 32 and
/// 1,000 connections, in a run where it was 0.98 and 0.94 by 64, and 0.98 and 0.96 by 256).
pub(super) const OPERATIONS: u32 = 64;

/// How much room a thread keeps for what is put off, that many times [`MOST`]: more is not put off at once.
const SPARE: usize = OPERATIONS as usize;

/// What a thread writes at the end of its turn.
struct Turn {
    /// The thread tells when its turns end.
    has_end: Cell<bool>,
    /// Reads and writes since the first write was put off. 0: nothing is put off.
    operations: Cell<u32>,
    due: RefCell<Vec<Arc<Mutex<Outlet>>>>,
    /// Room for what is put off, to be used again.
    spare: RefCell<Vec<Vec<u8>>>,
}

thread_local! {
    static TURN: Turn = const {
        Turn {
            has_end: Cell::new(false),
            operations: Cell::new(0),
            due: RefCell::new(Vec::new()),
            spare: RefCell::new(Vec::new()),
        }
    };
}

/// Writes what the sockets of this thread have put off. To be called by a runtime that is about to wait; threads that
/// never call it put nothing off.
pub(crate) fn end_turn() {
    TURN.with(|turn| {
        turn.has_end.set(true);
        turn.end();
    });
}

/// This thread runs nothing any more that calls [`end_turn`].
pub(crate) fn end_turns() {
    TURN.with(|turn| {
        turn.has_end.set(false);
        turn.end();
    });
}

/// Writes what is put off before something that takes long.
pub(super) fn write_due() {
    TURN.with(Turn::end);
}

/// Counts a read on one of this thread's sockets.
pub(super) fn count_read() {
    TURN.with(Turn::operation);
}

/// Takes over all that is to be written; none of it if that has to be done at once.
pub(super) fn put_off(socket: &Arc<Mutex<Outlet>>, slices: &[IoSlice<'_>]) -> Option<usize> {
    TURN.with(|turn| turn.put_off(socket, slices))
}

/// Keeps room that is no longer needed, unless the thread is at its end.
fn keep(room: Vec<u8>) {
    let _ = TURN.try_with(|turn| turn.keep(room));
}

impl Turn {
    fn end(&self) {
        if self.operations.replace(0) == 0 {
            return;
        }
        let mut due = self.due.take();
        for socket in due.drain(..) {
            let mut outlet = socket.lock();
            if outlet.is_put_off() {
                self.keep(outlet.send(&socket));
            }
        }
        self.due.replace(due);
    }

    /// One of its sockets reads or writes.
    fn operation(&self) {
        match self.operations.get() {
            0 => {}
            OPERATIONS.. => self.end(),
            count => self.operations.set(count + 1),
        }
    }

    /// Room for as much as one socket puts off. All of it at once: an update grew what an answer had left.
    fn room(&self) -> Vec<u8> {
        self.spare.borrow_mut().pop().unwrap_or_else(|| Vec::with_capacity(MOST))
    }

    /// Keeps the room of what was written.
    fn keep(&self, mut room: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if self.has_end.get() && room.capacity() >= MOST && spare.len() < SPARE {
            room.clear();
            spare.push(room);
        }
    }

    fn put_off(&self, socket: &Arc<Mutex<Outlet>>, slices: &[IoSlice<'_>]) -> Option<usize> {
        if !self.has_end.get() {
            return None;
        }
        self.operation();
        let mut outlet = socket.lock();
        let length = slices.iter().map(|slice| slice.len()).sum::<usize>();
        if outlet.due.len() + length > MOST {
            return None;
        }
        match outlet.state {
            State::Written => {
                outlet.due = self.room();
                outlet.state = State::PutOff;
                self.due.borrow_mut().push(Arc::clone(socket));
                self.operations.set(self.operations.get().max(1));
            }
            State::PutOff => {}
            State::Left { .. } | State::Failed(_) => return None,
        }
        for slice in slices {
            outlet.due.extend_from_slice(slice);
        }
        Some(length)
    }
}

/// A socket, and what was put off of what is written to it.
#[derive(Debug)]
pub(super) struct Outlet {
    pub stream: TcpStream,
    /// What the system is still to take.
    due: Vec<u8>,
    state: State,
}

/// What became of what was put off.
#[derive(Debug)]
enum State {
    Written,
    /// A thread writes it at the end of its turn.
    PutOff,
    /// The system did not take all of it at once. The task writes the rest.
    Left {
        task: AbortHandle,
        waiter: Option<Waker>,
    },
    /// Nobody was told yet.
    Failed(io::Error),
}

impl Outlet {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, due: Vec::new(), state: State::Written }
    }

    /// How much room is held for what is put off, in bytes.
    #[cfg(test)]
    pub fn room(&self) -> usize {
        self.due.capacity()
    }

    /// Whether something is written at the end of a turn.
    pub fn is_put_off(&self) -> bool {
        matches!(self.state, State::PutOff)
    }

    /// Writes what was put off, as far as the system takes it. The room that it took, unless something is left.
    fn send(&mut self, this: &Arc<Mutex<Self>>) -> Vec<u8> {
        let written = match self.stream.try_write(&self.due) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            written => written,
        };
        self.state = match written {
            Ok(all) if all == self.due.len() => State::Written,
            Ok(some) => {
                self.due.drain(..some);
                // A peer may take its time.
                self.due.shrink_to_fit();
                let task = tokio::spawn(write_rest(Arc::downgrade(this))).abort_handle();
                self.state = State::Left { task, waiter: None };
                return Vec::new();
            }
            Err(error) => State::Failed(error),
        };
        std::mem::take(&mut self.due)
    }

    /// Waits until nothing is left of what was put off.
    pub fn poll_written(
        &mut self,
        this: &Arc<Mutex<Self>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_put_off() {
            keep(self.send(this));
        }
        match std::mem::replace(&mut self.state, State::Written) {
            State::Written | State::PutOff => Poll::Ready(Ok(())),
            State::Left { task, .. } => {
                self.state = State::Left { task, waiter: Some(cx.waker().clone()) };
                Poll::Pending
            }
            State::Failed(error) => Poll::Ready(Err(error)),
        }
    }

    /// Why what was put off could not be written: the system says so once only.
    pub fn failed(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::Written) {
            State::Failed(error) => Err(error),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// Nothing comes any more. What is put off is written, as far as the system takes it at once; for more, the owner has
    /// to wait for [`Self::poll_written`] first.
    pub fn close(&mut self) {
        match std::mem::replace(&mut self.state, State::Written) {
            State::PutOff => drop(self.stream.try_write(&self.due)),
            State::Left { task, .. } => task.abort(),
            State::Written | State::Failed(_) => {}
        }
        keep(std::mem::take(&mut self.due));
    }
}

/// Writes what the system did not take at once, for as long as there is the socket.
async fn write_rest(socket: Weak<Mutex<Outlet>>) {
    poll_fn(|cx| {
        let Some(socket) = socket.upgrade() else { return Poll::Ready(()) };
        let mut outlet = socket.lock();
        let Outlet { stream, due, .. } = &mut *outlet;
        let mut written = Ok(());
        while written.is_ok() && !due.is_empty() {
            written = ready!(Pin::new(&mut *stream).poll_write(cx, due))
                .map(|some| drop(due.drain(..some)));
        }
        outlet.due = Vec::new();
        let state = written.map_or_else(State::Failed, |()| State::Written);
        let left = std::mem::replace(&mut outlet.state, state);
        drop(outlet);
        if let State::Left { waiter: Some(waiter), .. } = left {
            waiter.wake();
        }
        Poll::Ready(())
    })
    .await;
}
