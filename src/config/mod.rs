//! Configuration, in two steps: what was written ([`file::File`], with the place of every value), and
//! what is meant ([`Config`]). Building the second is the only validation.
//!
//! Order of precedence: `--set` and flags, environment (`OPTIN_PROXY_SECTION__KEY`), file, default.

mod changes;
pub mod file;
mod layers;
mod values;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http::uri::{Authority, Scheme};
use ipnet::IpNet;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::Semaphore;

pub use changes::Change;
pub use file::{File, Log, LogFormat, LogLevel, Uninspectable};
pub use layers::{ConfigError, Layers};
use values::{ca_dir, load_authorities, load_credentials, load_token, parse_upstream};
pub(crate) use values::{check_address, is_address};

use crate::contact::refusal::Pattern;
use crate::contact::{Mode, Policy, Source, Span};
use crate::intercept::{Host, Rules};
use crate::observe::admin::Token;
use crate::proxy::Credentials;

/// The most fields that a message may have. There is room for them in each request, before one is read.
const MAX_HEADERS: usize = 16_384;

/// A valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The listener of both ways of use.
    pub listen: Listen,
    /// Where requests go.
    pub upstream: Upstream,
    /// What becomes of contact writes.
    pub sanitize: Sanitize,
    /// When a refusal is sent again.
    pub retry: Retry,
    /// What becomes of CONNECT and of absolute-form targets.
    pub intercept: Intercept,
    /// How long anything may take.
    pub limits: Limits,
    /// What is logged, and how.
    pub log: Log,
    /// The trail of what was changed.
    pub audit: Audit,
    /// The listener for operators.
    pub admin: Admin,
    /// What was written, defaults filled in: what `optin-proxy check` prints.
    pub resolved: File,
}

/// `[listen]`
#[derive(Debug, Clone)]
pub struct Listen {
    /// Host and port; port 0 means any.
    pub address: String,
    /// How long requests in flight may take to finish on shutdown.
    pub drain_timeout: Duration,
    /// How long a connection is kept for the client's next request.
    pub keep_alive: Duration,
    /// The only clients that are served; empty for all.
    pub allow_from: Vec<IpNet>,
    /// What clients of the forward proxy must know.
    pub proxy_auth: Option<Credentials>,
}

impl Listen {
    /// Whether a listener at this address would be a proxy for whoever can reach it.
    pub(crate) fn is_open(&self, address: IpAddr) -> bool {
        !address.to_canonical().is_loopback()
            && self.allow_from.is_empty()
            && self.proxy_auth.is_none()
    }

    /// Whether a client at this address may use it.
    pub(crate) fn allows(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        self.allow_from.is_empty() || self.allow_from.iter().any(|net| net.contains(&client))
    }
}

/// What to do about a listener that would serve everybody.
pub(crate) const CLOSE_IT: &str = "other machines reach it: name those that may in listen.allow_from, or \
    set listen.proxy_auth";

/// `[upstream]`
#[derive(Debug, Clone)]
pub struct Upstream {
    /// `https`, or `http` for a simulated API.
    pub scheme: Scheme,
    /// Host, and the port if it is not the scheme's own.
    pub authority: Authority,
    /// Certificate authorities to trust instead of the system's.
    pub authorities: Option<Vec<CertificateDer<'static>>>,
    /// The longest wait for a connection: name look-up, TCP and TLS together.
    pub connect_timeout: Duration,
    /// The longest wait for the first byte of an answer, per attempt.
    pub response_timeout: Duration,
    /// How long an unused connection is kept for the next request.
    pub keep_alive: Duration,
}

/// `[sanitize]`
#[derive(Debug, Clone)]
pub struct Sanitize {
    /// What to do about each kind of inconsistency.
    pub policy: Policy,
    /// What becomes of a body that cannot be inspected.
    pub uninspectable: Uninspectable,
    /// The longest body that is inspected, in bytes.
    pub max_body: usize,
}

/// `[retry]`
#[derive(Debug, Clone)]
pub struct Retry {
    /// What a transition refusal looks like.
    pub pattern: Pattern,
    /// Attempts in all, the first one included.
    pub max_attempts: u32,
    /// The wait before the second attempt, doubled for each further one, before jitter.
    pub base_delay: Duration,
    /// The longest wait between attempts.
    pub max_delay: Duration,
    /// From the first attempt's start on, when to give up.
    pub deadline: Duration,
    /// Retries per request, over any 10 s.
    pub budget: f64,
    /// Retries a second that are always allowed.
    pub budget_floor: u32,
}

/// `[intercept]`
#[derive(Debug, Clone)]
pub struct Intercept {
    /// Where clients may be connected to.
    pub rules: Rules,
    /// Where the certificate authority is kept; `None` if neither the key nor the environment says.
    pub ca_dir: Option<PathBuf>,
    /// The longest silence of a tunnel.
    pub tunnel_idle_timeout: Duration,
}

