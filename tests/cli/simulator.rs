//! The simulated API, over real HTTP.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use optin_proxy::simulator::{CREDENTIALS, Options, Simulator, World};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::client::{Answer, Client};
use crate::support::proxy::Proxy;
use crate::support::{CONTACTS, REFUSAL};

const ATOM: &str = "Content-Type: application/atom+xml\r\n";

struct Api {
    client: Client,
    address: std::net::SocketAddr,
    world: World,
    _stop: DropGuard,
}

impl Api {
    async fn start(options: Options) -> Self {
        let simulator = Simulator::bind("127.0.0.1:0", options).await.expect("a free port");
        let (address, world) = (simulator.address(), simulator.world());
        let stop = CancellationToken::new();
        tokio::spawn(simulator.run(stop.clone()));
        Self { client: Client::connect(address).await, address, world, _stop: stop.drop_guard() }
    }

    async fn ask(&mut self, method: &str, target: &str, fields: &str, body: &str) -> Answer {
        let target = if target.starts_with('/') {
            target.to_owned()
        } else {
            format!("/ws/customers/joesflowers/{target}")
        };
        let asked = format!(
            "{method} {target} HTTP/1.1\r\nHost: sim:1\r\nAuthorization: Basic {}\r\nContent-Length: {}\r\n{fields}\r\n{body}",
            STANDARD.encode(CREDENTIALS),
            body.len()
        );
        self.client.ask(asked.as_bytes()).await
    }

    async fn put(&mut self, contact: u64, body: &str) -> Answer {
        self.ask("PUT", &format!("contacts/{contact}"), ATOM, body).await
    }
}

/// A body with these values; lists 1 to 3 in their order, `-` for a bare one.
fn body(email: &str, declared: &str, lists: &[&str]) -> String {
    let source = |value: &str| match value {
        "-" => String::new(),
        value => format!("<OptInSource>ACTION_BY_{value}</OptInSource>"),
    };
    let lists: String = lists
        .iter()
        .enumerate()
        .map(|(at, value)| format!("<ContactList id=\"http://api.constantcontact.com/ws/customers/joesflowers/lists/{}\">{}</ContactList>", at + 1, source(value)))
        .collect();
    format!(
        "<entry xmlns=\"http://www.w3.org/2005/Atom\"><content><Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\">\
         <EmailAddress>{email}</EmailAddress>{}<ContactLists>{lists}</ContactLists></Contact></content></entry>",
        source(declared)
    )
}

#[tokio::test]
async fn a_create_is_answered_with_location_and_entry_and_an_address_is_taken_once() {
    let mut api = Api::start(Options::default()).await;
    let entry = body("new&amp;er@example.com", "CONTACT", &["-"]);
    let created = api.ask("POST", "contacts", ATOM, &entry).await;
    assert_eq!(created.status, 201);
    let location = created.field("location").expect("a location").to_owned();
    assert_eq!(location, format!("http://sim:1{CONTACTS}/61"));
    assert!(
        String::from_utf8_lossy(&created.body)
            .contains("<EmailAddress>new&amp;er@example.com</EmailAddress>")
    );
    assert_eq!(api.ask("POST", "contacts", ATOM, &entry).await.status, 409);
    api.ask("DELETE", "contacts/61", "", "").await;
    assert_eq!(
        api.ask("POST", "contacts", ATOM, &entry).await.status,
        409,
        "any address ever known"
    );
    // Nor is one free that a contact had before, or has.
    let (former, anew) = ("contact3@example.com", "anew@example.com");
    assert_eq!(api.put(3, &body(anew, "CUSTOMER", &["CUSTOMER"])).await.status, 204);
    for taken in [former, anew] {
        let entry = body(taken, "CONTACT", &["-"]);
        assert_eq!(api.ask("POST", "contacts", ATOM, &entry).await.status, 409, "{taken}");
    }
    let undeclared = body("other@example.com", "-", &["-"]);
    assert_eq!(api.ask("POST", "contacts", ATOM, &undeclared).await.status, 400);
}

