//! Request bodies with a limit that is judged from a message's first five bytes, before any of it is buffered.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::status::too_large;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// gRPC's prefix of a message: one byte of flags, four of length (big-endian).
const PREFIX: usize = 5;

/// A request body whose first message may have `limit` bytes at the most. Unary calls have no other; of streams
/// tonic judges the rest.
pub(super) struct Limited {
    inner: Incoming,
    limit: usize,
    prefix: [u8; PREFIX],
    have: usize,
}

impl Limited {
    pub(super) fn new(inner: Incoming, limit: usize) -> Self {
        Limited { inner, limit, prefix: [0; PREFIX], have: 0 }
    }

    /// Looks at the next bytes; the length that the prefix claims, once it is whole and too large.
    fn look(&mut self, data: &[u8]) -> Option<usize> {
        let take = data.len().min(PREFIX - self.have);
        if take == 0 {
            return None;
        }
        self.prefix[self.have..self.have + take].copy_from_slice(&data[..take]);
        self.have += take;
        let [_, a, b, c, d] = self.prefix;
        let claimed = u32::from_be_bytes([a, b, c, d]) as usize;
        (self.have == PREFIX && claimed > self.limit).then_some(claimed)
    }
}

impl Body for Limited {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            None => return Poll::Ready(None),
        };
        match frame.data_ref().and_then(|data| this.look(data)) {
            Some(claimed) => Poll::Ready(Some(Err(Box::new(too_large(claimed, this.limit))))),
            None => Poll::Ready(Some(Ok(frame))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
