//! Everything is tested through public doors: the domain by its functions, the proxy over real sockets,
//! the commands by the real binary.

mod cli;
mod contact;
mod proxy;
mod support;
