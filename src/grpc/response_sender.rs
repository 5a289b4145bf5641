//! Sends responses over HTTP/2: the body that hyper polls, and the executor that ends streams whose peer stops reading.
//!
//! Budgets belong in `send_budget.rs`.

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
    list_permits::ListPermit,
    load_shed::OpenCallGuard,
    response_body::ResponseBody,
    send_budget::{ConnectionSendBudget, MessagePiece, MessageSplitter},
    status::normalize_trailers,
};

/// How long a peer may read nothing of a response.
#[derive(Clone, Copy, Debug)]
struct StallTimeout {
    normal: Duration,
    /// Applies while others need the memory.
    under_pressure: Duration,
}

const STALL_TIMEOUT: StallTimeout =
    StallTimeout { normal: Duration::from_secs(30), under_pressure: Duration::from_secs(2) };

/// What the body of a stream did when its task last ran.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StreamProgress {
    /// It was not polled: the response is not ready, or hyper holds a piece that flow control blocks.
    NotPolled,
    /// It returned a piece to hyper.
    PieceSent,
    /// It was polled for more: HTTP/2 has taken every piece so far.
    AwaitingMore,
}

thread_local! {
    /// Progress of the stream whose task runs on this thread. hyper polls the body within the stream's task, and
    /// does not inform its executor.
    static STREAM_PROGRESS: Cell<StreamProgress> = const { Cell::new(StreamProgress::NotPolled) };
}

/// A response as hyper sends it. It counts as an open call of its connection until hyper has all of it.
pub(super) struct SendBody {
    body: ResponseBody,
    pieces: MessageSplitter,
    list_permit: Option<ListPermit>,
    /// Whether a message was produced.
    has_sent_message: bool,
    send_budget: Arc<ConnectionSendBudget>,
    _call: OpenCallGuard,
}

impl SendBody {
    /// Wraps the response of a call.
    pub(super) fn wrap_response(
        response: Response<ResponseBody>,
        send_budget: &Arc<ConnectionSendBudget>,
        call: OpenCallGuard,
    ) -> Response<SendBody> {
        let (mut parts, body) = response.into_parts();
        if body.is_end_stream() {
            send_budget.charge_headers(&mut parts.headers);
        }
        let list_permit = parts.extensions.remove();
        let (pieces, send_budget) = (MessageSplitter::default(), send_budget.clone());
        Response::from_parts(
            parts,
            SendBody { body, pieces, list_permit, has_sent_message: false, send_budget, _call: call },
        )
    }
}

impl http_body::Body for SendBody {
    type Data = MessagePiece;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<MessagePiece>, Status>>> {
        let this = self.get_mut();
        if let Some(piece) = this.pieces.next_piece() {
            STREAM_PROGRESS.set(StreamProgress::PieceSent);
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        STREAM_PROGRESS.set(StreamProgress::AwaitingMore);
        let is_stream = this.has_sent_message && matches!(this.body, ResponseBody::Tonic(_));
        if is_stream {
            ready!(this.send_budget.poll_has_room(cx));
        }
        let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        Poll::Ready(Some(Ok(match frame.into_data() {
            Ok(bytes) => {
                this.has_sent_message = true;
                STREAM_PROGRESS.set(StreamProgress::PieceSent);
                Frame::data(this.pieces.start(bytes, &this.send_budget, this.list_permit.take()))
            }
            Err(frame) => {
                let mut trailers = frame.into_trailers().unwrap_or_default();
                if matches!(this.body, ResponseBody::Tonic(_)) {
                    normalize_trailers(&mut trailers);
                    this.send_budget.charge_headers(&mut trailers);
                }
                Frame::trailers(trailers)
            }
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_done() && self.body.is_end_stream()
    }
}

/// Executor of the streams of one connection.
#[derive(Clone, Debug)]
pub(super) struct StreamExecutor(pub(super) Arc<ConnectionSendBudget>);

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        tokio::spawn(run_until_stalled(stream, self.0.clone(), STALL_TIMEOUT));
    }
}

/// Runs a stream until it ends or its peer reads nothing for too long. In the latter case HTTP/2 resets the stream
/// (CANCEL) and releases its memory. Returns the output of the stream if it ends.
async fn run_until_stalled<F: Future>(
    stream: F,
    send_budget: Arc<ConnectionSendBudget>,
    timeout: StallTimeout,
) -> Option<F::Output> {
    let mut stream = pin!(stream);
    let mut stalled = None;
    poll_fn(|cx| {
        STREAM_PROGRESS.set(StreamProgress::NotPolled);
        if let Poll::Ready(ended) = stream.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }
        match STREAM_PROGRESS.get() {
            StreamProgress::NotPolled => {}
            StreamProgress::PieceSent => {
                stalled = Some((Instant::now(), Box::pin(sleep(timeout.under_pressure))))
            }
            StreamProgress::AwaitingMore => stalled = None,
        }
        let Some((since, timer)) = &mut stalled else { return Poll::Pending };
        while timer.as_mut().poll(cx).is_ready() {
            if since.elapsed() >= timeout.normal || send_budget.is_under_pressure() {
                return Poll::Ready(None);
            }
            timer.as_mut().reset(Instant::now() + timeout.under_pressure);
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
        let timeout = StallTimeout { normal: 5 * SOON, under_pressure: SOON };
        let budget = ConnectionSendBudget::new(Arc::default());
        let gives = async {
            STREAM_PROGRESS.set(StreamProgress::PieceSent);
            pending::<()>().await;
        };
        assert_eq!(run_until_stalled(gives, budget.clone(), timeout).await, None);
        let waits = async {
            STREAM_PROGRESS.set(StreamProgress::PieceSent);
            tokio::task::yield_now().await;
            STREAM_PROGRESS.set(StreamProgress::AwaitingMore);
            sleep(50 * SOON).await;
        };
        assert_eq!(run_until_stalled(waits, budget, timeout).await, Some(()));
    }

    #[tokio::test]
    async fn a_stalled_stream_ends_soon_when_others_need_the_room() {
        let process = Arc::default();
        let budget = ConnectionSendBudget::new(Arc::clone(&process));
        let _others = ConnectionSendBudget::new(process).charge(40 << 20);
        let gives = async {
            STREAM_PROGRESS.set(StreamProgress::PieceSent);
            pending::<()>().await;
        };
        let timeout = StallTimeout { normal: NEVER, under_pressure: SOON };
        assert_eq!(run_until_stalled(gives, budget, timeout).await, None);
    }
}
