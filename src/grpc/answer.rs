//! A Check's answer on the wire (`keyward.v1.CheckResponse`), written from what the engine found without a message in
//! between: of texts that are there already, nothing is copied twice. A test holds it against the generated message.

use bytes::{BufMut, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, message};
use prost_types::Duration as PbDuration;

use crate::{
    domain::{
        decision::{Failures, Reason},
        facts::KeyFacts as _,
        limit::Standing,
    },
    engine::Answer,
    pb,
};

use super::convert;

/// Writes the message.
pub(super) fn write(answer: &Answer, out: &mut impl BufMut) {
    write_with(answer, true, out);
}

/// Writes an item of a batch: without the key's grants and metadata if they would make the batch longer than `most`.
pub(super) fn write_item(answer: &Answer, most: usize, out: &mut BytesMut) {
    let start = out.len();
    nest(1, out, |out| write_with(answer, true, out));
    if out.len() > most && answer.holder.is_some() {
        out.truncate(start);
        nest(1, out, |out| write_with(answer, false, out));
    }
}

fn write_with(answer: &Answer, grants: bool, out: &mut impl BufMut) {
    let reason = answer.reason();
    number(1, u64::from(reason == Reason::Ok), out);
    number(2, reason as u64, out);
    match reason {
        Reason::MissingScope => text(3, &missing(answer), out),
        _ => text(3, reason.message(), out),
    }
    reasons(4, answer.failures, out);
    answer.missing.iter().for_each(|scope| text(5, scope.as_str(), out));
    if let Some(holder) = &answer.holder {
        let key = &holder.key;
        text(6, key.id().write(&mut [0; 36]), out);
        text(7, key.name().unwrap_or_default(), out);
        text(8, answer.account().map_or("", |account| account.as_str()), out);
        text(9, key.owner().user().map_or("", |user| user.as_str()), out);
        text(10, key.environment().as_str(), out);
        if grants {
            answer.grants().for_each(|scope| text(11, scope.as_str(), out));
        }
        number(12, holder.version.into(), out);
        if grants {
            key.metadata().iter().for_each(|pair| entry(13, pair, out));
        }
    }
    answer.limits().standings.iter().for_each(|standing| message::encode(14, &limit_state(standing), out));
    if let Some(after) = answer.limits().retry_after() {
        message::encode(15, &convert::duration(after), out);
    }
    if let Some(end) = answer.holder.as_ref().and_then(|holder| holder.key.expires_at()) {
        message::encode(16, &convert::timestamp(end), out);
    }
    number(17, answer.revision.0, out);
    message::encode(18, &convert::duration(answer.staleness), out);
    // No answer may be kept.
    message::encode(19, &PbDuration::default(), out);
    number(20, answer.limits().inexact.into(), out);
    number(22, (!grants).into(), out);
}

fn missing(answer: &Answer) -> String {
    let missing = convert::texts(&answer.missing).join(", ");
    format!("{}: missing {missing}", answer.reason().message())
}

fn limit_state((name, limit, standing): &(String, u64, Standing)) -> pb::RateLimitState {
    pb::RateLimitState {
        name: name.clone(),
        limit: *limit,
        remaining: standing.remaining,
        reset_after: standing.reset_after.map(convert::duration),
    }
}

/// A number or a flag. What is 0 is left out, as in every field of a message.
fn number(field: u32, value: u64, out: &mut impl BufMut) {
    if value != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn text(field: u32, text: &str, out: &mut impl BufMut) {
    if !text.is_empty() {
        some_text(field, text, out);
    }
}

fn some_text(field: u32, text: &str, out: &mut impl BufMut) {
    some_bytes(field, text.as_bytes(), out);
}

fn some_bytes(field: u32, bytes: &[u8], out: &mut impl BufMut) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.put_slice(bytes);
}

/// An entry of a map of texts.
fn entry(field: u32, (name, value): (&String, &String), out: &mut impl BufMut) {
    let length = |text: &str| 1 + encoded_len_varint(text.len() as u64) + text.len();
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint((length(name) + length(value)) as u64, out);
    some_text(1, name, out);
    some_text(2, value, out);
}

