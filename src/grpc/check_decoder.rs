//! Decodes `keyward.v1.CheckRequest` without copying its strings.
//!
//! Validation belongs in `check_evaluator.rs`. A test compares this decoder with the generated message.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use smallvec::SmallVec;
use tonic::Status;

use crate::pb;

use super::status::malformed_message;

/// A request as it was sent, borrowed from the message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CheckRequestView<'a> {
    pub(super) token: &'a str,
    pub(super) environment: &'a str,
    /// Most requests name a single scope.
    pub(super) scopes: SmallVec<[&'a str; 2]>,
    pub(super) authenticate_only: bool,
    pub(super) account: Option<&'a str>,
    pub(super) customer: Option<&'a str>,
    pub(super) client_ip: Option<&'a str>,
    pub(super) cost: Option<u64>,
    pub(super) dry_run: bool,
    pub(super) min_revision: Option<u64>,
}

/// The bytes are not such a message. The generated decoder words the error.
struct MalformedMessage;

impl From<prost::DecodeError> for MalformedMessage {
    fn from(_: prost::DecodeError) -> Self {
        MalformedMessage
    }
}

impl<'a> CheckRequestView<'a> {
    pub(super) fn decode(message: &'a [u8]) -> Result<Self, Status> {
        decode_check(message).map_err(|MalformedMessage| malformed_message::<pb::CheckRequest>(message))
    }

    /// Decodes the checks of a `BatchCheckRequest`.
    pub(super) fn decode_batch(message: &'a [u8]) -> Result<Vec<Self>, Status> {
        decode_checks(message).map_err(|MalformedMessage| malformed_message::<pb::BatchCheckRequest>(message))
    }
}

fn decode_check(mut rest: &[u8]) -> Result<CheckRequestView<'_>, MalformedMessage> {
    let mut request = CheckRequestView::default();
    while !rest.is_empty() {
        let (field, wire) = decode_key(&mut rest)?;
        match field {
            1 => request.token = read_text(wire, &mut rest)?,
            2 => request.environment = read_text(wire, &mut rest)?,
            3 => request.scopes.push(read_text(wire, &mut rest)?),
            4 => request.authenticate_only = read_varint(wire, &mut rest)? != 0,
            5 => request.account = Some(read_text(wire, &mut rest)?),
            6 => request.customer = Some(read_text(wire, &mut rest)?),
            7 => request.client_ip = Some(read_text(wire, &mut rest)?),
            8 => request.cost = Some(read_varint(wire, &mut rest)?),
            9 => request.dry_run = read_varint(wire, &mut rest)? != 0,
            10 => request.min_revision = Some(read_varint(wire, &mut rest)?),
            _ => skip_field(wire, field, &mut rest, DecodeContext::default())?,
        }
    }
    Ok(request)
}

fn decode_checks(mut rest: &[u8]) -> Result<Vec<CheckRequestView<'_>>, MalformedMessage> {
    let mut request = Vec::new();
    while !rest.is_empty() {
        match decode_key(&mut rest)? {
            (1, wire) => request.push(decode_check(read_bytes(wire, &mut rest)?)?),
            (field, wire) => skip_field(wire, field, &mut rest, DecodeContext::default())?,
        }
    }
    Ok(request)
}

fn read_bytes<'a>(wire: WireType, rest: &mut &'a [u8]) -> Result<&'a [u8], MalformedMessage> {
    if wire != WireType::LengthDelimited {
        return Err(MalformedMessage);
    }
    let length = usize::try_from(decode_varint(rest)?).map_err(|_| MalformedMessage)?;
    let (bytes, after) = rest.split_at_checked(length).ok_or(MalformedMessage)?;
    *rest = after;
    Ok(bytes)
}

fn read_text<'a>(wire: WireType, rest: &mut &'a [u8]) -> Result<&'a str, MalformedMessage> {
    std::str::from_utf8(read_bytes(wire, rest)?).map_err(|_| MalformedMessage)
}

fn read_varint(wire: WireType, rest: &mut &[u8]) -> Result<u64, MalformedMessage> {
    if wire == WireType::Varint { Ok(decode_varint(rest)?) } else { Err(MalformedMessage) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, option, prelude::*};
    use prost::Message as _;

    /// The same request as a generated message.
    fn generated(asked: &CheckRequestView<'_>) -> pb::CheckRequest {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        pb::CheckRequest {
            token: asked.token.into(),
            environment: asked.environment.into(),
            scopes: asked.scopes.iter().map(ToString::to_string).collect(),
            authenticate_only: asked.authenticate_only,
            account: owned(asked.account),
            customer: owned(asked.customer),
            client_ip: owned(asked.client_ip),
            cost: asked.cost,
            dry_run: asked.dry_run,
            min_revision: asked.min_revision,
        }
    }

    fn requests() -> impl Strategy<Value = pb::CheckRequest> {
        let texts = (".{0,80}", ".{0,9}", vec(".{0,20}", 0..5));
        let options = (option::of(".{0,9}"), option::of(".{0,9}"), option::of(".{0,9}"));
        let numbers = (option::of(any::<u64>()), option::of(any::<u64>()), any::<bool>(), any::<bool>());
        (texts, options, numbers).prop_map(|(texts, options, numbers)| pb::CheckRequest {
            token: texts.0,
            environment: texts.1,
            scopes: texts.2,
            account: options.0,
            customer: options.1,
            client_ip: options.2,
            cost: numbers.0,
            min_revision: numbers.1,
            authenticate_only: numbers.2,
            dry_run: numbers.3,
        })
    }

    proptest! {
        #[test]
        fn what_was_asked_is_read(request in requests()) {
            let bytes = request.encode_to_vec();
            prop_assert_eq!(generated(&CheckRequestView::decode(&bytes).unwrap()), request);
        }

        /// For any bytes, both decoders fail or agree. That includes concatenated messages, of which the last
        /// value counts, and damaged ones.
        #[test]
        fn it_reads_what_the_generated_reader_reads(
            requests in vec(requests(), 1..3),
            tail in vec(any::<u8>(), 0..12),
            damage in option::of((any::<prop::sample::Index>(), any::<u8>())),
        ) {
            let mut bytes: Vec<u8> = requests.iter().flat_map(pb::CheckRequest::encode_to_vec).collect();
            bytes.extend(tail);
            if let (Some((at, byte)), false) = (damage, bytes.is_empty()) {
                *at.get_mut(&mut bytes) = byte;
            }
            let expected = pb::CheckRequest::decode(&*bytes).map_err(|error| error.to_string());
            let read = CheckRequestView::decode(&bytes).map(|asked| generated(&asked));
            prop_assert_eq!(read.map_err(|status| status.message().to_owned()), expected);
        }

        #[test]
        fn a_batch_is_read_question_by_question(checks in vec(requests(), 0..5), tail in vec(any::<u8>(), 0..4)) {
            let mut bytes = pb::BatchCheckRequest { checks }.encode_to_vec();
            bytes.extend(tail);
            let expected = pb::BatchCheckRequest::decode(&*bytes).map_err(|error| error.to_string());
            let read = CheckRequestView::decode_batch(&bytes).map(|asked| asked.iter().map(generated).collect::<Vec<_>>());
            let read = read.map_err(|status| status.message().to_owned());
            prop_assert_eq!(read, expected.map(|batch| batch.checks));
        }
    }
}
