//! Serializes responses as JSON for `--output json`.
//!
//! # Invariants
//! - A response is one object with every field, in the protos' order and with their names; absent fields are `null`.
//! - Instants are RFC 3339 in UTC, durations text such as `1m30s`, enums their proto names, bytes hexadecimal digits.
//! - A new field of a message does not compile until it is listed here.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap as _};

use super::value_format::{format_proto_duration, format_rfc3339};
use crate::{
    domain::{text::escape_json, token::HexBytes},
    pb,
};

/// Formats a message as one JSON object and a line end. Invisible and control characters are escaped as `\u`.
pub(super) fn to_json_object(message: &impl ToJson) -> String {
    // serde_json can write everything here: maps of text, numbers and lists.
    let mut text = escape_json(serde_json::to_string_pretty(&AsJson(message)).unwrap_or_default());
    text.push('\n');
    text
}

/// A value that `--output json` can print.
pub(super) trait ToJson {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error>;
}

/// Implements [`Serialize`] for a [`ToJson`] value.
struct AsJson<'a, T>(&'a T);

impl<T: ToJson> Serialize for AsJson<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize_json(serializer)
    }
}

macro_rules! plain {
    ($($type:ty),*) => {
        $(impl ToJson for $type {
            fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.serialize(serializer)
            }
        })*
    };
}

plain!(String, bool, u32, u64, BTreeMap<String, String>);

impl<T: ToJson> ToJson for Option<T> {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.as_ref().map(AsJson).serialize(serializer)
    }
}

impl<T: ToJson> ToJson for Vec<T> {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter().map(AsJson))
    }
}

impl ToJson for prost_types::Timestamp {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_rfc3339(self))
    }
}

impl ToJson for prost_types::Duration {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_proto_duration(self))
    }
}

/// The JSON form of an enum or of bytes. An enum value that this build does not know stays a number.
#[derive(Serialize)]
#[serde(untagged)]
enum EncodedField {
    Name(&'static str),
    Number(i32),
    Names(Vec<EncodedField>),
    HexDigits(String),
}

fn encode_enum<E: TryFrom<i32>>(value: i32, name: fn(&E) -> &'static str) -> EncodedField {
    E::try_from(value).map_or(EncodedField::Number(value), |known| EncodedField::Name(name(&known)))
}

fn encode_key_state(value: &i32) -> EncodedField {
    encode_enum(*value, pb::KeyState::as_str_name)
}

fn encode_revoke_reason(value: &i32) -> EncodedField {
    encode_enum(*value, pb::RevokeReason::as_str_name)
}

fn encode_quota_period(value: &i32) -> EncodedField {
    encode_enum(*value, pb::QuotaPeriod::as_str_name)
}

fn encode_reason(value: &i32) -> EncodedField {
    encode_enum(*value, pb::Reason::as_str_name)
}

fn encode_expected_entry(value: &i32) -> EncodedField {
    encode_enum(*value, pb::ExpectedEntry::as_str_name)
}

fn encode_reasons(values: &[i32]) -> EncodedField {
    EncodedField::Names(values.iter().map(encode_reason).collect())
}

fn encode_hex(bytes: &[u8]) -> EncodedField {
    EncodedField::HexDigits(HexBytes(bytes).to_string())
}

/// A response without a token has `null`, never an empty text.
fn non_empty_token(token: &String) -> Option<&String> {
    Some(token).filter(|token| !token.is_empty())
}

macro_rules! messages {
    ($($message:ident { $($field:ident $(as $show:path)?),* $(,)? })*) => {
        $(impl ToJson for pb::$message {
            fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let pb::$message { $($field),* } = self;
                let mut map = serializer.serialize_map(None)?;
                $(map.serialize_entry(stringify!($field), &messages!(@ $field $($show)?))?;)*
                map.end()
            }
        })*
    };
    (@ $field:ident) => { AsJson($field) };
    (@ $field:ident $show:path) => { $show($field) };
}

