//! A load: prepared calls over some connections, so many in flight, for so long; and what came of them.
//!
//! Closed: a call is sent when one before it has been answered. Open: calls are sent at a rate whatever comes of them,
//! and the time that one had to wait for its turn counts as its own.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use hdrhistogram::Histogram;
use tokio::time::{Instant, sleep_until, timeout};

use super::wire::{Frame, Target, Wire};

/// How long the last answers of a round are waited for.
const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// Waits shorter than this are too short for a timer.
const SHORT: Duration = Duration::from_millis(3);
/// gRPC's frame around a message: a flag and four bytes of length.
pub(super) const PREFIX: usize = 5;

/// A call: its message in gRPC's frame, and how its answer begins.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) message: Bytes,
    pub(super) answer: Expected,
}

/// What is right for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Any message.
    Any,
    /// One whose first field is this bool.
    First(bool),
    /// One of Envoy's that allows, or does not: its first field is a status, which is empty then.
    Envoy(bool),
}

impl Expected {
    fn is(self, message: &[u8]) -> bool {
        let begins = |with: [u8; 2]| message.get(PREFIX..PREFIX + 2) == Some(&with);
        match self {
            Expected::Any => true,
            Expected::First(wanted) => begins([8, 1]) == wanted,
            Expected::Envoy(wanted) => begins([10, 0]) == wanted,
        }
    }
}

/// The calls of a load, in a ring; or each once.
#[derive(Debug)]
pub(super) struct Calls {
    calls: Vec<Call>,
    next: AtomicUsize,
    once: bool,
}

impl Calls {
    pub(super) fn ring(calls: Vec<Call>) -> Arc<Calls> {
        Arc::new(Calls { calls, next: AtomicUsize::new(0), once: false })
    }

    pub(super) fn once(calls: Vec<Call>) -> Arc<Calls> {
        Arc::new(Calls { calls, next: AtomicUsize::new(0), once: true })
    }

    fn next(&self) -> Option<&Call> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        if self.once { self.calls.get(at) } else { self.calls.get(at % self.calls.len().max(1)) }
    }
}

/// How calls are sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) connections: usize,
    /// In flight at a time on each.
    pub(super) in_flight: usize,
    /// Calls per second over all; None = as fast as answers come.
    pub(super) rate: Option<f64>,
    /// Short waits for the next call are spent busy: a timer is no finer than 1 ms. For a load with a core of its own.
    pub(super) spins: bool,
    /// Each call is a message on one of so many long streams of a connection.
    pub(super) streams: Option<usize>,
}

/// What came of a round.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// Answers within the round, right and wrong.
    pub(super) answered: u64,
    /// Answers that do not say what they should.
    pub(super) wrong: u64,
    /// Calls without an answer.
    pub(super) failed: u64,
    /// Of those, calls that were refused.
    pub(super) refused: u64,
    /// How long answers took, in nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// How long the round was.
    pub(super) took: Duration,
}

impl Tally {
    fn new() -> Tally {
        const LONGEST: u64 = 60_000_000_000;
        let latency = Histogram::new_with_bounds(1_000, LONGEST, 3);
        // Bounds that are constants are good or never are.
        let latency = latency.unwrap_or_else(|_| unreachable!("the bounds are in order"));
        Tally { answered: 0, wrong: 0, failed: 0, refused: 0, latency, took: Duration::ZERO }
    }

    /// Adds another's.
    pub(super) fn add(&mut self, other: &Tally) {
        self.answered += other.answered;
        self.wrong += other.wrong;
        self.failed += other.failed;
        self.refused += other.refused;
        self.took = self.took.max(other.took);
        // Both have the same bounds.
        let _ = self.latency.add(&other.latency);
    }

    /// Answers per second.
    pub(super) fn rate(&self) -> f64 {
        self.answered as f64 / self.took.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    fn note(&mut self, right: bool, since: Instant, now: Instant) {
        self.answered += 1;
        self.wrong += u64::from(!right);
        let nanos = u64::try_from(now.duration_since(since).as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(nanos);
    }
}

/// Connections that stay between rounds.
pub(super) struct Load {
    target: Target,
    shape: Shape,
    calls: Arc<Calls>,
    wires: Vec<Wire>,
}

impl Load {
    pub(super) fn new(target: Target, shape: Shape, calls: Arc<Calls>) -> Load {
        Load { target, shape, calls, wires: Vec::new() }
    }

    /// The same calls over connections of their own, in an open loop.
    pub(super) fn at_rate(&self, rate: f64, spins: bool) -> Load {
        let shape = Shape { rate: Some(rate), spins, ..self.shape };
        Load::new(self.target.clone(), shape, self.calls.clone())
    }

    /// One round.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub(super) async fn round(&mut self, duration: Duration) -> io::Result<Tally> {
        // What the protocol keeps to a call, and long streams, do not outlive a round.
        if self.shape.streams.is_some() {
            self.wires.clear();
        }
        self.wires.retain(|wire| !wire.is_worn());
        while self.wires.len() < self.shape.connections.max(1) {
            self.wires.push(Wire::connect(&self.target).await?);
        }
        let begun = Instant::now();
        let until = begun + duration;
        let each = self.wires.drain(..).enumerate().map(|(at, wire)| {
            let driver = Driver::new(wire, self.shape, at, &self.calls, begun, until);
            driver.run(self.shape.streams)
        });
        let mut total = Tally::new();
        for (wire, tally) in join_all(each.collect::<Vec<_>>()).await {
            total.add(&tally);
            self.wires.extend(wire);
        }
        total.took = if self.calls.once { begun.elapsed().min(duration) } else { duration };
        Ok(total)
    }
}

/// A call in flight.
struct Open {
    since: Instant,
    expected: Expected,
    right: Option<bool>,
    /// The beginning of its answer.
    said: Vec<u8>,
}

/// One connection's part of a round.
struct Driver<'a> {
    wire: Wire,
    calls: &'a Calls,
    in_flight: usize,
    open: HashMap<u32, Open>,
    tally: Tally,
    begun: Instant,
    until: Instant,
    /// Between two calls; None = closed loop.
    every: Option<Duration>,
    /// When the next call is due.
    due: Instant,
    spins: bool,
    exhausted: bool,
}

