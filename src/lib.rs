#![doc = "placeholder"]
#![forbid(unsafe_code)]
pub mod cli;
pub mod config;
pub mod contact;
pub mod observe;
pub mod proxy;
pub mod simulator;
