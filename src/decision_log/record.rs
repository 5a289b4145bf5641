//! One line of the decision log. What is not known, or empty, is left out.

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

/// Who asked for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecisionSource {
    /// A service, by Check.
    Check,
    /// Envoy, over gRPC.
    ExtAuthz,
    /// A proxy, over HTTP.
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

/// What is known of a decision.
#[derive(Clone, Debug)]
pub struct DecisionInput<'a> {
    /// Who asked.
    pub source: DecisionSource,
    /// Whether the request may pass.
    pub allowed: bool,
    /// Why; one word of a closed set.
    pub reason: &'static str,
    /// What the engine said, where it was asked.
    pub check_outcome: Option<&'a CheckOutcome>,
    /// Where the call is made.
    pub environment: Option<&'a EnvironmentName>,
    /// The scopes that are needed.
    pub required_scopes: &'a [Scope],
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// The proxy's number for the request.
    pub proxy_request_id: Option<&'a str>,
    /// Whether a denial stops the request, or is only told.
    pub is_shadow: bool,
}

/// A line. The fields are a promise: see docs/telemetry.md.
#[derive(Debug, Default, Serialize)]
pub(super) struct DecisionRecord {
    pub(super) decision_id: String,
    /// RFC 3339, UTC.
    pub(super) time: String,
    /// `check`, `ext_authz`, `forward_auth` or `change`.
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) allowed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) shadow: bool,
    /// What a change did, in the words of the audit log.
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
    /// Who was connected: the caller, or the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) revision: Option<u64>,
    /// Who made a change: a key's id, or `system`.
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
    /// Envoy's number for the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) http_id: Option<String>,
}

impl DecisionRecord {
    /// Of a decision on the call that this task answers.
    pub(super) fn from_decision(id: Uuid, at: Timestamp, facts: &DecisionInput<'_>) -> DecisionRecord {
        let texts = |scopes: &[Scope]| scopes.iter().map(ToString::to_string).collect();
        let key = facts.check_outcome.and_then(|answer| answer.key_match.as_ref()).map(|holder| &holder.key);
        let environment = facts.environment.or_else(|| key.map(|key| key.environment()));
        let (peer, request_id, trace_id) = trace::with_current(|call| {
            let trace = call.trace_id().map(|trace| trace.to_string());
            (call.peer().map(|peer| peer.to_string()), Some(call.request_id().to_string()), trace)
        })
        .unwrap_or_default();
        DecisionRecord {
            allowed: Some(facts.allowed),
            reason: Some(facts.reason),
            shadow: facts.is_shadow,
            key_id: key.map(|key| key.id().to_string()),
            account: facts
                .check_outcome
                .and_then(|answer| answer.acting_account_id())
                .map(ToString::to_string),
            user: key.and_then(|key| key.owner().user()).map(ToString::to_string),
            environment: environment.map(ToString::to_string),
            needed_scopes: texts(facts.required_scopes),
            missing_scopes: facts
                .check_outcome
                .map(|answer| texts(&answer.missing_scopes))
                .unwrap_or_default(),
            customer: facts.customer.map(ToString::to_string),
            client_ip: facts.client_ip.map(|ip| ip.to_string()),
            revision: facts.check_outcome.map(|answer| answer.revision.0),
            http_id: facts.proxy_request_id.map(str::to_owned),
            peer,
            request_id,
            trace_id,
            ..DecisionRecord::with_header(id, at, facts.source.as_str())
        }
    }

    /// Of a change that was committed.
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