impl<'a> Driver<'a> {
    fn new(
        wire: Wire,
        shape: Shape,
        at: usize,
        calls: &'a Calls,
        begun: Instant,
        until: Instant,
    ) -> Driver<'a> {
        let connections = shape.connections.max(1);
        let every = shape.rate.map(|rate| Duration::from_secs_f64(connections as f64 / rate.max(0.001)));
        // Connections take turns.
        let offset = every.map_or(Duration::ZERO, |every| every.mul_f64(at as f64 / connections as f64));
        Driver {
            wire,
            calls,
            in_flight: shape.in_flight.max(1),
            open: HashMap::new(),
            tally: Tally::new(),
            begun,
            until,
            every,
            due: begun + offset,
            spins: shape.spins,
            exhausted: false,
        }
    }

    /// Drives the connection through the round; gives it back if it is still good.
    async fn run(mut self, streams: Option<usize>) -> (Option<Wire>, Tally) {
        let driven = match streams {
            Some(streams) => self.stream(streams).await,
            None => self.unary().await,
        };
        if let Err(error) = driven {
            tracing::debug!(error = &error as &dyn std::error::Error, "a connection was lost");
            self.tally.failed += self.open.len() as u64;
            return (None, self.tally);
        }
        self.tally.failed += self.open.len() as u64;
        (self.open.is_empty().then_some(self.wire), self.tally)
    }

    async fn unary(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            if now >= self.until || self.exhausted {
                break;
            }
            self.send_due(now);
            self.wire.flush().await?;
            if self.open.is_empty() && self.wire.is_worn() {
                // The server asked to open no more calls, and all are answered.
                break;
            }
            let wake = match self.every {
                Some(_) if self.open.len() < self.in_flight => self.due.min(self.until),
                _ => self.until,
            };
            tokio::select! {
                read = self.wire.read() => read?,
                () = wait(wake, self.spins) => continue,
            }
            self.take(Instant::now());
        }
        let last = async {
            while !self.open.is_empty() {
                self.wire.read().await?;
                self.take(Instant::now());
                self.wire.flush().await?;
            }
            Ok(())
        };
        timeout(LAST_ANSWERS, last).await.unwrap_or(Ok(()))
    }

    fn send_due(&mut self, now: Instant) {
        while self.open.len() < self.in_flight {
            let since = if self.every.is_some() { self.due } else { now };
            if since > now {
                return;
            }
            let Some(call) = self.calls.next() else {
                self.exhausted = true;
                return;
            };
            if !self.wire.takes(call.message.len()) {
                return;
            }
            // A call that the server has no window for stays due.
            self.due += self.every.unwrap_or_default();
            let id = self.wire.open();
            self.wire.send(id, &call.message, true);
            let said = Vec::new();
            self.open.insert(id, Open { since, expected: call.answer, right: None, said });
        }
    }

    fn take(&mut self, now: Instant) {
        while let Some(frame) = self.wire.next() {
            match frame {
                Frame::Data { id, range, end } => {
                    if let Some(open) = self.open.get_mut(&id)
                        && open.right.is_none()
                    {
                        // An answer's beginning is all that is looked at.
                        open.said.extend(self.wire.bytes(range).iter().take(PREFIX + 2));
                        if open.said.len() >= PREFIX + 2 || end {
                            open.right = Some(open.expected.is(&open.said));
                        }
                    }
                    if end {
                        self.ended(id, now);
                    }
                }
                Frame::Headers { id, end: true } => self.ended(id, now),
                Frame::Reset { id } => {
                    self.tally.failed += u64::from(self.open.remove(&id).is_some());
                }
                Frame::Headers { .. } | Frame::Window { .. } => {}
            }
        }
    }

    fn ended(&mut self, id: u32, now: Instant) {
        let Some(open) = self.open.remove(&id) else { return };
        let right = open.right.or((!open.said.is_empty()).then(|| open.expected.is(&open.said)));
        match right {
            // It came too late to count.
            Some(_) if now > self.until => {}
            Some(right) => self.tally.note(right, open.since, now),
            // Headers alone: a refusal.
            None => {
                self.tally.failed += 1;
                self.tally.refused += 1;
            }
        }
    }

    /// The same over long streams: each keeps so many messages in flight, and answers come in order.
    async fn stream(&mut self, streams: usize) -> io::Result<()> {
        let mut lanes: HashMap<u32, Lane> = HashMap::new();
        for _ in 0..streams.max(1) {
            let id = self.wire.open();
            lanes.insert(id, Lane::new(self.wire.stream_window()));
        }
        while Instant::now() < self.until && !lanes.is_empty() {
            let now = Instant::now();
            for (id, lane) in &mut lanes {
                lane.fill(*id, &mut self.wire, self.calls, self.in_flight, now);
            }
            self.wire.flush().await?;
            tokio::select! {
                read = self.wire.read() => read?,
                () = sleep_until(self.until) => break,
            }
            let now = Instant::now();
            while let Some(frame) = self.wire.next() {
                match frame {
                    Frame::Data { id, range, .. } => {
                        if let Some(lane) = lanes.get_mut(&id) {
                            lane.take(self.wire.bytes(range), &mut self.tally, now);
                        }
                    }
                    Frame::Window { id, more } => {
                        if let Some(lane) = lanes.get_mut(&id) {
                            lane.window += i64::from(more);
                        }
                    }
                    Frame::Reset { id } | Frame::Headers { id, end: true } => {
                        // A stream that ends by itself was refused.
                        let lost = lanes.remove(&id).map_or(0, |lane| lane.sent.len());
                        self.tally.failed += lost as u64;
                    }
                    Frame::Headers { .. } => {}
                }
            }
        }
        if lanes.is_empty() && self.begun + Duration::from_millis(1) < self.until {
            return Err(io::Error::other("the server ended every stream"));
        }
        Ok(())
    }
}

