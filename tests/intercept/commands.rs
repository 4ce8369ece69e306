//! `ca`, `env`, `exec` and `doctor`, as a user runs them.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use tokio::net::TcpListener;

use crate::support::binary::{Output, Running, command, run_command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{RECIPE, answer, no_content, put};

fn run_in(data: &Path, arguments: &[&str]) -> Output {
    run_command(in_folder(data, arguments), b"")
}

fn in_folder(data: &Path, arguments: &[&str]) -> Command {
    let mut command = command(arguments);
    command.env("XDG_DATA_HOME", data);
    // What the developer's own machine trusts is none of the test's business either.
    for name in [
        "NO_PROXY",
        "no_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "JAVA_TOOL_OPTIONS",
        "NODE_EXTRA_CA_CERTS",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
    ] {
        command.env_remove(name);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[test]
fn init_makes_an_authority_once_and_show_describes_it() {
    let data = tempfile::tempdir().expect("a folder");
    let nothing = run_in(data.path(), &["ca", "show"]);
    assert_eq!(nothing.code, Some(1));
    assert!(nothing.stderr.contains("made at its first use"), "{}", nothing.stderr);
    let made = run_in(data.path(), &["ca", "init"]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let shown = run_in(data.path(), &["ca", "show"]);
    assert_eq!(text(&shown.stdout), text(&made.stdout));
    let said = text(&shown.stdout);
    assert!(
        said.contains("signs for    api.constantcontact.com, names below, and nothing else"),
        "{said}"
    );
    assert!(said.contains(&data.path().join("optin-proxy/ca.pem").display().to_string()), "{said}");
    assert!(said.contains("729 days left") || said.contains("730 days left"), "{said}");
    let again = run_in(data.path(), &["ca", "init"]);
    assert_eq!(again.code, Some(1));
    assert!(again.stderr.contains("never overwritten"), "{}", again.stderr);
}

#[test]
fn the_authority_is_where_the_configuration_says_and_else_under_the_users_data() {
    let home = tempfile::tempdir().expect("a folder");
    let mut init = command(&["ca", "init"]);
    init.env_remove("XDG_DATA_HOME").env("HOME", home.path());
    let made = run_command(init, b"");
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(home.path().join(".local/share/optin-proxy/ca.pem").exists());
    let data = tempfile::tempdir().expect("a folder");
    let elsewhere = data.path().join("elsewhere");
    let setting = format!("intercept.ca_dir={}", elsewhere.display());
    for command in ["init", "show"] {
        let done = run_in(data.path(), &["ca", command, "--set", &setting]);
        assert_eq!(done.code, Some(0), "{command}: {}", done.stderr);
    }
    assert!(elsewhere.join("ca.pem").exists());
    assert!(!data.path().join("optin-proxy").exists());
}

#[test]
fn export_writes_every_format() {
    let data = tempfile::tempdir().expect("a folder");
    let export = |format: &str| {
        let output = run_in(data.path(), &["ca", "export", "--format", format]);
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        output.stdout
    };
    let pem = text(&export("pem"));
    let der = export("der");
    let decoded = pem::parse(&pem).expect("PEM");
    assert_eq!(decoded.contents(), der);
    assert_eq!(pem, std::fs::read_to_string(data.path().join("optin-proxy/ca.pem")).expect("text"));
    let bundle = text(&export("bundle"));
    assert!(bundle.starts_with(&pem), "our own comes first");
    let jks = export("jks");
    assert_eq!(jks[..4], [0xFE, 0xED, 0xFE, 0xED]);
    for store in [jks, export("p12")] {
        assert!(memchr::memmem::find(&store, &der).is_some());
    }
    let file = data.path().join("out.der");
    let named = file.to_str().expect("UTF-8");
    run_in(data.path(), &["ca", "export", "--format", "der", "--output", named]);
    assert_eq!(std::fs::read(file).expect("it is there"), der);
}

#[test]
fn env_says_what_each_runtime_has_to_know() {
    let data = tempfile::tempdir().expect("a folder");
    let mut asked = in_folder(data.path(), &["env", "--proxy", "127.0.0.1:9"]);
    // Regression: the space was Java's, which did not start.
    asked.env("NO_PROXY", "intra.example, .corp 10.1.2.3").env("JAVA_TOOL_OPTIONS", "-Xmx64m");
    let output = run_command(asked, b"");
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let said = text(&output.stdout);
    let all: HashMap<_, _> = said
        .lines()
        .map(|line| line.strip_prefix("export ").expect("a variable").split_once('=').expect("one"))
        .map(|(name, value)| (name, value.trim_matches('\'')))
        .collect();
    assert_eq!(all["HTTPS_PROXY"], "http://127.0.0.1:9");
    assert_eq!(all["https_proxy"], all["HTTPS_PROXY"]);
    assert_eq!(
        (all["NO_PROXY"], all["no_proxy"]),
        ("intra.example, .corp 10.1.2.3", all["NO_PROXY"])
    );
    let ours = std::fs::read_to_string(data.path().join("optin-proxy/ca.pem")).expect("text");
    let count = |name: &str| {
        let pem = std::fs::read_to_string(all[name]).expect("a file");
        assert!(pem.starts_with(&ours), "{name}");
        pem.matches("BEGIN").count()
    };
    assert_eq!(count("NODE_EXTRA_CA_CERTS"), 1, "what adds gets ours alone");
    let system = rustls_native_certs::load_native_certs().certs.len();
    for replaces in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        assert!(count(replaces) > system / 2, "what replaces gets the system's too");
    }
    let java = all["JAVA_TOOL_OPTIONS"];
    assert!(java.starts_with("-Xmx64m -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9 "), "{java}");
    assert!(java.contains("-Dhttp.nonProxyHosts=intra.example|*.corp|10.1.2.3 "), "{java}");

    // Regression: options grew with each time that it was asked for.
    let mut again = in_folder(data.path(), &["env", "--proxy", "127.0.0.1:9"]);
    again.envs(&all);
    assert_eq!(text(&run_command(again, b"").stdout), said);

    for (shell, line) in [
        ("fish", "set -gx HTTPS_PROXY 'http://127.0.0.1:9'\n"),
        ("powershell", "$env:HTTPS_PROXY = 'http://127.0.0.1:9'\n"),
        ("docker", "HTTPS_PROXY=http://127.0.0.1:9\n"),
        ("k8s", "- name: HTTPS_PROXY\n  value: \"http://127.0.0.1:9\"\n"),
    ] {
        let output = run_in(data.path(), &["env", "--shell", shell, "--proxy", "127.0.0.1:9"]);
        assert!(text(&output.stdout).starts_with(line), "{}", text(&output.stdout));
    }
}

/// Regression: Java and Node did not start where the path of their files had a quote in it.
#[test]
fn env_names_files_whose_paths_need_care_as_each_runtime_wants_it_or_not_at_all() {
    let data = tempfile::tempdir().expect("a folder");
    let files = data.path().join("q\"q\\s");
    let files = files.to_str().expect("UTF-8");
    let docker = ["env", "--shell", "docker", "--proxy", "127.0.0.1:9", "--files", files];
    let output = run_in(data.path(), &docker);
    let said = text(&output.stdout);
    assert!(said.contains(r#"q\"q\\s"#) && !said.contains("JAVA_TOOL_OPTIONS"), "{said}");
    assert!(output.stderr.contains("Java is not led"), "{}", output.stderr);

    // Regression: each of these had a meaning for who reads it.
    for (shell, name, written) in [
        ("k8s", "$(HTTPS_PROXY)$$", "$$(HTTPS_PROXY)$$$$"),
        ("powershell", "o\u{2019}b'c", "o\u{2019}\u{2019}b''c"),
        ("sh", "b'c", r"b'\''c"),
        ("fish", r"b'c\d", r"b\'c\\d"),
    ] {
        let files = data.path().join(name);
        let files = files.to_str().expect("UTF-8");
        let asked = ["env", "--shell", shell, "--proxy", "127.0.0.1:9", "--files", files];
        let said = text(&run_in(data.path(), &asked).stdout);
        assert!(said.contains(&format!("/{written}/bundle.pem")), "{shell}: {said}");
    }
}

/// Regression: where the entries had spaces between them, the API was not found among them.
#[test]
fn env_warns_of_an_api_that_goes_past_the_proxy() {
    let data = tempfile::tempdir().expect("a folder");
    for list in ["x.example,api.constantcontact.com", "x.example api.constantcontact.com", "*"] {
        let mut asked = in_folder(data.path(), &["env", "--proxy", "127.0.0.1:9"]);
        asked.env("NO_PROXY", list);
        let said = run_command(asked, b"").stderr;
        assert!(said.contains("in NO_PROXY leads past the proxy"), "{list}: {said}");
    }
}

#[test]
fn env_carries_the_proxys_credentials_and_nothing_else_does() {
    let data = tempfile::tempdir().expect("a folder");
    let secret = "listen.proxy_auth=jo:s3cr3t@x";
    let said =
        text(&run_in(data.path(), &["env", "--proxy", "127.0.0.1:9", "--set", secret]).stdout);
    assert!(said.contains("HTTPS_PROXY='http://jo:s3cr3t%40x@127.0.0.1:9'"), "{said}");
    // Regression: Java was led to a proxy that it has no credentials for.
    assert!(!said.contains("JAVA_TOOL_OPTIONS"), "{said}");
    // Regression: they were taken for a part of the host's name, and repeated.
    for command in [&["env"][..], &["exec"]] {
        let more = ["--proxy", "http://jo:s3cr3t@127.0.0.1:9", "--", "true"];
        let arguments = [command, &more[..if command == ["env"] { 2 } else { 4 }]].concat();
        let refused = run_in(data.path(), &arguments);
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(refused.stderr.contains("listen.proxy_auth"), "{}", refused.stderr);
        assert!(!refused.stderr.contains("s3cr3t"), "{}", refused.stderr);
    }
    // Regression: variables were written with what is no address.
    for address in ["https://h:1", "x y:1", "h/p:1", "::1:1"] {
        let refused = run_in(data.path(), &["env", "--proxy", address]);
        assert_eq!(refused.code, Some(2), "{address}");
        assert!(refused.stderr.contains("as host:port"), "{}", refused.stderr);
    }
    let checked = text(&run_in(data.path(), &["check", "--set", secret]).stdout);
    assert!(!checked.contains("s3cr3t") && checked.contains("(hidden)"), "{checked}");
    let file = data.path().join("secret");
    std::fs::write(&file, "jo:from file\nmore\n").expect("ours");
    let named = format!("listen.proxy_auth=file:{}", file.display());
    let said =
        text(&run_in(data.path(), &["env", "--proxy", "127.0.0.1:9", "--set", &named]).stdout);
    assert!(said.contains("http://jo:from%20file@127.0.0.1:9"), "{said}");
    for wrong in ["s3cr3t", ":s3cr3t", "file:/nowhere/s3cr3t-file"] {
        let wrong = format!("listen.proxy_auth={wrong}");
        let refused = run_in(data.path(), &["check", "--set", &wrong]);
        assert_eq!(refused.code, Some(2));
        assert!(refused.stderr.contains("--set: listen.proxy_auth: "), "{}", refused.stderr);
        assert!(!refused.stderr.contains("s3cr3t"), "{}", refused.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_gives_a_command_its_environment_and_takes_its_status() {
    let data = tempfile::tempdir().expect("a folder");
    let run = |script: &str| run_in(data.path(), &["exec", "--", "sh", "-c", script]);
    let output = run("echo $HTTPS_PROXY; test -r $SSL_CERT_FILE || exit 9; exit 7");
    assert_eq!(output.code, Some(7), "{}", output.stderr);
    assert!(text(&output.stdout).starts_with("http://127.0.0.1:"));
    assert_eq!(output.stderr, "", "nothing but the command is heard");
    assert_eq!(run("kill -9 $$").code, Some(137));
    assert_eq!(run_in(data.path(), &["exec", "--", "/nowhere/command"]).code, Some(127));
    assert_eq!(run_in(data.path(), &["exec", "--", "/etc"]).code, Some(126));
    assert_eq!(run_in(data.path(), &["exec"]).code, Some(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_passes_signals_on() {
    let data = tempfile::tempdir().expect("a folder");
    let script = "trap 'exit 42' TERM; echo listening on 127.0.0.1:1; while :; do sleep 0.01; done";
    let running = Running::start(&mut in_folder(data.path(), &["exec", "--", "sh", "-c", script]));
    running.signal("TERM");
    assert_eq!(running.finish().0.code(), Some(42));
}

/// Regression: there was none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_keeps_the_audit_trail() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let data = tempfile::tempdir().expect("a folder");
    let trail = data.path().join("audit.jsonl");
    let settings =
        [format!("upstream.url={}", origin.url()), format!("audit.path={}", trail.display())];
    let script = "trap 'exit 0' TERM; echo listening on ${https_proxy#http://}; while :; do sleep 0.01; done";
    let running = Running::start(&mut in_folder(
        data.path(),
        &["exec", "--set", &settings[0], "--set", &settings[1], "--", "sh", "-c", script],
    ));
    let answer = Client::connect(running.address).await.ask(&put(RECIPE)).await;
    assert_eq!(answer.outcome(), "rewritten");
    running.signal("TERM");
    assert_eq!(running.finish().0.code(), Some(0));
    assert_eq!(std::fs::read_to_string(&trail).expect("a trail").lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_waits_for_a_proxy_that_is_to_be_used_and_sees_that_it_is_the_right_one() {
    let data = tempfile::tempdir().expect("a folder");
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = free.local_addr().expect("bound").to_string();
    drop(free);
    let exec = |data: &Path| {
        let script = "echo $https_proxy";
        let auth = "listen.proxy_auth=jo:secret";
        in_folder(data, &["exec", "--proxy", &address, "--set", auth, "--", "sh", "-c", script])
    };
    let (waiting, listen) = (exec(data.path()), address.clone());
    let waiting = std::thread::spawn(move || run_command(waiting, b""));
    let auth = "listen.proxy_auth=jo:secret";
    let arguments = ["serve", "--listen", &listen, "--admin", "127.0.0.1:0", "--set", auth];
    let running = Running::start(&mut in_folder(data.path(), &arguments));
    let output = waiting.join().expect("no panic");
    assert_eq!(text(&output.stdout), format!("http://jo:secret@{address}\n"), "{}", output.stderr);

    let other = tempfile::tempdir().expect("a folder");
    let output = run_command(exec(other.path()), b"");
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains("name that proxy's own folder in intercept.ca_dir"),
        "{}",
        output.stderr
    );
    drop(running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_file_says_of_the_listener_is_not_about_execs_own_proxy() {
    let data = tempfile::tempdir().expect("a folder");
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let file = data.path().join("proxy.toml");
    let address = taken.local_addr().expect("bound");
    let content = format!(
        "[listen]\naddress = '{address}'\nallow_from = ['10.0.0.0/8']\nproxy_auth = 'a:b'\n"
    );
    std::fs::write(&file, content).expect("ours");
    let named = file.to_str().expect("UTF-8");
    let script = "echo $https_proxy";
    let output = run_in(data.path(), &["exec", "-c", named, "--", "sh", "-c", script]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let url = text(&output.stdout);
    assert!(url.starts_with("http://127.0.0.1:") && !url.contains('@'), "{url}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_finds_the_common_faults_and_names_their_remedies() {
    let now = httpdate::fmt_http_date(std::time::SystemTime::now());
    let fine = format!("Date: {now}\r\n");
    let origin = Origin::start([Reply::Write(answer("404 Not Found", &fine, b""))]).await;
    let data = tempfile::tempdir().expect("a folder");
    let upstream = format!("upstream.url={}", origin.url());
    let healthy = ["doctor", "--set", &upstream, "--set", "listen.address=127.0.0.1:0"];
    let output = run_in(data.path(), &healthy);
    assert_eq!(output.code, Some(0), "{}", text(&output.stdout));
    assert!(text(&output.stdout).lines().all(|line| line.starts_with("ok ")));

    let late = "Date: Thu, 01 Jan 2015 00:00:00 GMT\r\n";
    let late = Origin::start([Reply::Write(answer("200 OK", late, b""))]).await;
    let late = format!("upstream.url={}", late.url());
    let taken = format!("listen.address={}", origin.address);
    let operators = format!("admin.address={}", origin.address);
    let closed = format!("upstream.url=http://{}", {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        listener.local_addr().expect("bound")
    });
    let free = "listen.address=127.0.0.1:0";
    for (settings, fault, remedy) in [
        ([late.as_str(), free], "FAULT clock", "Set this machine's clock"),
        ([&upstream, &taken], "FAULT listener", "choose another address in listen.address"),
        (
            [&upstream, &operators],
            "FAULT admin listener",
            "choose another address in admin.address",
        ),
        ([&closed, free], "FAULT upstream", "Check that upstream.url is right"),
        (
            [&upstream, "intercept.ca_dir=/dev/null/x"],
            "FAULT certificate authority",
            "intercept.ca_dir",
        ),
    ] {
        let output = run_in(data.path(), &["doctor", "--set", settings[0], "--set", settings[1]]);
        let said = text(&output.stdout);
        assert_eq!(output.code, Some(1), "{said}");
        assert!(said.contains(fault) && said.contains(remedy), "{said}");
    }
    for (list, hidden) in [
        ("x,api.constantcontact.com", true),
        (".constantcontact.com", true),
        ("constantcontact.com:443", true),
        ("*", true),
        ("notconstantcontact.com,localhost", false),
    ] {
        let mut asked = in_folder(data.path(), &healthy);
        asked.env("NO_PROXY", list);
        let said = text(&run_command(asked, b"").stdout);
        assert_eq!(said.contains("FAULT NO_PROXY"), hidden, "{list}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_knows_its_own_kind() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let data = tempfile::tempdir().expect("a folder");
    let url = origin.url();
    let running = Running::start(&mut in_folder(
        data.path(),
        &["serve", "--listen", "127.0.0.1:0", "--upstream", &url],
    ));
    let here = format!("listen.address={}", running.address);
    let upstream = format!("upstream.url={url}");
    let said = text(&run_in(data.path(), &["doctor", "--set", &here, "--set", &upstream]).stdout);
    assert!(said.contains("ok    listener: an optin-proxy runs at"), "{said}");
    let round = format!("upstream.url=http://{}", running.address);
    let said = text(
        &run_in(data.path(), &["doctor", "--set", "listen.address=127.0.0.1:0", "--set", &round])
            .stdout,
    );
    assert!(said.contains("FAULT upstream") && said.contains("in circles"), "{said}");
}

#[test]
fn a_listener_that_would_serve_everybody_is_refused_with_the_keys_to_set() {
    let data = tempfile::tempdir().expect("a folder");
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080"] {
        let refused = run_in(data.path(), &["serve", "--listen", address]);
        assert_eq!(refused.code, Some(2), "{address}");
        for key in ["listen.address", "listen.allow_from", "listen.proxy_auth"] {
            assert!(refused.stderr.contains(key), "{}", refused.stderr);
        }
    }
    let mut open =
        in_folder(data.path(), &["serve", "--listen", "0.0.0.0:0", "--admin", "127.0.0.1:0"]);
    open.env("OPTIN_PROXY_LISTEN__ALLOW_FROM", "10.0.0.0/8,127.0.0.1/32");
    drop(Running::start(&mut open));
}
