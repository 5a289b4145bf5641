//! The `keyward` program: the server, its tools and its command-line client in one binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    keyward::cli::main()
}