/// A message in a message. Its length is known when it is written: most have one of two bytes, for which room is kept.
fn nest(field: u32, out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    const KEPT: usize = 2;
    encode_key(field, WireType::LengthDelimited, out);
    let start = out.len();
    out.put_bytes(0, KEPT);
    write(out);
    let length = out.len() - start - KEPT;
    let prefix = encoded_len_varint(length as u64);
    if prefix != KEPT {
        out.resize(start + prefix.max(KEPT) + length, 0);
        out.copy_within(start + KEPT..start + KEPT + length, start + prefix);
        out.truncate(start + prefix + length);
    }
    encode_varint(length as u64, &mut &mut out[start..start + prefix]);
}

/// Reasons, packed: each has a number of one byte.
fn reasons(field: u32, list: Failures, out: &mut impl BufMut) {
    let mut numbers = [0; Reason::ALL.len()];
    let written = numbers.iter_mut().zip(list.iter()).map(|(number, reason)| *number = reason as u8).count();
    if written > 0 {
        some_bytes(field, &numbers[..written], out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{
            key::tests::sample,
            scope::Scope,
            time::{Revision, Timestamp},
        },
        engine::{Acts, HeldKey, Holder, limiter::Usage},
    };
    use prost::Message as _;
    use std::time::Duration;

    fn allowed() -> Answer {
        let mut key = sample();
        key.terms.metadata.insert("plan".into(), "pro".into());
        key.terms.metadata.insert("empty".into(), String::new());
        key.terms.expires_at = Some(Timestamp::from_micros(1_767_225_600_000_000));
        let mut answer = Answer::of(Reason::Ok, Revision(300));
        answer.place = Acts::AtHome;
        answer.holder = Some(Holder { key: HeldKey::from(&key), version: 1 });
        answer.staleness = Duration::from_millis(1500);
        answer
    }

    fn read(answer: &Answer) -> pb::CheckResponse {
        let mut bytes = Vec::new();
        write(answer, &mut bytes);
        pb::CheckResponse::decode(&*bytes).unwrap()
    }

    #[test]
    fn an_allowed_check_tells_of_the_key() {
        let answer = allowed();
        let key = &answer.holder.as_ref().unwrap().key;
        let expected = pb::CheckResponse {
            allowed: true,
            reason: pb::Reason::Ok.into(),
            message: "allowed".into(),
            key_id: key.id().to_string(),
            key_name: key.name().unwrap_or_default().into(),
            account: "acme".into(),
            environment: key.environment().to_string(),
            scopes: answer.grants().map(ToString::to_string).collect(),
            secret_version: 1,
            metadata: key.metadata().clone(),
            expires_at: Some(prost_types::Timestamp { seconds: 1_767_225_600, nanos: 0 }),
            revision: 300,
            staleness: Some(PbDuration { seconds: 1, nanos: 500_000_000 }),
            max_age: Some(PbDuration::default()),
            ..pb::CheckResponse::default()
        };
        assert!(!expected.scopes.is_empty() && expected.metadata.len() == 2);
        assert_eq!(read(&answer), expected);
    }

    #[test]
    fn an_item_that_makes_its_batch_too_long_is_written_without_its_grants_and_says_so() {
        let answer = allowed();
        let (mut whole, mut without) = (BytesMut::new(), BytesMut::new());
        write_item(&answer, usize::MAX, &mut whole);
        write_item(&answer, whole.len() - 1, &mut without);
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
            nest(1, &mut bytes, |out| text(3, &"x".repeat(length), out));
            nest(1, &mut bytes, |out| number(1, 1, out));
            let batch = pb::BatchCheckResponse::decode(&*bytes).unwrap();
            assert_eq!((batch.results[0].message.len(), batch.results[1].allowed), (length, true));
            assert_eq!(batch.encode_to_vec(), bytes);
        }
    }

    #[test]
    fn a_denial_tells_every_reason_and_what_is_missing() {
        let mut answer = allowed();
        answer.failures = crate::domain::decision::Failures::default();
        answer.failures.note(Reason::MissingScope, true);
        answer.failures.note(Reason::QuotaExceeded, true);
        answer.missing = vec![Scope::parse_required("a:b").unwrap(), Scope::parse_required("c").unwrap()];
        let standings = vec![(
            "quota".into(),
            100,
            Standing {
                remaining: 0,
                reset_after: Some(Duration::from_secs(9)),
                retry_after: None,
                allowed: false,
            },
        )];
        answer.limits = Some(Box::new(Usage { standings, inexact: true, ..Usage::default() }));
        let read = read(&answer);
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
