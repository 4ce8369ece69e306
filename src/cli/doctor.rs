//! `optin-proxy doctor`: the common faults, each with its remedy.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;
use http::header::{DATE, VIA};
use http::{HeaderMap, StatusCode};

use super::{ConfigArgs, Failure, env, healthcheck};
use crate::config::Config;
use crate::intercept::ca::{Authority, CaError, NEARLY_OVER};
use crate::intercept::trust;
use crate::proxy::{Probe, probe};

/// How far two clocks may be apart before certificates of one look wrong to the other.
const SKEW: Duration = Duration::from_secs(5 * 60);

#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    config: ConfigArgs,
}

/// What was looked at, and what is wrong with it.
struct Finding {
    subject: &'static str,
    /// What is so.
    state: String,
    /// What to do; `None` if nothing.
    remedy: Option<String>,
}

impl Finding {
    fn fine(subject: &'static str, state: impl Into<String>) -> Self {
        Self { subject, state: state.into(), remedy: None }
    }

    fn fault(subject: &'static str, state: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject, state: state.into(), remedy: Some(remedy.into()) }
    }
}

impl Doctor {
    pub fn run(self) -> Result<(), Failure> {
        let config = Arc::new(self.config.load(&[])?);
        let mut findings = vec![Finding::fine("configuration", "is valid"), authority(&config)];
        findings.extend(super::block_on(async {
            let mut findings = vec![listener(&config).await];
            findings.extend(admin(&config).await);
            findings.extend(upstream(&config).await);
            findings
        })?);
        findings.push(past_the_proxy(&config));

        let mut report = String::new();
        for Finding { subject, state, remedy } in &findings {
            let mark = if remedy.is_none() { "ok   " } else { "FAULT" };
            let _ = writeln!(report, "{mark} {subject}: {state}");
            if let Some(remedy) = remedy {
                let _ = writeln!(report, "      {remedy}");
            }
        }
        let told = io::stdout().write_all(report.as_bytes());
        if findings.iter().all(|finding| finding.remedy.is_none()) {
            Ok(told?)
        } else {
            Err(Failure::Negative)
        }
    }
}

fn authority(config: &Config) -> Finding {
    const SUBJECT: &str = "certificate authority";
    let intercept = &config.intercept;
    let Some(folder) = &intercept.ca_dir else {
        return Finding::fault(
            SUBJECT,
            "has no folder",
            "Set intercept.ca_dir, or HOME. Base-URL mode works without.",
        );
    };
    match Authority::load(folder, &intercept.rules.hosts) {
        Ok(None) => Finding::fine(
            SUBJECT,
            format!("none in {} yet; it is made at its first use", folder.display()),
        ),
        Ok(Some(authority)) => {
            let left = authority.not_after().duration_since(SystemTime::now()).unwrap_or_default();
            let state = format!("{}, {} days left", folder.display(), left.as_secs() / 86_400);
            if left > NEARLY_OVER {
                return Finding::fine(SUBJECT, state);
            }
            Finding::fault(
                SUBJECT,
                state,
                "Move the folder away, run `optin-proxy ca init`, restart `serve`, and let clients trust the new one.",
            )
        }
        // The error names its remedy.
        Err(error @ CaError::Broken { .. }) => Finding::fault(
            SUBJECT,
            error.to_string(),
            "If it says expired, look at this machine's clock first.",
        ),
        Err(error) => Finding::fault(SUBJECT, error.to_string(), "Base-URL mode works without."),
    }
}

/// A request that says it has been here tells an optin-proxy from anything else.
fn came_round() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(VIA, http::HeaderValue::from_static("1.1 optin-proxy"));
    headers
}

fn is_optin_proxy(probe: &Probe) -> bool {
    let status = probe.headers.get("proxy-status").map(|status| status.as_bytes());
    // 403 if it does not serve this machine.
    matches!(probe.status, StatusCode::LOOP_DETECTED | StatusCode::FORBIDDEN)
        && status.is_some_and(|status| status.starts_with(b"optin-proxy;"))
}

