//! What the benches measure with.

use std::sync::mpsc;
use std::time::Duration;

use tokio::sync::oneshot;

/// A thread with a runtime of its own; asked, it says how long it was on a CPU.
pub struct Worker {
    handle: tokio::runtime::Handle,
}

impl Worker {
    pub fn start() -> Self {
        Self::start_on(None)
    }

    /// On one core alone.
    pub fn start_on(core: Option<usize>) -> Self {
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            if let Some(core) = core {
                stay_on(core);
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            send.send(runtime.handle().clone()).expect("somebody waits");
            runtime.block_on(std::future::pending::<()>());
        });
        Self { handle: receive.recv().expect("the thread starts") }
    }

    pub fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (send, receive) = oneshot::channel();
        self.handle.spawn(async move { send.send(future.await).ok() });
        receive.blocking_recv().expect("it does not panic")
    }

    pub fn cpu_time(&self) -> Duration {
        self.run(async { cpu_time() })
    }
}

/// Keeps this thread, and those that it starts from now on, on one core: what other threads do to its caches is
/// no work of its own. Where there is no such core, it stays where it is.
pub fn stay_on(core: usize) {
    let mut one = rustix::thread::CpuSet::new();
    one.set(core);
    let _ = rustix::thread::sched_setaffinity(None, &one);
}

/// How long this thread was on a CPU.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanoseconds = stat.split(' ').next().expect("a field").parse().expect("a number");
    Duration::from_nanos(nanoseconds)
}

pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
