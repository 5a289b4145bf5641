//! Answers as bodies: any that tonic makes, and one message that is written here without it.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::Frame;
use tonic::{Status, body::Body};

use super::body::PREFIX;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// Most answers to Checks fit into this, in bytes.
pub(super) const ROOM: usize = 512;

/// The body of an answer.
pub(super) enum Reply {
    /// A message, and then the trailers that say OK.
    Message(Bytes),
    /// The trailers that say OK.
    Ok,
    /// Nothing any more.
    Sent,
    /// Whatever tonic made.
    Any(Body),
}

/// A message that is to be written, behind the room for its prefix.
pub(super) fn begin() -> BytesMut {
    let mut bytes = BytesMut::with_capacity(ROOM);
    bytes.put_bytes(0, PREFIX);
    bytes
}

/// The answer to a unary call that went well, of a message that has been written. No message comes near 4 GiB.
pub(super) fn ok(mut message: BytesMut) -> Response<Reply> {
    let length = u32::try_from(message.len() - PREFIX).unwrap_or(u32::MAX);
    message[1..PREFIX].copy_from_slice(&length.to_be_bytes());
    let mut response = Response::new(Reply::Message(message.freeze()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Reply::Any(body) = &mut *self {
            return Pin::new(body).poll_frame(cx);
        }
        let (frame, rest) = match mem::replace(&mut *self, Reply::Sent) {
            Reply::Message(message) => (Frame::data(message), Reply::Ok),
            Reply::Ok => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
                (Frame::trailers(trailers), Reply::Sent)
            }
            Reply::Sent | Reply::Any(_) => return Poll::Ready(None),
        };
        *self = rest;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Message(_) | Reply::Ok => false,
            Reply::Sent => true,
            Reply::Any(body) => body.is_end_stream(),
        }
    }
}
