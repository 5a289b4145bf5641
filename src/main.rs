//! x
use clap::Parser;
#[derive(Parser)]
enum C {
    Serve(keyward::config::server::ServeArgs),
    RootKey(keyward::config::server::RootKeyArgs),
}
fn main() -> std::process::ExitCode {
    match C::parse() {
        C::Serve(a) => keyward::cli::serve::run(a),
        C::RootKey(a) => keyward::cli::root_key::run(a),
    }
}
