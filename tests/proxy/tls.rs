//! Whom the proxy takes for the API.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::origin::{Origin, Reply, read_head};
use crate::support::proxy::Proxy;
use crate::support::tls::{Authority, own_certificate};
use crate::support::{CONTACTS, GET, RECIPE, RECIPE_OUT, no_content, put, request};

#[tokio::test]
async fn a_private_authority_is_trusted_if_it_is_named_and_no_other() {
    let (ours, other) = (Authority::new(), Authority::new());
    let origin =
        Origin::start_with([Reply::Write(no_content())], Some(ours.acceptor("localhost", &[])))
            .await;
    let url = format!("https://localhost:{}", origin.address.port());
    let ca_file = format!("upstream.ca_file={}", ours.file().display());

    let proxy = Proxy::start(&url, &[&ca_file]).await;
    assert_eq!(proxy.ask(&put(RECIPE)).await.outcome(), "rewritten");
    assert_eq!(origin.request().body, RECIPE_OUT);
    assert_eq!(origin.request().fields("host"), [format!("localhost:{}", origin.address.port())]);

    let wrong = format!("upstream.ca_file={}", other.file().display());
    let by_address = format!("https://127.0.0.1:{}", origin.address.port());
    for (url, setting) in
        [(&url, wrong.as_str()), (&url, "upstream.ca_file="), (&by_address, &ca_file)]
    {
        let proxy = Proxy::start(url, &[setting]).await;
        let answer = proxy.ask(&put(RECIPE)).await;
        let problem = (answer.status, answer.problem());
        assert_eq!(problem, (502, "upstream-certificate-untrusted".to_owned()), "{url} {setting}");
        assert_eq!(answer.field("proxy-status"), Some("optin-proxy; error=tls_certificate_error"));
    }
    assert_eq!(origin.requests().len(), 1, "not one byte to a peer that is not trusted");
}

#[tokio::test]
async fn a_servers_own_certificate_is_trusted_if_it_is_named_whatever_else_it_says_that_it_is() {
    for (name, years, is_named, problem) in [
        ("localhost", 2020..2100, true, None),
        ("localhost", 2020..2100, false, Some("cannot be verified")),
        ("elsewhere.example", 2020..2100, true, Some("for another name")),
        ("localhost", 2000..2001, true, Some("expired")),
        ("localhost", 2099..2100, true, Some("not valid yet")),
    ] {
        let (file, acceptor) = own_certificate(name, years);
        let (other, _) = own_certificate(name, 2020..2100);
        let origin = Origin::start_with([Reply::Write(no_content())], Some(acceptor)).await;
        let url = format!("https://localhost:{}", origin.address.port());
        let named = if is_named { file } else { other };
        let proxy =
            Proxy::start(&url, &[&format!("upstream.ca_file={}", named.path().display())]).await;
        let answer = proxy.ask(&put(RECIPE)).await;
        match problem {
            None => assert_eq!(answer.outcome(), "rewritten"),
            Some(why) => {
                assert_eq!(answer.status, 502, "{name}");
                let said = String::from_utf8_lossy(&answer.body);
                assert!(said.contains(why), "{name}: {said}");
                assert_eq!(origin.requests().len(), 0);
            }
        }
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_said_and_nothing_is_sent() {
    type Change = fn(&mut rcgen::CertificateParams);
    let cases: [(&str, Change); 3] = [
        ("the certificate has expired", |it| it.not_after = rcgen::date_time_ymd(2020, 1, 1)),
        ("the certificate is not valid yet", |it| it.not_before = rcgen::date_time_ymd(2090, 1, 1)),
        ("the certificate is not for servers", |it| {
            it.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }),
    ];
    let authority = Authority::new();
    let ca_file = format!("upstream.ca_file={}", authority.file().display());
    for (words, change) in cases {
        let acceptor = authority.acceptor_with("localhost", &[], change);
        let origin = Origin::start_with([Reply::Write(no_content())], Some(acceptor)).await;
        let url = format!("https://localhost:{}", origin.address.port());
        let proxy = Proxy::start(&url, &[&ca_file]).await;
        let answer = proxy.ask(&put(RECIPE)).await;
        let problem = (answer.status, answer.problem());
        assert_eq!(problem, (502, "upstream-certificate-untrusted".to_owned()), "{words}");
        let text = String::from_utf8_lossy(&answer.body);
        assert!(text.contains(words), "{text}");
        assert!(origin.requests().is_empty());
    }
}

#[tokio::test]
async fn a_plain_text_peer_is_no_tls_peer() {
    let origin =
        Origin::start([Reply::WriteAndClose(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())]).await;
    let proxy =
        Proxy::start(&format!("https://{}", origin.address), &["upstream.connect_timeout=200ms"])
            .await;
    let answer = proxy.ask(GET).await;
    // The origin waits for an end of line that TLS does not send: no handshake within the deadline.
    assert_eq!((answer.status, answer.problem()), (504, "upstream-connect-timeout".to_owned()));
    assert_eq!(answer.field("proxy-status"), Some("optin-proxy; error=connection_timeout"));
}

/// Regression: what ended while TLS was agreed upon was told as out of reach, and what broke behind a request as never begun, so
/// that a create may have been sent again.
#[tokio::test]
async fn a_connection_that_breaks_is_told_by_what_had_come_of_it() {
    let ours = Authority::new();
    let acceptor = ours.acceptor("localhost", &[]);
    let ca_file = format!("upstream.ca_file={}", ours.file().display());
    for (agrees, problem, advice) in [
        (false, "upstream-tls-failed", "TLS handshake: the connection was closed"),
        (true, "upstream-connection-closed", "may have been applied"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("https://localhost:{}", listener.local_addr().expect("bound").port());
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                if !agrees {
                    let _ = stream.read(&mut [0; 1_024]).await;
                    continue;
                }
                let mut stream = acceptor.accept(stream).await.expect("TLS");
                read_head(&mut stream, &mut Vec::new()).await;
                // A record that nobody can decrypt.
                let record = [&[0x17, 3, 3, 0, 32][..], &[b'a'; 32]].concat();
                stream.get_mut().0.write_all(&record).await.expect("it is read");
                let _ = stream.read(&mut [0]).await;
            }
        });
        let proxy = Proxy::start(&url, &[&ca_file]).await;
        let answer = proxy.ask(&request("POST", CONTACTS, "", RECIPE)).await;
        assert_eq!((answer.status, answer.problem()), (502, problem.to_owned()));
        let said = String::from_utf8_lossy(&answer.body);
        assert!(said.contains(advice), "{said}");
    }
}
