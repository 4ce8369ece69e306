//! CONNECT and absolute-form targets: who is let through, where to, and what passes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::API;
use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{answer, no_content};

pub(super) const UPSTREAM: &str = "http://127.0.0.1:9";
/// What these tests need to reach their own servers.
pub(super) const LOCAL: &str = "intercept.allow_private=127.0.0.0/8";

pub(super) async fn listener() -> (TcpListener, SocketAddr, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address, format!("intercept.ports={}", address.port()))
}

#[tokio::test]
async fn bytes_pass_a_tunnel_untouched_and_each_half_ends_by_itself() {
    let (listener, address, ports) = listener().await;
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    let tunnel = proxy.client().await.tunnel(&address.to_string()).await;
    let mut client = tunnel.expect("a tunnel");
    let (mut server, _) = listener.accept().await.expect("the proxy connects");
    let bytes: Vec<u8> = (0..300_000u32).map(|number| (number % 251) as u8).collect();

    let (mut reading, mut writing) = client.split();
    let (sent, received) = tokio::join!(
        async {
            writing.write_all(&bytes).await.expect("open");
            writing.shutdown().await.expect("open");
        },
        async {
            let mut received = Vec::new();
            server.read_to_end(&mut received).await.expect("it ends");
            received
        }
    );
    let () = sent;
    assert!(received == bytes);
    // The client has said all; the server has not.
    server.write_all(&bytes).await.expect("open");
    drop(server);
    let mut received = Vec::new();
    reading.read_to_end(&mut received).await.expect("it ends");
    assert!(received == bytes);
}

#[tokio::test]
async fn what_a_client_sends_right_behind_connect_goes_into_the_tunnel() {
    let (listener, address, ports) = listener().await;
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    for version in ["1.1", "1.0"] {
        let mut client = proxy.client().await;
        let asked = format!("CONNECT {address} HTTP/{version}\r\nHost: {address}\r\n\r\nearly");
        client.send(asked.as_bytes()).await;
        assert_eq!(client.answer(true).await.status, 200);
        let (mut server, _) = listener.accept().await.expect("the proxy connects");
        let mut early = [0; 5];
        server.read_exact(&mut early).await.expect("it comes");
        assert_eq!(&early, b"early");
    }
}

#[tokio::test]
async fn a_stream_of_an_http_2_connection_can_be_a_tunnel_too() {
    let (listener, address, ports) = listener().await;
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    let io = hyper_util::rt::TokioIo::new(proxy.client().await.stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, io).await.expect("HTTP/2");
    tokio::spawn(connection);
    let connect = http::Request::connect(address.to_string())
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .expect("a request");
    let answer = sender.send_request(connect).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let upgraded = hyper::upgrade::on(answer).await.expect("a tunnel");
    let mut client = hyper_util::rt::TokioIo::new(upgraded);
    let (mut server, _) = listener.accept().await.expect("the proxy connects");
    client.write_all(b"question").await.expect("open");
    client.flush().await.expect("open");
    let mut question = [0; 8];
    server.read_exact(&mut question).await.expect("open");
    assert_eq!(&question, b"question");
    server.write_all(b"answer").await.expect("open");
    drop(server);
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.expect("it ends");
    assert_eq!(received, b"answer");
}

