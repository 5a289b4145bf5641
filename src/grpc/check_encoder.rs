//! Encodes `keyward.v1.CheckResponse` straight from the engine's outcome, without an intermediate message.
//!
//! Nothing is decided here. A test compares this encoder with the generated message.

use bytes::{BufMut, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, message};
use prost_types::Duration as PbDuration;

use crate::{
    domain::{
        key_attributes::KeyAttributes as _,
        limit::LimitStatus,
        policy_decision::{Reason, ReasonSet},
    },
    engine::CheckOutcome,
    pb,
};

use super::convert;

pub(super) fn write_response(outcome: &CheckOutcome, out: &mut impl BufMut) {
    write_fields(outcome, true, out);
}

/// Writes an item of a batch. Omits the key's grants and metadata if they would make the batch longer than `max_bytes`.
pub(super) fn write_batch_item(outcome: &CheckOutcome, max_bytes: usize, out: &mut BytesMut) {
    let start = out.len();
    write_submessage(1, out, |out| write_fields(outcome, true, out));
    if out.len() > max_bytes && outcome.key_match.is_some() {
        out.truncate(start);
        write_submessage(1, out, |out| write_fields(outcome, false, out));
    }
}

fn write_fields(outcome: &CheckOutcome, grants: bool, out: &mut impl BufMut) {
    let reason = outcome.reason();
    write_varint(1, u64::from(reason == Reason::Ok), out);
    write_varint(2, reason as u64, out);
    match reason {
        Reason::MissingScope => write_text(3, &missing_scopes_message(outcome), out),
        _ => write_text(3, reason.message(), out),
    }
    write_reasons(4, outcome.failures, out);
    outcome.missing_scopes.iter().for_each(|scope| write_text(5, scope.as_str(), out));
    if let Some(key_match) = &outcome.key_match {
        let key = &key_match.key;
        write_text(6, key.id().encode_hyphenated(&mut [0; 36]), out);
        write_text(7, key.name().unwrap_or_default(), out);
        write_text(8, outcome.acting_account_id().map_or("", |account| account.as_str()), out);
        write_text(9, key.owner().user().map_or("", |user| user.as_str()), out);
        write_text(10, key.environment().as_str(), out);
        if grants {
            outcome.granted_scopes().for_each(|scope| write_text(11, scope.as_str(), out));
        }
        write_varint(12, key_match.secret_version.into(), out);
        if grants {
            key.metadata().iter().for_each(|pair| write_map_entry(13, pair, out));
        }
    }
    outcome
        .limits()
        .statuses
        .iter()
        .for_each(|status| message::encode(14, &limit_state_to_proto(status), out));
    if let Some(after) = outcome.limits().retry_after() {
        message::encode(15, &convert::duration_to_proto(after), out);
    }
    if let Some(expires_at) = outcome.key_match.as_ref().and_then(|key_match| key_match.key.expires_at()) {
        message::encode(16, &convert::timestamp_to_proto(expires_at), out);
    }
    write_varint(17, outcome.revision.0, out);
    message::encode(18, &convert::duration_to_proto(outcome.staleness), out);
    // `max_age` 0: no response may be cached.
    message::encode(19, &PbDuration::default(), out);
    write_varint(20, outcome.limits().is_inexact.into(), out);
    write_varint(22, (!grants).into(), out);
}

fn missing_scopes_message(outcome: &CheckOutcome) -> String {
    let missing = convert::to_strings(&outcome.missing_scopes).join(", ");
    format!("{}: missing {missing}", outcome.reason().message())
}

fn limit_state_to_proto((name, limit, status): &(String, u64, LimitStatus)) -> pb::RateLimitState {
    pb::RateLimitState {
        name: name.clone(),
        limit: *limit,
        remaining: status.remaining,
        reset_after: status.reset_after.map(convert::duration_to_proto),
    }
}

/// Writes a number or a flag. Zero is omitted, as proto3 requires.
fn write_varint(field: u32, value: u64, out: &mut impl BufMut) {
    if value != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn write_text(field: u32, text: &str, out: &mut impl BufMut) {
    if !text.is_empty() {
        write_nonempty_text(field, text, out);
    }
}

fn write_nonempty_text(field: u32, text: &str, out: &mut impl BufMut) {
    write_nonempty_bytes(field, text.as_bytes(), out);
}

fn write_nonempty_bytes(field: u32, bytes: &[u8], out: &mut impl BufMut) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.put_slice(bytes);
}

/// Writes an entry of a map of strings.
fn write_map_entry(field: u32, (name, value): (&String, &String), out: &mut impl BufMut) {
    let length = |text: &str| 1 + encoded_len_varint(text.len() as u64) + text.len();
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint((length(name) + length(value)) as u64, out);
    write_nonempty_text(1, name, out);
    write_nonempty_text(2, value, out);
}

/// Writes a nested message. Its length is only known afterwards; two bytes are reserved, which fit most.
fn write_submessage(field: u32, out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    const RESERVED_LEN: usize = 2;
    encode_key(field, WireType::LengthDelimited, out);
    let start = out.len();
    out.put_bytes(0, RESERVED_LEN);
    write(out);
    let length = out.len() - start - RESERVED_LEN;
    let prefix = encoded_len_varint(length as u64);
    if prefix != RESERVED_LEN {
        out.resize(start + prefix.max(RESERVED_LEN) + length, 0);
        out.copy_within(start + RESERVED_LEN..start + RESERVED_LEN + length, start + prefix);
        out.truncate(start + prefix + length);
    }
    encode_varint(length as u64, &mut &mut out[start..start + prefix]);
}

