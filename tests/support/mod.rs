//! The tests' own world: a scripted origin that records exact bytes, real proxies on free ports, and a
//! client that speaks raw HTTP.

pub mod binary;
pub mod client;
pub mod clock;
pub mod http2;
pub mod origin;
pub mod proxy;
pub mod tls;

pub const GET: &[u8] = b"GET /x HTTP/1.1\r\nHost: p\r\n\r\n";

/// The documented recipe: CONTACT declared, CUSTOMER echoed twice.
pub const RECIPE: &[u8] = include_bytes!("../corpus/in/recipe.xml");
/// What becomes of it.
pub const RECIPE_OUT: &[u8] = include_bytes!("../corpus/out/recipe.xml");
/// A body without a finding that declares CONTACT: the report's own case.
pub const BARE: &[u8] = include_bytes!("../corpus/in/equal-copies.xml");
/// A body that declares nothing.
pub const UNDECLARED: &[u8] = include_bytes!("../corpus/in/echo-undeclared.xml");

pub const CONTACT: &str = "/ws/customers/joesflowers/contacts/238";
pub const CONTACTS: &str = "/ws/customers/joesflowers/contacts";

/// The one message that is attested.
pub const REFUSAL: &str = "Error 400: Update failed: Existing person 123456:789 has an invalid state: \
    Status transition from O to S is not allowed when action by owner and confirm opt in is off";

/// A whole answer of the origin.
pub fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut bytes =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub fn refusal() -> Vec<u8> {
    answer("400 Bad Request", "Content-Type: text/plain\r\nX-Kept: Yes\r\n", REFUSAL.as_bytes())
}

pub fn no_content() -> Vec<u8> {
    b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()
}

/// A request with a body and its length.
pub fn request(method: &str, target: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut bytes = format!(
        "{method} {target} HTTP/1.1\r\nHost: proxy.local:8080\r\nContent-Type: application/atom+xml\r\n\
         Content-Length: {length}\r\n{headers}\r\n"
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub fn put(body: &[u8]) -> Vec<u8> {
    request("PUT", CONTACT, "", body)
}
