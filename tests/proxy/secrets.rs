//! Credentials and personal data get nowhere but upstream.

use crate::support::binary::{Running, command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
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