#[tokio::test]
async fn a_detail_has_list_sources_only_and_a_feed_contact_sources_only() {
    let mut api = Api::start(Options::default()).await;
    let detail = String::from_utf8(api.ask("GET", "contacts/1", "", "").await.body).expect("UTF-8");
    let (contact, lists) = detail.split_once("<ContactLists>").expect("lists");
    assert_eq!(
        (contact.matches("<OptInSource>").count(), lists.matches("<OptInSource>").count()),
        (0, 2)
    );
    assert_eq!(lists.matches("<OptInTime>").count(), 2);
    let feed = String::from_utf8(
        api.ask("GET", "contacts?email=CONTACT1%40example.com", "", "").await.body,
    )
    .expect("UTF-8");
    assert_eq!((feed.matches("<entry>").count(), feed.matches("<OptInSource>").count()), (1, 1));
    assert_eq!(feed.matches("<OptInTime>").count(), 1);
    assert!(!feed.contains("ContactList"));
    roxmltree::Document::parse(&detail).expect("XML");
    roxmltree::Document::parse(&feed).expect("XML");
}

#[tokio::test]
async fn feeds_have_fifty_entries_and_a_relative_next() {
    let mut api = Api::start(Options::default()).await;
    let feed = String::from_utf8(api.ask("GET", "contacts", "", "").await.body).expect("UTF-8");
    assert_eq!(feed.matches("<entry>").count(), 50);
    let (_, next) = feed.split_once("<link href=\"").expect("a link");
    let (next, _) = next.split_once("\" rel=\"next\"").expect("next");
    assert!(next.starts_with("/ws/customers/joesflowers/contacts?"), "{next}");
    let rest = String::from_utf8(api.ask("GET", next, "", "").await.body).expect("UTF-8");
    assert_eq!(rest.matches("<entry>").count(), 10);
    assert!(!rest.contains("rel=\"next\""));
    for number in 4..=51 {
        let list = format!(
            "<entry xmlns=\"http://www.w3.org/2005/Atom\"><content><ContactList xmlns=\"http://ws.constantcontact.com/ns/1.0/\"><Name>List {number}</Name></ContactList></content></entry>"
        );
        assert_eq!(api.ask("POST", "lists", ATOM, &list).await.status, 201);
    }
    let lists = String::from_utf8(api.ask("GET", "lists", "", "").await.body).expect("UTF-8");
    assert_eq!(lists.matches("<entry>").count(), 50);
    assert!(
        lists.contains("<link href=\"/ws/customers/joesflowers/lists?next=51\" rel=\"next\"/>")
    );
    let rest =
        String::from_utf8(api.ask("GET", "lists?next=51", "", "").await.body).expect("UTF-8");
    assert_eq!((rest.matches("<entry>").count(), rest.contains("next")), (1, false));
}

