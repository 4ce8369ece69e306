//! What names stand for, and when that is asked.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use optin_proxy::intercept::Resolve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::support::client::Answer;
use crate::support::clock::Clock;
use crate::support::origin::{Origin, Reply};
use crate::support::proxy::Proxy;
use crate::support::{answer, no_content};

const UPSTREAM: &str = "http://127.0.0.1:9";

/// Gives one list of addresses after the other, the last one for ever, and counts how often it was asked.
struct Names {
    answers: Mutex<Vec<Vec<SocketAddr>>>,
    asked: Mutex<Vec<String>>,
}

impl Names {
    fn that_say(answers: Vec<Vec<SocketAddr>>) -> Arc<Self> {
        Arc::new(Self { answers: Mutex::new(answers), asked: Mutex::default() })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Resolve for Names {
    fn resolve(&self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        self.asked.lock().unwrap().push(format!("{name}:{port}"));
        let mut answers = self.answers.lock().unwrap();
        Ok(if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() })
    }
}

async fn proxy(names: &Arc<Names>, settings: &[&str]) -> Proxy {
    let names = Arc::clone(names);
    let prepare = |server: &mut optin_proxy::proxy::Server| server.resolve_by(names);
    Proxy::start_with(UPSTREAM, settings, prepare).await
}

/// What a client is told that asks for a tunnel and gets none.
async fn refusal(proxy: &Proxy, target: &str) -> Answer {
    proxy.client().await.tunnel(target).await.expect_err("a refusal")
}

fn address(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(text.parse().expect("an address"), port)
}

#[tokio::test]
async fn one_address_that_is_denied_denies_the_name_wherever_it_stands_among_the_others() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let fine = address("127.0.0.1", port);
    let settings =
        ["intercept.allow_private=127.0.0.1", &format!("intercept.ports={port}")].map(String::from);
    let settings = settings.each_ref().map(|it| &**it);
    for (denied, class) in [
        ("10.0.0.1", "a private address"),
        ("169.254.169.254", "a link-local address"),
        ("127.0.0.2", "a loopback address"),
        ("::1", "a loopback address"),
        ("::ffff:192.168.0.1", "a private address"),
        ("64:ff9b::a00:1", "a private address"),
        ("100.64.0.1", "a carrier-grade NAT address"),
    ] {
        let denied = address(denied, port);
        for addresses in [vec![denied, fine], vec![fine, denied], vec![fine, fine, denied, fine]] {
            let names = Names::that_say(vec![addresses, vec![fine]]);
            let proxy = proxy(&names, &settings).await;
            let refused = refusal(&proxy, &format!("name.example:{port}")).await;
            assert_eq!((refused.status, &*refused.problem()), (403, "target-denied"), "{denied}");
            let detail = String::from_utf8_lossy(&refused.body);
            assert!(
                detail.contains("name.example stands for") && detail.contains(class),
                "{detail}"
            );
            assert_eq!(names.asked().len(), 1);
        }
    }
    // Nothing ever came to the address that was fine: the next connection is the first.
    let names = Names::that_say(vec![vec![fine]]);
    let proxy = proxy(&names, &settings).await;
    let mut tunnel =
        proxy.client().await.tunnel(&format!("name.example:{port}")).await.expect("open");
    let (mut accepted, _) = listener.accept().await.expect("a connection");
    tunnel.write_all(b"x").await.expect("open");
    accepted.read_exact(&mut [0]).await.expect("it is the tunnel's");
}

/// A name server that answers twice in different ways is how a rule about addresses is got round.
#[tokio::test]
async fn a_name_is_asked_for_once_and_what_was_judged_is_what_is_connected_to() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let fine = listener.local_addr().expect("bound");
    let elsewhere = TcpListener::bind(("127.0.0.2", fine.port())).await.expect("a free port");
    let other = elsewhere.local_addr().expect("bound");
    let ports = format!("intercept.ports={}", fine.port());
    let settings = ["intercept.allow_private=127.0.0.1", &ports];
    let names = Names::that_say(vec![vec![fine], vec![other]]);
    let proxy = proxy(&names, &settings).await;
    let target = format!("Name.Example.:{}", fine.port());
    let _tunnel =
        proxy.client().await.tunnel(&target).await.expect("what was judged first is fine");
    let _accepted = listener.accept().await.expect("a connection");
    assert_eq!(names.asked(), [format!("name.example:{}", fine.port())]);
    // The next tunnel asks anew, and is judged anew.
    let refused = refusal(&proxy, &target).await;
    assert_eq!(refused.status, 403);
    assert_eq!(names.asked().len(), 2);
}

