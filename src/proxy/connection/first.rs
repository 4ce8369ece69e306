//! What a connection says first, by which HTTP/2 is told from HTTP/1.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

/// The most that is read of a connection that was silent before hyper gets it, in bytes: most often all that has come. No more
/// than hyper takes at once, so that nothing of it is left behind.
pub(super) const FIRST: usize = 8 * 1024;

/// RFC 9113 section 3.4.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What comes first, and is enough to tell HTTP/2 from HTTP/1; `None` at the end of the stream.
pub(crate) async fn first_bytes<T: AsyncRead + Unpin>(stream: &mut T) -> Option<Bytes> {
    let mut start = Vec::new();
    loop {
        let came = poll_fn(|cx| {
            // Not in the future, whose room every connection has.
            let mut room = [const { MaybeUninit::uninit() }; FIRST];
            let mut buffer = ReadBuf::uninit(&mut room[start.len()..]);
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer));
            start.extend_from_slice(buffer.filled());
            Poll::Ready(read.is_ok() && !buffer.filled().is_empty())
        });
        // What is there of a head is for hyper to judge.
        let is_end = !came.await;
        if is_end || start.len() >= PREFACE.len() || !PREFACE.starts_with(&start) {
            return (!start.is_empty()).then(|| start.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// Regression: what had begun as HTTP/2 does could be longer than hyper reads at once, which was lost to a tunnel.
    #[tokio::test]
    async fn no_more_comes_first_than_hyper_takes_at_once() {
        for begun in 0..PREFACE.len() {
            let (more, rest) = ([b'x'; FIRST], [b'x'; FIRST]);
            let mut stream = PREFACE[..begun].chain(&more[..]).chain(&rest[..]);
            let start = first_bytes(&mut stream).await.expect("it is open");
            assert_eq!(start.len(), FIRST, "{begun}");
            let mut left = Vec::new();
            stream.read_to_end(&mut left).await.expect("in memory");
            assert_eq!(start.len() + left.len(), begun + more.len() + rest.len());
        }
    }
}