#[tokio::test]
async fn strangers_are_challenged_and_wrong_requests_get_the_documented_status() {
    let mut api = Api::start(Options::default()).await;
    for credentials in ["", "APIKEY%joesflowers:wrong", "nobody:secret"] {
        let asked = format!(
            "GET {CONTACTS} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {}\r\n\r\n",
            STANDARD.encode(credentials)
        );
        let answer = api.client.ask(asked.as_bytes()).await;
        assert_eq!(answer.status, 401);
        assert!(answer.field("www-authenticate").is_some_and(|it| it.starts_with("Basic")));
    }
    let asked = format!(
        "GET {CONTACTS} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {}\r\n\r\n",
        STANDARD.encode("OTHER%joesflowers:secret")
    );
    assert_eq!(api.client.ask(asked.as_bytes()).await.status, 403);
    let entry = body("x@example.com", "CONTACT", &["-"]);
    let list = "<ContactList xmlns='http://ws.constantcontact.com/ns/1.0/'><Name>Roses</Name></ContactList>";
    for (method, target, fields, body, status) in [
        ("GET", "contacts/999", "", "", 404),
        ("PUT", "contacts/999", ATOM, &*entry, 404),
        ("DELETE", "contacts/999", "", "", 404),
        ("GET", "contacts/1/x", "", "", 404),
        ("GET", "nothing", "", "", 404),
        ("PUT", "contacts/1", "", &entry, 415),
        ("POST", "contacts", "Content-Type: text/xml\r\n", &entry, 415),
        ("PATCH", "contacts/1", ATOM, &entry, 405),
        ("PUT", "contacts/1", ATOM, "<entry>", 400),
        ("PUT", "contacts/1", ATOM, "<entry/>", 400),
        ("GET", "contacts?email=nobody@example.com", "", "", 500),
        ("GET", "/ws/customers/other/contacts", "", "", 403),
        ("GET", "lists/1", "", "", 200),
        ("GET", "lists", "", "", 200),
        (
            "POST",
            "activities",
            "Content-Type: application/x-www-form-urlencoded\r\n",
            "activityType=SV_ADD",
            201,
        ),
        ("POST", "activities", ATOM, "x", 415),
        ("POST", "campaigns", ATOM, "<entry/>", 201),
        ("PUT", "campaigns/99", ATOM, "<entry/>", 404),
        ("PUT", "lists/1", "", list, 415),
        ("PUT", "lists/1", ATOM, "<entry/>", 400),
        ("PUT", "lists/9", ATOM, list, 404),
        ("PUT", "lists/1", ATOM, list, 204),
        ("DELETE", "contacts/1", "Content-Type: application/atom+xml\r\n", "", 204),
    ] {
        assert_eq!(
            api.ask(method, target, fields, body).await.status,
            status,
            "{method} {target} {fields}"
        );
    }
    assert!(
        String::from_utf8_lossy(&api.ask("GET", "lists/1", "", "").await.body)
            .contains("<Name>Roses</Name>")
    );
    let stored = api.ask("POST", "campaigns", ATOM, "<entry/>").await;
    let location = stored.field("location").expect("where it is");
    let campaign = &location["http://sim:1".len()..];
    assert_eq!(api.ask("PUT", campaign, ATOM, "<entry>2</entry>").await.status, 204);
    assert_eq!(api.ask("GET", campaign, "", "").await.body, b"<entry>2</entry>");
    for (method, target, allowed) in [
        ("PUT", "contacts", "GET, HEAD, POST"),
        ("POST", "contacts/1", "GET, HEAD, PUT, DELETE"),
        ("PUT", "lists", "GET, HEAD, POST"),
        ("POST", "lists/1", "GET, HEAD, PUT"),
        ("GET", "campaigns", "POST"),
        ("DELETE", campaign, "GET, HEAD, PUT"),
    ] {
        let answer = api.ask(method, target, ATOM, "").await;
        assert_eq!(
            (answer.status, answer.field("allow")),
            (405, Some(allowed)),
            "{method} {target}"
        );
    }
}

/// It once answered before it had read the body, and closed: what the client sent next on the connection was lost.
#[tokio::test]
async fn a_client_that_sends_its_credentials_only_after_the_challenge_keeps_its_connection() {
    let mut api = Api::start(Options::default()).await;
    let entry = body("x@example.com", "CONTACT", &["-"]);
    let head = format!(
        "PUT {CONTACTS}/1 HTTP/1.1\r\nHost: x\r\n{ATOM}Content-Length: {}\r\n",
        entry.len()
    );
    api.client.send(format!("{head}\r\n").as_bytes()).await;
    // By the other connection, the head has arrived.
    let mut other = Client::connect(api.address).await;
    assert_eq!(other.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 401);
    assert_eq!(api.client.ask(entry.as_bytes()).await.status, 401);
    assert_eq!(api.put(1, &entry).await.status, 204);
}

#[tokio::test]
async fn what_is_taken_can_be_given_back() {
    let mut api = Api::start(Options::default()).await;
    let entry = body("x@example.com", "CONTACT", &["-"]);
    let named = |name: &str| {
        entry.replace("</EmailAddress>", &format!("</EmailAddress><FirstName>{name}</FirstName>"))
    };
    for name in ["a&#1;b", "a\u{1}b", "&#xFFFF;"] {
        assert_eq!(api.put(1, &named(name)).await.status, 400, "{name:?}");
    }
    let declared = format!("<?xml version='1.0' encoding='ISO-8859-1'?>{}", named("Jörg"));
    let latin: Vec<u8> =
        declared.chars().map(|char| u8::try_from(char).expect("Latin-1")).collect();
    let head = format!(
        "PUT {CONTACTS}/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {}\r\n{ATOM}Content-Length: {}\r\n\r\n",
        STANDARD.encode(CREDENTIALS),
        latin.len()
    );
    assert_eq!(api.client.ask(&[head.as_bytes(), &latin].concat()).await.status, 204);
    // An escaped letter is the letter.
    let detail = api.ask("GET", "/ws/customers/joe%73flowers/contacts/1", "", "").await;
    assert!(String::from_utf8_lossy(&detail.body).contains("Jörg"), "{detail:?}");
}

