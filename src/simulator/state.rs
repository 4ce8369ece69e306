//! What the simulated account holds, and the rules by which it changes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;

use super::sent::{Sent, list_name};
use super::xml::escape;
use super::{ACCOUNT, Options};
use crate::contact::{ID_ORIGIN, NAMESPACE, Source};

/// Entries on a page of a feed (documented).
const PAGE: usize = 50;

/// The account's number in the thread's error message (observed; what the numbers mean is inferred).
const ACCOUNT_NUMBER: u64 = 123_456;

/// The simulated account.
pub struct State {
    options: Options,
    contacts: BTreeMap<u64, Contact>,
    lists: BTreeMap<u64, String>,
    /// Campaigns and bulk activities are kept as they came: nothing here acts on them.
    stored: BTreeMap<(Collection, u64), Bytes>,
    next_id: u64,
    /// Counts changes: the simulator's clock, in seconds.
    clock: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Collection {
    Activities,
    Campaigns,
}

impl Collection {
    pub fn name(self) -> &'static str {
        match self {
            Self::Activities => "activities",
            Self::Campaigns => "campaigns",
        }
    }
}

struct Contact {
    email: String,
    /// Addresses that it had before.
    former: Vec<String>,
    status: Status,
    /// Simple elements of the contact other than those with a meaning here, in their order.
    fields: Vec<(String, String)>,
    source: Source,
    lists: Vec<Membership>,
    updated: u64,
    /// How many PUTs it got: the draw of each depends on this and the seed alone.
    updates: u64,
    last_update: Option<Bytes>,
}

#[derive(Clone)]
struct Membership {
    list: u64,
    source: Source,
    since: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Active,
    DoNotMail,
    Removed,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Active => "Active",
            Self::DoNotMail => "Do Not Mail",
            Self::Removed => "Removed",
        }
    }
}

/// Why a request is refused.
#[derive(Debug)]
pub(super) enum Refusal {
    BadRequest(String),
    NotFound,
    Conflict(String),
    /// API-V1: an unknown address in `?email=` is answered with 500 (observed).
    UnknownAddress,
}

impl State {
    pub(super) fn new(options: Options) -> Self {
        let mut state = Self {
            options,
            contacts: BTreeMap::new(),
            lists: [(1, "General Interest"), (2, "Newsletter"), (3, "Offers")]
                .map(|(id, name)| (id, name.to_owned()))
                .into(),
            stored: BTreeMap::new(),
            next_id: options.contacts + 1,
            clock: 0,
        };
        for id in 1..=options.contacts {
            let status = if id % 3 == 0 { Status::Active } else { Status::DoNotMail };
            let membership = |list| Membership { list, source: Source::Customer, since: 0 };
            let contact = Contact {
                email: format!("contact{id}@example.com"),
                former: Vec::new(),
                status,
                fields: vec![("FirstName".into(), format!("Contact {id}"))],
                source: Source::Customer,
                // A Do-Not-Mail contact still shows its lists in the documentation's example.
                lists: vec![membership(1), membership(2)],
                updated: 0,
                updates: 0,
                last_update: None,
            };
            state.contacts.insert(id, contact);
        }
        state
    }

    pub(super) fn last_update(&self, contact: u64) -> Option<Bytes> {
        self.contacts.get(&contact)?.last_update.clone()
    }

