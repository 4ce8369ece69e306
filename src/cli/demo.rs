//! `optin-proxy demo`: the same updates straight to a simulated API and through the proxy.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clap::Args;
use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::serve::{FLUSH, Signals, Stop, exit, start_journal};
use super::steer::{Hand, ORDERS, Source, Steering};
use super::{ConfigArgs, Failure, sanitize};
use crate::contact::Source as OptInSource;
use crate::observe::admin::{Admin, Desk};
use crate::observe::log;
use crate::observe::metrics::Metrics;
use crate::proxy::Server;
use crate::simulator::{ACCOUNT, CREDENTIALS, Options, Simulator, World};

/// How often the simulated API refuses a contact's own update for no reason in the body.
const FLAKE_RATE: f64 = 0.1;

/// From how many updates on there is something to wait for.
const WORTH_A_BAR: u64 = 10_000;

/// Updates under way at once.
const CLIENTS: usize = 8;

#[derive(Debug, Args)]
pub(super) struct Demo {
    /// How many contacts to update
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    updates: u64,
    /// Keep everything up afterwards, and print commands to try
    #[arg(long)]
    stay: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Demo {
    pub fn run(self) -> Result<(), Failure> {
        super::block_on(self.show())?
    }

    async fn show(self) -> Result<(), Failure> {
        let started = Instant::now();
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        let failed = |error: &dyn std::fmt::Display| Failure::Failed(error.to_string());

        // Two simulated APIs with the same seed: what one client does to one of them must not change
        // what the other client meets.
        let options =
            Options { flake_rate: FLAKE_RATE, contacts: self.updates + 3, ..Options::default() };
        let mut apis = Vec::new();
        for _ in 0..2 {
            let simulator =
                Simulator::bind("127.0.0.1:0", options).await.map_err(|error| failed(&error))?;
            apis.push((simulator.address(), simulator.world()));
            let stop = stop.clone();
            running.spawn(async move { simulator.run(stop).await });
        }
        let [(direct, _), (behind, world)] =
            <[_; 2]>::try_from(apis).unwrap_or_else(|_| unreachable!("the loop above runs twice"));

        let source = Source::new(
            self.config,
            vec![
                ("demo", "log.level=off".to_owned()),
                ("demo", "admin.address=127.0.0.1:0".to_owned()),
            ],
            vec![
                ("demo", "listen.address=127.0.0.1:0".to_owned()),
                ("demo", "listen.allow_from=[]".to_owned()),
                ("demo", "listen.proxy_auth=".to_owned()),
                // What it shows is told by it.
                ("demo", "log.report_header=true".to_owned()),
                ("demo", format!("upstream.url=http://{behind}")),
            ],
        );
        let config = Arc::new(source.load()?);
        let level = log::start(&config.log);
        let metrics = Arc::new(Metrics::default());
        let journal = start_journal(&config, &metrics)?;
        let mut server = Server::bind(Arc::clone(&config), Arc::clone(&metrics))
            .await
            .map_err(|error| failed(&error))?;
        let (proxy, control) = (server.address(), server.control());
        server.keep(journal.clone());
        let (orders, asked) = mpsc::channel(ORDERS);
        let admin = match self.stay {
            true => Some(Admin::bind(&config.admin.address).await.map_err(|error| failed(&error))?),
            false => None,
        };
        let dashboard = admin.as_ref().map(Admin::address);
        if let Some(admin) = admin {
            server.also_own(admin.address());
            let desk = Desk {
                metrics: Arc::clone(&metrics),
                control: control.clone(),
                journal: journal.clone(),
                orders,
            };
            tokio::spawn(admin.run(desk));
        }
        let serving = stop.clone();
        running.spawn(async move {
            server.run(serving).await;
        });

        let bar = super::progress(
            Some(2 * self.updates).filter(|_| self.updates >= WORTH_A_BAR),
            "{bar:40} {pos} of {len} updates, {per_sec}, {eta} left",
        );
        let straight = update_all(&format!("http://{direct}"), self.updates, &bar).await?;
        let proxied = update_all(&format!("http://{proxy}"), self.updates, &bar).await?;
        bar.finish_and_clear();

        let mut out = anstream::stdout().lock();
        let mut told = writeln!(
            out,
            "{}{}{} updates each way in {:.1} s.",
            example(&world, &proxied),
            table(&straight, &proxied),
            self.updates,
            started.elapsed().as_secs_f64()
        );
        let well = proxied.iter().all(|update| update.status.is_success());
        if let Some(dashboard) = dashboard {
            let to_try = to_try(&direct.to_string(), &proxy.to_string(), self.updates);
            told = told
                .and_then(|()| write!(out, "{to_try}\nThe dashboard is at http://{dashboard}/\n"))
                .and_then(|()| out.flush());
            drop(out);
            // Who does not know where it is has no use for it.
            if told.is_ok() {
                let hand = Hand { source, control, level, metrics, at_start: &[] };
                Steering::new(hand, Signals::listen()?, asked).until_stop().await;
            }
        }
        stop.cancel();
        let mut signals = Stop::listen()?;
        tokio::select! {
            _ = running.join_all() => {}
            code = signals.next() => exit(code),
        }
        let _ = tokio::task::spawn_blocking(move || journal.flush(FLUSH)).await;
        if well {
            Ok(told?)
        } else {
            Err(Failure::Failed("some proxied updates did not end well".into()))
        }
    }
}

/// What an application does to a contact. The simulated account makes every third contact Active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Case {
    /// Re-subscribes somebody by the documented recipe, old list sources echoed: the body contradicts
    /// itself.
    Echoed,
    /// Re-subscribes somebody with bare lists: nothing in the body explains a refusal.
    Bare,
    /// The owner updates an active contact: nothing to mend.
    Owner,
}