#[tokio::test]
async fn the_owner_cannot_resubscribe_and_the_contact_can() {
    let mut api = Api::start(Options::default()).await;
    assert_eq!(api.world.status(1), Some("Do Not Mail"));
    let refused = api.put(1, &body("a@example.com", "CUSTOMER", &["-"])).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.body, REFUSAL.replace(":789", ":1").as_bytes());
    assert_eq!(api.world.status(1), Some("Do Not Mail"));
    assert_eq!(api.put(1, &body("a@example.com", "CONTACT", &["-"])).await.status, 204);
    assert_eq!(api.world.status(1), Some("Active"));
}

#[tokio::test]
async fn the_contact_cannot_remove_and_the_owner_can_and_both_may_come_back() {
    let mut api = Api::start(Options::default()).await;
    assert_eq!(api.put(3, &body("a@example.com", "CONTACT", &[])).await.status, 400);
    assert_eq!(api.world.status(3), Some("Active"));
    for back in ["CONTACT", "CUSTOMER"] {
        assert_eq!(api.put(3, &body("a@example.com", "CUSTOMER", &[])).await.status, 204);
        assert_eq!(api.world.status(3), Some("Removed"));
        assert_eq!(api.put(3, &body("a@example.com", back, &["-"])).await.status, 204);
        assert_eq!(api.world.status(3), Some("Active"));
    }
}

#[tokio::test]
async fn a_put_replaces_membership() {
    let mut api = Api::start(Options::default()).await;
    api.put(3, &body("b@example.com", "CUSTOMER", &["CUSTOMER"])).await;
    let detail = String::from_utf8(api.ask("GET", "contacts/3", "", "").await.body).expect("UTF-8");
    assert!(detail.contains("lists/1\"") && !detail.contains("lists/2\""), "{detail}");
    assert!(detail.contains("b@example.com"));
    let unknown = body("b@example.com", "CUSTOMER", &["-", "-", "-", "-"]);
    assert_eq!(api.put(3, &unknown).await.status, 400, "there is no list 4");
}

/// Our hypothesis, and what a seed is for.
#[tokio::test]
async fn any_value_of_a_contradictory_body_may_decide_and_the_seed_says_which() {
    let mut runs = Vec::new();
    for seed in [1, 1, 2] {
        let mut api = Api::start(Options { seed, contacts: 90, ..Options::default() }).await;
        let mut statuses = Vec::new();
        for contact in (1..=90).filter(|contact| contact % 3 != 0) {
            let own = format!("contact{contact}@example.com");
            let echoed = body(&own, "CONTACT", &["CUSTOMER", "CUSTOMER"]);
            statuses.push(api.put(contact, &echoed).await.status);
        }
        runs.push(statuses);
    }
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
    let refused = runs[0].iter().filter(|status| **status == 400).count();
    assert!((25..55).contains(&refused), "two of three values are the owner's: {refused} of 60");
}

#[tokio::test]
async fn a_flake_refuses_the_contact_as_if_it_were_the_owner_and_nobody_else() {
    let mut api = Api::start(Options { flake_rate: 1.0, ..Options::default() }).await;
    let bare = body("a@example.com", "CONTACT", &["-"]);
    let refused = api.put(1, &bare).await;
    assert_eq!((refused.status, refused.body), (400, REFUSAL.replace(":789", ":1").into_bytes()));
    assert_eq!(api.put(3, &bare).await.status, 204, "an active contact");
}

#[tokio::test]
async fn through_the_proxy_both_faults_are_gone() {
    let api = Api::start(Options { flake_rate: 0.3, ..Options::default() }).await;
    let proxy = Proxy::start(&format!("http://{}", api.address), &["retry.max_attempts=8"]).await;
    let mut through = Api { client: proxy.client().await, ..api };
    for contact in (1..=60).filter(|contact| contact % 3 != 0) {
        let lists: &[&str] = if contact % 2 == 0 { &["CUSTOMER", "CUSTOMER"] } else { &["-"] };
        let own = format!("contact{contact}@example.com");
        let answer = through.put(contact, &body(&own, "CONTACT", lists)).await;
        assert_eq!(answer.status, 204, "{contact}: {}", answer.report());
        assert_eq!(through.world.status(contact), Some("Active"));
    }
    assert!(proxy.metric("optin_proxy_retries_total{outcome=\"rescued\"}") > 0.0);
}
