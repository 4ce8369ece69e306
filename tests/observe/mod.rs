//! What operators see, and what they can do.

mod admin;
mod audit;
mod counts;
mod deploy;
mod journal;
#[cfg(feature = "otel")]
mod otlp;
mod report;
mod rotation;
mod stalled;

use std::net::SocketAddr;

use serde_json::Value;

use crate::support::binary::{Running, command};
use crate::support::client::{Answer, Client};
use crate::support::origin::Origin;

/// The program, and where operators reach it.
fn serve(origin: &Origin, settings: &[&str]) -> (Running, SocketAddr) {
    let url = origin.url();
    let mut arguments = vec!["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    arguments.extend(["--upstream", &url, "--set", "retry.base_delay=0s"]);
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let mut running = Running::start(&mut command(&arguments));
    let admin = running.admin();
    (running, admin)
}

/// Asks the admin listener, as a program on this machine would.
async fn ask(admin: SocketAddr, method: &str, path: &str, fields: &str, body: &str) -> Answer {
    let length = body.len();
    let asked = format!(
        "{method} {path} HTTP/1.1\r\nHost: {admin}\r\nContent-Length: {length}\r\n{fields}\r\n{body}"
    );
    Client::connect(admin).await.ask(asked.as_bytes()).await
}

async fn get(admin: SocketAddr, path: &str) -> Answer {
    ask(admin, "GET", path, "", "").await
}

async fn json(admin: SocketAddr, path: &str) -> Value {
    let answer = get(admin, path).await;
    assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
    assert_eq!(answer.field("content-type"), Some("application/json"));
    serde_json::from_slice(&answer.body).expect("JSON")
}

/// The exchanges that are kept, once there have been so many.
async fn exchanges(admin: SocketAddr, count: u64) -> Vec<Value> {
    loop {
        let mut kept = json(admin, "/api/exchanges").await;
        if kept["count"].as_u64().expect("a number") >= count {
            return std::mem::take(kept["exchanges"].as_array_mut().expect("an array"));
        }
        tokio::task::yield_now().await;
    }
}
