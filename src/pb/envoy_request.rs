//! `envoy.service.auth.v3.CheckRequest` as we read it: the same wire format, only the fields that a decision needs,
//! and text left where it arrived. Headers are attacker-chosen: they are not hashed into a map, and may be other
//! than UTF-8. Nothing here prints, since headers carry credentials. A test holds the numbers against the proto.

use std::fmt;

use bytes::Bytes;
use prost::encoding::decode_varint;

/// The largest body that Envoy may send along (`with_request_body`), in bytes: as large as what most gRPC servers read. It is
/// passed over when the message is decoded.
pub const MAX_BODY_BYTES: usize = 4 << 20;

/// How many bytes of an encoded [`EnvoyCheckRequest`] are the body of the request. Of one that is malformed, as far as it can be
/// read.
#[must_use]
pub fn request_body_len(message: &[u8]) -> usize {
    let https = length_delimited_values(message, 1)
        .flat_map(|attributes| length_delimited_values(attributes, 4))
        .flat_map(|request| length_delimited_values(request, 2));
    // `body`, and `raw_body` with pack_as_bytes.
    https
        .flat_map(|http| length_delimited_values(http, 11).chain(length_delimited_values(http, 12)))
        .map(<[u8]>::len)
        .sum()
}

/// The values of a length-delimited field, up to where the message is malformed.
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

/// What Envoy asks about one request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyCheckRequest {
    /// What is asked about.
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<EnvoyAttributeContext>,
}

/// The request and its surroundings.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyAttributeContext {
    /// Who sent it.
    #[prost(message, optional, tag = "1")]
    pub source: Option<EnvoyPeer>,
    /// The request.
    #[prost(message, optional, tag = "4")]
    pub request: Option<EnvoyRequest>,
    /// What the route's configuration says: virtual host and route merged.
    #[prost(message, repeated, tag = "10")]
    pub context_extensions: Vec<EnvoyMapEntry>,
}

/// One end of the connection.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyPeer {
    /// Its address.
    #[prost(message, optional, tag = "1")]
    pub address: Option<EnvoyAddress>,
}

/// An address; a pipe has none that is of use here.
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
    /// The IP address.
    #[prost(bytes = "bytes", tag = "2")]
    pub address: Bytes,
}

/// The request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyRequest {
    /// The HTTP request.
    #[prost(message, optional, tag = "2")]
    pub http: Option<EnvoyHttpRequest>,
}

/// An HTTP request.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHttpRequest {
    /// Envoy's number of the stream, the same when Envoy asks again.
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    /// `GET` and so on.
    #[prost(bytes = "bytes", tag = "2")]
    pub method: Bytes,
    /// Headers with lower-case names, repeated ones joined by commas. Empty with `encode_raw_headers`.
    #[prost(message, repeated, tag = "3")]
    pub headers: Vec<EnvoyMapEntry>,
    /// Path and query as they came.
    #[prost(bytes = "bytes", tag = "4")]
    pub path: Bytes,
    /// `:authority`.
    #[prost(bytes = "bytes", tag = "5")]
    pub host: Bytes,
    /// Headers as they came, with `encode_raw_headers`.
    #[prost(message, optional, tag = "13")]
    pub header_map: Option<EnvoyHeaderMap>,
}

/// Headers as they came.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHeaderMap {
    /// In order.
    #[prost(message, repeated, tag = "1")]
    pub headers: Vec<EnvoyHeaderValue>,
}

/// One header.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyHeaderValue {
    /// Its name.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Its value, where it is UTF-8.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// Its value as it came.
    #[prost(bytes = "bytes", tag = "3")]
    pub raw_value: Bytes,
}

/// An entry of a map: on the wire a map of strings is a repeated message of two.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvoyMapEntry {
    /// The key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
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
