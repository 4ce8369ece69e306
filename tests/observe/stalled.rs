//! The admin listener in this process, so that its deadlines need no waiting.

use std::sync::Arc;

use optin_proxy::config::Layers;
use optin_proxy::observe::admin::{Admin, Desk};
use optin_proxy::observe::journal::Journal;
use optin_proxy::observe::metrics::Metrics;
use optin_proxy::proxy::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::get;
use crate::support::clock::Clock;

#[tokio::test]
async fn who_takes_nothing_of_an_answer_for_ten_seconds_loses_the_place_that_a_probe_may_need() {
    let mut layers = Layers::default();
    layers.set("test", "listen.address=127.0.0.1:0");
    let config = Arc::new(layers.build().expect("a valid configuration"));
    let metrics = Arc::new(Metrics::default());
    let server = Server::bind(config, Arc::clone(&metrics)).await.expect("a free port");
    let journal = Journal::start(10, None, Arc::clone(&metrics)).expect("a thread");
    let (orders, _asked) = mpsc::channel(1);
    let admin = Admin::bind("127.0.0.1:0").await.expect("a free port");
    let address = admin.address();
    tokio::spawn(admin.run(Desk { metrics, control: server.control(), journal, orders }));
    let clock = Clock::hold();

    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a socket");
    let mut client = socket.connect(address).await.expect("it listens");
    // More answers than any buffer holds; not one byte of them is taken.
    let asked = format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let (mut reading, mut writing) = client.split();
    let begun = Instant::now();
    let sending = async {
        for _ in 0..100_000 {
            if writing.write_all(asked.as_bytes()).await.is_err() {
                return;
            }
        }
    };
    clock.until(sending).await;
    let lasted = begun.elapsed().as_secs();
    // Time passes here while bytes still move, too.
    assert!((10..60).contains(&lasted), "{lasted} s");
    let mut rest = Vec::new();
    assert!(reading.read_to_end(&mut rest).await.is_err() || !rest.is_empty());
    assert_eq!(get(address, "/livez").await.status, 200);
}
