//! The `aviary` program: everything it can do is a verb of [`aviary::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    aviary::cli::main()
}
