//! Messages that two readers could read in two ways: what the upstream gets can be read in one way only, and
//! nothing of one request becomes another.

use crate::support::CONTACT;
use crate::support::answer;
use crate::support::origin::{Origin, Reply, fields};
use crate::support::proxy::Proxy;

/// Wherever this stands in a body, it must stay there.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: p\r\n\r\n";
const CANARY: &str = "GET /canary HTTP/1.1\r\nHost: p\r\n\r\n";

/// What becomes of a request and of the canary behind it on the same connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Refused, with its connection, as it says.
    Closed(u16),
    /// Refused by itself: nothing is left of it.
    Refused(u16),
    /// Passed on with so many bytes of a body, and the canary too.
    Passed(usize),
    /// Passed on, and the connection is closed behind it.
    PassedAlone(usize),
}
use Fate::{Closed, Passed, PassedAlone, Refused};

fn post(head: &str, body: &str) -> String {
    format!("POST /up HTTP/1.1\r\nHost: p\r\n{head}\r\n{body}")
}

fn corpus() -> Vec<(&'static str, String, Fate)> {
    let chunked = "Transfer-Encoding: chunked\r\n";
    let length = SMUGGLED.len();
    vec![
        // Two framings.
        (
            "length, then chunked",
            post(
                &format!("Content-Length: {}\r\n{chunked}", length + 5),
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            PassedAlone(0),
        ),
        (
            "chunked, then length",
            post(
                &format!("{chunked}Content-Length: 4\r\n"),
                &format!("{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n"),
            ),
            PassedAlone(length),
        ),
        (
            "two lengths",
            post(&format!("Content-Length: 0\r\nContent-Length: {length}\r\n"), SMUGGLED),
            Closed(400),
        ),
        ("one length twice", post("Content-Length: 3\r\nContent-Length: 3\r\n", "abc"), Passed(3)),
        (
            "a list of lengths",
            post(&format!("Content-Length: 0, {length}\r\n"), SMUGGLED),
            Closed(400),
        ),
        ("a list of one length", post("Content-Length: 3, 3\r\n", "abc"), Closed(400)),
        // Lengths that are none.
        ("a signed length", post("Content-Length: +3\r\n", "abc"), Closed(400)),
        ("a negative length", post("Content-Length: -3\r\n", "abc"), Closed(400)),
        ("a hexadecimal length", post("Content-Length: 0x3\r\n", "abc"), Closed(400)),
        ("an empty length", post("Content-Length: \r\n", "abc"), Closed(400)),
        (
            "a length beyond 64 bits",
            post("Content-Length: 99999999999999999999\r\n", "abc"),
            Closed(400),
        ),
        // Transfer codings.
        (
            "identity",
            post(&format!("Transfer-Encoding: identity\r\nContent-Length: {length}\r\n"), SMUGGLED),
            Closed(400),
        ),
        (
            "xchunked",
            post(&format!("Transfer-Encoding: xchunked\r\nContent-Length: {length}\r\n"), SMUGGLED),
            Closed(400),
        ),
        ("gzip, chunked", post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), Closed(501)),
        (
            "chunked, identity",
            post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"),
            Closed(400),
        ),
        ("chunked twice", post(&format!("{chunked}{chunked}"), "0\r\n\r\n"), Closed(501)),
        ("CHUNKED", post("Transfer-Encoding: CHUNKED\r\n", "3\r\nabc\r\n0\r\n\r\n"), Passed(3)),
        (
            "a tab before chunked",
            post("Transfer-Encoding:\tchunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
            Passed(3),
        ),
        (
            "a vertical tab before chunked",
            post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"),
            Closed(400),
        ),
        (
            "a space before the colon",
            post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
            Closed(400),
        ),
        ("a folded coding", post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), Closed(400)),
        (
            "an underscore",
            post("Transfer_Encoding: chunked\r\nContent_Length: 5\r\n", ""),
            Closed(400),
        ),
        (
            "chunked in HTTP/1.0",
            format!("POST /up HTTP/1.0\r\nHost: p\r\n{chunked}\r\n0\r\n\r\n"),
            Closed(400),
        ),
        // Chunks.
        (
            "a length that begins with 0",
            post(&format!("Content-Length: 0{length}\r\n"), SMUGGLED),
            Passed(length),
        ),
        (
            "an asterisk",
            "POST * HTTP/1.1\r\nHost: p\r\nContent-Length: 0\r\n\r\n".into(),
            Refused(400),
        ),
        (
            "a target that is an authority",
            "GET p:443 HTTP/1.1\r\nHost: p\r\n\r\n".into(),
            Refused(400),
        ),
        ("an extension", post(chunked, "3;a=b\r\nabc\r\n0\r\n\r\n"), Passed(3)),
        ("an extension with an open quote", post(chunked, "3;a=\"\r\nabc\r\n0\r\n\r\n"), Passed(3)),
        (
            "a size beyond 64 bits",
            post(chunked, "FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"),
            Closed(400),
        ),
        ("a size with 0x", post(chunked, "0x3\r\nabc\r\n0\r\n\r\n"), Closed(400)),
        ("a negative size", post(chunked, "-1\r\nabc\r\n0\r\n\r\n"), Closed(400)),
        ("bare line feeds between chunks", post(chunked, "3\nabc\n0\n\n"), Closed(400)),
        ("a chunk longer than its size", post(chunked, "3\r\nabcd\r\n0\r\n\r\n"), Closed(400)),
        // Heads.
        ("a folded field", post("X: a\r\n b\r\n", ""), Closed(400)),
        ("NUL in a field", post("X: a\0b\r\n", ""), Closed(400)),
        ("a bare CR in a field", post("X: a\rb\r\n", ""), Closed(400)),
        ("an empty name", post(": x\r\n", ""), Closed(400)),
        ("a space in a name", post("X y: x\r\n", ""), Closed(400)),
        ("two hosts", post("Host: q\r\n", ""), Refused(400)),
        // RFC 9112 section 2.2 allows it, and what goes on has CRLF.
        (
            "bare line feeds",
            "POST /up HTTP/1.1\nHost: p\nContent-Length: 3\n\nabc".into(),
            Passed(3),
        ),
        ("HTTP/2.0 on the first line", "POST /up HTTP/2.0\r\nHost: p\r\n\r\n".into(), Closed(400)),
        ("HTTP/1.2", "POST /up HTTP/1.2\r\nHost: p\r\n\r\n".into(), Closed(400)),
        ("a space in the target", "POST /a b HTTP/1.1\r\nHost: p\r\n\r\n".into(), Closed(400)),
        ("a line feed in the target", "POST /a\nb HTTP/1.1\r\nHost: p\r\n\r\n".into(), Closed(400)),
        ("no token for a method", "P(ST /up HTTP/1.1\r\nHost: p\r\n\r\n".into(), Closed(400)),
        // Bodies where some expect none.
        (
            "a GET with a body",
            format!("GET /up HTTP/1.1\r\nHost: p\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"),
            Passed(length),
        ),
        (
            "an upgrade with a body",
            format!(
                "GET /up HTTP/1.1\r\nHost: p\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
            ),
            Passed(length),
        ),
        (
            "a length that Connection names",
            post(&format!("Connection: Content-Length\r\nContent-Length: {length}\r\n"), SMUGGLED),
            Passed(length),
        ),
        (
            "TRACE",
            "TRACE /up HTTP/1.1\r\nHost: p\r\nAuthorization: Basic eA==\r\n\r\n".into(),
            Refused(405),
        ),
        // The same where the body is read ahead.
        (
            "a contact write with two framings",
            format!(
                "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: {}\r\n{chunked}\r\n0\r\n\r\n{SMUGGLED}",
                length + 5
            ),
            PassedAlone(0),
        ),
        (
            "a contact write whose length begins with 0",
            format!(
                "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: 0{length}\r\n\r\n{SMUGGLED}"
            ),
            Passed(length),
        ),
        (
            "a contact write with a list of lengths",
            format!(
                "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: 0, {length}\r\n\r\n{SMUGGLED}"
            ),
            Closed(400),
        ),
        (
            "a refused contact write whose body goes on",
            format!(
                "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nContent-Length: {length}\r\nTransfer_Encoding: x\r\n\r\n{SMUGGLED}"
            ),
            Closed(400),
        ),
    ]
}

