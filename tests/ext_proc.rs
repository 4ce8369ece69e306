//! External processing, as Envoy asks for it: gRPC over a real socket, to the real program.

use std::io::Write;

use envoy_types::pb::envoy::config::core::v3::{HeaderMap, HeaderValue};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request as Ask;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response as Answer;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    CommonResponse, HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse,
};
use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::support::binary::{Running, command};
use crate::support::client::{Client, closed};
use crate::support::http2::{GOAWAY, Http2};
use crate::support::{CONTACT, RECIPE, RECIPE_OUT, UNDECLARED};

fn serve(settings: &[&str]) -> Running {
    let mut arguments = vec!["ext-proc", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    Running::start(&mut command(&arguments))
}

async fn client(running: &Running) -> ExternalProcessorClient<Channel> {
    let address = format!("http://{}", running.address);
    ExternalProcessorClient::connect(address)
        .await
        .expect("it listens")
        .max_decoding_message_size(64 << 20)
}

/// One request's stream.
struct Asking {
    messages: UnboundedSender<ProcessingRequest>,
    answers: Streaming<ProcessingResponse>,
    observes: bool,
}

impl Asking {
    async fn begin(client: &mut ExternalProcessorClient<Channel>) -> Self {
        let (messages, stream) = unbounded_channel();
        let stream = UnboundedReceiverStream::new(stream);
        let answers = client.process(stream).await.expect("a stream").into_inner();
        Self { messages, answers, observes: false }
    }

    fn send(&self, request: Ask) {
        let message = ProcessingRequest {
            request: Some(request),
            observability_mode: self.observes,
            ..ProcessingRequest::default()
        };
        self.messages.send(message).expect("it is open");
    }

    async fn next(&mut self) -> Option<Answer> {
        self.answers.message().await.expect("no fault").and_then(|it| it.response)
    }

    /// A PUT of a contact: whether its body is asked for, and how.
    async fn head(&mut self, length: Option<usize>) -> BodySendMode {
        let length = length.map(|it| it.to_string());
        let fields = [
            (":method", "PUT"),
            (":path", CONTACT),
            (":authority", "proxy.local:8080"),
            ("content-type", "application/atom+xml"),
        ];
        let fields = fields.into_iter().chain(length.as_deref().map(|it| ("content-length", it)));
        self.send(Ask::RequestHeaders(head(fields)));
        let answer = self.answers.message().await.expect("no fault").expect("an answer");
        assert!(matches!(answer.response, Some(Answer::RequestHeaders(_))), "{answer:?}");
        let mode = answer.mode_override.expect("a mode").request_body_mode;
        BodySendMode::try_from(mode).expect("a known one")
    }

    fn body(&self, body: &[u8]) {
        self.send(Ask::RequestBody(HttpBody {
            body: body.to_vec(),
            end_of_stream: true,
            ..HttpBody::default()
        }));
    }

    /// The report on an answer with this status.
    async fn report(&mut self, status: &str) -> String {
        self.send(Ask::ResponseHeaders(head([(":status", status)])));
        let Some(Answer::ResponseHeaders(head)) = self.next().await else { panic!("no head") };
        let mutation = head.response.expect("something to do").header_mutation.expect("of fields");
        let header = mutation.set_headers.into_iter().next().and_then(|it| it.header).expect("one");
        assert_eq!(header.key, "optin-proxy");
        String::from_utf8(header.raw_value).expect("text")
    }
}

fn head<'f>(fields: impl IntoIterator<Item = (&'f str, &'f str)>) -> HttpHeaders {
    let field = |(key, value): (&str, &str)| HeaderValue {
        key: key.into(),
        raw_value: value.as_bytes().to_vec(),
        ..HeaderValue::default()
    };
    let headers = fields.into_iter().map(field).collect();
    HttpHeaders { headers: Some(HeaderMap { headers }), ..HttpHeaders::default() }
}

