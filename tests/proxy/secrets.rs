//! Credentials and personal data get nowhere but upstream.

use crate::support::binary::{Running, command, run_command};
use crate::support::client::Client;
use crate::support::http2::{END_HEADERS, END_STREAM, HEADERS, Http2, fields};
use crate::support::origin::{Origin, Reply};
use crate::support::tls::{Authority, connect};
use crate::support::{REFUSAL, answer, no_content, refusal, request};

/// Every one of these stands in some request or answer below, and must stand in no output.
const PLANTED: [&str; 12] = [
    "s3cr3t-basic",
    "s3cr3t-token",
    "s3cr3t-key",
    "s3cr3t-cookie",
    "s3cr3t-nonce",
    "s3cr3t-custom",
    "jane.roe@example.org",
    "jane.roe%40example.org",
    "Jane Roe",
    "s3cr3t-answer",
    "s3cr3t-value",
    "s3cr3t-path",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planted_secrets_are_in_no_log_and_no_error() {
    let refused = answer(
        "400 Bad Request",
        "X: s3cr3t-answer\r\n",
        format!("{REFUSAL} jane.roe@example.org").as_bytes(),
    );
    let origin = Origin::start([
        Reply::Write(no_content()),
        Reply::Write(refusal()),
        Reply::Write(no_content()),
        Reply::Write(refused),
        Reply::WriteAndClose(b"s3cr3t-answer\r\n\r\n".to_vec()),
    ])
    .await;
    let url = origin.url();
    let running = Running::start(&mut command(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--upstream",
        &url,
        "--set",
        "log.level=trace",
        "--set",
        "retry.base_delay=0s",
        "--set",
        "retry.max_attempts=2",
    ]));
    let fields = "Authorization: Basic s3cr3t-basic\r\nCookie: a=s3cr3t-cookie\r\nX-Custom: s3cr3t-custom\r\n\
                  User-Agent: Shop/2 (jane.roe@example.org)\r\nProxy-Authorization: Basic s3cr3t-basic\r\n";
    let body = |declared: &str| {
        format!(
            "<entry xmlns=\"http://www.w3.org/2005/Atom\"><Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\">\
             <EmailAddress>jane.roe@example.org</EmailAddress><Name>Jane Roe</Name>\
             <OptInSource>{declared}</OptInSource><ContactLists>\
             <ContactList id=\"http://x/jane.roe@example.org\"><OptInSource>s3cr3t-value</OptInSource></ContactList>\
             </ContactLists></Contact></entry>"
        )
    };
    let path = "/ws/customers/jane.roe%40example.org/contacts/1?access_token=s3cr3t-token&api_key=s3cr3t-key&oauth_nonce=s3cr3t-nonce";
    let mut statuses = Vec::new();
    for (target, declared) in [
        (path, "ACTION_BY_CONTACT"),
        ("/ws/customers/jane.roe@example.org/contacts/1", "ACTION_BY_CONTACT"),
        ("/ws/customers/x/contacts/jane.roe@example.org", "ACTION_BY_CUSTOMER"),
        ("/s3cr3t-path/jane.roe@example.org", "s3cr3t-value"),
    ] {
        let asked = request("PUT", target, fields, body(declared).as_bytes());
        statuses.push(Client::connect(running.address).await.ask(&asked).await.status);
    }
    let malformed = request("PUT", path, fields, b"<Name>Jane Roe & s3cr3t-value</Name>");
    let answered = Client::connect(running.address).await.ask(&malformed).await;
    statuses.push(answered.status);
    assert_eq!(statuses, [204, 204, 400, 502, 502]);
    assert!(!String::from_utf8_lossy(&answered.body).contains("s3cr3t"));
    running.signal("TERM");
    let (_, log) = running.finish();
    for secret in PLANTED {
        let found = log.lines().find(|line| line.contains(secret));
        assert_eq!(found, None, "{secret}");
    }

    // What may be known is there, one canonical line a request and one event a finding.
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect();
    let of =
        |message: &str| lines.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let requests = of("request");
    assert_eq!(requests.len(), 5);
    assert_eq!(requests[1]["outcome"], "rescued");
    assert_eq!(requests[1]["attempts"], 2);
    assert_eq!(requests[1]["route"], "/ws/customers/{user}/contacts/{id}");
    assert_eq!(requests[1]["account"], "(e-mail address)");
    assert_eq!(requests[2]["account"], "x");
    assert_eq!(requests[2]["outcome"], "refused");
    assert_eq!(requests[3]["route"], "other");
    assert_eq!(requests[4]["reason"], "malformed");
    let mismatches = of("mismatch");
    assert_eq!(mismatches.len(), 3);
    for field in
        ["kind", "account", "contact_id", "list_id", "was", "now", "request_id", "user_agent"]
    {
        assert!(mismatches[0][field].is_string(), "{field}: {}", mismatches[0]);
    }
    assert_eq!(mismatches[0]["now"], "ACTION_BY_CONTACT");
    assert_eq!(mismatches[0]["user_agent"], "Shop/2 (e-mail address)");
    assert_eq!(mismatches[0]["request_id"], requests[0]["request_id"]);
}

