//! Flags that several `keyward keys` commands share.

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        table::DetailTable,
        text_output,
        value_format::{ExpiryArg, parse_name_value, parse_quota, parse_rate_limit},
    },
    pb,
};

#[derive(Debug, Args)]
pub(in crate::cli) struct KeyIdArgs {
    /// The key's id
    #[arg(value_name = "ID")]
    pub(super) id: String,
}

/// The name, scopes, restrictions and limits of a key.
#[derive(Debug, Default, Args)]
pub(super) struct KeyPolicyArgs {
    /// Name for people, unique among the owner's keys that are not revoked
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Scope to grant: monitors:read, monitors:*, or all (repeat, or separate by commas)
    #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',')]
    pub(super) scopes: Vec<String>,
    /// Role to grant (repeat, or separate by commas)
    #[arg(long = "role", value_name = "ROLE", value_delimiter = ',')]
    pub(super) roles: Vec<String>,
    /// When the key ends: a duration from now (90d, 1y), an instant (RFC 3339), or never
    #[arg(long, value_name = "WHEN", value_parser = ExpiryArg::parse)]
    pub(super) expires: Option<ExpiryArg>,
    /// Restrict the key to this customer (repeat, or separate by commas)
    #[arg(long = "customer", value_name = "ID", value_delimiter = ',')]
    pub(super) customers: Vec<String>,
    /// Restrict the key to client addresses of this network, such as 10.0.0.0/8 (repeat, or separate by
    /// commas)
    #[arg(long = "allow-cidr", value_name = "CIDR", value_delimiter = ',')]
    pub(super) allowed_cidrs: Vec<String>,
    /// Rate limit, such as calls=100/1m (repeatable)
    #[arg(long = "rate-limit", value_name = "NAME=LIMIT/WINDOW", value_parser = parse_rate_limit)]
    pub(super) rate_limits: Vec<pb::RateLimit>,
    /// Quota per hour, day, month (UTC) or total, such as 1000/month
    #[arg(long, value_name = "LIMIT/PERIOD", value_parser = parse_quota)]
    pub(super) quota: Option<pb::Quota>,
    /// Metadata of the key, such as team=billing (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_name_value)]
    pub(super) metadata: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum RevokeReasonArg {
    /// The token was exposed, or may have been
    Compromised,
    /// Another key has replaced this one
    Superseded,
    /// Nothing uses the key any more
    NoLongerNeeded,
    /// The person or team that owned it has left
    OwnerLeft,
}

impl From<RevokeReasonArg> for pb::RevokeReason {
    fn from(reason: RevokeReasonArg) -> pb::RevokeReason {
        match reason {
            RevokeReasonArg::Compromised => pb::RevokeReason::Compromised,
            RevokeReasonArg::Superseded => pb::RevokeReason::Superseded,
            RevokeReasonArg::NoLongerNeeded => pb::RevokeReason::NoLongerNeeded,
            RevokeReasonArg::OwnerLeft => pb::RevokeReason::OwnerLeft,
        }
    }
}

pub(super) fn describe_key_or_empty(key: Option<&pb::Key>) -> DetailTable {
    key.map_or_else(DetailTable::new, text_output::describe_key)
}