impl Case {
    fn of(contact: u64) -> Self {
        match contact % 3 {
            1 => Self::Echoed,
            2 => Self::Bare,
            _ => Self::Owner,
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Echoed => "re-subscribed, old list sources echoed",
            Self::Bare => "re-subscribed, lists bare",
            Self::Owner => "owner's update of an active contact",
        }
    }

    /// What it calls itself.
    const fn user_agent(self) -> &'static str {
        match self {
            Self::Echoed => "shop/3.2 PHP",
            Self::Bare => "newsletter/1.4 Ruby",
            Self::Owner => "back-office/7.0",
        }
    }

    /// The body that such an application puts back, made from what it got.
    fn body(self, entry: &str) -> String {
        let source = match self {
            Self::Echoed | Self::Bare => OptInSource::Contact,
            Self::Owner => OptInSource::Customer,
        };
        let declared = format!("</EmailAddress>\n      <OptInSource>{source}</OptInSource>");
        let entry = entry.replacen("</EmailAddress>", &declared, 1);
        if self != Self::Bare {
            return entry;
        }
        let mut bare = String::with_capacity(entry.len());
        let mut in_list = false;
        for line in entry.split_inclusive('\n') {
            let is_list = line.trim_start().starts_with("<ContactList ");
            if !in_list {
                bare.push_str(line.trim_end_matches('\n').trim_end_matches("</ContactList>"));
                bare.push_str(if is_list { "</ContactList>\n" } else { "\n" });
            }
            in_list = (in_list || is_list) && !line.contains("</ContactList>");
        }
        bare
    }
}

/// One update and its answer.
struct Update {
    contact: u64,
    status: StatusCode,
    /// The proxy's report, if it passed one.
    report: String,
    body: Bytes,
}

impl Update {
    fn reports(&self, outcome: &str) -> bool {
        self.report.ends_with(&format!("outcome={outcome}"))
    }

    fn is_rewritten(&self) -> bool {
        self.report.contains("rewritten=") && !self.report.contains("rewritten=0")
    }
}

/// Gets, changes and puts back every contact, as an application would.
async fn update_all(base: &str, contacts: u64, bar: &ProgressBar) -> Result<Vec<Update>, Failure> {
    let client: Client<HttpConnector, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).build_http();
    let next = Arc::new(AtomicU64::new(1));
    let mut workers = JoinSet::new();
    for _ in 0..CLIENTS {
        let (client, next, base) = (client.clone(), Arc::clone(&next), base.to_owned());
        let bar = bar.clone();
        workers.spawn(async move {
            let mut done = Vec::new();
            loop {
                let contact = next.fetch_add(1, Ordering::Relaxed);
                if contact > contacts {
                    return Ok(done);
                }
                done.push(update(&client, &base, contact).await?);
                bar.inc(1);
            }
        });
    }
    let mut all = Vec::new();
    while let Some(done) = workers.join_next().await {
        let done: Result<Vec<Update>, Failure> =
            done.map_err(|error| Failure::Failed(error.to_string()))?;
        all.extend(done?);
    }
    all.sort_by_key(|update| update.contact);
    Ok(all)
}

