use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::connect::Open;
use super::super::socket::Watch;
use super::super::stack::Begin;
use super::first::FIRST;
use super::*;
use crate::config::Config;

/// Says something, and takes what it is answered, but needs its time to have it written: as a socket that has put it off
/// while its peer reads slowly.
struct Slow {
    said: &'static [u8],
    closing: Pin<Box<tokio::time::Sleep>>,
    is_written: Arc<AtomicBool>,
    /// How often something was read.
    reads: Arc<AtomicUsize>,
}

impl AsyncRead for Slow {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let fits = self.said.len().min(buffer.remaining());
        self.reads.fetch_add(usize::from(fits > 0), Ordering::Relaxed);
        buffer.put_slice(&self.said[..fits]);
        self.said = &self.said[fits..];
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Slow {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        std::task::ready!(self.closing.as_mut().poll(cx));
        self.is_written.store(true, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Nothing is asked.
struct Unasked;

impl Handle<Arrived> for Unasked {
    type Response = Response<Observed>;
    type Error = Infallible;

    async fn handle(&self, _: Arrived) -> Result<Self::Response, Infallible> {
        unreachable!("there is no request")
    }
}

fn serving(config: &Config) -> (Serving<Unasked>, Peer) {
    let metrics = Arc::new(Metrics::default());
    let open = Open::new(Arc::clone(&metrics), CancellationToken::new(), None);
    let peer = Peer::new(([127, 0, 0, 1], 1).into(), Watch::default(), open);
    let begin = Begin::new(&Arc::new(config.clone()), &metrics, None);
    let served = Arc::new(ArcSwap::from_pointee(Served::new(begin, Unasked, config)));
    let serving = Serving::new(served, metrics, CancellationToken::new(), CancellationToken::new());
    (serving, peer)
}

/// Regression: what was put off of an answer was given up after a second.
#[tokio::test(start_paused = true)]
async fn what_is_put_off_of_an_answer_has_as_long_as_any_answer() {
    for said in [&b""[..], b"no HTTP\r\n\r\n"] {
        for (takes, is_in_time) in [(59, true), (61, false)] {
            let config = Config::default();
            assert_eq!(config.limits.idle_timeout, Duration::from_secs(60));
            let (serving, peer) = serving(&config);
            let is_written = Arc::new(AtomicBool::default());
            let closing = Box::pin(sleep(Duration::from_secs(takes)));
            let reads = Arc::default();
            let slow = Slow { said, closing, is_written: Arc::clone(&is_written), reads };
            serving.connection(slow, peer).await;
            assert_eq!(is_written.load(Ordering::Relaxed), is_in_time, "{takes} s");
        }
    }
}

/// Regression: as much as tells HTTP/1 from HTTP/2 was read by itself, of each connection that was new or had been silent.
#[tokio::test(start_paused = true)]
async fn what_a_silent_connection_has_sent_is_read_at_once() {
    let most: &'static [u8] = &[b' '; FIRST];
    let more: &'static [u8] = &[b' '; FIRST + 1];
    for (said, reads) in
        [(&b"no HTTP, and more than it takes to see that\r\n\r\n"[..], 1), (most, 1), (more, 2)]
    {
        let (serving, peer) = serving(&Config::default());
        let (closing, counted) = (Box::pin(sleep(Duration::ZERO)), Arc::default());
        let slow = Slow { said, closing, is_written: Arc::default(), reads: Arc::clone(&counted) };
        serving.connection(slow, peer).await;
        assert_eq!(counted.load(Ordering::Relaxed), reads, "{} bytes", said.len());
    }
}