/// Waits until then; `spins`: a short wait gives others their turn, and ends.
async fn wait(until: Instant, spins: bool) {
    if spins && until.duration_since(Instant::now()) < SHORT {
        tokio::task::yield_now().await;
    } else {
        sleep_until(until).await;
    }
}

/// A long stream.
struct Lane {
    window: i64,
    sent: std::collections::VecDeque<(Instant, Expected)>,
    said: Vec<u8>,
}

impl Lane {
    fn new(window: i64) -> Lane {
        Lane { window, sent: std::collections::VecDeque::new(), said: Vec::new() }
    }

    fn fill(&mut self, id: u32, wire: &mut Wire, calls: &Calls, in_flight: usize, now: Instant) {
        while self.sent.len() < in_flight {
            let Some(call) = calls.next() else { return };
            let length = call.message.len();
            if !wire.fits(length) || self.window < i64::try_from(length).unwrap_or(i64::MAX) {
                return;
            }
            self.window -= i64::try_from(length).unwrap_or(i64::MAX);
            wire.send(id, &call.message, false);
            self.sent.push_back((now, call.answer));
        }
    }

    /// Takes a piece of the answers; a message may lie in several.
    fn take(&mut self, bytes: &[u8], tally: &mut Tally, now: Instant) {
        self.said.extend(bytes);
        let mut at = 0;
        while let Some(&[_, a, b, c, d]) = self.said.get(at..at + PREFIX) {
            let length = PREFIX + usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX / 2);
            let Some(message) = self.said.get(at..at + length) else { break };
            if let Some((since, expected)) = self.sent.pop_front() {
                tally.note(expected.is(message), since, now);
            }
            at += length;
        }
        self.said.drain(..at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_by_its_first_field() {
        let allowed = [0, 0, 0, 0, 4, 8, 1, 16, 1];
        let denied = [0, 0, 0, 0, 2, 16, 3];
        assert!(Expected::First(true).is(&allowed) && !Expected::First(true).is(&denied));
        assert!(Expected::First(false).is(&denied) && !Expected::First(false).is(&allowed));
        assert!(Expected::Any.is(&denied));
    }

    #[test]
    fn messages_of_a_stream_are_told_apart_wherever_they_are_cut() {
        let message = [0, 0, 0, 0, 2, 8, 1];
        let both = [message, message].concat();
        let now = Instant::now();
        for cut in 0..both.len() {
            let (mut lane, mut tally) = (Lane::new(0), Tally::new());
            lane.sent.extend([(now, Expected::First(true)); 2]);
            lane.take(&both[..cut], &mut tally, now);
            lane.take(&both[cut..], &mut tally, now);
            assert_eq!((tally.answered, tally.wrong), (2, 0), "{cut}");
        }
    }

    #[test]
    fn calls_that_are_made_once_come_to_an_end() {
        let call = Call { message: Bytes::new(), answer: Expected::Any };
        let once = Calls::once(vec![call.clone(); 2]);
        assert!(once.next().is_some() && once.next().is_some() && once.next().is_none());
        let ring = Calls::ring(vec![call]);
        assert!(ring.next().is_some() && ring.next().is_some());
    }
}
