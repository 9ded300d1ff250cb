//! The command line: `brightrun train | check | export | selftest`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
