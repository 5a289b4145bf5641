//! A reduced `envoy.service.auth.v3.CheckRequest`: the same wire format with only the fields that a decision needs.
//!
//! Its meaning belongs in `grpc/ext_authz.rs`. Strings stay slices of the message. Clients choose the headers, so they
//! are not hashed into a map and need not be UTF-8. Nothing here prints, since headers carry credentials. A test
//! compares the field numbers with the proto.

use std::fmt;

use bytes::Bytes;
use prost::encoding::decode_varint;

/// The largest body that Envoy may send along (`with_request_body`), in bytes: the usual limit of
/// gRPC servers. Decoding skips it.
pub(crate) const MAX_BODY_BYTES: usize = 4 << 20;

/// Length of the client's body within an encoded [`EnvoyCheckRequest`]. In a malformed one, as far as it can be read.
#[must_use]
pub(crate) fn request_body_len(message: &[u8]) -> usize {
    let https = length_delimited_values(message, 1)
        .flat_map(|attributes| length_delimited_values(attributes, 4))
        .flat_map(|request| length_delimited_values(request, 2));
    // `body`, and `raw_body` with pack_as_bytes.
    https
        .flat_map(|http| length_delimited_values(http, 11).chain(length_delimited_values(http, 12)))
        .map(<[u8]>::len)
        .sum()
}

/// The values of a length-delimited field, until the message is malformed.
fn length_delimited_values(message: &[u8], number: u64) -> impl Iterator<Item = &[u8]> {
    let mut rest = message;
    let fields = std::iter::from_fn(move || {
        let tag = decode_varint(&mut rest).ok()?;
        let length = match tag & 7 {
            0 => rest.iter().position(|byte| *byte < 0x80)? + 1,
            1 => 8,
            2 => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (value, behind) = rest.split_at_checked(length)?;
        rest = behind;
        Some((tag, value))
    });
    fields.filter(move |(tag, _)| *tag == number << 3 | 2).map(|(_, value)| value)
}

/// Envoy's request to authorize a client's request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyCheckRequest {
    /// The client's request and its context.
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<EnvoyAttributeContext>,
}

/// A client's request and its context.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyAttributeContext {
    /// The peer that sent the request.
    #[prost(message, optional, tag = "1")]
    pub source: Option<EnvoyPeer>,
    #[prost(message, optional, tag = "4")]
    pub request: Option<EnvoyRequest>,
    /// Settings of the route: virtual host and route merged.
    #[prost(message, repeated, tag = "10")]
    pub context_extensions: Vec<EnvoyMapEntry>,
}

/// One end of the connection.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyPeer {
    #[prost(message, optional, tag = "1")]
    pub address: Option<EnvoyAddress>,
}

/// An address; that of a pipe is not used.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyAddress {
    /// An IP address and port.
    #[prost(message, optional, tag = "1")]
    pub socket_address: Option<EnvoySocketAddress>,
}

/// An IP address; the port does not matter.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoySocketAddress {
    /// The textual form of the IP address.
    #[prost(bytes = "bytes", tag = "2")]
    pub address: Bytes,
}

/// The client's request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyRequest {
    #[prost(message, optional, tag = "2")]
    pub http: Option<EnvoyHttpRequest>,
}

/// Attributes of an HTTP request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHttpRequest {
    /// Envoy's id of the stream; the same when Envoy retries.
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub method: Bytes,
    /// Headers with lower-case names, repeated ones joined by commas. Empty with `encode_raw_headers`.
    #[prost(message, repeated, tag = "3")]
    pub headers: Vec<EnvoyMapEntry>,
    /// Path and query, not normalized.
    #[prost(bytes = "bytes", tag = "4")]
    pub path: Bytes,
    /// Value of `:authority` or `Host`.
    #[prost(bytes = "bytes", tag = "5")]
    pub host: Bytes,
    /// Headers in their original form, with `encode_raw_headers`.
    #[prost(message, optional, tag = "13")]
    pub header_map: Option<EnvoyHeaderMap>,
}

/// Headers in their original form.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHeaderMap {
    #[prost(message, repeated, tag = "1")]
    pub headers: Vec<EnvoyHeaderValue>,
}

/// A header with its name and value.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHeaderValue {
    /// Name in lower case.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Value, if it is UTF-8.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// Value as raw bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub raw_value: Bytes,
}

/// An entry of a map of strings. Encoded, such a map is a repeated message of key and value.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyMapEntry {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

macro_rules! impl_redacted_debug {
    ($($message:ident),*) => {
        $(impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message)).finish_non_exhaustive()
            }
        })*
    };
}

impl_redacted_debug!(
    EnvoyCheckRequest,
    EnvoyAttributeContext,
    EnvoyPeer,
    EnvoyAddress,
    EnvoySocketAddress,
    EnvoyRequest,
    EnvoyHttpRequest,
    EnvoyHeaderMap,
    EnvoyHeaderValue,
    EnvoyMapEntry
);

#[cfg(test)]
mod tests {
    use super::*;

    /// A length-delimited field of fewer than 128 bytes.
    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(value.len()).unwrap()], value].concat()
    }

    #[test]
    fn the_length_of_a_body_is_found_in_either_field() {
        let http = [field(4, b"/path"), field(11, b"body!"), field(12, b"raw"), vec![10 << 3, 5]].concat();
        let attributes = [field(1, b"source"), field(4, &field(2, &http)), field(10, b"extensions")].concat();
        let message = field(1, &attributes);
        assert_eq!(request_body_len(&message), 8);
        assert_eq!(
            request_body_len(&[message.clone(), message.clone()].concat()),
            16,
            "what is merged counts"
        );
        assert_eq!(request_body_len(&message[..message.len() - 1]), 0, "malformed");
        assert_eq!(request_body_len(&[]), 0);
    }
}
