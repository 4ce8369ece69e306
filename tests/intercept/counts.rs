//! What is counted of tunnels.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::API;
use super::connect::{LOCAL, UPSTREAM, listener};
use crate::support::proxy::Proxy;
use crate::support::tls::connect;

#[tokio::test]
async fn a_tunnel_is_counted_by_what_became_of_it_and_by_its_bytes() {
    let (listener, address, ports) = listener().await;
    let (target, ports) = (address.to_string(), format!("{ports},443"));
    let proxy = Proxy::start(UPSTREAM, &[LOCAL, &ports]).await;
    let mut tunnel = proxy.client().await.tunnel(&target).await.expect("a tunnel");
    let (mut server, _) = listener.accept().await.expect("the proxy connects");
    tunnel.write_all(b"12345").await.expect("open");
    server.read_exact(&mut [0; 5]).await.expect("open");
    server.write_all(b"123").await.expect("open");
    tunnel.read_exact(&mut [0; 3]).await.expect("open");
    drop((tunnel, server, listener));
    while proxy.metric("optin_proxy_tunnels") > 0.0 {
        tokio::task::yield_now().await;
    }
    let failed = proxy.client().await.tunnel(&target).await.expect_err("nobody listens");
    assert_eq!(failed.status, 502);
    let stream = proxy.client().await.tunnel(&format!("{API}:443")).await.expect("a tunnel");
    let trusted = proxy.folder.path().join("ca.pem");
    let _open = connect(stream, API, &trusted, &[]).await.expect("it is trusted");
    let completed = "optin_proxy_tls_handshakes_total{result=\"completed\"}";
    while proxy.metric(completed) == 0.0 {
        tokio::task::yield_now().await;
    }
    for (series, value) in [
        (completed, 1.0),
        ("optin_proxy_tunnel_bytes_total{direction=\"sent\"}", 5.0),
        ("optin_proxy_tunnel_bytes_total{direction=\"received\"}", 3.0),
        ("optin_proxy_forward_targets_total{decision=\"tunneled\"}", 1.0),
        ("optin_proxy_forward_targets_total{decision=\"failed\"}", 1.0),
        ("optin_proxy_forward_targets_total{decision=\"intercepted\"}", 1.0),
    ] {
        assert_eq!(proxy.metric(series), value, "{series}");
    }
}