/// `[limits]`
#[derive(Debug, Clone)]
pub struct Limits {
    /// The longest wait for a request's head, and for the first bytes of a connection.
    pub header_timeout: Duration,
    /// The longest that a contact write's body may take to come.
    pub body_timeout: Duration,
    /// The longest that an exchange may take, from its head to the end of its answer.
    pub request_timeout: Duration,
    /// The longest silence in the middle of a body, downstream or upstream.
    pub idle_timeout: Duration,
    /// The least bytes a second of an upload, counting the time that the proxy waits for it, after a grace of
    /// `idle_timeout`; 0 for none.
    pub min_rate: usize,
    /// The most downstream connections; further ones wait to be accepted.
    pub max_connections: usize,
    /// The most requests in flight; further ones get 503.
    pub max_requests: usize,
    /// The most bytes of bodies that are held at once, all requests together.
    pub max_buffered: usize,
    /// The longest head of a request, in bytes.
    pub max_head: usize,
    /// The most fields in the head of an HTTP/1 request.
    pub max_headers: usize,
    /// The longest path and query, in bytes.
    pub max_target: usize,
}

/// `[audit]`
#[derive(Debug, Clone)]
pub struct Audit {
    /// The file; `None` for no trail.
    pub path: Option<PathBuf>,
    /// The longest that a file may get, in bytes.
    pub max_size: u64,
    /// The longest that a file is written to.
    pub max_age: Duration,
    /// How many files beside the one that is written to.
    pub keep: usize,
    /// The longest that a line may be with the system before it is forced to the disk.
    pub fsync: Duration,
}

/// `[admin]`
#[derive(Debug, Clone)]
pub struct Admin {
    /// Host and port; port 0 means any.
    pub address: String,
    /// What has to be known to change anything, or to see more than numbers from another machine.
    pub token: Option<Token>,
    /// Names under which operators reach the listener, beside this machine's own addresses.
    pub hosts: Vec<Host>,
    /// How many exchanges are kept to be looked at.
    pub exchanges: usize,
    /// Somebody chose the address: then it must be had, else the proxy does not start.
    pub required: bool,
}

impl Config {
    /// The same with another `sanitize.mode`.
    pub(crate) fn with_mode(mut self, mode: Mode) -> Self {
        (self.sanitize.policy.mode, self.resolved.sanitize.mode) = (mode, mode);
        self
    }

    /// The same with another `log.level`.
    pub(crate) fn with_level(mut self, level: LogLevel) -> Self {
        (self.log.level, self.resolved.log.level) = (level, level);
        self
    }