#[tokio::test]
async fn plain_requests_are_held_to_the_same() {
    let origin =
        Origin::start([Reply::Write(answer("200 OK", "", b"here")), Reply::Write(no_content())])
            .await;
    let fine = origin.address;
    let ports = format!("intercept.ports={}", fine.port());
    let settings = ["intercept.allow_private=127.0.0.1", &ports];
    let denied = address("10.0.0.1", fine.port());
    let names = Names::that_say(vec![vec![fine, denied], vec![fine], vec![denied]]);
    let proxy = proxy(&names, &settings).await;
    let asked = format!(
        "GET http://name.example:{0}/x HTTP/1.1\r\nHost: name.example\r\n\r\n",
        fine.port()
    );
    let refused = proxy.ask(asked.as_bytes()).await;
    assert_eq!((refused.status, &*refused.problem()), (403, "target-denied"));
    assert!(origin.requests().is_empty());
    assert_eq!(proxy.ask(asked.as_bytes()).await.body, b"here");
    // The connection that was judged is used again without a question.
    assert_eq!(proxy.ask(asked.as_bytes()).await.status, 204);
    assert_eq!(names.asked().len(), 2);
}

#[tokio::test]
async fn a_dead_address_leaves_those_behind_it_their_chance() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let fine = listener.local_addr().expect("bound");
    let ports = format!("intercept.ports={}", fine.port());
    let settings = ["intercept.allow_private=127.0.0.0/8", &ports];
    let names = Names::that_say(vec![vec![address("127.0.0.3", fine.port()), fine]]);
    let proxy = proxy(&names, &settings).await;
    let target = format!("name.example:{}", fine.port());
    let _tunnel = proxy.client().await.tunnel(&target).await.expect("the second address answers");
    let names = Names::that_say(vec![vec![]]);
    let proxy = self::proxy(&names, &settings).await;
    let refused = refusal(&proxy, &target).await;
    assert_eq!((refused.status, &*refused.problem()), (502, "upstream-name-unresolved"));
}

#[tokio::test]
async fn a_name_for_an_address_that_is_denied_by_itself_is_denied_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let denied = listener.local_addr().expect("bound");
    let ports = format!("intercept.ports={}", denied.port());
    let settings = ["intercept.allow_private=127.0.0.0/8", &ports, "intercept.deny=127.0.0.1"];
    let names = Names::that_say(vec![vec![denied]]);
    let proxy = proxy(&names, &settings).await;
    let refused = refusal(&proxy, &format!("name.example:{}", denied.port())).await;
    assert_eq!((refused.status, &*refused.problem()), (403, "target-denied"));
}

#[tokio::test]
async fn an_address_that_never_answers_leaves_time_for_those_behind_it() {
    // The system takes no more connections than fit into this queue, and says nothing to the others.
    let hanging = TcpSocket::new_v4().expect("a socket");
    hanging.bind(address("127.0.0.3", 0)).expect("a free port");
    let hanging = hanging.listen(1).expect("bound");
    let silent = hanging.local_addr().expect("bound");
    let clock = Clock::hold();
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut connecting = Box::pin(TcpStream::connect(silent));
        let within = tokio::time::timeout(Duration::from_secs(1000), &mut connecting);
        waiting.push((clock.until(within).await.is_ok(), connecting));
    }
    assert!(!waiting[3].0, "its queue is full");
    let listener = TcpListener::bind(("127.0.0.1", silent.port())).await.expect("a free port");
    let fine = listener.local_addr().expect("bound");
    let ports = format!("intercept.ports={}", fine.port());
    let settings = [
        "intercept.allow_private=127.0.0.0/8",
        &ports,
        "upstream.connect_timeout=5h",
        "limits.request_timeout=24h",
    ];
    let names = Names::that_say(vec![vec![silent, fine]]);
    let proxy = proxy(&names, &settings).await;
    let target = format!("name.example:{}", fine.port());
    let asking = proxy.client().await.tunnel(&target);
    let asked = Instant::now();
    clock.until(asking).await.expect("the second address answers");
    let waited = asked.elapsed().as_secs() / 3600;
    assert!((2..5).contains(&waited), "half of the time, and not all of it: {waited} h");
}
