//! What is shipped for Prometheus and Grafana speaks of metrics that there are.

use std::collections::BTreeSet;

use optin_proxy::observe::metrics::Metrics;

const ALERTS: &str = include_str!("../../deploy/prometheus/alerts.yml");
const DASHBOARD: &str = include_str!("../../deploy/grafana/optin-proxy.json");

/// Every series that is there from the start, by its name.
fn series() -> BTreeSet<String> {
    let text = Metrics::default().encode();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split(['{', ' ']).next().expect("a name").to_owned()).collect()
}

/// The names of metrics in a text.
fn named(text: &str) -> BTreeSet<&str> {
    let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_';
    text.split(|it| !is_name(it))
        .filter(|word| word.starts_with("optin_proxy_") || word.starts_with("process_"))
        .collect()
}

#[test]
fn every_metric_that_alerts_and_dashboard_name_exists() {
    let there = series();
    for (file, text) in [("alerts.yml", ALERTS), ("optin-proxy.json", DASHBOARD)] {
        let names = named(text);
        assert!(names.len() > 5, "{file}: {names:?}");
        for name in names {
            assert!(there.contains(name), "{file}: {name} is not in {there:?}");
        }
    }
}

/// Regression: of most, the first that were counted were no growth to Prometheus, which saw no series before them.
#[test]
fn what_is_alerted_on_is_counted_from_nothing() {
    let text = Metrics::default().encode();
    for problem in [
        "connect-timeout",
        "name-unresolved",
        "connection-refused",
        "unreachable",
        "certificate-untrusted",
        "tls-failed",
        "response-timeout",
        "answer-malformed",
        "connection-closed",
    ] {
        assert!(text.contains(&format!("{{problem=\"upstream-{problem}\"}} 0\n")), "{problem}");
    }
    for result in ["timeout", "client_gone", "alert", "not_tls", "wrong_name", "incompatible"] {
        let series = format!("optin_proxy_tls_handshakes_total{{result=\"{result}\"}} 0\n");
        assert!(text.contains(&series), "{result}");
    }
}

#[test]
fn every_metric_is_on_the_dashboard() {
    let shown = named(DASHBOARD);
    for name in series().iter().filter(|name| name.starts_with("optin_proxy_")) {
        let base = name.trim_end_matches("_sum").trim_end_matches("_count");
        let shown = shown.contains(name.as_str())
            || shown.contains(format!("{base}_bucket").as_str())
            || name.contains("malformed")
            || name.contains("config_reloads");
        assert!(shown, "{name}");
    }
}

#[test]
fn labels_that_alerts_and_dashboard_ask_for_have_such_values() {
    let text = Metrics::default().encode();
    for file in [ALERTS, DASHBOARD] {
        let file = file.replace("\\\"", "\"");
        for label in ["result=\"", "outcome=\"", "reason=\"", "verdict=\"", "kind=\""] {
            for (at, _) in file.match_indices(label) {
                let asked = &file[at..at
                    + label.len()
                    + file[at + label.len()..].find('"').expect("an end")
                    + 1];
                assert!(text.contains(asked), "{asked}");
            }
        }
    }
}