messages! {
    Key {
        id, account, user, environment, name, hint, scopes, roles, customers, allowed_cidrs, rate_limits,
        quota, metadata, state as encode_key_state, created_at, created_by, updated_at, expires_at, last_used_at,
        revoked_at, revoke_reason as encode_revoke_reason, secrets, revision, revoke_comment,
    }
    Secret { version, hint, created_at, expires_at, last_used_at }
    RateLimit { name, limit, window }
    Quota { limit, period as encode_quota_period }
    Propagation { complete, confirmed, unconfirmed, complete_by, sync_replicated }
    UnconfirmedReplica { replica, last_seen, lease_ends_by }
    CreateKeyResponse { key, token as non_empty_token, revision, replayed }
    GetKeyResponse { key }
    ListKeysResponse { keys, next_page_token }
    UpdateKeyResponse { key, revision, propagation }
    DisableKeyResponse { key, revision, propagation }
    EnableKeyResponse { key, revision, propagation }
    RevokeKeyResponse { key, revision, propagation }
    RotateKeyResponse { key, token as non_empty_token, replayed, revision, previous_expires_at, propagation }
    FinishRotationResponse { key, revision, propagation }
    LookupKeyResponse { key, secret_version }
    WhoAmIResponse { account, key, actor }
    AccountName { id, name }
    RevokeSelfResponse { revision, propagation }
    BulkRevokeKeysResponse { keys, revision, propagation, more }
    BulkRevokeResult { key, revoked, error }
    KeyUsageResponse { buckets, allowed, denied }
    UsageBucket { start, allowed, denied, denied_by_reason }
    ReasonCount { reason as encode_reason, count }
    Account { id, name, suspended, created_at, updated_at, revision, longest_life }
    CreateAccountResponse { account, revision }
    GetAccountResponse { account }
    ListAccountsResponse { accounts, next_page_token }
    UpdateAccountResponse { account, revision }
    SuspendAccountResponse { account, revision, propagation }
    ResumeAccountResponse { account, revision }
    Member { account, user, role, revision }
    PutMemberResponse { member, revision, propagation }
    RemoveMemberResponse { revision, propagation }
    ListMembersResponse { members, next_page_token }
    Role { account, name, scopes, revision }
    PutRoleResponse { role, revision, propagation }
    DeleteRoleResponse { revision, propagation }
    ListRolesResponse { roles, next_page_token }
    CheckResponse {
        allowed, reason as encode_reason, message, failures as encode_reasons, missing_scopes, key_id, key_name,
        account, user, environment, scopes, secret_version, metadata, rate_limits, retry_after, expires_at,
        revision, staleness, max_age, limits_inexact, grants_omitted,
    }
    RateLimitState { name, limit, remaining, reset_after }
    ListAuditEntriesResponse { entries, next_page_token }
    AuditEntry {
        revision, at, action, account, key_id, actor, actor_account, method, detail, hash as encode_hex, user, acting_user, changes, previous_revision,
        request_id, peer, prev_hash as encode_hex, payload,
    }
    AuditFieldChange { field, before, after }
    VerifyAuditLogResponse {
        valid, head, head_hash as encode_hex, broken_at, problem, entries, first_revision, last_revision,
        last_hash as encode_hex, checkpoint, records, mismatches, expected as encode_expected_entry,
    }
    AuditCheckpoint { revision, hash as encode_hex, entries, made_at }
    AuditMismatch { record, revision, problem }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn value(message: &impl ToJson) -> Value {
        serde_json::from_str(&to_json_object(message)).unwrap()
    }

    #[test]
    fn a_response_keeps_the_names_and_the_order_of_the_protos() {
        let response = pb::RevokeSelfResponse {
            revision: 1 << 60,
            propagation: Some(pb::Propagation { complete: true, ..Default::default() }),
        };
        assert_eq!(
            to_json_object(&response),
            r#"{
  "revision": 1152921504606846976,
  "propagation": {
    "complete": true,
    "confirmed": [],
    "unconfirmed": [],
    "complete_by": null,
    "sync_replicated": false
  }
}
"#
        );
    }

    #[test]
    fn enums_have_their_proto_names_instants_rfc_3339_and_durations_units() {
        let mut key = pb::Key {
            created_at: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            ..Default::default()
        };
        key.set_state(pb::KeyState::Active);
        key.quota = Some(pb::Quota { limit: 5, period: pb::QuotaPeriod::Month.into() });
        key.rate_limits = vec![pb::RateLimit {
            name: "a".into(),
            limit: 1,
            window: Some(prost_types::Duration { seconds: 90, nanos: 0 }),
        }];
        let key = value(&key);
        assert_eq!(key["state"], "KEY_STATE_ACTIVE");
        assert_eq!(key["created_at"], "1970-01-01T00:00:00Z");
        assert_eq!(key["expires_at"], Value::Null);
        assert_eq!(key["quota"], json!({ "limit": 5, "period": "QUOTA_PERIOD_MONTH" }));
        assert_eq!(key["rate_limits"], json!([{ "name": "a", "limit": 1, "window": "1m30s" }]));

        let check = value(&pb::CheckResponse { reason: 4, failures: vec![4, 999], ..Default::default() });
        assert_eq!(check["reason"], "REASON_REVOKED");
        assert_eq!(check["failures"], json!(["REASON_REVOKED", 999]));
    }

    #[test]
    fn a_token_that_is_not_there_is_null() {
        let token = |token: &str| {
            value(&pb::CreateKeyResponse { token: token.into(), ..Default::default() })["token"].take()
        };
        assert_eq!(token("kw_x"), "kw_x");
        assert_eq!(token(""), Value::Null);
    }

    #[test]
    fn text_that_steers_a_terminal_is_escaped_and_stays_the_same_text() {
        let name = "\u{1b}[2J\u{9b}2J\u{7f}\u{202e}\u{200b}\u{e0041}é\n";
        let key = pb::Key { name: name.into(), ..Default::default() };
        let text = to_json_object(&key);
        assert!(text.contains(r#""\u001b[2J\u009b2J\u007f\u202e\u200b\udb40\udc41é\n""#), "{text}");
        assert_eq!(value(&key)["name"], name);
    }

    #[test]
    fn bytes_are_hexadecimal_digits() {
        let entry = value(&pb::AuditEntry { hash: vec![0, 255], ..Default::default() });
        assert_eq!(entry["hash"], "00ff");
    }
}