#[tokio::test]
async fn a_target_that_the_rules_refuse_gets_403_with_the_rule_and_its_key() {
    let proxy = Proxy::start(UPSTREAM, &["intercept.deny=*.denied.example"]).await;
    for (target, because) in [
        ("www.denied.example:443", "`*.denied.example` in intercept.deny"),
        ("elsewhere.example:8443", "intercept.ports"),
        ("api.constantcontact.com:80", "intercept.ports"),
        ("127.0.0.1:443", "loopback address that intercept.allow_private"),
        ("localhost:443", "loopback address that intercept.allow_private"),
        ("10.1.2.3:443", "private address"),
        ("169.254.169.254:443", "link-local address"),
        ("100.64.0.1:443", "a carrier-grade NAT address"),
        ("0.0.0.0:443", "unspecified address"),
        ("224.0.0.1:443", "multicast address"),
        ("[::1]:443", "loopback address"),
        ("[::ffff:127.0.0.1]:443", "loopback address"),
        ("[fe80::1]:443", "link-local address"),
    ] {
        let refused = proxy
            .client()
            .await
            .ask(format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
            .await;
        assert_eq!(
            (refused.status, refused.problem()),
            (403, "target-denied".to_owned()),
            "{target}"
        );
        let detail = String::from_utf8_lossy(&refused.body).into_owned();
        assert!(detail.contains(because), "{target}: {detail}");
        if because.contains("address") {
            let status = "optin-proxy; error=destination_ip_prohibited";
            assert_eq!(refused.field("proxy-status"), Some(status), "{target}");
        }
        assert_eq!(
            refused.field("connection"),
            Some("close"),
            "what follows may be meant for the tunnel"
        );
    }
}

#[tokio::test]
async fn other_hosts_may_be_denied_but_for_those_allowed() {
    let (listener, address, _) = listener().await;
    let allowed = format!("intercept.allow={address}");
    let proxy = Proxy::start(UPSTREAM, &["intercept.other_hosts=deny", LOCAL, &allowed]).await;
    let refused = proxy.client().await.tunnel("elsewhere.example:443").await.expect_err("refused");
    assert_eq!(refused.status, 403);
    proxy.client().await.tunnel(&address.to_string()).await.expect("a tunnel");
    listener.accept().await.expect("the proxy connects");
    proxy.client().await.tunnel(&format!("{API}:443")).await.expect("the API is not another host");
}

#[tokio::test]
async fn the_proxys_own_listener_is_refused_whatever_is_allowed() {
    let (free, own, ports) = listener().await;
    drop(free);
    let listen = format!("listen.address={own}");
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports, &listen]).await;
    for asked in [
        format!("CONNECT {own}"),
        format!("GET http://{own}/"),
        format!("CONNECT localhost:{}", own.port()),
    ] {
        let refused = proxy.ask(format!("{asked} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await;
        assert_eq!(
            (refused.status, refused.problem()),
            (403, "target-denied".to_owned()),
            "{asked}"
        );
        let detail = String::from_utf8_lossy(&refused.body).into_owned();
        assert!(detail.contains("own listener") || detail.contains("::1"), "{detail}");
    }
}

#[tokio::test]
async fn what_is_no_host_and_port_gets_400() {
    let proxy = Proxy::start(UPSTREAM, &[]).await;
    let long = format!("{}:443", "a.".repeat(200));
    for target in [
        "elsewhere.example",
        "elsewhere.example:",
        "elsewhere.example:0",
        "elsewhere.example:65536",
        "elsewhere.example:+443",
        "user@elsewhere.example:443",
        "user:password@elsewhere.example:443",
        ":443",
        "a..b:443",
        "a%41.example:443",
        "/x",
        "http://a.example:443",
        &long,
    ] {
        let refused = proxy
            .client()
            .await
            .ask(format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
            .await;
        assert_eq!(refused.status, 400, "{target}");
    }
}

/// What some resolvers take for an address is none that is served, whichever it is.
#[tokio::test]
async fn an_address_in_another_spelling_gets_403() {
    let proxy = Proxy::start(UPSTREAM, &[LOCAL]).await;
    for host in ["127.1", "0x7f000001", "0x7f.1", "2130706433", "0177.0.0.1"] {
        for asked in [format!("CONNECT {host}:443"), format!("GET http://{host}/x")] {
            let asked = format!("{asked} HTTP/1.1\r\nHost: x\r\n\r\n");
            let refused = proxy.ask(asked.as_bytes()).await;
            let problem = (refused.status, refused.problem());
            assert_eq!(problem, (403, "target-denied".to_owned()), "{asked}");
        }
    }
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_gets_502_before_any_200() {
    let (listener, address, ports) = listener().await;
    drop(listener);
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    for (target, problem) in [
        (address.to_string(), "upstream-connection-refused"),
        (format!("name.invalid:{}", address.port()), "upstream-name-unresolved"),
    ] {
        let asked = format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        let refused = proxy.client().await.ask(asked.as_bytes()).await;
        assert_eq!((refused.status, refused.problem()), (502, problem.to_owned()));
        assert!(String::from_utf8_lossy(&refused.body).contains(&target));
    }
}

#[tokio::test]
async fn a_tunnel_that_stands_still_is_ended() {
    let (listener, address, ports) = listener().await;
    let settings = [LOCAL, &ports, "intercept.tunnel_idle_timeout=10m", "limits.idle_timeout=1m"];
    let proxy = Proxy::start(UPSTREAM, &settings).await;
    let clock = Clock::hold();
    let mut client = proxy.client().await.tunnel(&address.to_string()).await.expect("a tunnel");
    let (mut server, _) = listener.accept().await.expect("the proxy connects");
    while proxy.metric("optin_proxy_tunnels") < 1.0 {
        tokio::task::yield_now().await;
    }
    // Longer than any other limit, and shorter than the tunnel's.
    clock.advance(Duration::from_secs(9 * 60)).await;
    client.write_all(b"x").await.expect("open");
    server.read_exact(&mut [0]).await.expect("open");
    clock.advance(Duration::from_secs(9 * 60)).await;
    server.write_all(b"y").await.expect("open");
    client.read_exact(&mut [0]).await.expect("open");
    let quiet = tokio::time::Instant::now();
    let mut byte = [0];
    let ended = clock.until(client.read(&mut byte)).await;
    assert_eq!(ended.unwrap_or(0), 0);
    assert_eq!(server.read(&mut byte).await.unwrap_or(0), 0);
    assert!(quiet.elapsed() >= Duration::from_secs(9 * 60), "the limit is 10 minutes");
}

#[tokio::test]
async fn plain_requests_to_other_hosts_are_passed_on_by_the_same_rules() {
    let origin =
        Origin::start([Reply::Write(answer("200 OK", "Location: http://x/\r\n", b"there"))]).await;
    let address = origin.address;
    let ports = format!("intercept.ports={}", address.port());
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    let body = crate::support::RECIPE;
    let target = format!("http://{address}{}", crate::support::CONTACT);
    let passed = proxy.ask(&crate::support::request("PUT", &target, "X-Kept: 1\r\n", body)).await;
    assert_eq!((passed.status, &passed.body[..]), (200, &b"there"[..]));
    assert_eq!(passed.report(), "(none)", "a contact of somebody else's is none of ours");
    let arrived = origin.request();
    assert_eq!(arrived.body, body);
    assert_eq!(arrived.fields("host"), [address.to_string()]);
    assert_eq!(arrived.fields("x-kept"), ["1"]);
    assert_eq!(arrived.fields("via"), ["1.1 optin-proxy"]);

    let proxy = Proxy::start(UPSTREAM, &[&ports]).await;
    let refused = proxy.ask(&crate::support::request("GET", &target, "", b"")).await;
    assert_eq!((refused.status, refused.problem()), (403, "target-denied".to_owned()));
    assert_eq!(origin.requests().len(), 1);
    let proxy = Proxy::start(UPSTREAM, &[]).await;
    let refused =
        proxy.ask(&crate::support::request("GET", "https://elsewhere.example/", "", b"")).await;
    assert_eq!(refused.status, 400);
}

#[tokio::test]
async fn a_plain_request_for_the_api_takes_the_stack_with_the_clients_host() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    let target = format!("http://{API}{}", crate::support::CONTACT);
    let asked = crate::support::request("PUT", &target, "", crate::support::RECIPE);
    assert_eq!(proxy.ask(&asked).await.outcome(), "rewritten");
    assert_eq!(origin.request().body, crate::support::RECIPE_OUT);
    assert_eq!(origin.request().fields("host"), [API]);
}

#[tokio::test]
async fn a_request_that_was_here_before_gets_508() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &[]).await;
    for via in ["1.1 optin-proxy", "1.0 fred, 2 optin-proxy (x)"] {
        let asked = format!("GET / HTTP/1.1\r\nHost: x\r\nVia: {via}\r\n\r\n");
        let refused = proxy.ask(asked.as_bytes()).await;
        assert_eq!((refused.status, refused.problem()), (508, "loop".to_owned()));
    }
    let tunnel = format!("CONNECT {API}:443 HTTP/1.1\r\nHost: x\r\nVia: 1.1 optin-proxy\r\n\r\n");
    assert_eq!(proxy.client().await.ask(tunnel.as_bytes()).await.status, 508);
    let other =
        b"GET / HTTP/1.1\r\nHost: x\r\nVia: 1.1 optin-proxy-like, 1.1 x (optin-proxy)\r\n\r\n";
    assert_eq!(proxy.ask(other).await.status, 204);
    assert_eq!(origin.requests().len(), 1);
}