/// The body to be sent in the place of the client's, and its length as the field says it.
fn edited(answer: Option<Answer>) -> Option<(Vec<u8>, Option<String>)> {
    let Some(Answer::RequestBody(body)) = answer else { panic!("no answer to a body: {answer:?}") };
    let CommonResponse { header_mutation, body_mutation, .. } = body.response?;
    let Some(Mutation::Body(body)) = body_mutation?.mutation else { panic!("not a whole body") };
    let fields = header_mutation.map(|it| it.set_headers).unwrap_or_default();
    let length =
        fields.into_iter().filter_map(|it| it.header).find(|it| it.key == "content-length");
    Some((body, length.map(|it| String::from_utf8(it.raw_value).expect("a number"))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_comes_back_consistent_with_its_length_and_the_answer_with_a_report() {
    let running = serve(&[]);
    let mut client = client(&running).await;
    for (length, mode) in
        [(Some(RECIPE.len()), BodySendMode::Buffered), (None, BodySendMode::BufferedPartial)]
    {
        let mut asking = Asking::begin(&mut client).await;
        assert_eq!(asking.head(length).await, mode);
        asking.body(RECIPE);
        let (body, counted) = edited(asking.next().await).expect("another body");
        assert_eq!(body, RECIPE_OUT);
        // A length that nobody announced is not made up.
        assert_eq!(counted, length.map(|_| RECIPE_OUT.len().to_string()));
        let report = asking.report("204").await;
        assert_eq!(report, "findings=2, rewritten=2, attempts=1, outcome=rewritten");
    }
    // What there is nothing to change in stays Envoy's own.
    let mut asking = Asking::begin(&mut client).await;
    asking.head(Some(UNDECLARED.len())).await;
    asking.body(UNDECLARED);
    assert_eq!(edited(asking.next().await), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_contact_write_or_too_long_is_not_asked_for() {
    let running = serve(&["sanitize.max_body=64KiB"]);
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    assert_eq!(asking.head(Some(65_537)).await, BodySendMode::None);
    assert!(asking.report("204").await.ends_with("outcome=uninspected"));
    let mut asking = Asking::begin(&mut client).await;
    asking.send(Ask::RequestHeaders(head([(":method", "GET"), (":path", CONTACT)])));
    let answer = asking.answers.message().await.expect("no fault").expect("an answer");
    assert_eq!(answer.mode_override.expect("a mode").request_body_mode, BodySendMode::None as i32);
}

/// Regression: without a length that was announced, it was looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_turns_out_too_long_is_not_looked_at() {
    for (setting, is_rejected) in [("forward", false), ("reject", true)] {
        let uninspectable = format!("sanitize.uninspectable={setting}");
        let limits = ["sanitize.max_body=2KiB", "limits.max_buffered=64KiB", &uninspectable];
        let running = serve(&limits);
        let mut client = client(&running).await;
        // The last one is longer than any message may be.
        for length in [2_048, 2_049, 70_000] {
            let mut asking = Asking::begin(&mut client).await;
            assert_eq!(asking.head(None).await, BodySendMode::BufferedPartial);
            let spaces = vec![b' '; length - RECIPE.len()];
            asking.body(&[RECIPE, &spaces].concat());
            let refused = match asking.next().await {
                Some(Answer::ImmediateResponse(refusal)) => refusal.status.map(|it| it.code),
                Some(answer) => {
                    assert_eq!(edited(Some(answer)).is_some(), length == 2_048);
                    None
                }
                // In order, which Envoy takes for a leave to go on.
                None => None,
            };
            let is_refused = is_rejected && length > 2_048;
            assert_eq!(refused, is_refused.then_some(413), "{setting} {length}");
        }
    }
}

/// Regression: the stream ended in order, which Envoy takes for a leave to go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_cannot_be_read_ends_its_stream_with_an_error() {
    let running = serve(&["sanitize.max_body=1KiB", "limits.max_buffered=64KiB"]);
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    let long = "x".repeat(70_000);
    asking.send(Ask::RequestHeaders(head([(":method", "PUT"), (":path", CONTACT), ("x", &long)])));
    let status = asking.answers.message().await.expect_err("it cannot be read");
    assert_eq!(status.code(), Code::OutOfRange);
}

/// Regression: it was waited for without end, and so was a stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_says_nothing_is_closed_and_does_not_hold_up_a_stop() {
    let running = serve(&["limits.header_timeout=1s", "listen.drain_timeout=1h"]);
    let mut silent = Client::connect(running.address).await;
    assert!(silent.is_closed().await);
    let running = serve(&["limits.header_timeout=1h", "listen.drain_timeout=1h"]);
    let mut silent = Client::connect(running.address).await;
    // It is there before the stop: those of the same listener are served in their order.
    client(&running).await;
    running.signal("TERM");
    assert!(silent.is_closed().await);
    assert_eq!(running.finish().0.code(), Some(0));
}

/// Regression: it had no report, and its line said that the API had been asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rejected_says_so_as_serve_does() {
    let running = serve(&["sanitize.max_body=64KiB", "sanitize.uninspectable=reject"]);
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    let fields = [(":method", "PUT"), (":path", CONTACT), ("content-length", "65537")];
    asking.send(Ask::RequestHeaders(head(fields)));
    let Some(Answer::ImmediateResponse(refusal)) = asking.next().await else {
        panic!("it is not rejected")
    };
    assert_eq!(refusal.status.expect("a status").code, 413);
    let fields =
        refusal.headers.expect("fields").set_headers.into_iter().filter_map(|it| it.header);
    let report = fields.into_iter().find(|field| field.key == "optin-proxy").expect("a report");
    let expected = b"findings=0, rewritten=0, attempts=0, outcome=uninspected";
    assert_eq!(report.raw_value, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_watches_gets_no_answer_and_is_counted_all_the_same() {
    let running = serve(&[]);
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    asking.observes = true;
    let fields = [(":method", "PUT"), (":path", CONTACT)];
    asking.send(Ask::RequestHeaders(head(fields)));
    asking.body(RECIPE);
    drop(asking.messages);
    assert!(asking.answers.message().await.expect("no fault").is_none());
    running.signal("TERM");
    let (status, log) = running.finish();
    assert_eq!(status.code(), Some(0));
    assert_eq!(log.matches("\"message\":\"mismatch\"").count(), 2, "{log}");
    assert!(log.contains("\"outcome\":\"observed\""), "{log}");
}

/// Regression: what was read of a body counted until it was whole, and not for as long as it was kept; and a head for which
/// there was no room went on uninspected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_together_take_no_more_memory_than_the_limit() {
    let mut running = serve(&["sanitize.max_body=100KiB", "limits.max_buffered=100KiB"]);
    let admin = running.admin();
    let mut client = client(&running).await;
    let spaces = vec![b' '; 60 * 1024];
    let body = [RECIPE, &spaces].concat();
    // The first one holds its part until its answer has come.
    let mut first = Asking::begin(&mut client).await;
    first.head(Some(body.len())).await;
    first.body(&body);
    assert!(edited(first.next().await).is_some());
    for _ in 0..3 {
        let mut asking = Asking::begin(&mut client).await;
        assert_eq!(asking.head(Some(body.len())).await, BodySendMode::Buffered, "heads go on");
        asking.body(&body);
        let Some(Answer::ImmediateResponse(refusal)) = asking.next().await else {
            panic!("no refusal")
        };
        assert_eq!(refusal.status.expect("one").code, 503);
        let fields = refusal.headers.expect("some").set_headers;
        let mut names = fields.iter().filter_map(|it| it.header.as_ref()).map(|it| &*it.key);
        assert!(names.any(|name| name == "retry-after"));
        assert!(asking.next().await.is_none(), "it is said once");
    }
    let asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let metrics = Client::connect(admin).await.ask(asked).await.body;
    let metrics = String::from_utf8(metrics).expect("text");
    assert!(
        metrics.contains("optin_proxy_problems_total{problem=\"overloaded\"} 3\n"),
        "{metrics}"
    );
    // Who only watches is not refused anything, but it is counted that nobody looked.
    let mut watching = Asking::begin(&mut client).await;
    watching.observes = true;
    watching.send(Ask::RequestHeaders(head([(":method", "PUT"), (":path", CONTACT)])));
    watching.body(&body);
    assert!(watching.next().await.is_none());
    let metrics = Client::connect(admin).await.ask(asked).await.body;
    let metrics = String::from_utf8(metrics).expect("text");
    assert!(
        metrics.contains("optin_proxy_problems_total{problem=\"overloaded\"} 4\n"),
        "{metrics}"
    );
    assert!(first.report("204").await.ends_with("outcome=rewritten"));
    drop(first);
    // Then there is room again, as often as one comes after the other.
    for _ in 0..5 {
        let edited = loop {
            let mut asking = Asking::begin(&mut client).await;
            asking.head(Some(body.len())).await;
            asking.body(&body);
            match asking.next().await {
                // The one before is just about to end.
                Some(Answer::ImmediateResponse(_)) => {}
                answer => break edited(answer),
            }
        };
        assert_eq!(edited.expect("another body").0, [RECIPE_OUT, &spaces].concat());
    }
}

/// Regression: only what came was counted, and packed bodies took a thousand times as much.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_body_unpacks_to_counts_too() {
    let running = serve(&["sanitize.max_body=100KiB", "limits.max_buffered=100KiB"]);
    let mut client = client(&running).await;
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&[RECIPE, &vec![b' '; 60 * 1024]].concat()).expect("memory");
    let body = packed.finish().expect("memory");
    let fields = [
        (":method", "PUT"),
        (":path", CONTACT),
        ("content-type", "application/atom+xml"),
        ("content-encoding", "gzip"),
    ];
    let mut asked = Vec::new();
    for _ in 0..2 {
        let mut asking = Asking::begin(&mut client).await;
        asking.send(Ask::RequestHeaders(head(fields)));
        assert!(matches!(asking.next().await, Some(Answer::RequestHeaders(_))));
        asking.body(&body);
        asked.push((asking.next().await, asking));
    }
    let [(first, _held), (second, _)] = &asked[..] else { panic!("two") };
    assert!(matches!(first, Some(Answer::RequestBody(_))), "{first:?}");
    let Some(Answer::ImmediateResponse(refusal)) = second else { panic!("{second:?}") };
    assert_eq!(refusal.status.as_ref().expect("one").code, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_lets_streams_come_to_their_end() {
    let running = serve(&[]);
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    asking.head(Some(RECIPE.len())).await;
    running.signal("TERM");
    // The listener goes at once.
    closed(running.address).await;
    asking.body(RECIPE);
    assert!(edited(asking.next().await).is_some());
    assert!(asking.report("204").await.ends_with("outcome=rewritten"));
    drop((asking, client));
    let (status, log) = running.finish();
    assert_eq!(status.code(), Some(0));
    assert!(log.contains("\"message\":\"stopped\""), "{log}");
}

/// Regression: it was not told, and an Envoy asked on until the process was stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_connections_after_what_is_on_them() {
    let mut running = serve(&[]);
    let admin = running.admin();
    let mut client = client(&running).await;
    let mut asking = Asking::begin(&mut client).await;
    asking.head(Some(RECIPE.len())).await;
    let mut silent = Http2::connect(running.address, 65_535).await;
    let drain = b"POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(Client::connect(admin).await.ask(drain).await.status, 200);
    let told = silent.next().await.expect("a word before the end");
    assert_eq!((told.kind, told.code()), (GOAWAY, 0));
    while silent.next().await.is_some() {}
    asking.body(RECIPE);
    assert!(edited(asking.next().await).is_some());
    assert!(asking.report("204").await.ends_with("outcome=rewritten"));
}

/// Regression: they were told as changed, and were not.
#[test]
fn keys_that_are_heeded_at_the_start_only_are_told_as_such() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("proxy.toml");
    let path = file.to_str().expect("text");
    std::fs::write(&file, "[limits]\n").expect("written");
    let arguments = ["ext-proc", "-c", path, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();
    let changed = "[limits]\nidle_timeout = \"9s\"\nmax_buffered = \"9MiB\"\nmax_requests = 9\nbody_timeout = \"9s\"\n";
    std::fs::write(&file, changed).expect("written");
    let reload = b"POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let told = runtime.expect("a runtime").block_on(async {
        let answer = Client::connect(admin).await.ask(reload).await;
        String::from_utf8(answer.body).expect("text")
    });
    for key in ["idle_timeout", "max_buffered", "max_requests"] {
        let (_, told) = told.split_once(key).expect(key);
        let told = told.split("limits.").next().unwrap_or_default();
        assert!(told.contains("(heeded at the next start only)"), "{key}: {told}");
    }
    assert_eq!(told.matches("(heeded").count(), 3, "{told}");
}

#[test]
fn huge_pages_are_refused_by_a_processor_too() {
    assert!(serve(&[]).refuses_huge_pages());
}