/// The HTTP/2 library logs heads at a level of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_of_an_http_2_client_is_logged_at_any_level() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let url = origin.url();
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--upstream", &url];
    let running = Running::start(command(&arguments).args(["--set", "log.level=trace"]));
    let mut client = Http2::connect(running.address, 65_535).await;
    let head = [
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/?access_token=s3cr3t-query"),
        (":authority", "p"),
        ("authorization", "Bearer s3cr3t-token"),
        ("cookie", "s3cr3t-cookie"),
    ];
    client.send(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&head)).await;
    client.fate(1).await;
    drop(client);
    running.signal("TERM");
    let (_, log) = running.finish();
    assert_eq!(log.lines().find(|line| line.contains("s3cr3t")), None);
    assert_eq!(log.lines().find(|line| line.contains("\"target\":\"h2")), None);
}

const API: &str = "api.constantcontact.com";

/// A word that stands nowhere but in one place of one message.
fn secret(place: &str) -> String {
    format!("s3cr3t-{place}")
}

/// Places of a request's head; `{}` is where the secret goes.
const PLACES: [(&str, &str); 22] = [
    ("authorization", "Authorization: Bearer {}"),
    ("authorization-oauth", "Authorization: OAuth oauth_token=\"{}\", oauth_signature=\"x\""),
    ("cookie", "Cookie: session={}"),
    ("referer", "Referer: http://shop.example/{}?email=jane.roe@example.org"),
    ("user-agent", "User-Agent: Shop ({}@example.org)"),
    ("origin", "Origin: http://{}.example"),
    ("from", "From: {}@example.org"),
    ("etag", "If-Match: \"{}\""),
    ("custom", "X-Contact-Email: {}@example.org"),
    ("field-name", "X-{}: x"),
    ("connection", "Connection: x-{}"),
    ("hop", "Keep-Alive: {}"),
    ("trailer", "Trailer: x-{}"),
    ("expect", "Expect: {}"),
    ("content-type", "Content-Type: application/atom+xml; boundary={}"),
    ("charset", "Content-Type: application/atom+xml; charset={}"),
    ("coding", "Content-Encoding: {}"),
    ("forwarded", "X-Forwarded-For: {}"),
    ("via", "Via: 1.1 {}"),
    ("request-id", "Traceparent: {}"),
    ("range", "Range: {}"),
    ("digest", "Content-MD5: {}"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_in_any_place_is_in_no_log_no_metric_and_no_answer_of_the_proxys_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    // An upstream that nobody trusts, with a certificate that says more than it should.
    let authority = Authority::new();
    let named = format!("{}.example", secret("certificate"));
    let untrusted =
        Origin::start_with([Reply::Write(no_content())], Some(authority.acceptor(&named, &[])))
            .await;
    let auth = write("auth", &format!("proxy:{}\n", secret("proxy-auth")));
    let config = write(
        "proxy.toml",
        &format!(
            "[listen]\nproxy_auth = \"file:{auth}\"\n[intercept]\nca_dir = \"{}\"\n\
             [upstream]\nurl = \"https://localhost:{}\"\nca_file = \"{}\"\n[log]\nlevel = \"trace\"\n",
            folder.path().join("ca").display(),
            untrusted.address.port(),
            authority.file().display(),
        ),
    );
    let trail = folder.path().join("audit.jsonl");
    let audit = format!("audit.path={}", trail.display());
    let token = format!("admin.token={}", secret("admin-token-of-16"));
    let mut arguments = vec!["serve", "-c", &config, "--listen", "127.0.0.1:0"];
    arguments.extend(["--admin", "127.0.0.1:0", "--set", &audit, "--set", &token]);
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();

    // By base URL, with a secret in each place, in each part of the target, and in the body.
    let mut asked = 0;
    let mut said = String::new();
    let mut tell = |answer: crate::support::client::Answer| {
        said.push_str(&answer.head);
        said.push_str(&String::from_utf8_lossy(&answer.body));
        asked += 1;
    };
    let target = format!(
        "/ws/customers/{}@example.org/contacts/7?access_token={}&{}=x",
        secret("account"),
        secret("query"),
        secret("query-name")
    );
    let body = format!(
        "<Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\" {name}=\"{value}\">\
         <EmailAddress>{address}</EmailAddress><{element}/><!-- {comment} -->\
         <OptInSource>{source}</OptInSource></Contact>",
        name = secret("attribute-name"),
        value = secret("attribute"),
        address = secret("text"),
        element = secret("element"),
        comment = secret("comment"),
        source = secret("source"),
    );
    for (place, line) in PLACES {
        let line = format!("{}\r\n", line.replace("{}", &secret(place)));
        let bytes = request("PUT", &target, &line, body.as_bytes());
        tell(Client::connect(running.address).await.ask(&bytes).await);
    }
    // Heads that are none, absolute targets, and CONNECT in all its wrong ways.
    for head in [
        format!(
            "GET /{} HTTP/1.1\r\nHost: p\r\n{} x\r\n\r\n",
            secret("bad-path"),
            secret("bad-field")
        ),
        format!("{} / HTTP/1.1\r\n\r\n", secret("method")),
        format!("GET / HTTP/1.1\r\nHost: {}@p\r\n\r\n", secret("host-user")),
        format!("GET http://{}@{API}/x HTTP/1.1\r\nHost: p\r\n\r\n", secret("target-user")),
        format!("CONNECT {}@{API}:443 HTTP/1.1\r\nHost: p\r\n\r\n", secret("connect-user")),
        format!(
            "CONNECT {API}:443 HTTP/1.1\r\nHost: p\r\nProxy-Authorization: Basic {}\r\n\r\n",
            secret("wrong-proxy-auth")
        ),
        format!("GET /{} HTTP/1.1\r\nHost: p\r\nX: {}", secret("half-path"), "x".repeat(20_000)),
    ] {
        tell(Client::connect(running.address).await.ask(head.as_bytes()).await);
    }
    // Through a tunnel.
    let credentials = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        format!("proxy:{}", secret("proxy-auth")),
    );
    let mut client = Client::connect(running.address).await;
    let head =
        format!("CONNECT {API}:443 HTTP/1.1\r\nProxy-Authorization: Basic {credentials}\r\n\r\n");
    client.send(head.as_bytes()).await;
    assert_eq!(client.answer(true).await.status, 200);
    let trusted = folder.path().join("ca/ca.pem");
    let stream = connect(client.stream, API, &trusted, &["http/1.1"]).await.expect("it is trusted");
    let mut client = Client::over(stream);
    let fields = format!("Authorization: Basic {}\r\n", secret("tunnel"));
    let bytes = request("PUT", &target, &fields, body.as_bytes());
    let bytes = String::from_utf8_lossy(&bytes).replace("proxy.local:8080", API);
    let answer = client.ask(bytes.as_bytes()).await;
    assert_eq!((answer.status, answer.problem()), (502, "upstream-certificate-untrusted".into()));
    tell(answer);
    assert_eq!(asked, PLACES.len() + 8);

    let last = b"GET /last HTTP/1.1\r\nHost: p\r\nX-Request-Id: 0123456789abcdef\r\n\r\n";
    Client::connect(running.address).await.ask(last).await;
    let mut shown = String::new();
    while !shown.contains("\"request_id\":\"0123456789abcdef\"") {
        shown.clear();
        for path in ["/metrics", "/config", "/api/stats", "/api/exchanges", "/", "/ca.pem"] {
            let asked = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            let answer = Client::connect(admin).await.ask(asked.as_bytes()).await;
            assert_eq!(answer.status, 200, "{path}");
            shown.push_str(&String::from_utf8_lossy(&answer.body));
        }
        tokio::task::yield_now().await;
    }
    running.signal("TERM");
    let (_, log) = running.finish();
    let checked = run_command(command(&["check", "-c", &config]), b"");
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    let outputs = [
        ("the log", log),
        ("the answers", said),
        ("what operators see", shown),
        ("the audit trail", std::fs::read_to_string(&trail).expect("it is there")),
        ("check", String::from_utf8_lossy(&checked.stdout).into_owned() + &checked.stderr),
    ];
    assert!(outputs[3].1.lines().count() >= PLACES.len(), "each write had a finding");
    let key = std::fs::read_to_string(folder.path().join("ca/issuer.pem")).expect("the key");
    let key = key.lines().find(|line| line.len() > 40).expect("a line of base64");
    for (output, text) in &outputs {
        for hidden in ["s3cr3t", "jane.roe", credentials.as_str(), key] {
            let found = text.lines().find(|line| line.contains(hidden));
            assert_eq!(found, None, "{hidden} in {output}");
        }
    }
    assert!(outputs[0].1.contains("the certificate is for another name"), "{}", outputs[0].1);
}