    /// Validates what was written.
    ///
    /// # Errors
    /// The first value that cannot be meant, by its dotted key.
    pub(crate) fn build(file: File) -> Result<Self, (&'static str, String)> {
        let (scheme, authority) = parse_upstream(&file.upstream.url)?;
        check_address("listen.address", &file.listen.address)?;
        check_address("admin.address", &file.admin.address)?;
        let listen = Listen {
            address: file.listen.address.clone(),
            drain_timeout: file.listen.drain_timeout.0,
            keep_alive: file.listen.keep_alive.0,
            allow_from: file.listen.allow_from.0.iter().map(|it| it.0).collect(),
            proxy_auth: load_credentials(&file.listen.proxy_auth)?,
        };
        let literal = listen.address.parse::<SocketAddr>();
        if literal.is_ok_and(|address| listen.is_open(address.ip())) {
            return Err(("listen.address", CLOSE_IT.into()));
        }
        let authorities = load_authorities(&file.upstream.ca_file)?;
        let pattern = Pattern::new(&file.retry.pattern)
            .map_err(|error| ("retry.pattern", error.to_string()))?;
        for (key, known) in [
            ("sanitize.aliases.ACTION_BY_CONTACT", Source::Contact),
            ("sanitize.aliases.ACTION_BY_CUSTOMER", Source::Customer),
        ] {
            if file.sanitize.aliases.contains_key(known.as_str()) {
                return Err((key, "is a value of the API's own, and stands for itself".into()));
            }
        }
        if file.retry.max_attempts == 0 {
            return Err(("retry.max_attempts", "must be 1 (no retry) or more".into()));
        }
        if !(file.retry.budget.is_finite() && file.retry.budget >= 0.0) {
            return Err(("retry.budget", "must be 0 or more: retries per request".into()));
        }
        if file.sanitize.max_body.0 > Span::LONGEST_BODY {
            return Err(("sanitize.max_body", "must be less than 4GiB".into()));
        }
        let mut hosts: Vec<Host> = Vec::new();
        for host in &file.intercept.hosts.0 {
            if ServerName::try_from(host).is_err() {
                let why = format!("`{host}` cannot stand in a certificate: name hosts as DNS does");
                return Err(("intercept.hosts", why));
            }
            // In other letters it is the same host.
            if !hosts.contains(host) {
                hosts.push(host.clone());
            }
        }
        if file.intercept.ports.0.contains(&0) {
            return Err(("intercept.ports", "a port is a number from 1 to 65535".into()));
        }
        for (key, number) in [
            ("limits.max_connections", file.limits.max_connections),
            ("limits.max_requests", file.limits.max_requests),
            ("limits.max_buffered", file.limits.max_buffered.0),
            ("limits.max_headers", file.limits.max_headers),
            ("limits.max_target", file.limits.max_target.0),
        ] {
            if number == 0 {
                return Err((key, "must be 1 or more: without it nothing could be done".into()));
            }
            if number > Semaphore::MAX_PERMITS {
                return Err((key, format!("must be {} or less", Semaphore::MAX_PERMITS)));
            }
        }
        if file.limits.max_headers > MAX_HEADERS {
            let why = format!("must be {MAX_HEADERS} or less: each request has room for as many");
            return Err(("limits.max_headers", why));
        }
        if file.admin.exchanges > 1_000_000 {
            return Err((
                "admin.exchanges",
                "must be 1000000 or less: they are kept in memory".into(),
            ));
        }
        if file.audit.max_size.0 == 0 || file.audit.max_age.0.is_zero() {
            let key = if file.audit.max_size.0 == 0 { "audit.max_size" } else { "audit.max_age" };
            return Err((key, "must be more than zero: no line would fit".into()));
        }
        // hyper's own smallest buffer, and the largest that HTTP/2's setting can say.
        if !(8192..=u32::MAX as usize).contains(&file.limits.max_head.0) {
            return Err(("limits.max_head", "must be from 8KiB to less than 4GiB".into()));
        }
        if file.limits.max_buffered.0 < file.sanitize.max_body.0 {
            // Whoever has set one has set that one wrong.
            return Err(if file.limits.max_buffered == File::default().limits.max_buffered {
                let most = file.limits.max_buffered;
                let why = format!("must be at most limits.max_buffered, {most}: raise that too");
                ("sanitize.max_body", why)
            } else {
                let why = "must be at least sanitize.max_body: the longest body would never fit";
                ("limits.max_buffered", why.into())
            });
        }
        for (key, duration) in [
            ("upstream.connect_timeout", file.upstream.connect_timeout),
            ("upstream.response_timeout", file.upstream.response_timeout),
            ("limits.header_timeout", file.limits.header_timeout),
            ("limits.body_timeout", file.limits.body_timeout),
            ("limits.request_timeout", file.limits.request_timeout),
            ("limits.idle_timeout", file.limits.idle_timeout),
            ("intercept.tunnel_idle_timeout", file.intercept.tunnel_idle_timeout),
        ] {
            if duration.0.is_zero() {
                return Err((
                    key,
                    "must be longer than zero: without it nothing could be done".into(),
                ));
            }
        }
        Ok(Self {
            listen,
            upstream: Upstream {
                scheme,
                authority,
                authorities,
                connect_timeout: file.upstream.connect_timeout.0,
                response_timeout: file.upstream.response_timeout.0,
                keep_alive: file.upstream.keep_alive.0,
            },
            sanitize: Sanitize {
                policy: Policy {
                    mode: file.sanitize.mode,
                    lists: file.sanitize.lists,
                    undeclared: file.sanitize.undeclared,
                    ambiguous: file.sanitize.ambiguous,
                    removal: file.sanitize.removal,
                    keep_own_ids: !file.sanitize.restore_ids,
                    aliases: file.sanitize.aliases.clone(),
                },
                uninspectable: file.sanitize.uninspectable,
                max_body: file.sanitize.max_body.0,
            },
            retry: Retry {
                pattern,
                max_attempts: file.retry.max_attempts,
                base_delay: file.retry.base_delay.0,
                max_delay: file.retry.max_delay.0,
                deadline: file.retry.deadline.0,
                budget: file.retry.budget,
                budget_floor: file.retry.budget_floor,
            },
            intercept: Intercept {
                rules: Rules {
                    hosts,
                    other_hosts: file.intercept.other_hosts,
                    ports: file.intercept.ports.0.clone(),
                    allow: file.intercept.allow.0.clone(),
                    deny: file.intercept.deny.0.clone(),
                    allow_private: file.intercept.allow_private.0.clone(),
                },
                ca_dir: ca_dir(&file.intercept.ca_dir),
                tunnel_idle_timeout: file.intercept.tunnel_idle_timeout.0,
            },
            limits: Limits {
                header_timeout: file.limits.header_timeout.0,
                body_timeout: file.limits.body_timeout.0,
                request_timeout: file.limits.request_timeout.0,
                idle_timeout: file.limits.idle_timeout.0,
                min_rate: file.limits.min_rate.0,
                max_connections: file.limits.max_connections,
                max_requests: file.limits.max_requests,
                max_buffered: file.limits.max_buffered.0,
                max_head: file.limits.max_head.0,
                max_headers: file.limits.max_headers,
                max_target: file.limits.max_target.0,
            },
            log: file.log.clone(),
            audit: Audit {
                path: Some(&file.audit.path).filter(|it| !it.is_empty()).map(PathBuf::from),
                max_size: file.audit.max_size.0 as u64,
                max_age: file.audit.max_age.0,
                keep: file.audit.keep,
                fsync: file.audit.fsync.0,
            },
            admin: Admin {
                address: file.admin.address.clone(),
                token: load_token(&file.admin.token)?,
                hosts: file.admin.hosts.0.clone(),
                exchanges: file.admin.exchanges,
                required: false,
            },
            resolved: file,
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::build(File::default()).expect("the defaults are valid: a test builds them")
    }
}
