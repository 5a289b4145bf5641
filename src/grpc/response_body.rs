//! Response bodies: either tonic's, or a single message that was encoded by hand.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::Frame;
use tonic::{Status, body::Body};

use super::raw_codec::MESSAGE_PREFIX_LEN;

const GRPC_STATUS_HEADER: HeaderName = HeaderName::from_static("grpc-status");
/// Initial buffer size in bytes; most Check responses fit.
pub(super) const INITIAL_CAPACITY: usize = 512;

/// The body of a response.
pub(super) enum ResponseBody {
    /// A message, followed by trailers with status OK.
    Message(Bytes),
    /// Trailers with status OK.
    OkTrailers,
    /// Everything was sent.
    Finished,
    /// A body that tonic made.
    Tonic(Body),
}

/// A buffer for a message, with space reserved for its prefix.
pub(super) fn new_message_buffer() -> BytesMut {
    let mut bytes = BytesMut::with_capacity(INITIAL_CAPACITY);
    bytes.put_bytes(0, MESSAGE_PREFIX_LEN);
    bytes
}

/// A successful response with this encoded message. No message comes near 4 GiB.
pub(super) fn ok_response(mut message: BytesMut) -> Response<ResponseBody> {
    let length = u32::try_from(message.len() - MESSAGE_PREFIX_LEN).unwrap_or(u32::MAX);
    message[1..MESSAGE_PREFIX_LEN].copy_from_slice(&length.to_be_bytes());
    let mut response = Response::new(ResponseBody::Message(message.freeze()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let ResponseBody::Tonic(body) = &mut *self {
            return Pin::new(body).poll_frame(cx);
        }
        let (frame, rest) = match mem::replace(&mut *self, ResponseBody::Finished) {
            ResponseBody::Message(message) => (Frame::data(message), ResponseBody::OkTrailers),
            ResponseBody::OkTrailers => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(GRPC_STATUS_HEADER, HeaderValue::from_static("0"));
                (Frame::trailers(trailers), ResponseBody::Finished)
            }
            ResponseBody::Finished | ResponseBody::Tonic(_) => return Poll::Ready(None),
        };
        *self = rest;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ResponseBody::Message(_) | ResponseBody::OkTrailers => false,
            ResponseBody::Finished => true,
            ResponseBody::Tonic(body) => body.is_end_stream(),
        }
    }
}
