//! Encodes the message and the details of a status within the sizes that gRPC clients accept.
//!
//! Both travel in one header block, which clients usually limit to 8 KiB (gRPC for Java) or 16 KiB (tonic). So the
//! limits apply to the encoded form: percent-encoding for the message, base64 for the details. What does not fit is
//! omitted, and its count is given instead. Wording belongs in `status.rs`.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message as _;
use prost_types::Any;
use tonic::Code;
use tonic_types::pb::{self as rpc, bad_request::FieldViolation};

use crate::{pb, service_error::InvalidField};

/// The longest message, in percent-encoded bytes.
pub(super) const MAX_MESSAGE_LEN: usize = 1024;
/// The largest `grpc-status-details-bin` in bytes, before base64 makes 6.7 kB of it.
pub(super) const MAX_DETAILS_LEN: usize = 5000;
/// The longest item in a message or in the details, in percent-encoded bytes.
const MAX_ITEM_LEN: usize = 400;
/// Bytes that a list leaves for the words around it.
const LIST_RESERVE: usize = 120;

/// The `domain` of Keyward's reasons in `ErrorInfo`.
pub(super) const ERROR_DOMAIN: &str = "keyward";

/// The details of a status, most important first: the last are dropped if they do not fit.
pub(super) struct StatusDetails(Vec<Any>);

impl StatusDetails {
    /// Creates details with a reason and its metadata.
    pub(super) fn new(reason: &str, metadata: HashMap<String, String>) -> StatusDetails {
        let metadata = metadata
            .into_iter()
            .map(|(name, value)| (name, truncate_encoded(&value, MAX_ITEM_LEN)))
            .collect();
        let info = rpc::ErrorInfo { reason: reason.to_owned(), domain: ERROR_DOMAIN.to_owned(), metadata };
        StatusDetails(vec![pack_any("google.rpc.ErrorInfo", &info)])
    }

    /// Adds the delay before a retry.
    pub(super) fn with_retry(mut self, after: std::time::Duration) -> StatusDetails {
        let retry_delay = prost_types::Duration::try_from(after).ok();
        self.0.push(pack_any("google.rpc.RetryInfo", &rpc::RetryInfo { retry_delay }));
        self
    }

    /// Lists as many violations as fit.
    pub(super) fn from_violations(violations: &[InvalidField]) -> StatusDetails {
        let each = violations.iter().map(|violation| FieldViolation {
            field: truncate_encoded(&violation.field, MAX_ITEM_LEN),
            description: truncate_encoded(&violation.problem, MAX_ITEM_LEN),
            ..FieldViolation::default()
        });
        let mut list = rpc::BadRequest { field_violations: each.collect() };
        let omitted = truncate_to_fit(&mut list.field_violations);
        let mut details =
            StatusDetails::new("INVALID_REQUEST", omitted_metadata("violations_omitted", omitted));
        details.0.push(pack_any("google.rpc.BadRequest", &list));
        details
    }

    /// Adds the propagation of a change, with as many replicas as fit, unconfirmed ones first.
    pub(super) fn from_propagation(
        reason: &str,
        mut metadata: HashMap<String, String>,
        mut propagation: pb::Propagation,
    ) -> StatusDetails {
        let mut omitted = truncate_to_fit(&mut propagation.unconfirmed);
        if omitted > 0 {
            omitted += propagation.confirmed.len();
            propagation.confirmed.clear();
        }
        while propagation.encoded_len() > max_list_len() && propagation.confirmed.pop().is_some() {
            omitted += 1;
        }
        metadata.extend(omitted_metadata("replicas_omitted", omitted));
        let mut details = StatusDetails::new(reason, metadata);
        details.0.push(pack_any("keyward.v1.Propagation", &propagation));
        details
    }

    /// Encodes a `google.rpc.Status`, and drops details that do not fit.
    pub(super) fn encode(self, code: Code, message: &str) -> Bytes {
        let mut status = rpc::Status { code: code.into(), message: message.to_owned(), details: self.0 };
        while status.encoded_len() > MAX_DETAILS_LEN && status.details.len() > 1 {
            status.details.pop();
        }
        status.encode_to_vec().into()
    }
}

