mod bad_input;
mod commands;
mod config;
mod sanitize;
mod simulator;