#[tokio::test]
async fn a_proxy_before_itself_says_so_instead_of_going_round() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = proxy.local_addr().expect("bound");
    drop(proxy);
    let listen = format!("listen.address={address}");
    let proxy = Proxy::start(&format!("http://{address}"), &[&listen]).await;
    let answer = proxy.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!((answer.status, answer.problem()), (508, "loop".to_owned()));
}

#[tokio::test]
async fn credentials_are_asked_of_clients_of_the_forward_proxy_only() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let proxy = Proxy::before(&origin, &["listen.proxy_auth=jo:pass word"]).await;
    // "jo:pass word", "jo:pass", "jo:pass word" with another scheme's name.
    let right = "Basic am86cGFzcyB3b3Jk";
    for (given, fine) in [
        ("", false),
        (right, true),
        ("basic am86cGFzcyB3b3Jk", true),
        ("Basic am86cGFzcw==", false),
        ("Basic !", false),
        ("Bearer am86cGFzcyB3b3Jk", false),
        ("Basic am86cGFzcyB3b3Jk\r\nProxy-Authorization: Basic am86cGFzcyB3b3Jk", false),
    ] {
        let field = if given.is_empty() {
            String::new()
        } else {
            format!("Proxy-Authorization: {given}\r\n")
        };
        for target in [format!("CONNECT {API}:443"), format!("GET http://{API}/x")] {
            let asked = format!("{target} HTTP/1.1\r\nHost: x\r\n{field}\r\n");
            let mut client = proxy.client().await;
            client.send(asked.as_bytes()).await;
            let answer = client.answer(fine).await;
            assert_eq!(answer.status != 407, fine, "{target} {given:?}");
            if !fine {
                assert_eq!(answer.problem(), "proxy-auth-required");
                assert!(
                    answer
                        .field("proxy-authenticate")
                        .is_some_and(|it| it.starts_with("Basic realm="))
                );
            }
        }
    }
    assert_eq!(proxy.ask(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 204);
    assert!(origin.requests().iter().all(|it| it.fields("proxy-authorization").is_empty()));
}