/// Bytes for a list in the details, besides the message, the reason and type names.
fn max_list_len() -> usize {
    MAX_DETAILS_LEN - MAX_MESSAGE_LEN - 2 * MAX_ITEM_LEN
}

/// Keeps as many leading items as fit, and returns how many it drops.
fn truncate_to_fit<M: prost::Message>(list: &mut Vec<M>) -> usize {
    let mut size = 0;
    let fitting = list.iter().take_while(|item| {
        size += item.encoded_len() + 4;
        size <= max_list_len()
    });
    let (fitting, all) = (fitting.count(), list.len());
    list.truncate(fitting);
    all - fitting
}

fn omitted_metadata(name: &str, number: usize) -> HashMap<String, String> {
    (number > 0).then(|| (name.to_owned(), number.to_string())).into_iter().collect()
}

fn pack_any(name: &str, message: &impl prost::Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

/// Joins as many items as fit into a message, and counts the rest.
pub(super) fn join_truncated(
    items: impl ExactSizeIterator<Item = String>,
    separator: &str,
    noun: &str,
) -> String {
    let (mut text, mut length) = (String::new(), 0);
    let mut left = items.len();
    for item in items {
        let item = truncate_encoded(&item, MAX_ITEM_LEN);
        length += percent_encoded_len(&item) + percent_encoded_len(separator);
        if length + LIST_RESERVE > MAX_MESSAGE_LEN - MAX_ITEM_LEN {
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

/// Cuts the text so that its percent-encoded form has at most `max_len` bytes.
pub(super) fn truncate_encoded(text: &str, max_len: usize) -> String {
    const ELLIPSIS: &str = "...";
    if percent_encoded_len(text) <= max_len {
        return text.to_owned();
    }
    let mut length = ELLIPSIS.len();
    let fits = text.chars().take_while(|letter| {
        length += percent_encoded_len(letter.encode_utf8(&mut [0; 4]));
        length <= max_len
    });
    fits.chain(ELLIPSIS.chars()).collect()
}

/// Length of a text in tonic's percent-encoding.
fn percent_encoded_len(text: &str) -> usize {
    let encoded = |byte: u8| byte.is_ascii_control() || !byte.is_ascii() || b" \"#%<>`?{}".contains(&byte);
    text.bytes().map(|byte| if encoded(byte) { 3 } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_by_its_encoded_length_between_letters() {
        assert_eq!(truncate_encoded("as it is", 12), "as it is");
        assert_eq!(truncate_encoded("as it is", 11), "as it...");
        assert_eq!(truncate_encoded("ééé", 17), "éé...");
        assert_eq!(truncate_encoded("ééé", 14), "é...");
    }

    #[test]
    fn a_list_names_what_fits_and_counts_the_rest() {
        let few = ["a", "b"].map(str::to_owned);
        assert_eq!(join_truncated(few.into_iter(), ", ", "names"), "a, b");
        let many = join_truncated(
            (0..1000).map(|at| format!("name{at}")).collect::<Vec<_>>().into_iter(),
            ", ",
            "names",
        );
        assert!(many.starts_with("name0, name1, ") && many.ends_with(" more names"), "{many}");
        assert!(percent_encoded_len(&many) <= MAX_MESSAGE_LEN);
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
            let details = StatusDetails::from_propagation("NOT_PROPAGATED", HashMap::new(), propagation);
            let bytes = details.encode(Code::DeadlineExceeded, &"x".repeat(MAX_MESSAGE_LEN));
            assert!(bytes.len() <= MAX_DETAILS_LEN, "{waiting} and {confirmed}: {}", bytes.len());
            let status = rpc::Status::decode(bytes).unwrap();
            let info = rpc::ErrorInfo::decode(&*status.details[0].value).unwrap();
            let report = pb::Propagation::decode(&*status.details[1].value).unwrap();
            let left_out = waiting + confirmed - report.unconfirmed.len() - report.confirmed.len();
            let reported = info.metadata.get("replicas_omitted").map_or(0, |number| number.parse().unwrap());
            assert_eq!(reported, left_out);
            assert!(report.unconfirmed.len() >= waiting.min(20));
        }
    }
}
