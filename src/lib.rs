#![forbid(unsafe_code)]
pub mod contact;