#[tokio::test]
async fn no_request_can_be_read_in_two_ways_and_none_poisons_the_next() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b"mine"))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let mut seen = 0;
    for (name, message, fate) in corpus() {
        let mut client = proxy.client().await;
        client.send(format!("{message}{CANARY}").as_bytes()).await;
        let first = client.answer(false).await;
        let second = client.answer(false).await;
        let (status, own, canary) = match fate {
            Closed(status) => (status, None, false),
            Refused(status) => (status, None, true),
            Passed(length) => (200, Some(length), true),
            PassedAlone(length) => (200, Some(length), false),
        };
        assert_eq!(first.status, status, "{name}");
        if own.is_none() {
            first.problem();
        }
        assert_eq!(second.status, if canary { 200 } else { 0 }, "{name}: the canary");
        assert_eq!(first.field("connection"), (!canary).then_some("close"), "{name}");

        let arrived = origin.requests().split_off(seen);
        seen += arrived.len();
        let mut expected: Vec<(&str, usize)> =
            own.map(|length| ("up", length)).into_iter().collect();
        expected.extend(canary.then_some(("canary", 0)));
        let targets: Vec<_> = arrived
            .iter()
            .map(|request| {
                let target = request.head.split(' ').nth(1).expect("a target");
                let is_own = target == "/up" || target == CONTACT;
                (if is_own { "up" } else { target.trim_start_matches('/') }, request.body.len())
            })
            .collect();
        assert_eq!(targets, expected, "{name}");
        for request in &arrived {
            let count = |field: &str| fields(&request.head, field).len();
            assert!(
                count("content-length") + count("transfer-encoding") <= 1,
                "{name}: {}",
                request.head
            );
            assert_eq!(count("host"), 1, "{name}: {}", request.head);
            assert!(
                !request.head.contains('_') && !request.head.contains('\0'),
                "{name}: {}",
                request.head
            );
            assert_eq!(request.head.matches('\n').count(), request.head.matches("\r\n").count());
        }
        // Nor does it wait for somebody on another connection.
        assert_eq!(proxy.ask(CANARY.as_bytes()).await.body, b"mine", "{name}");
        seen += 1;
    }
}

#[tokio::test]
async fn the_path_is_passed_on_byte_for_byte() {
    let origin = Origin::start([Reply::Write(answer("200 OK", "", b""))]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for target in [
        "/a%0d%0aX:%20y",
        "//evil/../x",
        "/a\\b",
        "/a//b/./c?d=%2F&e",
        "/%C3%A4?%00",
        "/a?b?c",
        "*",
    ] {
        let asked = format!("OPTIONS {target} HTTP/1.1\r\nHost: p\r\n\r\n");
        assert_eq!(proxy.ask(asked.as_bytes()).await.status, 200, "{target}");
        let head = origin.requests().pop().expect("it arrived").head;
        assert_eq!(head.lines().next(), Some(&*format!("OPTIONS {target} HTTP/1.1")));
    }
}
