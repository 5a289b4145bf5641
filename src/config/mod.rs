//! Settings: flags, environment and files become values that are valid already. The only place that reads the
//! environment, and it holds no logic of the product.

#[cfg(keyward_breakable)]
pub mod breakage;
pub mod client;
pub mod duration;
mod gateway;
pub mod lifecycle;
pub mod limits;
mod listeners;
pub mod replicas;
pub mod rules;
pub mod server;
