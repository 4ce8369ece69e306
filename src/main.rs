//! Arguments in, exit status out. All else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    optin_proxy::cli::run()
}
