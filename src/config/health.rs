//! The settings of `keyward health`: which admin pages are asked, and how long.

use std::time::Duration;

use clap::Args;

use super::duration;

/// `keyward health`.
#[derive(Args, Clone, Debug)]
pub struct HealthArgs {
    /// Where the server has its admin pages
    #[arg(long, env = "KEYWARD_ADMIN_LISTEN", value_name = "ADDR", default_value = super::server::DEFAULT_ADMIN_LISTEN)]
    pub admin_listen: String,
    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", value_parser = duration::parse_timeout, default_value = "2s")]
    pub timeout: Duration,
}
