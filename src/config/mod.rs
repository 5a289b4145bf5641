//! Turns flags, environment variables and files into validated settings.
//!
//! This is the only module that reads the environment. Connecting, serving and every decision of the product belong
//! elsewhere.

mod boolean;
pub(crate) mod client;
#[cfg(test)]
mod credential_tests;
pub(crate) mod duration;
pub(crate) mod effective;
pub(crate) mod error;
#[cfg(keyward_breakable)]
pub mod fault_injection;
pub(crate) mod file;
mod gateway;
pub mod lifecycle;
mod limits;
mod listener_preflight;
mod listeners;
mod preflight;
mod problems;
mod raw;
pub(crate) mod reference_page;
pub(crate) mod replicas;
pub(crate) mod rules;
pub(crate) mod schema;
pub mod secret_url;
pub mod server;
pub mod telemetry;
pub(crate) mod toml_messages;
pub(crate) mod trace_parent;
