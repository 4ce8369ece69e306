//! Contact writes on their way through the proxy.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{
    BARE, CONTACT, CONTACTS, RECIPE, RECIPE_OUT, UNDECLARED, answer, no_content, put, request,
};

async fn origin() -> Origin {
    Origin::start([Reply::Write(no_content())]).await
}

#[tokio::test]
async fn an_inconsistent_update_arrives_consistent() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&put(RECIPE)).await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.report(), "findings=2, rewritten=2, attempts=1, outcome=rewritten");
    let arrived = origin.request();
    assert_eq!(arrived.body, RECIPE_OUT);
    assert_eq!(arrived.fields("content-length"), [RECIPE_OUT.len().to_string()]);
    assert_eq!(proxy.metric("optin_proxy_mismatches_total{kind=\"list_differs\"}"), 2.0);
    assert_eq!(proxy.metric("optin_proxy_edits_total"), 2.0);
    assert_eq!(proxy.metric("optin_proxy_bodies_total{result=\"rewritten\",reason=\"\"}"), 1.0);
}

#[tokio::test]
async fn a_create_is_rewritten_too_and_paths_may_be_in_any_case_with_a_slash_at_the_end() {
    for (method, target) in [
        ("POST", CONTACTS.to_owned()),
        ("POST", format!("{CONTACTS}/")),
        ("PUT", CONTACT.to_uppercase()),
        ("PUT", format!("{CONTACT}/")),
        ("PUT", "/WS/Customers/jo%40example.org/Contacts/12?x=1".to_owned()),
        ("PUT", "//ws/customers/joesflowers//contacts/1/".to_owned()),
    ] {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&request(method, &target, "", RECIPE)).await;
        assert_eq!(answer.outcome(), "rewritten", "{method} {target}");
        let arrived = origin.request();
        assert_eq!(arrived.body, RECIPE_OUT);
        assert!(arrived.head.starts_with(&format!("{method} {target} HTTP/1.1\r\n")));
    }
}

#[tokio::test]
async fn what_writes_no_contact_is_not_looked_at() {
    for (method, target) in [
        ("POST", CONTACT),
        ("PUT", CONTACTS),
        ("PATCH", CONTACT),
        ("DELETE", CONTACT),
        ("GET", CONTACT),
        ("POST", "/ws/customers/joesflowers/activities"),
        ("PUT", "/ws/customers/joesflowers/lists/1"),
        ("PUT", "/ws/customers/joesflowers/contacts/1/more"),
        ("PUT", "/other/ws/customers/joesflowers/contacts/1"),
        ("PUT", "/ws/customers//contacts/1"),
    ] {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&request(method, target, "", RECIPE)).await;
        assert_eq!(answer.report(), "(none)", "{method} {target}");
        assert_eq!(origin.request().body, RECIPE, "{method} {target}");
    }
}

#[tokio::test]
async fn the_report_says_what_became_of_a_body() {
    let campaign = include_bytes!("../corpus/in/campaign.xml");
    let cases: &[(&[u8], &[&str], &str)] = &[
        (BARE, &[], "findings=0, rewritten=0, attempts=1, outcome=clean"),
        (UNDECLARED, &[], "findings=1, rewritten=0, attempts=1, outcome=observed"),
        (
            RECIPE,
            &["sanitize.mode=observe"],
            "findings=2, rewritten=0, attempts=1, outcome=observed",
        ),
        (RECIPE, &["sanitize.mode=off"], "(none)"),
        (RECIPE, &["log.report_header=false"], "(none)"),
        (b"<entry>", &[], "findings=0, rewritten=0, attempts=1, outcome=uninspected"),
        (campaign, &[], "(none)"),
    ];
    for (body, settings, report) in cases {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, settings).await;
        let answer = proxy.ask(&put(body)).await;
        assert_eq!(answer.report(), *report, "{settings:?}");
        if !settings.contains(&"log.report_header=false") {
            assert_eq!(origin.request().body, *body, "{settings:?}");
        }
    }
}

