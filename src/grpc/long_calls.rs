//! Limits the long-running calls of a connection (`Health/Watch`, `WatchPropagation`), and ends them when it drains.
//!
//! They end with UNAVAILABLE, and the client repeats them on another connection. Otherwise draining would never finish.

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

/// Concurrent calls to `Health/Watch` per connection. They need no credential.
const MAX_HEALTH_WATCHES: usize = 8;
/// Other concurrent long-running calls per connection.
const MAX_OTHER_LONG_CALLS: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DrainReason {
    /// The connection has reached its maximum age.
    Aged,
    /// The server is shutting down.
    Stopping,
}

/// Long-running calls of one connection.
#[derive(Clone, Debug)]
pub(super) struct LongCalls {
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
    pub(super) fn drain(&self, reason: DrainReason) {
        self.draining.send_replace(Some(reason));
    }

    /// Acquires a permit for `Health/Watch`. Fails if the connection has reached its limit.
    pub(super) fn acquire_health(&self) -> Result<LongCallPermit, Status> {
        self.acquire(&self.health, MAX_HEALTH_WATCHES)
    }

    /// Acquires a permit for another long-running call. Fails if the connection has reached its limit.
    pub(super) fn acquire_other(&self) -> Result<LongCallPermit, Status> {
        self.acquire(&self.others, MAX_OTHER_LONG_CALLS)
    }

    fn acquire(&self, semaphore: &Arc<Semaphore>, limit: usize) -> Result<LongCallPermit, Status> {
        let permit = semaphore.clone().try_acquire_owned().map_err(|_| too_many_long_calls(limit))?;
        let mut draining = self.draining.subscribe();
        let end_status = async move {
            let reason = draining.wait_for(Option::is_some).await.map(|reason| *reason);
            match reason.ok().flatten() {
                Some(DrainReason::Aged) => connection_too_old(),
                // Without a sender the connection is gone, and nobody reads this status.
                Some(DrainReason::Stopping) | None => ServiceError::Stopping.into(),
            }
        };
        Ok(LongCallPermit { ended: end_status.boxed(), _permit: permit })
    }
}

/// A permit for a long-running call.
pub(super) struct LongCallPermit {
    ended: BoxFuture<'static, Status>,
    _permit: OwnedSemaphorePermit,
}

impl LongCallPermit {
    /// Wraps the response of the call, which holds the permit.
    pub(super) fn attach(self, response: Response<Body>) -> Response<Body> {
        if response.body().is_end_stream() {
            return response;
        }
        response.map(|body| Body::new(LongCallBody { body, permit: Some(self) }))
    }
}

/// The response body of a long-running call.
struct LongCallBody {
    body: Body,
    /// `None` once the body has ended.
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
        // Ready frames are sent before the end: health reports NOT_SERVING before a server stops.
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match (polled, ended) {
            (Poll::Pending, Poll::Ready(status)) => {
                self.permit = None;
                let mut trailers = HeaderMap::new();
                Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
            }
            (polled, Poll::Ready(status)) => {
                // A completed future must not be polled again.
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
