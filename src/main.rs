//! The `keyward` program: the server, its tools and its command-line client in one binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(keyward_breakable)]
    match keyward::config::breakage::Breakage::read() {
        Ok(breakage) => {
            breakage.rule.into_iter().for_each(keyward::domain::lease::leave_out);
            keyward::clock::run_at(breakage.clock_rate);
        }
        Err(problem) => panic!("{problem}"),
    }
    keyward::cli::main()
}