#[tokio::test]
async fn only_clients_of_the_networks_named_are_served() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let get = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n";
    let proxy = Proxy::before(&origin, &["listen.allow_from=10.0.0.0/8, 127.0.0.0/8"]).await;
    assert_eq!(proxy.ask(get).await.status, 204);
    let proxy = Proxy::before(&origin, &["listen.allow_from=10.0.0.0/8"]).await;
    let refused = proxy.ask(get).await;
    assert_eq!((refused.status, refused.problem()), (403, "client-denied".to_owned()));
    // Nor are the others asked for credentials.
    let settings = ["listen.allow_from=10.0.0.0/8", "listen.proxy_auth=a:b"];
    let proxy = Proxy::before(&origin, &settings).await;
    let refused = proxy.client().await.tunnel(&format!("{API}:443")).await.expect_err("refused");
    assert_eq!((refused.status, refused.problem()), (403, "client-denied".to_owned()));
    assert_eq!(origin.requests().len(), 1);
}

/// How many descriptors this process has open.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux").count()
}

#[test]
fn clients_that_open_tunnels_and_misbehave_leave_nothing_open() {
    // A process of its own would be cleaner still: other tests open and close descriptors meanwhile. So
    // many rounds would leave many more than they do.
    const ROUNDS: usize = 300;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let (listener, address, ports) = listener().await;
        let ports = format!("{ports},443");
        let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
        let clock = Clock::hold();
        // Closes whatever comes.
        tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        let before = descriptors();
        for _ in 0..ROUNDS {
            // Opens a tunnel and goes away.
            drop(proxy.client().await.tunnel(&address.to_string()).await.expect("a tunnel"));
            // Goes away before the answer.
            let mut client = proxy.client().await;
            client.send(format!("CONNECT {address} HTTP/1.1\r\n\r\n").as_bytes()).await;
            drop(client);
        }
        let mut silent = Vec::new();
        for _ in 0..ROUNDS {
            // Says nothing in its tunnel until the handshake's deadline.
            let tunnel = proxy.client().await.tunnel(&format!("{API}:443")).await;
            silent.push(tunnel.expect("a tunnel"));
        }
        for mut tunnel in silent {
            let end = clock.until(tunnel.read(&mut [0])).await;
            assert_eq!(end.unwrap_or(0), 0, "it is let go");
        }
        while proxy.metric("optin_proxy_connections") > 0.0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(proxy.metric("optin_proxy_tunnels"), 0.0);
        let after = descriptors();
        assert!(after < before + ROUNDS / 2, "{after} descriptors, {before} before");
    });
}

