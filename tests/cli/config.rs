//! The configuration: its layers, and what is said about mistakes.

use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use optin_proxy::config::{Config, File, Layers};

use crate::support::binary::{Running, command, run, run_command};
use crate::support::client::Client;
use crate::support::origin::{Origin, Reply};
use crate::support::{GET, no_content};

const SHIPPED: &str = include_str!("../../proxy.toml");

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(text.as_bytes()).expect("it can be written");
    file
}

/// What `check` says about a file.
fn complaint(text: &str) -> String {
    let file = file(text);
    let path = file.path().to_str().expect("UTF-8");
    let output = run(&["check", "-c", path], b"");
    assert_eq!(output.code, Some(2), "{text}");
    assert!(output.stdout.is_empty());
    output.stderr.replace(path, "proxy.toml")
}

#[test]
fn the_shipped_file_shows_every_key_with_its_default() {
    let shipped: File = toml::from_str(SHIPPED).expect("it is valid");
    assert_eq!(shipped, File::default());
    let keys = |text: &str| -> Vec<String> {
        let table: toml::Table = text.parse().expect("TOML");
        let sections = table.iter().flat_map(|(section, keys)| {
            let keys = keys.as_table().expect("a section").keys();
            keys.map(move |key| format!("{section}.{key}"))
        });
        sections.collect()
    };
    let all = toml::to_string(&File::default()).expect("TOML");
    assert_eq!(keys(SHIPPED), keys(&all));
}

#[test]
fn the_defaults_are_valid_and_check_prints_what_check_reads() {
    assert_eq!(Config::default().resolved, File::default());
    let output = run(&["check"], b"");
    assert_eq!(output.code, Some(0));
    let again = file(&String::from_utf8(output.stdout.clone()).expect("UTF-8"));
    let again = run(&["check", "-c", again.path().to_str().expect("UTF-8")], b"");
    assert_eq!(again.stdout, output.stdout);
}

