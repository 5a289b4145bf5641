//! Encodes the message and the details of a status within the sizes that gRPC clients accept.
//!
//! Both travel in one block of headers, whose usual limits are 8 KiB (gRPC for Java) and 16 KiB (tonic). So the limits
//! hold for the encoded form: percent-encoding for the message, base64 for the details. What does not fit is left out,
//! and its number is given instead.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message as _;
use prost_types::Any;
use tonic::Code;
use tonic_types::pb::{self as rpc, bad_request::FieldViolation};

use crate::{pb, refusal::Violation};

/// The longest message, percent-encoded.
pub(super) const MAX_MESSAGE: usize = 1024;
/// The largest `grpc-status-details-bin` before base64, which makes 6.7 kB of it.
pub(super) const MAX_DETAILS: usize = 5000;
/// The longest text of one item in a message, percent-encoded, and of one in the details.
const MAX_ITEM: usize = 400;
/// Room that a list leaves for the words around it.
const AROUND: usize = 120;

/// The domain of Keyward's reasons.
pub(super) const DOMAIN: &str = "keyward";

/// The details of a status, in the order in which they are kept when there is no room for all of them.
pub(super) struct Details(Vec<Any>);

impl Details {
    /// Details with a reason and what belongs to it.
    pub(super) fn new(reason: &str, metadata: HashMap<String, String>) -> Details {
        let metadata = metadata.into_iter().map(|(name, value)| (name, shorten(&value, MAX_ITEM))).collect();
        let info = rpc::ErrorInfo { reason: reason.to_owned(), domain: DOMAIN.to_owned(), metadata };
        Details(vec![any("google.rpc.ErrorInfo", &info)])
    }

    /// Adds when the call may be sent again.
    pub(super) fn with_retry(mut self, after: std::time::Duration) -> Details {
        let retry_delay = prost_types::Duration::try_from(after).ok();
        self.0.push(any("google.rpc.RetryInfo", &rpc::RetryInfo { retry_delay }));
        self
    }

    /// The first of the violations, as many as fit.
    pub(super) fn of_violations(violations: &[Violation]) -> Details {
        let each = violations.iter().map(|violation| FieldViolation {
            field: shorten(&violation.field, MAX_ITEM),
            description: shorten(&violation.problem, MAX_ITEM),
            ..FieldViolation::default()
        });
        let mut list = rpc::BadRequest { field_violations: each.collect() };
        let left_out = keep(&mut list.field_violations);
        let mut details = Details::new("INVALID_REQUEST", omitted("violations_omitted", left_out));
        details.0.push(any("google.rpc.BadRequest", &list));
        details
    }

    /// How far a change has come, with as many replicas as fit: those that have not acknowledged it first.
    pub(super) fn of_propagation(
        reason: &str,
        mut metadata: HashMap<String, String>,
        mut propagation: pb::Propagation,
    ) -> Details {
        let mut left_out = keep(&mut propagation.unconfirmed);
        if left_out > 0 {
            left_out += propagation.confirmed.len();
            propagation.confirmed.clear();
        }
        while propagation.encoded_len() > room() && propagation.confirmed.pop().is_some() {
            left_out += 1;
        }
        metadata.extend(omitted("replicas_omitted", left_out));
        let mut details = Details::new(reason, metadata);
        details.0.push(any("keyward.v1.Propagation", &propagation));
        details
    }

    /// The encoded `google.rpc.Status`.
    pub(super) fn encode(self, code: Code, message: &str) -> Bytes {
        let mut status = rpc::Status { code: code.into(), message: message.to_owned(), details: self.0 };
        while status.encoded_len() > MAX_DETAILS && status.details.len() > 1 {
            status.details.pop();
        }
        status.encode_to_vec().into()
    }
}

/// The room for a list in the details: beside the message, the reason and the names of types.
fn room() -> usize {
    MAX_DETAILS - MAX_MESSAGE - 2 * MAX_ITEM
}

/// Keeps as many items from the beginning as there is room for, and returns how many that leaves out.
fn keep<M: prost::Message>(list: &mut Vec<M>) -> usize {
    let mut size = 0;
    let fitting = list.iter().take_while(|item| {
        size += item.encoded_len() + 4;
        size <= room()
    });
    let (fitting, all) = (fitting.count(), list.len());
    list.truncate(fitting);
    all - fitting
}

