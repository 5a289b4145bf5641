//! Settings: flags, environment and files become values that are valid already. The only place that reads the
//! environment, and it holds no logic of the product.

mod account_limits;
mod boolean;
pub mod client;
#[cfg(test)]
mod credential_tests;
pub mod duration;
pub mod effective;
#[cfg(keyward_breakable)]
pub mod fault_injection;
pub mod file;
mod gateway;
pub mod health;
pub mod lifecycle;
pub mod limits;
mod listeners;
mod preflight;
pub mod problems;
pub mod reference_page;
pub mod replicas;
pub mod rules;
pub mod schema;
pub mod secret_url;
pub mod server;
pub mod telemetry;
pub mod toml_messages;
pub mod trace_parent;