#[test]
fn mistakes_name_file_line_key_and_the_nearest_right_key() {
    for (text, complaint_of) in [
        (
            "[retry]\n\nmax_attempt = 3\n",
            "proxy.toml:3: unknown key `retry.max_attempt`; did you mean `retry.max_attempts`?",
        ),
        ("[retri]\nx = 1\n", "proxy.toml:1: unknown key `retri`; did you mean `retry`?"),
        ("url = 'x'\n", "proxy.toml:1: unknown key `url`; did you mean `upstream.url`?"),
        (
            "[limits]\nmax_body = '1MiB'\n",
            "proxy.toml:2: unknown key `limits.max_body`; did you mean `sanitize.max_body`?",
        ),
        (
            "[retry]\nmax_attempts = 'x'\n",
            "proxy.toml:2: retry.max_attempts: invalid type: string \"x\", expected u32",
        ),
        (
            "[retry]\nmax_attempts = 0\n",
            "proxy.toml:2: retry.max_attempts: must be 1 (no retry) or more",
        ),
        (
            "[retry]\nbase_delay = '5'\n",
            "proxy.toml:2: retry.base_delay: time unit needed, for example 5sec or 5ms: write a duration like \"250ms\", \"10s\" or \"2m\"",
        ),
        ("[retry]\npattern = '('\n", "proxy.toml:2: retry.pattern: is not a regular expression"),
        ("[retry]\npattern = 'x'\n", "proxy.toml:2: retry.pattern: has no group `actor`"),
        (
            "[sanitize]\nmax_body = '1 apple'\n",
            "proxy.toml:2: sanitize.max_body: is not a size: write one like \"64KiB\" or \"1MiB\"",
        ),
        (
            "[sanitize]\nlists = 'aline'\n",
            "proxy.toml:2: sanitize.lists: unknown variant `aline`, expected one of `align`, `strip`, `leave`",
        ),
        (
            "[sanitize.aliases]\nX = 'Y'\n",
            "proxy.toml:2: sanitize.aliases.X: unknown variant `Y`, expected `ACTION_BY_CONTACT` or `ACTION_BY_CUSTOMER`",
        ),
        (
            "[upstream]\nurl = 'https://a.example/path'\n",
            "proxy.toml:2: upstream.url: has a path, but requests keep their own",
        ),
        (
            "[upstream]\nurl = 'ftp://a.example'\n",
            "proxy.toml:2: upstream.url: is neither http nor https",
        ),
        ("[upstream]\nurl = 'a.example'\n", "proxy.toml:2: upstream.url: has no scheme or no host"),
        ("[listen]\naddress = '8080'\n", "proxy.toml:2: listen.address: must be a host and a port"),
        (
            "[limits]\nidle_timeout = '0s'\n",
            "proxy.toml:2: limits.idle_timeout: must be longer than zero",
        ),
        ("listen = 1\n", "proxy.toml:1: `listen` is a section"),
        ("[listen]\naddress = \n", "proxy.toml:2: listen.address: "),
        ("[admin]\ns3cret=\n", "proxy.toml:2: string values"),
        ("[s3cret]\nx = 1\n[s3cret]\n", "proxy.toml:3: duplicate key"),
        (
            "[upstream]\nurl = 'http://a.example:99999'\n",
            "proxy.toml:2: upstream.url: has a port that is none",
        ),
        ("[admin]\ntoken = s3cret\n", "proxy.toml:2: admin.token: "),
        (
            "[listen]\naddress = '[::1]:1'\naddress = '[::1]:2'\n",
            "proxy.toml:3: listen.address: duplicate key",
        ),
        ("[log]\n[listen]\n[log]\n", "proxy.toml:3: log: duplicate key"),
        (
            "[log]\n\n[sanitize]\nmax_body = '100MiB'\n",
            "proxy.toml:4: sanitize.max_body: must be at most limits.max_buffered, 64MiB: raise that too",
        ),
        (
            "[limits]\nmax_buffered = '1KiB'\n",
            "proxy.toml:2: limits.max_buffered: must be at least sanitize.max_body",
        ),
        (
            "[sanitize.aliases]\nACTION_BY_CONTACT = 'ACTION_BY_CUSTOMER'\n",
            "proxy.toml:2: sanitize.aliases.ACTION_BY_CONTACT: is a value of the API's own",
        ),
        (
            "[upstream]\nurl = 'http://a.example#x'\n",
            "proxy.toml:2: upstream.url: has a query or a fragment",
        ),
        (
            "[upstream]\nurl = 'http://user:s3cret@a.example:80'\n",
            "proxy.toml:2: upstream.url: holds a user name, which belongs into the application's own requests",
        ),
        (
            "[upstream]\nurl = 'http://a.example:0'\n",
            "proxy.toml:2: upstream.url: has a port that is none",
        ),
    ] {
        let said = complaint(text);
        assert!(said.starts_with(&format!("optin-proxy: {complaint_of}")), "{text}{said}");
        assert!(!said.contains("s3cret"), "{said}");
    }
}

#[test]
fn all_unknown_keys_are_named_at_once() {
    let said = complaint("[retry]\nmax_attempt = 3\n[log]\nlevle = 'info'\n");
    assert!(said.contains("proxy.toml:2:") && said.contains("proxy.toml:4:"), "{said}");
}

