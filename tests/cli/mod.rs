mod commands;
mod config;
mod sanitize;
mod simulator;