    pub(super) fn status(&self, contact: u64) -> Option<&'static str> {
        self.contacts.get(&contact).map(|contact| contact.status.as_str())
    }

    /// `POST /contacts`: 201 with the entry, 409 for an address ever known (documented).
    pub(super) fn create(&mut self, body: &Bytes) -> Result<(u64, String), Refusal> {
        let sent = Sent::read(body)?;
        // Contact-level OptInSource is required on a create (documented).
        let source = sent.declared.ok_or_else(|| {
            Refusal::BadRequest("Error 400: OptInSource is required for a new contact".into())
        })?;
        if sent.email.is_empty() {
            return Err(Refusal::BadRequest("Error 400: EmailAddress is required".into()));
        }
        self.check_new(&sent.email)?;
        let lists = self.memberships(&sent, None)?;
        let id = self.next_id;
        self.next_id += 1;
        self.clock += 1;
        let status = if lists.is_empty() { Status::Removed } else { Status::Active };
        let contact = Contact {
            email: sent.email,
            former: Vec::new(),
            status,
            fields: sent.fields,
            source,
            lists,
            updated: self.clock,
            updates: 0,
            last_update: None,
        };
        self.contacts.insert(id, contact);
        self.detail(id).map(|entry| (id, entry))
    }

    /// `PUT /contacts/{id}`: 204; exactly the lists in the body survive (documented).
    pub(super) fn update(&mut self, id: u64, body: &Bytes) -> Result<(), Refusal> {
        let contact = self.contacts.get_mut(&id).ok_or(Refusal::NotFound)?;
        contact.last_update = Some(body.clone());
        contact.updates += 1;
        let (updates, status) = (contact.updates, contact.status);
        let sent = Sent::read(body)?;
        let lists = self.memberships(&sent, self.contacts.get(&id))?;
        let mut dice = self.dice(id, updates);
        // ASSUMED, our hypothesis for "randomly": the server evaluates one of all the values in the
        // body, wherever it stands. With none, the owner acts (inferred from the owner's being the
        // default everywhere else).
        let actor = match sent.sources.as_slice() {
            [] => Source::Customer,
            sources => sources[dice.usize(..sources.len())],
        };
        let removal = lists.is_empty();
        match (status, actor) {
            // Do Not Mail -> Active: refused to the owner (documented); the text is the one attested.
            (Status::DoNotMail, Source::Customer) if !removal => {
                return Err(transition_refused(id));
            }
            // Refused although the contact acts, and allowed on another try (observed, once): the
            // user's own report, whose lists are bare, so that nothing in the body explains it.
            (Status::DoNotMail, Source::Contact)
                if !removal && dice.f64() < self.options.flake_rate =>
            {
                return Err(transition_refused(id));
            }
            // A removal: refused to the contact (documented by staff for an active one, assumed for the
            // others; so is the wording).
            (_, Source::Contact) if removal => {
                let message = "Error 400: Update failed: a contact cannot be removed from all lists \
                               with ACTION_BY_CONTACT";
                return Err(Refusal::BadRequest(message.into()));
            }
            _ => {}
        }
        self.clock += 1;
        let clock = self.clock;
        let contact = self.contacts.get_mut(&id).ok_or(Refusal::NotFound)?;
        // `Status` in a request is ignored: it follows list membership (documented by staff).
        contact.status = match (removal, status) {
            (false, _) => Status::Active,
            (true, Status::DoNotMail) => Status::DoNotMail,
            (true, _) => Status::Removed,
        };
        contact.lists = lists;
        contact.fields = sent.fields;
        contact.source = sent.declared.unwrap_or(contact.source);
        contact.updated = clock;
        if !sent.email.is_empty() {
            let before = std::mem::replace(&mut contact.email, sent.email);
            if before != contact.email && !contact.former.contains(&before) {
                contact.former.push(before);
            }
        }
        Ok(())
    }

    /// `DELETE /contacts/{id}` = Do Not Mail: 204 (documented).
    pub(super) fn do_not_mail(&mut self, id: u64) -> Result<(), Refusal> {
        self.clock += 1;
        let contact = self.contacts.get_mut(&id).ok_or(Refusal::NotFound)?;
        contact.status = Status::DoNotMail;
        contact.updated = self.clock;
        Ok(())
    }

    /// A detail GET: list-level sources only (observed).
    pub(super) fn detail(&self, id: u64) -> Result<String, Refusal> {
        let contact = self.contacts.get(&id).ok_or(Refusal::NotFound)?;
        let mut lists = String::new();
        for Membership { list, source, since } in &contact.lists {
            let _ = write!(
                lists,
                "\n        <ContactList id=\"{ID_ORIGIN}{path}\">\
                 \n          <link xmlns=\"http://www.w3.org/2005/Atom\" href=\"{path}\" rel=\"self\"/>\
                 \n          <OptInSource>{source}</OptInSource>\
                 \n          <OptInTime>{time}</OptInTime>\
                 \n        </ContactList>",
                path = path("lists", *list),
                time = time(*since),
            );
        }
        let lists = format!("\n      <ContactLists>{lists}\n      </ContactLists>");
        Ok(format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}",
            entry(id, contact, &lists, "<entry xmlns=\"http://www.w3.org/2005/Atom\">")
        ))
    }

    /// A page of contacts: contact-level sources only (observed), 50 a page, and a relative link to
    /// the next (documented).
    pub(super) fn feed(&self, from: u64, address: Option<&str>) -> Result<String, Refusal> {
        let found: Vec<_> = match address {
            Some(address) => {
                let id = self.by_address(address).ok_or(Refusal::UnknownAddress)?;
                self.contacts.range(id..=id).collect()
            }
            None => self.contacts.range(from..).take(PAGE + 1).collect(),
        };
        let mut feed = begin_feed("contacts", found.get(PAGE).map(|(next, _)| **next));
        for (id, contact) in found.iter().take(PAGE) {
            // Which of the lists' times it is: assumed.
            let since = contact.lists.iter().map(|it| it.since).min().unwrap_or(contact.updated);
            let opted_in = format!(
                "\n      <OptInSource>{}</OptInSource>\n      <OptInTime>{}</OptInTime>",
                contact.source,
                time(since)
            );
            feed.push_str(&entry(**id, contact, &opted_in, "<entry>"));
        }
        feed.push_str("</feed>\n");
        Ok(feed)
    }

    /// `GET /lists`, in pages as of contacts, and `GET /lists/{id}`.
    pub(super) fn lists(&self, id: Option<u64>, from: u64) -> Result<String, Refusal> {
        let entry = |id: u64, name: &str, start: &str| {
            format!(
                "{start}\n  <id>{ID_ORIGIN}{path}</id>\n  <title type=\"text\">{name}</title>\
                 \n  <content type=\"application/vnd.ctct+xml\">\
                 \n    <ContactList xmlns=\"{NAMESPACE}\" id=\"{ID_ORIGIN}{path}\"><Name>{name}</Name></ContactList>\
                 \n  </content>\n</entry>\n",
                path = path("lists", id),
                name = escape(name),
            )
        };
        let alone = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<entry xmlns=\"http://www.w3.org/2005/Atom\">";
        if let Some(id) = id {
            let name = self.lists.get(&id).ok_or(Refusal::NotFound)?;
            return Ok(entry(id, name, alone));
        }
        let found: Vec<_> = self.lists.range(from..).take(PAGE + 1).collect();
        let mut feed = begin_feed("lists", found.get(PAGE).map(|(next, _)| **next));
        for (id, name) in found.iter().take(PAGE) {
            feed.push_str(&entry(**id, name, "<entry>"));
        }
        feed.push_str("</feed>\n");
        Ok(feed)
    }

    /// `POST /lists`
    pub(super) fn create_list(&mut self, body: &Bytes) -> Result<(u64, String), Refusal> {
        let name = list_name(body)?;
        let id = self.lists.keys().next_back().map_or(1, |last| last + 1);
        self.lists.insert(id, name);
        Ok((id, self.lists(Some(id), 0)?))
    }

    /// `PUT /lists/{id}`: 204, as of every update (documented).
    pub(super) fn rename_list(&mut self, id: u64, body: &Bytes) -> Result<(), Refusal> {
        let list = self.lists.get_mut(&id).ok_or(Refusal::NotFound)?;
        *list = list_name(body)?;
        Ok(())
    }

    /// Takes a bulk activity or a campaign in, to be read back as it is.
    pub(super) fn store(
        &mut self,
        collection: Collection,
        id: Option<u64>,
        body: Bytes,
    ) -> Result<u64, Refusal> {
        let id = match id {
            Some(id) if self.stored.contains_key(&(collection, id)) => id,
            Some(_) => return Err(Refusal::NotFound),
            None => {
                self.next_id += 1;
                self.next_id - 1
            }
        };
        self.stored.insert((collection, id), body);
        Ok(id)
    }

    pub(super) fn stored(&self, collection: Collection, id: u64) -> Result<Bytes, Refusal> {
        self.stored.get(&(collection, id)).cloned().ok_or(Refusal::NotFound)
    }

    /// Refuses an address that any contact has, or had.
    fn check_new(&self, address: &str) -> Result<(), Refusal> {
        let same = |known: &String| known.eq_ignore_ascii_case(address.trim());
        let knows = |contact: &Contact| same(&contact.email) || contact.former.iter().any(same);
        if self.contacts.values().any(knows) {
            // The wording is assumed.
            let message = "Error 409: Email address already exists. Use PUT to update it.";
            return Err(Refusal::Conflict(message.into()));
        }
        Ok(())
    }

    fn by_address(&self, address: &str) -> Option<u64> {
        let same = |contact: &Contact| contact.email.eq_ignore_ascii_case(address.trim());
        self.contacts.iter().find(|(_, contact)| same(contact)).map(|(id, _)| *id)
    }

    /// The lists of a body. One that the account does not have is an error (assumed), and one that says nothing of its own takes
    /// the contact's source (assumed).
    fn memberships(
        &self,
        sent: &Sent,
        before: Option<&Contact>,
    ) -> Result<Vec<Membership>, Refusal> {
        let members: Result<Vec<Membership>, Refusal> = sent
            .lists
            .iter()
            .map(|(id, source)| {
                let list = id.trim_end_matches('/').rsplit('/').next().unwrap_or(id);
                let list = list.parse().ok().filter(|list| self.lists.contains_key(list));
                let list = list.ok_or_else(|| {
                    Refusal::BadRequest("Error 400: there is no such list in this account".into())
                })?;
                let known = before
                    .and_then(|contact| contact.lists.iter().find(|member| member.list == list));
                let source = source.or(sent.declared).unwrap_or(Source::Customer);
                let since = known.map_or(self.clock + 1, |member| member.since);
                Ok(Membership { list, source, since })
            })
            .collect();
        let mut members = members?;
        // Who is named twice is a member once.
        members.sort_by_key(|member| member.list);
        members.dedup_by_key(|member| member.list);
        Ok(members)
    }

    /// Randomness that depends on nothing but the seed, the contact and how often it was updated, so
    /// that other clients' requests in between change nothing.
    fn dice(&self, contact: u64, update: u64) -> fastrand::Rng {
        let mut mixed = fastrand::Rng::with_seed(self.options.seed);
        let seed = mixed.u64(..) ^ contact.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ update << 48;
        let mut dice = fastrand::Rng::with_seed(seed);
        // The first numbers of neighbouring seeds resemble each other.
        dice.u64(..);
        dice.u64(..);
        dice
    }
}