async fn listener(config: &Arc<Config>) -> Finding {
    const SUBJECT: &str = "listener";
    let address = &config.listen.address;
    let error = match tokio::net::TcpListener::bind(address).await {
        Ok(_) => return Finding::fine(SUBJECT, format!("{address} is free")),
        Err(error) => error,
    };
    if error.kind() != io::ErrorKind::AddrInUse {
        return Finding::fault(
            SUBJECT,
            format!("{address}: {error}"),
            "Choose an address of this machine in listen.address.",
        );
    }
    match probe(config, &format!("http://{address}"), came_round()).await {
        Ok(answer) if is_optin_proxy(&answer) => match vouches(config, address).await {
            Ok(()) => Finding::fine(SUBJECT, format!("an optin-proxy runs at {address}")),
            Err(error) => Finding::fault(
                SUBJECT,
                error.to_string(),
                "Until then clients refuse what it serves.",
            ),
        },
        _ => Finding::fault(
            SUBJECT,
            format!("{address} is taken by another program"),
            "Stop that program, or choose another address in listen.address.",
        ),
    }
}

/// Whether the listener for operators can be had, where somebody chose its address: the proxy would not start without.
async fn admin(config: &Config) -> Option<Finding> {
    const SUBJECT: &str = "admin listener";
    let address = &config.admin.address;
    let error = match config.admin.required {
        true => tokio::net::TcpListener::bind(address).await.err()?,
        false => return None,
    };
    // The one that runs has it.
    if error.kind() == io::ErrorKind::AddrInUse && healthcheck::is_ours(address) {
        return None;
    }
    Some(Finding::fault(
        SUBJECT,
        format!("{address}: {error}"),
        "Stop the program that has it, or choose another address in admin.address.",
    ))
}

/// Whether the proxy that runs has the authority that is in this command's folder.
async fn vouches(config: &Arc<Config>, address: &str) -> Result<(), Failure> {
    let intercept = &config.intercept;
    let Some(folder) = &intercept.ca_dir else { return Ok(()) };
    match Authority::load(folder, &intercept.rules.hosts) {
        Ok(Some(authority)) => {
            env::agrees(config, &env::reached(config, address)?, &authority).await
        }
        // Said already, or none yet.
        _ => Ok(()),
    }
}

async fn upstream(config: &Arc<Config>) -> Vec<Finding> {
    const SUBJECT: &str = "upstream";
    let url = &config.resolved.upstream.url;
    let answer = match probe(config, url, came_round()).await {
        Err(error) => {
            let (state, remedy) = error.explained();
            return vec![Finding::fault(SUBJECT, state, remedy)];
        }
        Ok(answer) if is_optin_proxy(&answer) => {
            return vec![Finding::fault(
                SUBJECT,
                format!("{url} is an optin-proxy: requests would go round in circles"),
                "Set upstream.url to the API itself.",
            )];
        }
        Ok(answer) => answer,
    };
    let reached = Finding::fine(SUBJECT, format!("{url} answers, with {}", answer.status));
    vec![reached, clock(&answer)]
}

fn clock(answer: &Probe) -> Finding {
    const SUBJECT: &str = "clock";
    let date = answer.headers.get(DATE).and_then(|date| date.to_str().ok());
    let Some(theirs) = date.and_then(|date| httpdate::parse_http_date(date).ok()) else {
        return Finding::fine(SUBJECT, "the upstream does not tell the time");
    };
    let now = SystemTime::now();
    let apart = now.duration_since(theirs).unwrap_or_else(|error| error.duration());
    if apart <= SKEW {
        return Finding::fine(SUBJECT, "agrees with the upstream's");
    }
    Finding::fault(
        SUBJECT,
        format!("{} s apart from the upstream's", apart.as_secs()),
        "Set this machine's clock: certificates are judged by it.",
    )
}

/// Whether the environment of this very command would lead a client past the proxy.
fn past_the_proxy(config: &Config) -> Finding {
    const SUBJECT: &str = "NO_PROXY";
    let environment = |name: &str| std::env::var_os(name);
    match trust::hidden(&config.intercept.rules.hosts, &environment) {
        None => Finding::fine(SUBJECT, "excepts no intercepted host"),
        Some((variable, entry)) => Finding::fault(
            SUBJECT,
            format!("`{entry}` in {variable} leads clients past the proxy"),
            format!("Take it out of {variable}."),
        ),
    }
}
