//! The simulator's HTTP side: routes, authentication, status codes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, HOST, LOCATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;

use super::state::{Collection, Refusal, path};
use super::{ACCOUNT, CREDENTIALS, World};

type Answer = Response<Full<Bytes>>;

/// The longest body that is taken, in bytes (assumed).
const MAX_BODY: usize = 8 * 1024 * 1024;

/// Where a request was sent.
struct Origin<'r> {
    scheme: &'r str,
    host: &'r str,
}

/// What a request over `scheme` is answered.
pub(super) async fn answer(world: &World, scheme: &str, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    // HTTP/2 names it in its target.
    let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = parts.uri.authority().map(|it| it.as_str()).or(host).unwrap_or_default();
    // Read before anything is refused: a client that has not sent it all would lose its connection.
    let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
        return plain(
            StatusCode::PAYLOAD_TOO_LARGE,
            "Error 413: the body is too long or broke off",
        );
    };
    if let Some(refused) = refuse_stranger(&parts.headers) {
        return refused;
    }
    let path = parts.uri.path();
    let mut segments = path.strip_suffix('/').unwrap_or(path).split('/').skip(1);
    let lower = |segment: Option<&str>| segment.map(str::to_ascii_lowercase);
    let (ws, customers) = (lower(segments.next()), lower(segments.next()));
    if ws.as_deref() != Some("ws") || customers.as_deref() != Some("customers") {
        return not_found();
    }
    // Another account's data is not for this key (assumed to be a 403).
    let user = segments.next().map(|user| percent_decode_str(user).decode_utf8_lossy());
    if !user.is_some_and(|user| user.eq_ignore_ascii_case(ACCOUNT)) {
        return plain(StatusCode::FORBIDDEN, "Error 403: this key may not use that account");
    }
    let Some(collection) = lower(segments.next()) else { return not_found() };
    let id = match segments.next().map(str::parse::<u64>) {
        None => None,
        Some(Ok(id)) => Some(id),
        Some(Err(_)) => return not_found(),
    };
    if segments.next().is_some() {
        return not_found();
    }
    let call = Call {
        world,
        method: &parts.method,
        headers: &parts.headers,
        origin: &Origin { scheme, host },
        query: parts.uri.query().unwrap_or_default(),
        id,
        body: body.to_bytes(),
    };
    let answered = match collection.as_str() {
        "contacts" => call.contacts(),
        "lists" => call.lists(),
        "activities" => call.stored(Collection::Activities),
        "campaigns" => call.stored(Collection::Campaigns),
        _ => Ok(not_found()),
    };
    answered.unwrap_or_else(refused)
}

struct Call<'c> {
    world: &'c World,
    method: &'c Method,
    headers: &'c HeaderMap,
    origin: &'c Origin<'c>,
    query: &'c str,
    id: Option<u64>,
    body: Bytes,
}

