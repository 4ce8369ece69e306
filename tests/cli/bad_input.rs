//! What a deployment can get wrong: one clear line each, the right exit status, and a probe that tells the truth.

use std::fs::Permissions;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::support::binary::{Output, Running, command, run_command};
use crate::support::client::{Answer, Client};

const NOWHERE: &str = "http://127.0.0.1:9";

fn serve(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = command(&[&["serve"], arguments].concat());
    command.envs(environment.iter().copied());
    run_command(command, b"")
}

/// Starts, with what is wrong all the same.
fn start(arguments: &[&str], prepare: impl FnOnce(Command) -> Command) -> (Running, SocketAddr) {
    let always =
        ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--upstream", NOWHERE];
    let command = command(&[&always, arguments].concat());
    let mut running = Running::start(&mut prepare(command));
    let admin = running.admin();
    (running, admin)
}

async fn ready(admin: SocketAddr) -> Answer {
    Client::connect(admin).await.ask(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await
}

/// The log, once the program has come to its end.
fn stop(running: Running) -> String {
    running.signal("TERM");
    let (status, log) = running.finish();
    assert_eq!(status.code(), Some(0), "{log}");
    log
}

#[test]
fn what_cannot_be_started_with_is_one_line_and_an_exit_status() {
    let folder = tempfile::tempdir().expect("a folder");
    let in_folder = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let half = in_folder("half.toml");
    std::fs::write(&half, "[sanitize]\nmode = \"enf").expect("ours");
    let (missing, unreadable) = (in_folder("missing.toml"), in_folder("."));
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = taken.local_addr().expect("bound").to_string();
    for (name, arguments, environment, status, said) in [
        ("missing", vec!["-c", &missing], vec![], 2, vec!["missing.toml", "cannot read", "-c"]),
        ("unreadable", vec!["-c", &unreadable], vec![], 2, vec!["cannot read", "-c"]),
        ("half-written", vec!["-c", &half], vec![], 2, vec!["half.toml:2: "]),
        (
            "its port taken",
            vec!["--listen", &taken],
            vec![],
            1,
            vec![&*taken, "in use", "--listen"],
        ),
        (
            "the operators' port taken",
            vec!["--listen", "127.0.0.1:0", "--admin", &taken],
            vec![],
            1,
            vec![&*taken, "--admin"],
        ),
        (
            "an unknown variable",
            vec![],
            vec![("OPTIN_PROXY_SANITIZE__MOED", "observe")],
            2,
            vec!["OPTIN_PROXY_SANITIZE__MOED", "did you mean `sanitize.mode`?"],
        ),
        (
            "one underscore for two",
            vec![],
            vec![("OPTIN_PROXY_UPSTREAM_URL", NOWHERE)],
            2,
            vec!["OPTIN_PROXY_UPSTREAM__URL"],
        ),
        (
            "no threads",
            vec![],
            vec![("TOKIO_WORKER_THREADS", "0")],
            1,
            vec!["TOKIO_WORKER_THREADS", "leave it out"],
        ),
    ] {
        let arguments: Vec<&str> = arguments.into_iter().collect();
        let output = serve(&arguments, &environment);
        assert_eq!(output.code, Some(status), "{name}: {}", output.stderr);
        let errors: Vec<_> = output.stderr.lines().filter(|it| !it.starts_with('{')).collect();
        let [line] = errors[..] else { panic!("{name}: {}", output.stderr) };
        assert!(line.starts_with("optin-proxy: "), "{line}");
        for word in said {
            assert!(line.contains(word), "{name}: {word} in {line}");
        }
        assert!(!output.stderr.contains("\"started\""), "{name}");
        assert_eq!(output.stdout, b"", "{name}: nobody is told that it listens");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_roots_the_bundled_ones_are_trusted_and_the_log_says_so() {
    let nothing = tempfile::tempdir().expect("a folder");
    let path = nothing.path().join("none").to_str().expect("UTF-8").to_owned();
    let (running, admin) = start(&[], |mut command| {
        command.env("SSL_CERT_FILE", &path).env("SSL_CERT_DIR", &path);
        command
    });
    assert_eq!(ready(admin).await.status, 200);
    let log = stop(running);
    let line = log.lines().find(|line| line.contains("bundled Mozilla roots"));
    assert!(line.is_some_and(|line| line.contains("\"WARN\"")), "{log}");
}

/// As where a volume was forgotten, or is read-only. A folder that nobody chose is only missed once it is needed: a base URL
/// needs none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_for_the_authority_that_was_chosen_and_cannot_be_used_is_no_readiness() {
    let folder = tempfile::tempdir().expect("a folder");
    // Where the tests are root's, the program must not be: it could write everywhere.
    let is_root = rustix::process::geteuid().is_root();
    let program = folder.path().join("optin-proxy");
    std::fs::copy(env!("CARGO_BIN_EXE_optin-proxy"), &program).expect("ours");
    let set = |mode| std::fs::set_permissions(folder.path(), Permissions::from_mode(mode));
    set(0o555).expect("ours");
    let as_somebody = |command: Command| {
        if !is_root {
            return command;
        }
        let mut other = Command::new(&program);
        other.args(command.get_args()).uid(65_534).gid(65_534);
        other.env_remove("HOME").env_remove("XDG_DATA_HOME");
        other
    };
    let chosen = folder.path().join("ca").to_str().expect("UTF-8").to_owned();
    let (running, admin) = start(&["--set", &format!("intercept.ca_dir={chosen}")], as_somebody);
    let told = ready(admin).await;
    assert_eq!(told.status, 503);
    let told = String::from_utf8_lossy(&told.body).into_owned();
    assert!(told.contains("intercept.ca_dir"), "{told}");
    // It says so to who asks for a tunnel, and a base URL is served.
    let asked = b"CONNECT api.constantcontact.com:443 HTTP/1.1\r\nHost: x\r\n\r\n";
    let refused = Client::connect(running.address).await.ask(asked).await;
    assert_eq!((refused.status, &*refused.problem()), (503, "ca-unavailable"));
    let asked = b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n";
    assert_eq!(Client::connect(running.address).await.ask(asked).await.status, 502, "upstream's");
    let log = stop(running);
    let errors: Vec<_> = log.lines().filter(|line| line.contains("\"ERROR\"")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    assert!(errors[0].contains("HTTPS_PROXY mode will not work") && errors[0].contains("ca_dir"));

    let (running, admin) = start(&[], |command| {
        let mut command = as_somebody(command);
        command.env("XDG_DATA_HOME", &chosen);
        command
    });
    assert_eq!(ready(admin).await.status, 200);
    assert!(!stop(running).contains("\"ERROR\""));
    set(0o755).expect("ours");
}
