//! How much is under way, and what is turned away when that is too much. Every thread counts what it alone has, so that
//! a Check touches no memory that another core writes.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tonic::{Status, body::Body};

use crate::transport::Overload;

use super::status::{deadline_exceeded, overloaded};

/// Bytes that large requests of management may hold together, before they are read.
const LARGE_BYTES: usize = 64 << 20;
/// Requests up to this size are bounded by the number of calls alone, in bytes.
const SMALL: usize = 64 << 10;
/// Answers of server reflection that may be under way: strangers get them, and each is large.
const REFLECTIONS: usize = 64;
/// How long each may take.
const BRIEFLY: Duration = Duration::from_secs(60);

/// One serving thread's queue: calls that have arrived and have not had their turn. On a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Lane {
    waiting: AtomicUsize,
    shed: AtomicU64,
    most: usize,
}

impl Lane {
    pub(super) fn new(most: usize) -> Lane {
        Lane { waiting: AtomicUsize::new(0), shed: AtomicU64::new(0), most }
    }

    /// A place in the queue; None when it is full.
    pub(super) fn queue(self: &Arc<Self>) -> Option<Turn> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) < self.most {
            return Some(Turn(self.clone()));
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.turn_away();
        None
    }

    /// Counts a call that is turned away.
    pub(super) fn turn_away(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }

    /// Calls that were turned away.
    pub(super) fn shed(&self) -> u64 {
        self.shed.load(Ordering::Relaxed)
    }
}

/// A place in a thread's queue, until the call's turn has come.
#[derive(Debug)]
pub(super) struct Turn(Arc<Lane>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What management and strangers may have under way in the whole process.
#[derive(Debug)]
pub(super) struct Room {
    management: Arc<Semaphore>,
    large: Arc<Semaphore>,
    reflections: Arc<Semaphore>,
    shed: AtomicU64,
}

impl Room {
    pub(super) fn new(overload: Overload) -> Room {
        let semaphore = |places| Arc::new(Semaphore::new(places));
        Room {
            management: semaphore(overload.management_calls),
            large: semaphore(LARGE_BYTES),
            reflections: semaphore(REFLECTIONS),
            shed: AtomicU64::new(0),
        }
    }

    fn take(&self, from: &Arc<Semaphore>, places: usize) -> Result<Place, Status> {
        let places = u32::try_from(places).unwrap_or(u32::MAX);
        from.clone().try_acquire_many_owned(places).map(Place).map_err(|_| {
            self.shed.fetch_add(1, Ordering::Relaxed);
            overloaded()
        })
    }

    /// A place for a management call.
    pub(super) fn management(&self) -> Result<Place, Status> {
        self.take(&self.management, 1)
    }

    /// Room for a request that says that it has so many bytes; None for a small one.
    pub(super) fn large(&self, bytes: usize) -> Result<Option<Place>, Status> {
        if bytes <= SMALL { Ok(None) } else { self.take(&self.large, bytes).map(Some) }
    }

    /// A place for an answer of server reflection.
    pub(super) fn reflection(&self) -> Result<Place, Status> {
        self.take(&self.reflections, 1)
    }

    /// Calls that found no room.
    pub(super) fn shed(&self) -> u64 {
        self.shed.load(Ordering::Relaxed)
    }
}

/// Room that a call has, until this is dropped.
#[derive(Debug)]
pub(super) struct Place(
    #[expect(dead_code, reason = "it is held, and given back when dropped")] OwnedSemaphorePermit,
);

/// The calls of one connection.
#[derive(Debug, Default)]
pub(super) struct Calls {
    open: AtomicUsize,
    ever: AtomicU64,
}

impl Calls {
    /// Counts a call until the guard is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> Call {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.ever.fetch_add(1, Ordering::Relaxed);
        Call(self.clone())
    }

    /// How many there have been, while none is open.
    pub(super) fn idle_after(&self) -> Option<u64> {
        (self.open.load(Ordering::Relaxed) == 0).then(|| self.ever.load(Ordering::Relaxed))
    }
}

/// A call that is counted.
#[derive(Debug)]
pub(super) struct Call(Arc<Calls>);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer that is given up after a minute, and has a place until then.
pub(super) struct Briefly {
    body: Body,
    end: Pin<Box<Sleep>>,
    _place: Place,
}

impl Briefly {
    pub(super) fn new(body: Body, place: Place) -> Briefly {
        Briefly { body, end: Box::pin(sleep(BRIEFLY)), _place: place }
    }
}

impl http_body::Body for Briefly {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(deadline_exceeded())));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_turns_calls_away_until_a_turn_has_come() {
        let lane = Arc::new(Lane::new(2));
        let (first, _second) = (lane.queue(), lane.queue());
        assert!(first.is_some() && lane.queue().is_none());
        assert_eq!(lane.shed(), 1);
        drop(first);
        assert!(lane.queue().is_some());
    }

    #[test]
    fn large_requests_share_a_budget_and_small_ones_need_none() {
        let room = Room::new(Overload::default());
        assert!(room.large(SMALL).unwrap().is_none());
        let held: Vec<_> = (0..16).map(|_| room.large(4 << 20).unwrap()).collect();
        assert_eq!(room.large(4 << 20).unwrap_err().code(), tonic::Code::Unavailable);
        drop(held);
        assert!(room.large(4 << 20).is_ok());
        assert_eq!(room.shed(), 1);
    }

    #[test]
    fn a_connection_is_idle_while_no_call_is_open() {
        let calls = Arc::new(Calls::default());
        assert_eq!(calls.idle_after(), Some(0));
        let call = calls.begin();
        assert_eq!(calls.idle_after(), None);
        drop(call);
        assert_eq!(calls.idle_after(), Some(1));
    }
}
