//! Settings: flags, environment and files become values that are valid already. The only place that reads the
//! environment, and it holds no logic of the product.

mod account_limits;
mod boolean;
#[cfg(keyward_breakable)]
pub mod breakage;
pub mod client;
#[cfg(test)]
mod credential_tests;
pub mod document;
pub mod duration;
pub mod effective;
mod gateway;
pub mod health;
pub mod keys;
pub mod lifecycle;
pub mod limits;
mod listeners;
mod preflight;
pub mod problems;
pub mod reference;
pub mod replicas;
pub mod rules;
pub mod secret;
pub mod server;
pub mod telemetry;
pub mod trace_parent;
pub mod wording;