#[tokio::test]
async fn a_report_of_the_upstreams_own_is_not_taken_for_ours() {
    let forged = answer("200 OK", "optin-proxy: outcome=rescued\r\n", b"");
    let origin = Origin::start([Reply::Write(forged)]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    assert_eq!(proxy.ask(&put(BARE)).await.outcome(), "clean");
}

#[tokio::test]
async fn ids_under_the_host_that_the_client_used_are_restored() {
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let body = include_bytes!("../corpus/in/own-origin.xml");
    let out = include_bytes!("../corpus/out/own-origin.xml");
    let asked =
        String::from_utf8(put(body)).expect("ASCII").replace("proxy.local:8080", "127.0.0.1:8080");
    let asked = asked.replacen("127.0.0.1:8080\r\n", "127.0.0.1:8080\r\nX: y\r\n", 1);
    let answer = proxy.ask(asked.as_bytes()).await;
    assert_eq!(answer.report(), "findings=3, rewritten=3, attempts=1, outcome=rewritten");
    assert_eq!(origin.request().body, out);
}

#[tokio::test]
async fn compressed_bodies_are_edited_within_their_coding() {
    let gzip = {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(RECIPE).expect("in memory");
        encoder.finish().expect("in memory")
    };
    let zlib = {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(RECIPE).expect("in memory");
        encoder.finish().expect("in memory")
    };
    let raw = {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(RECIPE).expect("in memory");
        encoder.finish().expect("in memory")
    };
    for (coding, body) in
        [("x-gzip", gzip.clone()), ("gzip", gzip), ("deflate", zlib), ("Deflate", raw)]
    {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        let header = format!("Content-Encoding: {coding}\r\n");
        let answer = proxy.ask(&request("PUT", CONTACT, &header, &body)).await;
        assert_eq!(answer.outcome(), "rewritten", "{coding}");
        let arrived = origin.request();
        assert_eq!(arrived.fields("content-encoding"), [coding]);
        assert_eq!(arrived.fields("content-length"), [arrived.body.len().to_string()]);
        let mut decoded = Vec::new();
        use std::io::Read;
        match coding {
            "gzip" | "x-gzip" => {
                flate2::read::GzDecoder::new(&arrived.body[..]).read_to_end(&mut decoded)
            }
            "deflate" => {
                flate2::read::ZlibDecoder::new(&arrived.body[..]).read_to_end(&mut decoded)
            }
            _ => flate2::read::DeflateDecoder::new(&arrived.body[..]).read_to_end(&mut decoded),
        }
        .expect("well encoded");
        assert_eq!(decoded, RECIPE_OUT, "{coding}");
    }
}

#[tokio::test]
async fn a_body_is_inspected_however_its_fields_are_spelt_that_say_how_to_read_it() {
    for field in [
        "Content-Encoding: identity",
        "Content-Encoding: identity, ",
        "Content-Type: application/atom+xml; Charset=\"UTF-8\"",
    ] {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        let length = RECIPE.len();
        let head = format!(
            "PUT {CONTACT} HTTP/1.1\r\nHost: p\r\n{field}\r\nContent-Length: {length}\r\n\r\n"
        );
        let answer = proxy.ask(&[head.as_bytes(), RECIPE].concat()).await;
        assert_eq!(answer.outcome(), "rewritten", "{field}");
        assert_eq!(origin.request().body, RECIPE_OUT, "{field}");
    }
}

#[tokio::test]
async fn what_follows_a_deflated_body_is_not_lost() {
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
    zlib.write_all(RECIPE).expect("in memory");
    let zlib = zlib.finish().expect("in memory");
    let raw = &zlib[2..zlib.len() - 4];
    for packed in [&zlib, raw] {
        let body = [packed, b"behind"].concat();
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        let answer =
            proxy.ask(&request("PUT", CONTACT, "Content-Encoding: deflate\r\n", &body)).await;
        assert_eq!(answer.outcome(), "uninspected");
        assert_eq!(origin.request().body, body);
    }
}

#[tokio::test]
async fn a_compressed_body_without_a_finding_keeps_its_bytes() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
    encoder.write_all(BARE).expect("in memory");
    let body = encoder.finish().expect("in memory");
    let origin = origin().await;
    let proxy = Proxy::before(&origin, &[]).await;
    let answer = proxy.ask(&request("PUT", CONTACT, "Content-Encoding: gzip\r\n", &body)).await;
    assert_eq!(answer.outcome(), "clean");
    assert_eq!(origin.request().body, body);
}