/// Writes reasons as a packed field: each number takes one byte.
fn write_reasons(field: u32, list: ReasonSet, out: &mut impl BufMut) {
    let mut numbers = [0; Reason::ALL.len()];
    let written = numbers.iter_mut().zip(list.iter()).map(|(number, reason)| *number = reason as u8).count();
    if written > 0 {
        write_nonempty_bytes(field, &numbers[..written], out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{
            key::tests::sample_key,
            scope::Scope,
            time::{Revision, Timestamp},
        },
        engine::{KeyMatch, KeyRef, check_outcome::ActingAccount, limiter::LimitOutcome},
    };
    use prost::Message as _;
    use std::time::Duration;

    fn allowed_outcome() -> CheckOutcome {
        let mut key = sample_key();
        key.spec.metadata.insert("plan".into(), "pro".into());
        key.spec.metadata.insert("empty".into(), String::new());
        key.spec.expires_at = Some(Timestamp::from_micros(1_767_225_600_000_000));
        let mut answer = CheckOutcome::from_reason(Reason::Ok, Revision(300));
        answer.acting_account = ActingAccount::KeyOwner;
        answer.key_match = Some(KeyMatch { key: KeyRef::from(&key), secret_version: 1 });
        answer.staleness = Duration::from_millis(1500);
        answer
    }

    fn decode_response(answer: &CheckOutcome) -> pb::CheckResponse {
        let mut bytes = Vec::new();
        write_response(answer, &mut bytes);
        pb::CheckResponse::decode(&*bytes).unwrap()
    }

    #[test]
    fn an_allowed_check_tells_of_the_key() {
        let answer = allowed_outcome();
        let key = &answer.key_match.as_ref().unwrap().key;
        let expected = pb::CheckResponse {
            allowed: true,
            reason: pb::Reason::Ok.into(),
            message: "allowed".into(),
            key_id: key.id().to_string(),
            key_name: key.name().unwrap_or_default().into(),
            account: "acme".into(),
            environment: key.environment().to_string(),
            scopes: answer.granted_scopes().map(ToString::to_string).collect(),
            secret_version: 1,
            metadata: key.metadata().clone(),
            expires_at: Some(prost_types::Timestamp { seconds: 1_767_225_600, nanos: 0 }),
            revision: 300,
            staleness: Some(PbDuration { seconds: 1, nanos: 500_000_000 }),
            max_age: Some(PbDuration::default()),
            ..pb::CheckResponse::default()
        };
        assert!(!expected.scopes.is_empty() && expected.metadata.len() == 2);
        assert_eq!(decode_response(&answer), expected);
    }

    #[test]
    fn an_item_that_makes_its_batch_too_long_is_written_without_its_grants_and_says_so() {
        let answer = allowed_outcome();
        let (mut whole, mut without) = (BytesMut::new(), BytesMut::new());
        write_batch_item(&answer, usize::MAX, &mut whole);
        write_batch_item(&answer, whole.len() - 1, &mut without);
        let item = |bytes: &[u8]| pb::BatchCheckResponse::decode(bytes).unwrap().results.remove(0);
        let (whole, without) = (item(&whole), item(&without));
        assert!(!whole.grants_omitted && !whole.scopes.is_empty());
        let (scopes, metadata) = (Vec::new(), Default::default());
        assert_eq!(without, pb::CheckResponse { grants_omitted: true, scopes, metadata, ..whole });
    }

    #[test]
    fn a_message_in_a_message_is_as_long_as_it_says() {
        for length in [0, 1, 127, 128, 16_383, 16_384, 40_000] {
            let mut bytes = BytesMut::new();
            write_submessage(1, &mut bytes, |out| write_text(3, &"x".repeat(length), out));
            write_submessage(1, &mut bytes, |out| write_varint(1, 1, out));
            let batch = pb::BatchCheckResponse::decode(&*bytes).unwrap();
            assert_eq!((batch.results[0].message.len(), batch.results[1].allowed), (length, true));
            assert_eq!(batch.encode_to_vec(), bytes);
        }
    }

    #[test]
    fn a_denial_tells_every_reason_and_what_is_missing() {
        let mut answer = allowed_outcome();
        answer.failures = crate::domain::policy_decision::ReasonSet::default();
        answer.failures.insert_if(Reason::MissingScope, true);
        answer.failures.insert_if(Reason::QuotaExceeded, true);
        answer.missing_scopes =
            vec![Scope::parse_required("a:b").unwrap(), Scope::parse_required("c").unwrap()];
        let standings = vec![(
            "quota".into(),
            100,
            LimitStatus {
                remaining: 0,
                reset_after: Some(Duration::from_secs(9)),
                retry_after: None,
                allowed: false,
            },
        )];
        answer.limits =
            Some(Box::new(LimitOutcome { statuses: standings, is_inexact: true, ..LimitOutcome::default() }));
        let read = decode_response(&answer);
        assert!(!read.allowed && read.limits_inexact);
        assert_eq!(read.reason(), pb::Reason::MissingScope);
        assert!(read.message.ends_with(": missing a:b, c"), "{}", read.message);
        let failures: Vec<_> = read.failures().collect();
        assert_eq!(failures, [pb::Reason::MissingScope, pb::Reason::QuotaExceeded]);
        assert_eq!(read.missing_scopes, ["a:b", "c"]);
        let reset_after = Some(PbDuration { seconds: 9, nanos: 0 });
        let quota = pb::RateLimitState { name: "quota".into(), limit: 100, remaining: 0, reset_after };
        assert_eq!(read.rate_limits, [quota]);
    }
}