/// The start of a feed, with a link to where it goes on, if it does.
fn begin_feed(collection: &str, next: Option<u64>) -> String {
    let path = path_of(collection);
    let mut feed = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<feed xmlns=\"http://www.w3.org/2005/Atom\">\n  <id>{ID_ORIGIN}{path}</id>\n"
    );
    if let Some(next) = next {
        let _ = writeln!(feed, "  <link href=\"{path}?next={next}\" rel=\"next\"/>");
    }
    feed
}

/// The one message that is attested, word for word.
fn transition_refused(contact: u64) -> Refusal {
    Refusal::BadRequest(format!(
        "Error 400: Update failed: Existing person {ACCOUNT_NUMBER}:{contact} has an invalid state: \
         Status transition from O to S is not allowed when action by owner and confirm opt in is off"
    ))
}

pub(super) fn path_of(collection: &str) -> String {
    format!("/ws/customers/{ACCOUNT}/{collection}")
}

pub(super) fn path(collection: &str, id: u64) -> String {
    format!("/ws/customers/{ACCOUNT}/{collection}/{id}")
}

/// The simulator's clock, as the API writes times.
fn time(second: u64) -> String {
    let (hour, minute) = (second / 3600 % 24, second / 60 % 60);
    format!("2010-03-01T{hour:02}:{minute:02}:{:02}.096Z", second % 60)
}

fn entry(id: u64, contact: &Contact, sources: &str, start: &str) -> String {
    let path = path("contacts", id);
    let email = escape(&contact.email);
    let fields: String = contact
        .fields
        .iter()
        .map(|(name, text)| format!("\n      <{name}>{}</{name}>", escape(text)))
        .collect();
    format!(
        "{start}\
         \n  <link href=\"{path}\" rel=\"edit\"/>\
         \n  <id>{ID_ORIGIN}{path}</id>\
         \n  <title type=\"text\">Contact: {email}</title>\
         \n  <updated>{updated}</updated>\
         \n  <author><name>Constant Contact</name></author>\
         \n  <content type=\"application/vnd.ctct+xml\">\
         \n    <Contact xmlns=\"{NAMESPACE}\" id=\"{ID_ORIGIN}{path}\">\
         \n      <Status>{status}</Status>\
         \n      <EmailAddress>{email}</EmailAddress>{fields}{sources}\
         \n    </Contact>\
         \n  </content>\
         \n</entry>\n",
        updated = time(contact.updated),
        status = contact.status.as_str(),
    )
}
