//! Limits the long-running calls of a connection (`Health/Watch`, `WatchPropagation`), and ends them when it drains.
//!
//! They end with UNAVAILABLE, and the client repeats them over another connection. Without that, draining would never
//! finish.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Status, body::Body};

use crate::service_error::ServiceError;

use super::status::{connection_too_old, too_many_long_calls};

/// How many calls to `Health/Watch` a connection has at most. They need no credential.
const MAX_HEALTH_WATCHES: usize = 8;
/// How many other calls that last it has.
const MAX_OTHER_LONG_CALLS: usize = 32;

/// Why a connection drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DrainReason {
    /// It is too old.
    Aged,
    /// The server stops.
    Stopping,
}

/// The calls of one connection that last.
#[derive(Clone, Debug)]
pub struct LongCalls {
    health: Arc<Semaphore>,
    others: Arc<Semaphore>,
    draining: watch::Sender<Option<DrainReason>>,
}

impl Default for LongCalls {
    fn default() -> Self {
        LongCalls {
            health: Arc::new(Semaphore::new(MAX_HEALTH_WATCHES)),
            others: Arc::new(Semaphore::new(MAX_OTHER_LONG_CALLS)),
            draining: watch::Sender::new(None),
        }
    }
}

impl LongCalls {
    /// Ends all of them.
    pub(super) fn drain(&self, reason: DrainReason) {
        self.draining.send_replace(Some(reason));
    }

    /// A place for a call to `Health/Watch`.
    ///
    /// # Errors
    /// When the connection has as many as it may have.
    pub(super) fn acquire_health(&self) -> Result<LongCallPermit, Status> {
        self.acquire(&self.health, MAX_HEALTH_WATCHES)
    }

    /// A place for another call that lasts.
    ///
    /// # Errors
    /// When the connection has as many as it may have.
    pub(super) fn acquire_other(&self) -> Result<LongCallPermit, Status> {
        self.acquire(&self.others, MAX_OTHER_LONG_CALLS)
    }

    fn acquire(&self, semaphore: &Arc<Semaphore>, limit: usize) -> Result<LongCallPermit, Status> {
        let permit = semaphore.clone().try_acquire_owned().map_err(|_| too_many_long_calls(limit))?;
        let mut draining = self.draining.subscribe();
        let ends = async move {
            let reason = draining.wait_for(Option::is_some).await.map(|reason| *reason);
            match reason.ok().flatten() {
                Some(DrainReason::Aged) => connection_too_old(),
                // The connection is gone with the sender, and nobody sees this.
                Some(DrainReason::Stopping) | None => ServiceError::Stopping.into(),
            }
        };
        Ok(LongCallPermit { ended: ends.boxed(), _place: permit })
    }
}

/// A place among the calls that last.
pub(super) struct LongCallPermit {
    ended: BoxFuture<'static, Status>,
    _place: OwnedSemaphorePermit,
}

impl LongCallPermit {
    /// The answer of a call that has this place.
    pub(super) fn attach(self, answer: Response<Body>) -> Response<Body> {
        if answer.body().is_end_stream() {
            return answer;
        }
        answer.map(|body| Body::new(LongCallBody { body, permit: Some(self) }))
    }
}

/// The answer of a call that lasts.
struct LongCallBody {
    body: Body,
    /// None = it has ended.
    permit: Option<LongCallPermit>,
}

impl http_body::Body for LongCallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(watch) = &mut self.permit else { return Poll::Ready(None) };
        let ended = watch.ended.poll_unpin(cx);
        // Ready frames come before the end: health reports NOT_SERVING before a server stops.
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match (polled, ended) {
            (Poll::Pending, Poll::Ready(status)) => {
                self.permit = None;
                let mut trailers = HeaderMap::new();
                Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
            }
            (polled, Poll::Ready(status)) => {
                // A future that is done is not polled again.
                if let Some(watch) = &mut self.permit {
                    watch.ended = std::future::ready(status).boxed();
                }
                polled
            }
            (polled, Poll::Pending) => polled,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.permit.is_none() || self.body.is_end_stream()
    }
}
