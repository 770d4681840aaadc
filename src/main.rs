//! The `aviary` program: everything it can do is a verb of [`aviary::cli`].

use std::process::ExitCode;

/// Takes the place of the C library's allocator, librdkafka's calls included: a record is allocated on one thread and freed on
/// another. Benchmarks name it as well, so that they measure what users run; the library leaves the choice to its user.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    aviary::cli::main()
}
