//! Spans, as a collector gets them.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::support::binary::{Running, command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{CONTACT, RECIPE, no_content, put, request};

/// A collector that keeps what it gets (OTLP over gRPC: a POST for each export).
struct Collector {
    address: SocketAddr,
    got: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let got = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&got);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let kept = Arc::clone(&kept);
                let service = service_fn(move |request| Self::export(request, Arc::clone(&kept)));
                let connection = http2::Builder::new(TokioExecutor::new());
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, got }
    }

    async fn export(
        request: Request<Incoming>,
        kept: Arc<Mutex<Vec<u8>>>,
    ) -> Result<Response<impl http_body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
        let service = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
        assert_eq!(request.uri().path(), service);
        let message = request.into_body().collect().await.expect("a message").to_bytes();
        kept.lock().unwrap().extend_from_slice(&message);
        // An empty message, not compressed, and that all is well.
        let well = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
        let trailers = HeaderMap::from_iter([well]);
        let body = Full::new(Bytes::from_static(&[0; 5]));
        let body = body.with_trailers(async { Some(Ok(trailers)) });
        let mut answer = Response::new(body);
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Ok(answer)
    }

    fn has(&self, bytes: &[u8]) -> bool {
        memchr::memmem::find(&self.got.lock().unwrap(), bytes).is_some()
    }
}

fn serve(origin: &Origin, endpoint: &str) -> std::process::Command {
    let url = origin.url();
    let mut command = command(&["serve", "--listen", "127.0.0.1:0", "--upstream", &url]);
    command.args(["--admin", "127.0.0.1:0"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_is_a_span_of_the_client_s_trace_or_of_a_new_one_with_nothing_of_the_contact() {
    let (origin, collector) =
        tokio::join!(Origin::start([Reply::Write(no_content())]), Collector::start());
    let running = Running::start(&mut serve(&origin, &format!("http://{}", collector.address)));
    let mut client = Client::connect(running.address).await;
    let fields = "User-Agent: Shop/2 jane.roe@example.org\r\nAuthorization: Basic c2VjcmV0\r\n\
         traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    client.ask(&request("PUT", CONTACT, fields, RECIPE)).await;
    // Who began this trace does not record it.
    let unsampled = "traceparent: 00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-00f067aa0ba902b7-00\r\n";
    client.ask(&request("PUT", CONTACT, unsampled, RECIPE)).await;
    client.ask(&put(RECIPE)).await;
    // As it stops, it sends what it has: nothing here waits for the exporter's next turn.
    running.signal("TERM");
    let (status, log) = tokio::task::spawn_blocking(|| running.finish()).await.expect("it ends");
    assert!(status.success());

    let theirs = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes();
    assert!(collector.has(&theirs) && collector.has(&0x00f0_67aa_0ba9_02b7_u64.to_be_bytes()));
    assert!(!collector.has(&[0xaa; 16]));
    let lines = log.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let lines: Vec<serde_json::Value> =
        lines.filter(|line: &serde_json::Value| line["message"] == "request").collect();
    let ours = lines[2]["trace_id"].as_str().expect("a trace of ours");
    let ours = u128::from_str_radix(ours, 16).expect("hexadecimal");
    assert!(collector.has(&ours.to_be_bytes()), "the log's id is the span's");
    // The API is told of none of it but what its client said.
    let sent = origin.requests();
    assert!(sent[0].head.contains("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
    assert!(!sent[2].head.to_ascii_lowercase().contains("traceparent"));

    let texts: [&[u8]; 6] = [
        b"PUT /ws/customers/{user}/contacts/{id}",
        b"optin-proxy",
        b"http.response.status_code",
        b"rewritten",
        b"joesflowers",
        b"Shop/2",
    ];
    for text in texts {
        assert!(collector.has(text), "{}", String::from_utf8_lossy(text));
    }
    let planted: [&[u8]; 4] = [b"jane.roe", b"c2VjcmV0", b"EmailAddress", b"example.org"];
    for text in planted {
        assert!(!collector.has(text), "{}", String::from_utf8_lossy(text));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_or_hangs_costs_no_request_and_little_time_at_the_end() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    // It accepts, by its backlog, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let hangs = format!("http://{}", silent.local_addr().expect("bound"));
    for endpoint in ["http://127.0.0.1:9", &hangs] {
        let running = Running::start(&mut serve(&origin, endpoint));
        let mut client = Client::connect(running.address).await;
        assert_eq!(client.ask(&put(RECIPE)).await.status, 204);
        running.signal("TERM");
        let (status, log) =
            tokio::task::spawn_blocking(|| running.finish()).await.expect("it ends");
        assert!(status.success());
        assert!(log.contains("not exported") || log.contains("BatchSpanProcessor"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_none_is_said_at_the_start() {
    let origin = Origin::start([]).await;
    let output = crate::support::binary::run_command(serve(&origin, "no endpoint"), b"");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{}", output.stderr);
}
