//! Spans for a collector that speaks the OpenTelemetry protocol (OTLP) over gRPC.
//!
//! One span of kind SERVER an exchange, made of its [`Record`] once all is over: nothing is added to the way of
//! a request, and no text gets out that is not in a record. It is set up by OpenTelemetry's own variables
//! (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and so on). Where none of them names an
//! endpoint, nothing is exported.

use std::sync::Arc;
use std::time::Duration;
use std::{env, io};

use opentelemetry::trace::{
    Span, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer, TracerProvider,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider};
use parking_lot::Mutex;
use smol_str::SmolStr;
use tokio::runtime::{Builder, Runtime};

use super::ids::Trace;
use super::journal::Outlet;
use super::record::Record;

/// The variables that name a collector (OpenTelemetry Protocol Exporter specification).
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// Whose spans these are, where `OTEL_SERVICE_NAME` does not say otherwise.
const SERVICE: &str = env!("CARGO_PKG_NAME");

/// Hands spans to a bounded queue, from which a thread of the SDK's exports them. What does not fit is dropped, and
/// the SDK logs it.
pub(crate) struct Spans {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    ids: Ids,
    _carrier: Carrier,
}

/// Carries the connection to the collector, beyond the end of whatever else runs.
struct Carrier(Option<Runtime>);

impl Drop for Carrier {
    fn drop(&mut self) {
        // Inside another runtime it must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error(transparent)]
    Runtime(#[from] io::Error),
    #[error(transparent)]
    Exporter(#[from] ExporterBuildError),
}

impl Spans {
    /// An exporter, if the environment names a collector.
    ///
    /// # Errors
    /// If what the environment says is no endpoint.
    pub fn from_env() -> Result<Option<Self>, SetupError> {
        let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        if !ENDPOINTS.into_iter().any(is_set) {
            return Ok(None);
        }
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let handle = runtime.handle().clone();
        let carrier = Carrier(Some(runtime));
        let inside = handle.enter();
        let exporter = SpanExporter::builder().with_tonic().build()?;
        let ids = Ids::default();
        let mut resource = Resource::builder();
        if !is_set("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name(SERVICE);
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_id_generator(ids.clone())
            .with_resource(resource.build())
            .build();
        let scope =
            InstrumentationScope::builder(SERVICE).with_version(env!("CARGO_PKG_VERSION")).build();
        let tracer = provider.tracer_with_scope(scope);
        drop(inside);
        Ok(Some(Self { provider, tracer, ids, _carrier: carrier }))
    }
}

impl Outlet for Spans {
    fn take(&self, record: &Record) {
        let Some(trace) = record.trace else { return };
        self.ids.begin(trace.id);
        let span = SpanBuilder::from_name(format!("{} {}", record.method, record.route))
            .with_kind(SpanKind::Server)
            .with_start_time(record.time)
            .with_attributes(attributes(record));
        let mut span = self.tracer.build_with_context(span, &parent(trace));
        if record.status.is_some_and(|status| status >= 500) {
            span.set_status(Status::error(record.problem.unwrap_or_default()));
        }
        span.end_with_timestamp(record.time + Duration::from_secs_f64(record.duration_ms / 1000.0));
    }

    fn flush(&self, limit: Duration) {
        if let Err(error) = self.provider.shutdown_with_timeout(limit) {
            tracing::warn!(%error, "spans were not exported to the end");
        }
    }
}

/// What the client said of its own span.
fn parent(trace: Trace) -> Context {
    let Some(parent) = trace.parent else { return Context::new() };
    let flags = if trace.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    Context::new().with_remote_span_context(SpanContext::new(
        TraceId::from(trace.id),
        SpanId::from(parent),
        flags,
        true,
        TraceState::default(),
    ))
}

/// By OpenTelemetry's semantic conventions for HTTP, and by the proxy's own names.
fn attributes(record: &Record) -> Vec<KeyValue> {
    let text = |name, value: &Option<SmolStr>| {
        value.as_ref().map(|value| KeyValue::new(name, value.to_string()))
    };
    let number = |name, value: u64| KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX));
    let mut attributes = vec![
        KeyValue::new("http.request.method", record.method.to_string()),
        KeyValue::new("http.route", record.route),
        KeyValue::new("optin_proxy.request_id", record.request_id.to_string()),
        number("optin_proxy.attempts", record.attempts.into()),
    ];
    attributes.extend(record.status.map(|it| number("http.response.status_code", it.into())));
    attributes.extend(text("user_agent.original", &record.user_agent));
    attributes.extend(text("optin_proxy.account", &record.account));
    attributes.extend(text("optin_proxy.contact_id", &record.contact_id));
    attributes.extend(text("optin_proxy.authority", &record.authority));
    attributes.extend(record.decision.map(|it| KeyValue::new("optin_proxy.decision", it)));
    attributes.extend(record.problem.map(|it| KeyValue::new("error.type", it)));
    if let Some(outcome) = record.outcome {
        attributes.extend([
            KeyValue::new("optin_proxy.outcome", outcome.as_str()),
            number("optin_proxy.findings", record.found as u64),
            number("optin_proxy.rewritten", record.rewritten as u64),
        ]);
    }
    attributes
}

/// A trace that no client began has the id that the log knows it by.
#[derive(Debug, Clone, Default)]
struct Ids {
    random: RandomIdGenerator,
    /// Of the span that is next; the journal makes them one by one.
    trace: Arc<Mutex<u128>>,
}

impl Ids {
    fn begin(&self, trace: u128) {
        *self.trace.lock() = trace;
    }
}

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        TraceId::from(*self.trace.lock())
    }

    fn new_span_id(&self) -> SpanId {
        self.random.new_span_id()
    }
}
