//! The kinds of calls that a load makes.

use clap::ValueEnum;

/// What to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BenchMode {
    /// AuthzService.Check
    Check,
    /// AuthzService.BatchCheck
    Batch,
    /// AuthzService.StreamCheck
    Stream,
    /// KeyService.Create
    Create,
    /// KeyService.Revoke, each key once
    Revoke,
    /// What Envoy asks
    ExtAuthz,
    /// AuthzService.Check at shares of what the server can answer, from half to twice as many
    Overload,
}

impl BenchMode {
    pub(super) fn method_path(self) -> &'static str {
        match self {
            BenchMode::Check | BenchMode::Overload => "/keyward.v1.AuthzService/Check",
            BenchMode::Batch => "/keyward.v1.AuthzService/BatchCheck",
            BenchMode::Stream => "/keyward.v1.AuthzService/StreamCheck",
            BenchMode::Create => "/keyward.v1.KeyService/Create",
            BenchMode::Revoke => "/keyward.v1.KeyService/Revoke",
            BenchMode::ExtAuthz => "/envoy.service.auth.v3.Authorization/Check",
        }
    }
}
