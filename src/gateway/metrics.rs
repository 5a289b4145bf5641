//! Counts the gateway's outcomes by protocol, mode and reason. The labels are a closed set; no value of a client
//! becomes one.

use crate::{
    domain::{policy_decision::Reason, route::EnforcementMode},
    metrics_core::ShardedCounters,
};

use super::{request::ProxyProtocol, response::GatewayOutcome};

/// What is found besides the engine's reasons.
const GATEWAY_REASONS: [&str; 11] = [
    "public",
    "no_credential",
    "many_credentials",
    "no_rule",
    "management_key",
    "bad_request",
    "too_large",
    "misconfigured",
    "not_ready",
    "limits_unavailable",
    "lease_lost",
];
const REASON_COUNT: usize = Reason::ALL.len() + GATEWAY_REASONS.len();

#[derive(Debug)]
pub(crate) struct GatewayMetrics {
    requests: ShardedCounters,
    /// Changed rules that were wrong, and that were right.
    reloads: ShardedCounters,
}

impl Default for GatewayMetrics {
    fn default() -> Self {
        GatewayMetrics {
            requests: ShardedCounters::new(2 * 2 * REASON_COUNT),
            reloads: ShardedCounters::new(2),
        }
    }
}

/// The value of one counter, with its labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GatewayRequestCount {
    /// The protocol: `ext_authz` or `forward`.
    pub(crate) via: &'static str,
    /// The mode: `enforce` or `shadow`.
    pub(crate) mode: &'static str,
    /// `allowed`, `denied`, `error`: what was found, whether it was enforced or not.
    pub(crate) result: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) count: u64,
}

/// The place of the first counter of a way of asking in a mode.
const fn counter_offset(via: usize, mode: usize) -> usize {
    (via * 2 + mode) * REASON_COUNT
}

fn reason_labels() -> impl Iterator<Item = &'static str> {
    Reason::ALL.into_iter().map(Reason::as_str).chain(GATEWAY_REASONS)
}

impl GatewayMetrics {
    pub(super) fn record(&self, via: ProxyProtocol, mode: EnforcementMode, outcome: &GatewayOutcome) {
        let label = outcome.reason_label();
        if let Some(at) = reason_labels().position(|known| known == label) {
            self.requests.add(counter_offset(via as usize, mode as usize) + at, 1);
        }
    }

    pub(super) fn record_reload(&self, good: bool) {
        self.reloads.add(usize::from(good), 1);
    }

    /// How often changed rules were wrong, and how often right.
    #[must_use]
    pub(crate) fn reloads(&self) -> [u64; 2] {
        [0, 1].map(|good| self.reloads.get(good))
    }

    /// Every counter that counted something.
    pub(crate) fn iter(&self) -> impl Iterator<Item = GatewayRequestCount> {
        ["ext_authz", "forward"].into_iter().enumerate().flat_map(move |(protocol, via)| {
            ["enforce", "shadow"].into_iter().enumerate().flat_map(move |(at, mode)| {
                reason_labels().zip(counter_offset(protocol, at)..).filter_map(move |(reason, at)| {
                    let result = match reason {
                        "ok" | "public" => "allowed",
                        "misconfigured" | "not_ready" | "limits_unavailable" | "lease_lost" => "error",
                        _ => "denied",
                    };
                    let count = self.requests.get(at);
                    (count > 0).then_some(GatewayRequestCount { via, mode, result, reason, count })
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_has_a_counter_of_its_own() {
        let counts = GatewayMetrics::default();
        counts.record(ProxyProtocol::ForwardAuth, EnforcementMode::Shadow, &GatewayOutcome::NoRule);
        counts.record(ProxyProtocol::ForwardAuth, EnforcementMode::Shadow, &GatewayOutcome::NoRule);
        counts.record(ProxyProtocol::ExtAuthz, EnforcementMode::Enforce, &GatewayOutcome::Public);
        let listed: Vec<_> = counts.iter().collect();
        let count =
            |via, mode, result, reason, count| GatewayRequestCount { via, mode, result, reason, count };
        assert_eq!(
            listed,
            [
                count("ext_authz", "enforce", "allowed", "public", 1),
                count("forward", "shadow", "denied", "no_rule", 2)
            ]
        );
        assert_eq!(reason_labels().count(), REASON_COUNT);
    }
}