async fn update(
    client: &Client<HttpConnector, Full<Bytes>>,
    base: &str,
    contact: u64,
) -> Result<Update, Failure> {
    let uri = format!("{base}/ws/customers/{ACCOUNT}/contacts/{contact}");
    let ask = |method: Method, body: Bytes| {
        let uri = uri.clone();
        async move {
            let request = Request::builder()
                .method(method)
                .uri(uri)
                .header(AUTHORIZATION, format!("Basic {}", STANDARD.encode(CREDENTIALS)))
                .header(CONTENT_TYPE, "application/atom+xml")
                .header(USER_AGENT, Case::of(contact).user_agent())
                .body(Full::new(body))
                .map_err(|error| Failure::Failed(error.to_string()))?;
            let response = client
                .request(request)
                .await
                .map_err(|error| Failure::Failed(error.to_string()))?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.map_err(|error| Failure::Failed(error.to_string()))?;
            Ok::<_, Failure>((parts, body.to_bytes()))
        }
    };
    let (_, entry) = ask(Method::GET, Bytes::new()).await?;
    let body = Bytes::from(Case::of(contact).body(&String::from_utf8_lossy(&entry)));
    let (answer, _) = ask(Method::PUT, body.clone()).await?;
    let report = answer.headers.get("optin-proxy").and_then(|report| report.to_str().ok());
    Ok(Update {
        contact,
        status: answer.status,
        report: report.unwrap_or_default().to_owned(),
        body,
    })
}

/// The first rewritten body: as the application sent it, and as the API received it.
fn example(world: &World, proxied: &[Update]) -> String {
    let Some(update) = proxied.iter().find(|update| update.is_rewritten()) else {
        return String::new();
    };
    let received = world.last_update(update.contact).unwrap_or_default();
    let diff =
        sanitize::diff(&update.body, &received, "sent by the application", "received by the API");
    format!("One update on its way through the proxy:\n\n{diff}\n")
}

/// What a person grasps in five seconds.
fn table(straight: &[Update], proxied: &[Update]) -> String {
    #[derive(Default)]
    struct Row {
        sent: usize,
        straight: usize,
        proxied: usize,
        rewritten: usize,
        rescued: usize,
    }
    let mut rows: BTreeMap<Case, Row> = BTreeMap::new();
    let mut total = Row::default();
    for (direct, through) in straight.iter().zip(proxied) {
        for row in [rows.entry(Case::of(direct.contact)).or_default(), &mut total] {
            row.sent += 1;
            row.straight += usize::from(!direct.status.is_success());
            row.proxied += usize::from(!through.status.is_success());
            row.rewritten += usize::from(through.is_rewritten());
            row.rescued += usize::from(through.reports("rescued"));
        }
    }
    let mut text = String::new();
    let heading = [
        "updates",
        "sent",
        "refused straight",
        "refused by proxy",
        "rewritten",
        "rescued by retry",
    ];
    let [updates, sent, direct, through, rewritten, rescued] = heading;
    let _ = writeln!(
        text,
        "\x1b[1m{updates:<40}{sent:>6}{direct:>18}{through:>18}{rewritten:>11}{rescued:>18}\x1b[0m"
    );
    let lines = rows.iter().map(|(case, row)| (case.title(), row)).chain([("all", &total)]);
    for (title, row) in lines {
        let colour = |refused: usize| if refused == 0 { "\x1b[32m" } else { "\x1b[31m" };
        let _ = writeln!(
            text,
            "{title:<40}{:>6}{}{:>18}{}{:>18}\x1b[0m{:>11}{:>18}",
            row.sent,
            colour(row.straight),
            row.straight,
            colour(row.proxied),
            row.proxied,
            row.rewritten,
            row.rescued,
        );
    }
    text.push('\n');
    text
}

/// Commands for a contact that the demo has not touched, one of those that are unsubscribed.
fn to_try(direct: &str, proxy: &str, updates: u64) -> String {
    let contact = (updates + 1..).find(|contact| Case::of(*contact) == Case::Echoed).unwrap_or(1);
    let put = |base: &str| {
        format!(
            "curl -sS {auth} http://{base}/ws/customers/{ACCOUNT}/contacts/{contact} \\\n  \
             | sed 's#</EmailAddress>#&<OptInSource>ACTION_BY_CONTACT</OptInSource>#' \\\n  \
             | curl -sS -i {auth} -X PUT -H 'Content-Type: application/atom+xml' --data-binary @- \\\n      \
             http://{base}/ws/customers/{ACCOUNT}/contacts/{contact}\n",
            auth = format_args!("-u '{CREDENTIALS}'"),
        )
    };
    format!(
        "\nAll of it stays up until Ctrl-C. Re-subscribe a contact: through the proxy\n\n{}\n\
         and straight to the API, which may refuse it\n\n{}",
        put(proxy),
        put(direct),
    )
}
