//! The `keyward` program: the server, its tools and its command-line client in one binary.

use std::process::ExitCode;

/// A Check allocates and frees about twenty small blocks; docs/performance.md has what this allocator gains.
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
