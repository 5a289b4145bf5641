//! The `keyward` program: the server, its tools and its command-line client in one binary.

use std::process::ExitCode;

/// A Check allocates some twenty small things and frees them again at once: see docs/performance.md for what it gains.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(keyward_breakable)]
    match keyward::config::fault_injection::InjectedFaults::from_env() {
        Ok(breakage) => {
            breakage.skipped_invariant.into_iter().for_each(keyward::domain::lease::disable_invariant);
            keyward::clock::set_boot_clock_rate(breakage.clock_rate);
        }
        Err(problem) => panic!("{problem}"),
    }
    keyward::cli::main()
}