impl Call<'_> {
    fn contacts(self) -> Result<Answer, Refusal> {
        match (self.method, self.id) {
            (&Method::GET | &Method::HEAD, Some(id)) => Ok(atom(self.world.0.lock().detail(id)?)),
            (&Method::GET | &Method::HEAD, None) => {
                let from = self.next();
                let address = self.parameter("email").map(|address| unescape(&address));
                Ok(atom(self.world.0.lock().feed(from, address.as_deref())?))
            }
            (&Method::POST, None) => {
                if !self.is_atom() {
                    return Ok(unsupported("application/atom+xml"));
                }
                let (id, entry) = self.world.0.lock().create(&self.body)?;
                Ok(self.created("contacts", id, entry))
            }
            (&Method::PUT, Some(id)) => {
                if !self.is_atom() {
                    return Ok(unsupported("application/atom+xml"));
                }
                self.world.0.lock().update(id, &self.body)?;
                Ok(empty(StatusCode::NO_CONTENT))
            }
            (&Method::DELETE, Some(id)) => {
                self.world.0.lock().do_not_mail(id)?;
                Ok(empty(StatusCode::NO_CONTENT))
            }
            (_, Some(_)) => Ok(not_allowed("GET, HEAD, PUT, DELETE")),
            (_, None) => Ok(not_allowed("GET, HEAD, POST")),
        }
    }

    fn lists(self) -> Result<Answer, Refusal> {
        match (self.method, self.id) {
            (&Method::GET | &Method::HEAD, id) => {
                Ok(atom(self.world.0.lock().lists(id, self.next())?))
            }
            (&Method::POST, None) | (&Method::PUT, Some(_)) if !self.is_atom() => {
                Ok(unsupported("application/atom+xml"))
            }
            (&Method::POST, None) => {
                let (id, entry) = self.world.0.lock().create_list(&self.body)?;
                Ok(self.created("lists", id, entry))
            }
            (&Method::PUT, Some(id)) => {
                self.world.0.lock().rename_list(id, &self.body)?;
                Ok(empty(StatusCode::NO_CONTENT))
            }
            (_, Some(_)) => Ok(not_allowed("GET, HEAD, PUT")),
            (_, None) => Ok(not_allowed("GET, HEAD, POST")),
        }
    }

    /// Bulk activities take forms, campaigns take Atom (documented). Neither changes a contact here.
    fn stored(self, collection: Collection) -> Result<Answer, Refusal> {
        let fits = match collection {
            Collection::Activities => {
                self.has_type("application/x-www-form-urlencoded")
                    || self.has_type("multipart/form-data")
            }
            Collection::Campaigns => self.is_atom(),
        };
        match (self.method, self.id) {
            (&Method::GET | &Method::HEAD, Some(id)) => {
                let body = self.world.0.lock().stored(collection, id)?;
                Ok(with_type(Response::new(Full::new(body)), "application/atom+xml"))
            }
            (&Method::POST, None) | (&Method::PUT, Some(_)) if !fits => {
                Ok(unsupported(match collection {
                    Collection::Activities => {
                        "application/x-www-form-urlencoded or multipart/form-data"
                    }
                    Collection::Campaigns => "application/atom+xml",
                }))
            }
            (&Method::POST, None) => {
                let id = self.world.0.lock().store(collection, None, self.body.clone())?;
                let name = collection.name();
                let entry = format!(
                    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
                     <entry xmlns=\"http://www.w3.org/2005/Atom\"><id>{}{}</id></entry>\n",
                    crate::contact::ID_ORIGIN,
                    path(name, id)
                );
                Ok(self.created(name, id, entry))
            }
            (&Method::PUT, Some(id)) => {
                self.world.0.lock().store(collection, Some(id), self.body.clone())?;
                Ok(empty(StatusCode::NO_CONTENT))
            }
            (_, Some(_)) => Ok(not_allowed("GET, HEAD, PUT")),
            (_, None) => Ok(not_allowed("POST")),
        }
    }

    /// 201 with `Location` and the entry (documented). The location is where it was asked for.
    fn created(&self, collection: &str, id: u64, entry: String) -> Answer {
        let Origin { scheme, host } = self.origin;
        let mut answer = atom(entry);
        *answer.status_mut() = StatusCode::CREATED;
        let location = match *host {
            // By HTTP/1.0, it need not be said.
            "" => path(collection, id),
            host => format!("{scheme}://{host}{}", path(collection, id)),
        };
        if let Ok(location) = HeaderValue::from_str(&location) {
            answer.headers_mut().insert(LOCATION, location);
        }
        answer
    }

    fn has_type(&self, expected: &str) -> bool {
        self.headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|value| value.trim().eq_ignore_ascii_case(expected))
    }

    fn is_atom(&self) -> bool {
        self.has_type("application/atom+xml")
    }

    /// Where a feed goes on.
    fn next(&self) -> u64 {
        self.parameter("next").and_then(|next| next.parse().ok()).unwrap_or(0)
    }

    fn parameter(&self, name: &str) -> Option<String> {
        self.query
            .split('&')
            .filter_map(|parameter| parameter.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_owned())
    }
}

/// Percent-decoding, and a plus for a space.
fn unescape(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

/// 401 with a challenge (documented) to who does not authenticate, 403 to a wrong key (documented).
fn refuse_stranger(headers: &HeaderMap) -> Option<Answer> {
    let credentials = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
        .and_then(|(_, encoded)| STANDARD.decode(encoded.trim()).ok());
    let expected = CREDENTIALS.as_bytes();
    let account = CREDENTIALS.find('%').map_or(expected, |at| &expected[at..]);
    match credentials {
        Some(credentials) if credentials == expected => None,
        Some(credentials) if credentials.ends_with(account) => {
            Some(plain(StatusCode::FORBIDDEN, "Error 403: the API key is not known"))
        }
        _ => {
            let mut answer = plain(StatusCode::UNAUTHORIZED, "Error 401: who are you?");
            let challenge = HeaderValue::from_static("Basic realm=\"api.constantcontact.com\"");
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            Some(answer)
        }
    }
}

/// The content type of errors is documented nowhere; plain text is one of those seen.
fn refused(refusal: Refusal) -> Answer {
    match refusal {
        Refusal::BadRequest(message) => plain(StatusCode::BAD_REQUEST, &message),
        Refusal::NotFound => not_found(),
        Refusal::Conflict(message) => plain(StatusCode::CONFLICT, &message),
        Refusal::UnknownAddress => plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Error 500: there is no contact of that address",
        ),
    }
}

fn not_found() -> Answer {
    plain(StatusCode::NOT_FOUND, "Error 404: there is no such resource")
}

fn unsupported(expected: &str) -> Answer {
    plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, &format!("Error 415: send {expected}"))
}

fn not_allowed(methods: &'static str) -> Answer {
    let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "Error 405: not with this method");
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    answer
}

fn plain(status: StatusCode, message: &str) -> Answer {
    let mut answer = Response::new(Full::from(message.to_owned()));
    *answer.status_mut() = status;
    with_type(answer, "text/plain; charset=utf-8")
}

fn atom(text: String) -> Answer {
    with_type(Response::new(Full::from(text)), "application/atom+xml; charset=utf-8")
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

fn with_type(mut answer: Answer, value: &'static str) -> Answer {
    let name: HeaderName = CONTENT_TYPE;
    answer.headers_mut().insert(name, HeaderValue::from_static(value));
    answer
}
