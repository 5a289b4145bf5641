//! Sends answers over HTTP/2: the body that hyper reads an answer from, and the executor of its streams, which ends those
//! whose peer takes nothing.

use std::{
    cell::Cell,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Response;
use http_body::{Body as _, Frame};
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::{
    load::Call,
    outgoing::{ConnectionSendBudget, ListPermit, Piece, Pieces},
    reply::Reply,
    status::hold_to_size,
};

/// How long a peer may take none of an answer.
#[derive(Clone, Copy, Debug)]
struct StallTimeout {
    usual: Duration,
    /// While others need the room.
    pressed: Duration,
}

const STALL_TIMEOUT: StallTimeout =
    StallTimeout { usual: Duration::from_secs(30), pressed: Duration::from_secs(2) };

/// What the body of a stream has last done while its task ran.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// It was not asked: an answer is not made yet, or hyper holds a piece that the peer has no window for.
    NotAsked,
    /// It has given a piece to hyper.
    Gave,
    /// It was asked for more: HTTP/2 has every piece so far.
    Asked,
}

thread_local! {
    /// Of the stream whose task runs on this thread now. hyper polls a body within the stream's task and tells its
    /// executor nothing of it.
    static PROGRESS: Cell<Progress> = const { Cell::new(Progress::NotAsked) };
}

/// An answer as hyper sends it. It counts as a call of its connection until hyper has all of it.
pub(super) struct SendBody {
    body: Reply,
    pieces: Pieces,
    place: Option<ListPermit>,
    /// It has given a message already.
    begun: bool,
    unsent: Arc<ConnectionSendBudget>,
    _call: Call,
}

impl SendBody {
    /// The answer of a call.
    pub(super) fn respond(
        response: Response<Reply>,
        unsent: &Arc<ConnectionSendBudget>,
        call: Call,
    ) -> Response<SendBody> {
        let (mut parts, body) = response.into_parts();
        if body.is_end_stream() {
            unsent.charge_headers(&mut parts.headers);
        }
        let place = parts.extensions.remove();
        let (pieces, unsent) = (Pieces::default(), unsent.clone());
        Response::from_parts(parts, SendBody { body, pieces, place, begun: false, unsent, _call: call })
    }
}

impl http_body::Body for SendBody {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        let this = self.get_mut();
        if let Some(piece) = this.pieces.next() {
            PROGRESS.set(Progress::Gave);
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        PROGRESS.set(Progress::Asked);
        let streams = this.begun && matches!(this.body, Reply::Any(_));
        if streams {
            ready!(this.unsent.poll_room(cx));
        }
        let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        Poll::Ready(Some(Ok(match frame.into_data() {
            Ok(bytes) => {
                this.begun = true;
                PROGRESS.set(Progress::Gave);
                Frame::data(this.pieces.begin(bytes, &this.unsent, this.place.take()))
            }
            Err(frame) => {
                let mut trailers = frame.into_trailers().unwrap_or_default();
                if matches!(this.body, Reply::Any(_)) {
                    hold_to_size(&mut trailers);
                    this.unsent.charge_headers(&mut trailers);
                }
                Frame::trailers(trailers)
            }
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.are_done() && self.body.is_end_stream()
    }
}

/// Runs the streams of one connection.
#[derive(Clone, Debug)]
pub(super) struct Streams(pub(super) Arc<ConnectionSendBudget>);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        tokio::spawn(until_stalled(stream, self.0.clone(), STALL_TIMEOUT));
    }
}

/// Runs a stream until it ends, or its peer takes nothing of its answer for too long. Then HTTP/2 resets it (CANCEL) and
/// gives up what it holds. Returns what the stream returns, if it ends.
async fn until_stalled<F: Future>(
    stream: F,
    unsent: Arc<ConnectionSendBudget>,
    timeout: StallTimeout,
) -> Option<F::Output> {
    let mut stream = pin!(stream);
    let mut stalled = None;
    poll_fn(|cx| {
        PROGRESS.set(Progress::NotAsked);
        if let Poll::Ready(ended) = stream.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }
        match PROGRESS.get() {
            Progress::NotAsked => {}
            Progress::Gave => stalled = Some((Instant::now(), Box::pin(sleep(timeout.pressed)))),
            Progress::Asked => stalled = None,
        }
        let Some((since, look)) = &mut stalled else { return Poll::Pending };
        while look.as_mut().poll(cx).is_ready() {
            if since.elapsed() >= timeout.usual || unsent.is_pressed() {
                return Poll::Ready(None);
            }
            look.as_mut().reset(Instant::now() + timeout.pressed);
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);
    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_stream_ends_when_its_peer_takes_nothing_and_not_when_it_has_nothing_to_give() {
        let timeout = StallTimeout { usual: 5 * SOON, pressed: SOON };
        let unsent = ConnectionSendBudget::new(Arc::default());
        let gives = async {
            PROGRESS.set(Progress::Gave);
            pending::<()>().await;
        };
        assert_eq!(until_stalled(gives, unsent.clone(), timeout).await, None);
        let waits = async {
            PROGRESS.set(Progress::Gave);
            tokio::task::yield_now().await;
            PROGRESS.set(Progress::Asked);
            sleep(50 * SOON).await;
        };
        assert_eq!(until_stalled(waits, unsent, timeout).await, Some(()));
    }

    #[tokio::test]
    async fn a_stalled_stream_ends_soon_when_others_need_the_room() {
        let process = Arc::default();
        let unsent = ConnectionSendBudget::new(Arc::clone(&process));
        let _others = ConnectionSendBudget::new(process).charge(40 << 20);
        let gives = async {
            PROGRESS.set(Progress::Gave);
            pending::<()>().await;
        };
        let timeout = StallTimeout { usual: NEVER, pressed: SOON };
        assert_eq!(until_stalled(gives, unsent, timeout).await, None);
    }
}