fn omitted(name: &str, number: usize) -> HashMap<String, String> {
    (number > 0).then(|| (name.to_owned(), number.to_string())).into_iter().collect()
}

fn any(name: &str, message: &impl prost::Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

/// Lists as many items as fit into a message, and how many there are besides.
pub(super) fn list(items: impl ExactSizeIterator<Item = String>, separator: &str, noun: &str) -> String {
    let (mut text, mut length) = (String::new(), 0);
    let mut left = items.len();
    for item in items {
        let item = shorten(&item, MAX_ITEM);
        length += encoded_len(&item) + encoded_len(separator);
        if length + AROUND > MAX_MESSAGE - MAX_ITEM {
            break;
        }
        if !text.is_empty() {
            text += separator;
        }
        text += &item;
        left -= 1;
    }
    if left > 0 { format!("{text}{separator}and {left} more {noun}") } else { text }
}

/// The text, cut so that its percent-encoded form has at most `most` bytes.
pub(super) fn shorten(text: &str, most: usize) -> String {
    const CUT: &str = "...";
    if encoded_len(text) <= most {
        return text.to_owned();
    }
    let mut length = CUT.len();
    let fits = text.chars().take_while(|letter| {
        length += encoded_len(letter.encode_utf8(&mut [0; 4]));
        length <= most
    });
    fits.chain(CUT.chars()).collect()
}

/// How long a text is when it is percent-encoded as tonic does it.
fn encoded_len(text: &str) -> usize {
    let encoded = |byte: u8| byte.is_ascii_control() || !byte.is_ascii() || b" \"#%<>`?{}".contains(&byte);
    text.bytes().map(|byte| if encoded(byte) { 3 } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_by_its_encoded_length_between_letters() {
        assert_eq!(shorten("as it is", 12), "as it is");
        assert_eq!(shorten("as it is", 11), "as it...");
        assert_eq!(shorten("ééé", 17), "éé...");
        assert_eq!(shorten("ééé", 14), "é...");
    }

    #[test]
    fn a_list_names_what_fits_and_counts_the_rest() {
        let few = ["a", "b"].map(str::to_owned);
        assert_eq!(list(few.into_iter(), ", ", "names"), "a, b");
        let many =
            list((0..1000).map(|at| format!("name{at}")).collect::<Vec<_>>().into_iter(), ", ", "names");
        assert!(many.starts_with("name0, name1, ") && many.ends_with(" more names"), "{many}");
        assert!(encoded_len(&many) <= MAX_MESSAGE);
    }

    #[test]
    fn the_report_of_very_many_replicas_fits_and_says_how_many_it_leaves_out() {
        let replica = |at: usize| format!("keyward-replica-with-a-long-name-{at}");
        let unconfirmed = |count| {
            (0..count)
                .map(|at| pb::UnconfirmedReplica { replica: replica(at), ..Default::default() })
                .collect()
        };
        for (waiting, confirmed) in [(3, 500), (500, 500), (500, 0), (3, 3)] {
            let propagation = pb::Propagation {
                confirmed: (0..confirmed).map(replica).collect(),
                unconfirmed: unconfirmed(waiting),
                ..Default::default()
            };
            let details = Details::of_propagation("NOT_PROPAGATED", HashMap::new(), propagation);
            let bytes = details.encode(Code::DeadlineExceeded, &"x".repeat(MAX_MESSAGE));
            assert!(bytes.len() <= MAX_DETAILS, "{waiting} and {confirmed}: {}", bytes.len());
            let status = rpc::Status::decode(bytes).unwrap();
            let info = rpc::ErrorInfo::decode(&*status.details[0].value).unwrap();
            let report = pb::Propagation::decode(&*status.details[1].value).unwrap();
            let left_out = waiting + confirmed - report.unconfirmed.len() - report.confirmed.len();
            let told = info.metadata.get("replicas_omitted").map_or(0, |number| number.parse().unwrap());
            assert_eq!(told, left_out);
            assert!(report.unconfirmed.len() >= waiting.min(20));
        }
    }
}
