//! The simulator of the core: see the library.

use std::process::ExitCode;

fn main() -> anyhow::Result<ExitCode> {
    sim::cli::main()
}
