//! A record of the decision log. Unknown and empty fields are left out.

use std::net::IpAddr;

use serde::Serialize;
use uuid::Uuid;

use crate::{
    domain::{
        key_attributes::KeyAttributes as _,
        log::{LogEntry, RecordChange},
        name::{CustomerId, EnvironmentName},
        scope::Scope,
        time::Timestamp,
    },
    engine::CheckOutcome,
    trace,
};

/// The interface that requested a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecisionSource {
    /// A service that calls Check.
    Check,
    /// Envoy through gRPC ext_authz.
    ExtAuthz,
    /// A proxy through HTTP forward auth.
    ForwardAuth,
}

impl DecisionSource {
    const fn as_str(self) -> &'static str {
        match self {
            DecisionSource::Check => "check",
            DecisionSource::ExtAuthz => "ext_authz",
            DecisionSource::ForwardAuth => "forward_auth",
        }
    }
}

/// The input of a decision to be recorded.
#[derive(Clone, Debug)]
pub struct DecisionInput<'a> {
    /// The interface that requested the decision.
    pub source: DecisionSource,
    /// Whether the request is allowed.
    pub allowed: bool,
    /// The reason code, from a closed set.
    pub reason: &'static str,
    /// The engine's outcome, if the engine decided.
    pub check_outcome: Option<&'a CheckOutcome>,
    /// The environment of the request.
    pub environment: Option<&'a EnvironmentName>,
    /// The scopes that the request requires.
    pub required_scopes: &'a [Scope],
    /// The customer that the request is about.
    pub customer: Option<&'a CustomerId>,
    /// Address of the end client.
    pub client_ip: Option<IpAddr>,
    /// The proxy's id of the request.
    pub proxy_request_id: Option<&'a str>,
    /// Whether a denial is only reported and does not stop the request.
    pub is_shadow: bool,
}

/// A line of the log. The field names are stable: see docs/telemetry.md.
#[derive(Debug, Default, Serialize)]
pub(super) struct DecisionRecord {
    pub(super) decision_id: String,
    /// RFC 3339 in UTC.
    pub(super) time: String,
    /// `check`, `ext_authz`, `forward_auth` or `change`.
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) allowed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) shadow: bool,
    /// The action of a change, as in the audit log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) action: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) account: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) environment: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) needed_scopes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) missing_scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) customer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client_ip: Option<String>,
    /// Address of the connected peer: the caller or the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) revision: Option<u64>,
    /// The actor of a change: a key's id or `system`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) actor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) actor_account: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) acting_user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) trace_id: Option<String>,
    /// Envoy's id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) http_id: Option<String>,
}

impl DecisionRecord {
    /// The record of a decision in this task's call.
    pub(super) fn from_decision(id: Uuid, at: Timestamp, input: &DecisionInput<'_>) -> DecisionRecord {
        let texts = |scopes: &[Scope]| scopes.iter().map(ToString::to_string).collect();
        let key =
            input.check_outcome.and_then(|answer| answer.key_match.as_ref()).map(|matched| &matched.key);
        let environment = input.environment.or_else(|| key.map(|key| key.environment()));
        let (peer, request_id, trace_id) = trace::with_current(|call| {
            let trace = call.trace_id().map(|trace| trace.to_string());
            (call.peer().map(|peer| peer.to_string()), Some(call.request_id().to_string()), trace)
        })
        .unwrap_or_default();
        DecisionRecord {
            allowed: Some(input.allowed),
            reason: Some(input.reason),
            shadow: input.is_shadow,
            key_id: key.map(|key| key.id().to_string()),
            account: input
                .check_outcome
                .and_then(|answer| answer.acting_account_id())
                .map(ToString::to_string),
            user: key.and_then(|key| key.owner().user()).map(ToString::to_string),
            environment: environment.map(ToString::to_string),
            needed_scopes: texts(input.required_scopes),
            missing_scopes: input
                .check_outcome
                .map(|answer| texts(&answer.missing_scopes))
                .unwrap_or_default(),
            customer: input.customer.map(ToString::to_string),
            client_ip: input.client_ip.map(|ip| ip.to_string()),
            revision: input.check_outcome.map(|answer| answer.revision.0),
            http_id: input.proxy_request_id.map(str::to_owned),
            peer,
            request_id,
            trace_id,
            ..DecisionRecord::with_header(id, at, input.source.as_str())
        }
    }

    /// The record of a committed change.
    pub(super) fn from_change(id: Uuid, row: &LogEntry, change: &RecordChange) -> DecisionRecord {
        let (environment, role) = match change {
            RecordChange::Key(key) => (Some(key.environment.to_string()), None),
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => (None, Some(role.name.to_string())),
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                (None, Some(member.role.to_string()))
            }
            RecordChange::Account(_) => (None, None),
        };
        DecisionRecord {
            action: Some(row.action.clone()),
            key_id: row.key_id.map(|key| key.to_string()),
            account: row.account.as_ref().map(ToString::to_string),
            user: row.user.as_ref().map(ToString::to_string),
            role,
            environment,
            revision: Some(row.revision.0),
            actor: Some(row.actor.clone()),
            actor_account: row.actor_account.as_ref().map(ToString::to_string),
            acting_user: row.acting_user.as_ref().map(ToString::to_string),
            method: Some(row.method.clone()),
            ..DecisionRecord::with_header(id, row.at, "change")
        }
    }

    fn with_header(id: Uuid, at: Timestamp, kind: &'static str) -> DecisionRecord {
        let time = jiff::Timestamp::from_microsecond(at.as_micros()).map(|time| time.to_string());
        DecisionRecord {
            decision_id: id.to_string(),
            time: time.unwrap_or_default(),
            kind,
            ..DecisionRecord::default()
        }
    }
}