#[tokio::test]
async fn what_cannot_be_inspected_is_passed_on_or_refused_and_counted_with_its_reason() {
    let mut bomb = GzEncoder::new(Vec::new(), Compression::best());
    bomb.write_all(&vec![b' '; 2 << 20]).expect("in memory");
    let bomb = bomb.finish().expect("in memory");
    let mut cut = GzEncoder::new(Vec::new(), Compression::best());
    cut.write_all(RECIPE).expect("in memory");
    let mut cut = cut.finish().expect("in memory");
    cut.truncate(cut.len() - 9);
    let deep = [b"<a>".repeat(300), b"</a>".repeat(300)].concat();
    let cases: &[(&str, &[u8], &str, u16)] = &[
        ("", b"<entry>", "malformed", 415),
        ("", b"<!DOCTYPE a><a/>", "doctype", 415),
        ("", b"\xFF\xFE<\0a\0/\0>\0", "encoding", 415),
        ("", &deep, "depth", 413),
        ("Content-Encoding: br\r\n", RECIPE, "content_encoding", 415),
        ("Content-Encoding: gzip, gzip\r\n", RECIPE, "content_encoding", 415),
        ("Content-Encoding: gzip\r\n", RECIPE, "content_encoding", 415),
        ("Content-Encoding: gzip\r\n", &cut, "content_encoding", 415),
        ("Content-Encoding: gzip\r\n", &bomb, "too_large", 413),
        ("", &[b'x'; (1 << 20) + 1], "too_large", 413),
    ];
    for (headers, body, reason, status) in cases {
        let origin = origin().await;
        let asked = request("PUT", CONTACT, headers, body);
        let series =
            format!("optin_proxy_bodies_total{{result=\"uninspected\",reason=\"{reason}\"}}");

        let proxy = Proxy::before(&origin, &[]).await;
        let answer = proxy.ask(&asked).await;
        assert_eq!((answer.status, answer.outcome()), (204, "uninspected"), "{reason}");
        assert_eq!(origin.request().body, *body, "{reason}");
        assert_eq!(proxy.metric(&series), 1.0, "{reason}");

        let strict = Proxy::before(&origin, &["sanitize.uninspectable=reject"]).await;
        let answer = strict.ask(&asked).await;
        assert_eq!(answer.status, *status, "{reason}");
        assert_eq!(answer.problem(), format!("body-{}", reason.replace('_', "-")));
        assert_eq!(answer.report(), "findings=0, rewritten=0, attempts=0, outcome=uninspected");
        assert_eq!(origin.requests().len(), 1, "{reason}: nothing more arrived");
        assert_eq!(strict.metric(&series), 1.0, "{reason}");
    }
}

#[tokio::test]
async fn who_only_observes_refuses_nothing() {
    let origin = origin().await;
    let settings = ["sanitize.mode=observe", "sanitize.uninspectable=reject"];
    let proxy = Proxy::before(&origin, &settings).await;
    let answer = proxy.ask(&put(b"<entry>")).await;
    assert_eq!((answer.status, answer.outcome()), (204, "uninspected"));
}

#[tokio::test]
async fn the_largest_body_is_inspected_and_one_byte_more_is_not() {
    let length = RECIPE.len();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(RECIPE).expect("in memory");
    let gzip = gzip.finish().expect("in memory");
    for (cap, outcome) in
        [(length, "rewritten"), (length + 1, "rewritten"), (length - 1, "uninspected")]
    {
        let setting = format!("sanitize.max_body={cap}");
        let chunked = [
            format!("PUT {CONTACT} HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n")
                .as_bytes(),
            RECIPE,
            b"\r\n0\r\n\r\n",
        ]
        .concat();
        for asked in [put(RECIPE), chunked] {
            let origin = origin().await;
            let proxy = Proxy::before(&origin, &[&setting]).await;
            assert_eq!(proxy.ask(&asked).await.outcome(), outcome, "{cap}");
            let expected = if outcome == "rewritten" { RECIPE_OUT } else { RECIPE };
            assert_eq!(origin.request().body, expected, "{cap}");
        }
        // What counts of a packed body is what it unpacks to.
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[&setting]).await;
        let packed = request("PUT", CONTACT, "Content-Encoding: gzip\r\n", &gzip);
        assert_eq!(proxy.ask(&packed).await.outcome(), outcome, "{cap}, packed");
    }
}

#[tokio::test]
async fn digests_of_a_changed_body_are_dropped_and_those_of_an_unchanged_one_kept() {
    let digests = "Content-MD5: a\r\nDigest: SHA-256=b\r\nContent-Digest: sha-256=:c:\r\nRepr-Digest: sha-256=:d:\r\n";
    for (body, kept) in [(RECIPE, 0), (BARE, 1)] {
        let origin = origin().await;
        let proxy = Proxy::before(&origin, &[]).await;
        proxy.ask(&request("PUT", CONTACT, digests, body)).await;
        let arrived = origin.request();
        for name in ["content-md5", "digest", "content-digest", "repr-digest"] {
            assert_eq!(arrived.fields(name).len(), kept, "{name}");
        }
    }
}