#[test]
fn arguments_go_over_environment_over_file_over_default() {
    let file = file(
        "[retry]\nmax_attempts = 4\nbudget = 0.4\ndeadline = '4s'\n[sanitize.aliases]\nOLD = 'ACTION_BY_CUSTOMER'\n",
    );
    let mut check = command(&[
        "check",
        "-c",
        file.path().to_str().expect("UTF-8"),
        "--set",
        "retry.max_attempts=6",
        "--set",
        "sanitize.aliases.By_Client=ACTION_BY_CONTACT",
        "--set",
        "upstream.url=http://localhost:1",
    ]);
    check.env("OPTIN_PROXY_RETRY__MAX_ATTEMPTS", "5").env("OPTIN_PROXY_RETRY__BUDGET", "0.5");
    check.env("OPTIN_PROXY_SANITIZE__ALIASES__ACTION_BY_CLIENT", "ACTION_BY_CUSTOMER");
    check.env("OPTIN_PROXY_SOMETHING_ELSE", "is not ours to judge");
    let output = run_command(check, b"");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let file: File = toml::from_str(&text).expect("TOML");
    assert_eq!(file.retry.max_attempts, 6);
    assert_eq!(file.retry.budget, 0.5);
    assert_eq!(file.retry.deadline.to_string(), "4s");
    assert_eq!(file.retry.budget_floor, 3);
    assert_eq!(file.upstream.url, "http://localhost:1");
    let aliases: Vec<&String> = file.sanitize.aliases.keys().collect();
    assert_eq!(aliases, ["ACTION_BY_CLIENT", "By_Client", "OLD"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_go_over_the_environment() {
    let origin = Origin::start([Reply::Write(no_content())]).await;
    let url = origin.url();
    let mut serving = command(&["serve", "--listen", "127.0.0.1:0", "--upstream", &url]);
    serving.env("OPTIN_PROXY_UPSTREAM__URL", "http://127.0.0.1:9");
    let running = Running::start(&mut serving);
    assert_eq!(Client::connect(running.address).await.ask(GET).await.status, 204);
}

#[test]
fn values_that_nobody_can_mean_are_refused() {
    for setting in [
        "retry.budget=-1",
        "retry.budget=nan",
        "intercept.ports=0,443",
        "intercept.tunnel_idle_timeout=0s",
        "limits.max_connections=0",
        "limits.max_requests=0",
        "limits.max_headers=0",
        // Each request would ask for all of the memory that there is.
        "limits.max_headers=16385",
        "listen.address=http://127.0.0.1:8080",
        "listen.address=x/y:1",
        "listen.address=0:8080",
        "listen.address=:::8080",
        "admin.address=*:8081",
        "admin.address=localhost",
        "limits.max_target=0B",
        "limits.max_head=8191B",
        "limits.header_timeout=0s",
        "limits.body_timeout=0s",
        "limits.request_timeout=0s",
        "upstream.url=http://user@a.example",
        "upstream.connect_timeout=0s",
        "upstream.response_timeout=0s",
        "audit.max_size=0B",
        "audit.max_age=0s",
        "admin.exchanges=1000001",
        "admin.token=0123456789abcde",
    ] {
        let mut layers = Layers::default();
        layers.set("test", setting);
        let said = layers.build().expect_err(setting).to_string();
        let key = setting.split('=').next().expect("a key");
        assert!(said.starts_with(&format!("test: {key}")), "{setting}: {said}");
    }
}

#[test]
fn mistakes_in_the_environment_and_in_arguments_name_their_place() {
    for (name, value, expected) in [
        (
            "OPTIN_PROXY_RETRY__MAX_ATTEMPT",
            "1",
            "environment variable OPTIN_PROXY_RETRY__MAX_ATTEMPT: unknown key `retry.max_attempt`; did you mean `retry.max_attempts`?",
        ),
        ("OPTIN_PROXY_", "1", "environment variable OPTIN_PROXY_: it names no key"),
        (
            "OPTIN_PROXY_RETRY__BUDGET",
            "x",
            "environment variable OPTIN_PROXY_RETRY__BUDGET: retry.budget: ",
        ),
        (
            "OPTIN_PROXY_RETRY_BUDGET",
            "1",
            "environment variable OPTIN_PROXY_RETRY_BUDGET: two underscores separate section and key: OPTIN_PROXY_RETRY__BUDGET",
        ),
    ] {
        let mut check = command(&["check"]);
        check.env(name, value);
        let output = run_command(check, b"");
        assert_eq!(output.code, Some(2));
        assert!(
            output.stderr.starts_with(&format!("optin-proxy: {expected}")),
            "{}",
            output.stderr
        );
    }
    for (arguments, expected) in [
        (&["check", "--set", "retry=3"][..], "--set: `retry` is a section: name a key of it"),
        (
            &["check", "--set", "sanitize.aliases.ACTION_BY_CUSTOMER=ACTION_BY_CONTACT"],
            "--set: sanitize.aliases.ACTION_BY_CUSTOMER: is a value of the API's own",
        ),
        (
            &["check", "--set", "retry.budget"][..],
            "--set: write section.key=value, not `retry.budget`",
        ),
        (
            &["check", "--set", "retry.bugdet=1"],
            "--set: unknown key `retry.bugdet`; did you mean `retry.budget`?",
        ),
        (
            &["check", "--set", "SANITIZE.MODE=observe"],
            "--set: unknown key `SANITIZE.MODE`; did you mean `sanitize.mode`?",
        ),
        // What has no name may be a secret.
        (
            &["check", "--set", "admin.token \"0123456789abcdef\""],
            "--set: write section.key=value, not `admin.token`",
        ),
        (&["serve", "--upstream", "nowhere"], "--upstream: upstream.url: has no scheme or no host"),
        (&["serve", "--listen", "x"], "--listen: listen.address: must be a host and a port"),
        (
            &["check", "-c", "/nowhere/proxy.toml"],
            "/nowhere/proxy.toml: cannot read the configuration",
        ),
    ] {
        let output = run(arguments, b"");
        assert_eq!(output.code, Some(2), "{arguments:?}");
        assert!(
            output.stderr.starts_with(&format!("optin-proxy: {expected}")),
            "{}",
            output.stderr
        );
    }
}

#[test]
fn values_that_look_like_something_else_are_taken_as_the_text_that_is_expected() {
    let mut layers = Layers::default();
    layers.set("test", "retry.pattern=1");
    layers.set("test", "sanitize.max_body=2KiB");
    layers.set("test", "log.report_header=false");
    let said = layers.build().expect_err("no group").to_string();
    assert!(said.starts_with("test: retry.pattern: has no group"), "{said}");
}

#[test]
fn a_name_of_the_users_own_may_be_quoted_as_in_toml() {
    for name in ["\"x y\"", "'x y'", "x y"] {
        let mut layers = Layers::default();
        layers.set("test", &format!("sanitize.aliases.{name}=ACTION_BY_CUSTOMER"));
        let config = layers.build().expect("valid");
        assert!(config.resolved.sanitize.aliases.contains_key("x y"), "{name}");
    }
    let mut layers = Layers::default();
    layers.set("test", "\"retry\" . 'max_attempts' = 7");
    layers.set("test", "sanitize.aliases.a.b=ACTION_BY_CUSTOMER");
    layers.set("test", "sanitize.aliases.\"c.d\"=ACTION_BY_CUSTOMER");
    let config = layers.build().expect("valid");
    assert_eq!(config.retry.max_attempts, 7);
    let aliases: Vec<_> = config.resolved.sanitize.aliases.keys().collect();
    assert_eq!(aliases, ["a.b", "c.d"]);
}

/// Regression: a token in the environment made the port of the shipped file one that was chosen.
#[test]
fn who_chooses_a_token_chooses_no_address_for_operators() {
    let is_required = |name: &str, value: &str| {
        let mut layers = Layers::default();
        layers.file(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/proxy.toml")));
        layers.environment([(name.into(), value.into())].into_iter());
        layers.build().expect("valid").admin.required
    };
    assert!(!is_required("OPTIN_PROXY_ADMIN__TOKEN", "0123456789abcdef"));
    assert!(is_required("OPTIN_PROXY_ADMIN__ADDRESS", "127.0.0.1:9901"));
}

#[test]
fn clients_that_are_allowed_may_be_given_by_their_address_alone() {
    let mut layers = Layers::default();
    layers.set("test", "listen.allow_from=127.0.0.1, ::1, 10.0.0.0/8");
    let config = layers.build().expect("valid");
    let shown: Vec<_> = config.listen.allow_from.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["127.0.0.1/32", "::1/128", "10.0.0.0/8"]);
}

#[test]
fn authorities_that_cannot_be_loaded_are_a_clear_error_before_anything_is_bound() {
    let empty = file("");
    let broken = file("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let paths = [empty.path().to_str(), broken.path().to_str(), Some("/nowhere/ca.pem")];
    for path in paths.map(|path| path.expect("UTF-8")) {
        for command in ["check", "serve"] {
            let output = run(&[command, "--set", &format!("upstream.ca_file={path}")], b"");
            assert_eq!(output.code, Some(2), "{command} {path}");
            let said = output.stderr;
            assert!(said.contains("upstream.ca_file") && said.contains(path), "{said}");
        }
    }
}

/// Kubernetes gives every pod variables named after the services around it.
#[test]
fn variables_that_only_begin_like_ours_are_not_ours() {
    for (name, ours) in [
        ("OPTIN_PROXY_ADMIN_SERVICE_HOST", false),
        ("OPTIN_PROXY_PORT_8080_TCP", false),
        ("OPTIN_PROXY_UPSTREM_URL", true),
        ("OPTIN_PROXY_LOG_LEVEL", true),
        ("OPTIN_PROXY_SANITIZE", true),
        ("OPTIN_PROXY_MODE", true),
        ("OPTIN_PROXY_VERSION", false),
    ] {
        let mut check = command(&["check"]);
        check.env(name, "x");
        assert_eq!(run_command(check, b"").code, Some(if ours { 2 } else { 0 }), "{name}");
    }
}

/// Regression: it was as if the variable were not there, so that what it guards stood open.
#[test]
fn a_variable_that_is_not_utf_8_is_an_error_and_not_repeated() {
    for name in ["OPTIN_PROXY_LISTEN__PROXY_AUTH", "OPTIN_PROXY_SANITIZE__MODE"] {
        let mut check = command(&["check"]);
        check.env(name, OsStr::from_bytes(b"user:p\xe4ss"));
        let output = run_command(check, b"");
        assert_eq!(output.code, Some(2));
        let expected = format!("environment variable {name}: its value is not UTF-8");
        assert!(output.stderr.contains(&expected), "{}", output.stderr);
        assert!(!output.stderr.contains("user:p"), "{}", output.stderr);
    }
}

#[test]
fn mistakes_of_syntax_name_line_and_key() {
    for (text, expected) in [
        (&b"listen.address = 127.0.0.1:8080"[..], "1: listen.address: "),
        (b"[listen]\naddress \"x\"", "2: listen.address: "),
        (b"[sanitize.aliases]\nFOO = ACTION_BY_CONTACT", "2: sanitize.aliases: "),
        (b"# one\n# caf\xe9", "2: this is not UTF-8"),
        (b"[limits]\nmax_requests = 9223372036854775807", "2: limits.max_requests: must be "),
        (b"[listen]\ndrain_timeout = 25", "2: listen.drain_timeout: time unit needed"),
        (b"[sanitize]\naliases = {A = \"B\"}", "2: sanitize.aliases.A: "),
    ] {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("ours");
        let path = file.path().to_str().expect("UTF-8");
        let output = run(&["check", "-c", path], b"");
        assert_eq!(output.code, Some(2));
        let expected = format!("optin-proxy: {path}:{expected}");
        assert!(output.stderr.starts_with(&expected), "{} {}", output.stderr, expected);
    }
    let in_a_table = run(&["check", "--set", "sanitize.aliases={A=\"B\"}"], b"").stderr;
    assert!(in_a_table.starts_with("optin-proxy: --set: sanitize.aliases.A: "), "{in_a_table}");
}

/// Regression: a secret without its quotes stood in the error, in the log at a reload, and in its answer.
#[test]
fn a_secret_that_is_no_text_is_not_repeated() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("proxy.toml");
    for (section, line) in [
        ("admin", "token = 1234567890123456789"),
        ("admin", "token = 12345.6789"),
        ("listen", "proxy_auth = 1234567890123456789"),
        ("listen", "proxy_auth = 98765432109812345678"),
        ("admin", "token = {a = 98765432109812345678}"),
    ] {
        std::fs::write(&file, format!("[{section}]\n{line}\n")).expect("ours");
        let output = run(&["check", "-c", file.to_str().expect("UTF-8")], b"");
        assert_eq!(output.code, Some(2));
        assert!(output.stderr.contains("put it in quotes"), "{}", output.stderr);
        assert!(!output.stderr.contains("12345"), "{}", output.stderr);
    }
}
