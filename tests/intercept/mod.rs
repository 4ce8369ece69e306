mod authority;
mod commands;
mod connect;
mod counts;
mod names;
mod open;

/// The name under which the origin of these tests is the API.
const API: &str = "api.constantcontact.com";
