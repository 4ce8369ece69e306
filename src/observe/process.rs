//! What the process takes of the system, under the names that Prometheus' own client libraries use.

use std::fmt;

use procfs::process::Process as Itself;
use procfs::{ProcResult, WithCurrentSystemInfo};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Reads /proc whenever it is scraped.
#[derive(Debug)]
pub(super) struct Process;

struct Reading {
    /// In seconds.
    cpu: f64,
    /// In bytes.
    resident: u64,
    descriptors: usize,
    most_descriptors: Option<u64>,
    /// In seconds since 1970.
    started: f64,
    threads: i64,
}

impl Reading {
    fn take() -> ProcResult<Self> {
        let itself = Itself::myself()?;
        let stat = itself.stat()?;
        let ticks = procfs::ticks_per_second() as f64;
        let most = itself.limits()?.max_open_files.soft_limit;
        Ok(Self {
            cpu: (stat.utime + stat.stime) as f64 / ticks,
            resident: stat.rss_bytes().get(),
            descriptors: itself.fd_count()?,
            most_descriptors: match most {
                procfs::process::LimitValue::Value(most) => Some(most),
                procfs::process::LimitValue::Unlimited => None,
            },
            started: procfs::boot_time_secs()? as f64 + stat.starttime as f64 / ticks,
            threads: stat.num_threads,
        })
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Without /proc there is nothing to say.
        let Ok(reading) = Reading::take() else { return Ok(()) };
        let mut put = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        put(
            "process_cpu_seconds",
            "Time on a CPU, user and system",
            &ConstCounter::new(reading.cpu),
        )?;
        put(
            "process_resident_memory_bytes",
            "Resident memory",
            &ConstGauge::new(reading.resident),
        )?;
        put("process_open_fds", "Open descriptors", &ConstGauge::new(reading.descriptors as u64))?;
        if let Some(most) = reading.most_descriptors {
            put("process_max_fds", "The most open descriptors", &ConstGauge::new(most))?;
        }
        put("process_threads", "Threads", &ConstGauge::new(reading.threads))?;
        put(
            "process_start_time_seconds",
            "When the process began, since 1970",
            &ConstGauge::new(reading.started),
        )
    }
}
