//! Which requests write a contact, and how a path may be named in a log.

use http::{Method, Uri};

/// What a request does, by its method and path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// `POST /ws/customers/{user}/contacts`
    Create,
    /// `PUT /ws/customers/{user}/contacts/{id}`
    Update,
    /// Anything else: not ours.
    Other,
}

/// The parts of a path below `/ws/customers`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Resource<'a> {
    /// The account's user name, as it stands in the path.
    pub account: &'a str,
    /// The collection, lower-case only if the client wrote it so.
    pub collection: &'a str,
    /// The member of the collection, if the path names one.
    pub id: Option<&'a str>,
}

impl<'a> Resource<'a> {
    /// Reads a path without regard to case, and to slashes beside one another or at the end: a base URL that ends with one
    /// is easily written.
    pub fn of(path: &'a str) -> Option<Self> {
        // As nearly all write it.
        let mut segments = match path.strip_prefix("/ws/customers/") {
            Some(below) => segments(below),
            None => {
                let mut segments = segments(path.strip_prefix('/')?);
                let mut is = |name: &str| segments.next()?.eq_ignore_ascii_case(name).then_some(());
                is("ws").and_then(|()| is("customers"))?;
                segments
            }
        };
        let account = segments.next()?;
        let collection = segments.next()?;
        let id = segments.next();
        if segments.next().is_some() {
            return None;
        }
        Some(Self { account, collection, id })
    }

    /// The contact that it is, if it is one.
    pub fn contact_id(&self) -> Option<&'a str> {
        self.id.filter(|_| self.is_contact())
    }

    fn is_contact(&self) -> bool {
        self.collection.eq_ignore_ascii_case("contacts")
    }
}

/// What stands between slashes. It is too short for a search to be worth its beginning.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    let mut rest = path;
    std::iter::from_fn(move || {
        let segment = &rest[rest.bytes().position(|byte| byte != b'/')?..];
        let end = segment.bytes().position(|byte| byte == b'/').unwrap_or(segment.len());
        let (segment, behind) = segment.split_at(end);
        rest = behind;
        Some(segment)
    })
}

impl Route {
    pub fn of(method: &Method, uri: &Uri) -> Self {
        match Resource::of(uri.path()) {
            Some(resource) if resource.is_contact() => match (method, resource.id) {
                (&Method::POST, None) => Self::Create,
                (&Method::PUT, Some(_)) => Self::Update,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// The path with everything taken out that may be personal: `/ws/customers/{user}/contacts/{id}`.
pub(crate) fn template(resource: Option<Resource<'_>>) -> &'static str {
    let Some(resource) = resource else { return "other" };
    let known = [
        ("contacts", "/ws/customers/{user}/contacts", "/ws/customers/{user}/contacts/{id}"),
        ("lists", "/ws/customers/{user}/lists", "/ws/customers/{user}/lists/{id}"),
        ("activities", "/ws/customers/{user}/activities", "/ws/customers/{user}/activities/{id}"),
        ("campaigns", "/ws/customers/{user}/campaigns", "/ws/customers/{user}/campaigns/{id}"),
    ];
    known
        .into_iter()
        .find(|(name, ..)| resource.collection.eq_ignore_ascii_case(name))
        .map_or("other", |(_, whole, member)| if resource.id.is_some() { member } else { whole })
}
