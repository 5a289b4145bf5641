//! Request bodies with a limit that is judged from a message's first five bytes, before any of it is buffered. Those of
//! management must come in time, too, and large ones find room.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};

use super::{
    load::{Place, Room},
    status::{too_large, too_slow},
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// gRPC's prefix of a message: one byte of flags, four of length (big-endian).
pub(super) const PREFIX: usize = 5;
/// How long a request to management may take to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// The room that a large request takes until its call has ended.
pub(super) type Held = Arc<OnceLock<Place>>;

/// A request body of which some may have been read already.
pub(super) struct Arriving {
    read: Option<Bytes>,
    /// How reading the rest failed, if it has.
    failed: Option<hyper::Error>,
    rest: Incoming,
}

impl From<Incoming> for Arriving {
    fn from(rest: Incoming) -> Arriving {
        Arriving { read: None, failed: None, rest }
    }
}

impl Arriving {
    /// The message of a unary call that is plainly in order: it comes in one piece, uncompressed, with nothing behind
    /// it, and has at most `limit` bytes. None = it does not; nothing of the body is lost.
    pub(super) async fn plain_message(&mut self, limit: usize) -> Option<Bytes> {
        let data = self.next_data().await?;
        self.read = Some(data.clone());
        let [flags, a, b, c, d] = *data.first_chunk::<PREFIX>()?;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if flags != 0 || length > limit || length != data.len() - PREFIX {
            return None;
        }
        while !self.rest.is_end_stream() {
            match self.next_data().await {
                Some(more) if more.is_empty() => {}
                Some(more) => {
                    self.read = Some([data, more].concat().into());
                    return None;
                }
                None => break,
            }
        }
        // A body that breaks off after its message is not in order.
        self.failed.is_none().then(|| data.slice(PREFIX..))
    }

    /// The next bytes; None at the end, and where reading fails.
    async fn next_data(&mut self) -> Option<Bytes> {
        match poll_fn(|cx| Pin::new(&mut self.rest).poll_frame(cx)).await? {
            // What is no data stands at the end.
            Ok(frame) => frame.into_data().ok(),
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(data) = self.read.take() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match self.failed.take() {
            Some(error) => Poll::Ready(Some(Err(error))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_none() && self.failed.is_none() && self.rest.is_end_stream()
    }
}

/// A request body whose first message may have `limit` bytes at the most. Unary calls have no other; of streams
/// tonic judges the rest.
pub(super) struct Limited {
    inner: Arriving,
    limit: usize,
    prefix: [u8; PREFIX],
    have: usize,
    managed: Option<Managed>,
}

/// What a request to management is held to besides.
struct Managed {
    room: Arc<Room>,
    held: Held,
    late: Option<Pin<Box<Sleep>>>,
}

impl Limited {
    pub(super) fn new(body: impl Into<Arriving>, limit: usize) -> Self {
        Limited { inner: body.into(), limit, prefix: [0; PREFIX], have: 0, managed: None }
    }

    /// A request to management. What a large one takes of `room` is kept in `held`.
    pub(super) fn managed(self, room: Arc<Room>, held: Held) -> Self {
        Limited { managed: Some(Managed { room, held, late: None }), ..self }
    }

    /// Looks at the next bytes.
    ///
    /// # Errors
    /// When the length that the prefix claims, once it is whole, is too large, or finds no room.
    fn look(&mut self, data: &[u8]) -> Result<(), BoxError> {
        let take = data.len().min(PREFIX - self.have);
        if take == 0 {
            return Ok(());
        }
        self.prefix[self.have..self.have + take].copy_from_slice(&data[..take]);
        self.have += take;
        if self.have < PREFIX {
            return Ok(());
        }
        let [_, a, b, c, d] = self.prefix;
        let claimed = u32::from_be_bytes([a, b, c, d]) as usize;
        if claimed > self.limit {
            return Err(Box::new(too_large(claimed, self.limit)));
        }
        if let Some(managed) = &self.managed
            && let Some(place) = managed.room.large(claimed)?
        {
            // The prefix is whole once only.
            let _ = managed.held.set(place);
        }
        Ok(())
    }

    /// Whether the request takes too long to arrive.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(managed) = &mut self.managed else { return false };
        let late = managed.late.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
        late.as_mut().poll(cx).is_ready()
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
        let frame = match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending if this.is_late(cx) => return Poll::Ready(Some(Err(Box::new(too_slow())))),
            Poll::Pending => return Poll::Pending,
        };
        let looked = frame.data_ref().map_or(Ok(()), |data| this.look(data));
        Poll::Ready(Some(looked.map(|()| frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}
