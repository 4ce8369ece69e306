//! What must hold for any bytes. The fuzz targets drive it with libFuzzer; `tests/fuzz.rs` does with a fixed seed.

#[path = "properties.rs"]
pub mod properties;
#[path = "../tests/contact/reference.rs"]
mod reference;

const C: &str = "ACTION_BY_CONTACT";
const U: &str = "ACTION_BY_CUSTOMER";