#[tokio::test]
async fn a_connect_that_could_be_read_in_two_ways_gets_400() {
    let proxy = Proxy::start(UPSTREAM, &[]).await;
    for field in ["Content-Length: 5", "Transfer-Encoding: chunked", "Host: other"] {
        let asked = format!("CONNECT {API}:443 HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n");
        assert_eq!(proxy.client().await.ask(asked.as_bytes()).await.status, 400, "{field}");
    }
    let mut client = proxy.client().await;
    let asked = format!("CONNECT {API}:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
    client.send(asked.as_bytes()).await;
    assert_eq!(client.answer(true).await.status, 200);
}

/// Regression: a port that is none passed for none at all, and another port of the upstream's host for its own.
#[tokio::test]
async fn a_target_in_absolute_form_leads_to_its_own_port_and_no_other() {
    let api = Origin::start([Reply::Write(no_content())]).await;
    let other = Origin::start([Reply::Write(answer("200 OK", "", b"ok"))]).await;
    let ports = format!("intercept.ports={}", other.address.port());
    let proxy = Proxy::before(&api, &[LOCAL, &ports]).await;
    let asked = format!("GET http://{}/x HTTP/1.1\r\nHost: p\r\n\r\n", other.address);
    assert_eq!(proxy.ask(asked.as_bytes()).await.status, 200);
    assert_eq!((api.requests().len(), other.requests().len()), (0, 1));
    let hosts = ["99999", "65616", "0", "+80"].map(|port| format!("127.0.0.1:{port}"));
    for host in hosts.into_iter().chain([format!("user@{API}")]) {
        let asked = format!("GET http://{host}/x HTTP/1.1\r\nHost: p\r\n\r\n");
        assert_eq!(proxy.ask(asked.as_bytes()).await.status, 400, "{host}");
    }
}

/// Regression: in absolute form, the host of `upstream.url` was let through whatever the rules said.
#[tokio::test]
async fn by_its_own_name_the_upstream_is_let_through_by_the_rules_and_is_the_api_then() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let target = |authority: &str| {
        let target = format!("http://{authority}{}", crate::support::CONTACT);
        crate::support::request("PUT", &target, "", crate::support::RECIPE)
    };
    let (address, plain) = (origin.address.to_string(), "127.0.0.1");
    let ports = format!("intercept.ports={}", origin.address.port());
    for (settings, authorities) in [
        (&[][..], &[&*address, plain][..]),
        (&[&*ports], &[&*address, plain]),
        (&[LOCAL], &[&*address]),
        (&[LOCAL, &*ports, "intercept.deny=127.0.0.1"], &[&*address, plain]),
        (&[LOCAL, &*ports, "intercept.other_hosts=deny"], &[&*address, plain]),
    ] {
        let proxy = Proxy::before(&origin, settings).await;
        for authority in authorities {
            let refused = proxy.ask(&target(authority)).await;
            assert_eq!((refused.status, refused.problem()), (403, "target-denied".to_owned()));
        }
        assert_eq!(origin.requests().len(), 0, "{settings:?}");
    }
    let proxy = Proxy::before(&origin, &[LOCAL, &ports]).await;
    let passed = proxy.ask(&target(&address)).await;
    assert_eq!((passed.status, passed.outcome()), (204, "rewritten"));
    assert_eq!(proxy.ask(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 204);
}
