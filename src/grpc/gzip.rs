//! Inflates gzip-compressed request messages within the limit of their call.
//!
//! A message is inflated chunk by chunk, and memory is reserved before each chunk is filled. So neither an announced
//! nor an inflated size takes memory beyond the limit. Responses are never compressed.

use std::io::Read as _;

use flate2::bufread::GzDecoder;
use http::{HeaderMap, HeaderName, HeaderValue};
use tonic::Status;

use super::{
    raw_codec::MESSAGE_PREFIX_LEN,
    status::{unreadable_request, unsupported_encoding},
};

/// Names the encoding of a request's messages.
pub(super) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// Lists the accepted encodings, on every response.
pub(super) const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
pub(super) const ACCEPTED_ENCODINGS: HeaderValue = HeaderValue::from_static("identity,gzip");

/// Size of the first chunk in bytes; each further chunk doubles the total.
const FIRST_CHUNK: usize = 4 << 10;

#[derive(Debug)]
pub(super) enum InflateError {
    /// The inflated message exceeds the limit.
    TooLarge,
    /// The message is malformed, or no memory is left.
    Failed(Status),
}

impl From<Status> for InflateError {
    fn from(status: Status) -> Self {
        InflateError::Failed(status)
    }
}

/// Removes `grpc-encoding` and returns whether messages may be compressed. Fails if the encoding is unknown.
pub(super) fn take_grpc_encoding(headers: &mut HeaderMap) -> Result<bool, Status> {
    let Some(encoding) = headers.get(GRPC_ENCODING) else { return Ok(false) };
    let gzip = match encoding.as_bytes() {
        b"gzip" => true,
        b"identity" => false,
        other => return Err(unsupported_encoding(&String::from_utf8_lossy(other))),
    };
    headers.remove(GRPC_ENCODING);
    Ok(gzip)
}

/// Inflates a message including its prefix. `reserve` gets the total size before the buffer grows. Fails if the data is
/// not gzip, exceeds `limit` bytes, or no memory is left.
pub(super) fn inflate(
    message: &[u8],
    limit: usize,
    mut reserve: impl FnMut(usize) -> Result<(), Status>,
) -> Result<Vec<u8>, InflateError> {
    let mut decoder = GzDecoder::new(message.get(MESSAGE_PREFIX_LEN..).unwrap_or_default());
    let mut out = vec![0; MESSAGE_PREFIX_LEN];
    loop {
        let filled = out.len();
        let size = (2 * filled).max(FIRST_CHUNK).min(MESSAGE_PREFIX_LEN + limit + 1);
        if filled == size {
            return Err(InflateError::TooLarge);
        }
        reserve(size)?;
        out.reserve_exact(size - filled);
        out.resize(size, 0);
        let read = fill_chunk(&mut decoder, &mut out[filled..])?;
        out.truncate(filled + read);
        if filled + read < size {
            break;
        }
    }
    // Trailing bytes are not allowed.
    if !decoder.into_inner().is_empty() {
        return Err(unreadable_request().into());
    }
    let length = u32::try_from(out.len() - MESSAGE_PREFIX_LEN).map_err(|_| InflateError::TooLarge)?;
    out[1..MESSAGE_PREFIX_LEN].copy_from_slice(&length.to_be_bytes());
    Ok(out)
}

/// Reads until the chunk is full or the stream ends.
fn fill_chunk(decoder: &mut GzDecoder<&[u8]>, chunk: &mut [u8]) -> Result<usize, Status> {
    let mut filled = 0;
    while filled < chunk.len() {
        match decoder.read(&mut chunk[filled..]).map_err(|_| unreadable_request())? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::{super::raw_codec::COMPRESSED_FLAG, *};

    fn compressed(message: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(message).unwrap();
        let bytes = encoder.finish().unwrap();
        [&[COMPRESSED_FLAG], &u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()
    }

    fn code(error: InflateError) -> tonic::Code {
        match error {
            InflateError::TooLarge => panic!("too large"),
            InflateError::Failed(status) => status.code(),
        }
    }

    #[test]
    fn a_bomb_takes_no_memory_beyond_the_limit() {
        let bomb = compressed(&vec![0; 64 << 20]);
        assert!(bomb.len() < 100_000);
        let mut peak = 0;
        let reserve = |bytes| {
            peak = bytes;
            Ok(())
        };
        let refused = inflate(&bomb, 16 << 10, reserve).unwrap_err();
        assert!(matches!(refused, InflateError::TooLarge), "{refused:?}");
        assert!(peak <= (16 << 10) + MESSAGE_PREFIX_LEN + 1, "{peak}");
        let refused = inflate(&bomb, 16 << 10, |_| Err(crate::grpc::status::overloaded())).unwrap_err();
        assert_eq!(code(refused), tonic::Code::Unavailable, "without memory nothing is inflated");
    }

    #[test]
    fn what_is_no_whole_gzip_stream_is_not_readable() {
        let good = compressed(b"message");
        for bad in [
            &good[..MESSAGE_PREFIX_LEN],
            &good[..good.len() - 1],
            &[&good[..], b"x"].concat(),
            b"\x01\0\0\0\x02hi",
        ] {
            let refused = inflate(bad, 1024, |_| Ok(())).unwrap_err();
            assert_eq!(code(refused), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn encodings_other_than_gzip_are_refused_with_the_list() {
        let taken = |encoding: &str| {
            let mut headers = HeaderMap::from_iter([(GRPC_ENCODING, encoding.parse().unwrap())]);
            (take_grpc_encoding(&mut headers).map_err(|status| status.code()), headers.len())
        };
        assert_eq!(taken("gzip"), (Ok(true), 0));
        assert_eq!(taken("identity"), (Ok(false), 0));
        for other in ["deflate", "br", "GZIP", "gzip, br", ""] {
            assert_eq!(taken(other).0, Err(tonic::Code::Unimplemented), "{other:?}");
        }
        assert!(!take_grpc_encoding(&mut HeaderMap::new()).unwrap());
    }

    proptest! {
        #[test]
        fn a_message_comes_out_as_it_was_or_not_at_all(
            message in proptest::collection::vec(0u8..4, 0..20_000),
            limit in 0usize..20_000,
        ) {
            let inflated = inflate(&compressed(&message), limit, |_| Ok(()));
            if message.len() <= limit {
                let inflated = inflated.unwrap();
                prop_assert_eq!(&inflated[..MESSAGE_PREFIX_LEN], [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..]].concat());
                prop_assert_eq!(&inflated[MESSAGE_PREFIX_LEN..], message);
            } else {
                prop_assert!(matches!(inflated, Err(InflateError::TooLarge)));
            }
        }
    }
}
