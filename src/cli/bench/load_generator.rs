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

use super::http2_client::{CallTarget, Http2Connection, Http2Event};

/// How long the last answers of a round are waited for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits shorter than this are too short for a timer.
const MIN_TIMER_WAIT: Duration = Duration::from_millis(3);
/// gRPC's frame around a message: a flag and four bytes of length.
pub(super) const FRAME_PREFIX_BYTES: usize = 5;

/// A call: its message in gRPC's frame, and how its answer begins.
#[derive(Clone, Debug)]
pub(super) struct PreparedCall {
    pub(super) message: Bytes,
    pub(super) expected: ExpectedAnswer,
}

/// What is right for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpectedAnswer {
    /// Any message.
    Any,
    /// One whose first field is this bool.
    FirstBool(bool),
    /// One of Envoy's that allows, or does not: its first field is a status, which is empty then.
    Envoy(bool),
}

impl ExpectedAnswer {
    fn matches(self, message: &[u8]) -> bool {
        let begins = |with: [u8; 2]| message.get(FRAME_PREFIX_BYTES..FRAME_PREFIX_BYTES + 2) == Some(&with);
        match self {
            ExpectedAnswer::Any => true,
            ExpectedAnswer::FirstBool(wanted) => begins([8, 1]) == wanted,
            ExpectedAnswer::Envoy(wanted) => begins([10, 0]) == wanted,
        }
    }
}

/// The calls of a load, in a ring; or each once.
#[derive(Debug)]
pub(super) struct CallSource {
    calls: Vec<PreparedCall>,
    next: AtomicUsize,
    each_once: bool,
}

impl CallSource {
    pub(super) fn cycling(calls: Vec<PreparedCall>) -> Arc<CallSource> {
        Arc::new(CallSource { calls, next: AtomicUsize::new(0), each_once: false })
    }

    pub(super) fn each_once(calls: Vec<PreparedCall>) -> Arc<CallSource> {
        Arc::new(CallSource { calls, next: AtomicUsize::new(0), each_once: true })
    }

    fn next_call(&self) -> Option<&PreparedCall> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        if self.each_once { self.calls.get(at) } else { self.calls.get(at % self.calls.len().max(1)) }
    }
}

/// How calls are sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoadShape {
    pub(super) connections: usize,
    /// In flight at a time on each.
    pub(super) in_flight: usize,
    /// Calls per second over all; None = as fast as answers come.
    pub(super) rate: Option<f64>,
    /// Short waits for the next call are spent busy: a timer is no finer than 1 ms. For a load with a core of its own.
    pub(super) spin_waits: bool,
    /// Each call is a message on one of so many long streams of a connection.
    pub(super) streams: Option<usize>,
}

/// What came of a round.
#[derive(Clone, Debug)]
pub(super) struct RoundTally {
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
    pub(super) duration: Duration,
}

impl RoundTally {
    fn new() -> RoundTally {
        const LONGEST: u64 = 60_000_000_000;
        let latency = Histogram::new_with_bounds(1_000, LONGEST, 3);
        // Bounds that are constants are good or never are.
        let latency = latency.unwrap_or_else(|_| unreachable!("the bounds are in order"));
        RoundTally { answered: 0, wrong: 0, failed: 0, refused: 0, latency, duration: Duration::ZERO }
    }

    /// Adds another's.
    pub(super) fn merge(&mut self, other: &RoundTally) {
        self.answered += other.answered;
        self.wrong += other.wrong;
        self.failed += other.failed;
        self.refused += other.refused;
        self.duration = self.duration.max(other.duration);
        // Both have the same bounds.
        let _ = self.latency.add(&other.latency);
    }

    /// Answers per second.
    pub(super) fn answers_per_second(&self) -> f64 {
        self.answered as f64 / self.duration.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    fn record(&mut self, right: bool, since: Instant, now: Instant) {
        self.answered += 1;
        self.wrong += u64::from(!right);
        let nanos = u64::try_from(now.duration_since(since).as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(nanos);
    }
}

/// Connections that stay between rounds.
pub(super) struct LoadGenerator {
    target: CallTarget,
    shape: LoadShape,
    calls: Arc<CallSource>,
    connections: Vec<Http2Connection>,
}

impl LoadGenerator {
    pub(super) fn new(target: CallTarget, shape: LoadShape, calls: Arc<CallSource>) -> LoadGenerator {
        LoadGenerator { target, shape, calls, connections: Vec::new() }
    }

    /// The same calls over connections of their own, in an open loop.
    pub(super) fn with_rate(&self, rate: f64, spins: bool) -> LoadGenerator {
        let shape = LoadShape { rate: Some(rate), spin_waits: spins, ..self.shape };
        LoadGenerator::new(self.target.clone(), shape, self.calls.clone())
    }

    /// One round.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub(super) async fn run_round(&mut self, duration: Duration) -> io::Result<RoundTally> {
        // What the protocol keeps to a call, and long streams, do not outlive a round.
        if self.shape.streams.is_some() {
            self.connections.clear();
        }
        self.connections.retain(|wire| !wire.is_exhausted());
        while self.connections.len() < self.shape.connections.max(1) {
            self.connections.push(Http2Connection::connect(&self.target).await?);
        }
        let begun = Instant::now();
        let until = begun + duration;
        let each = self.connections.drain(..).enumerate().map(|(at, wire)| {
            let driver = ConnectionDriver::new(wire, self.shape, at, &self.calls, begun, until);
            driver.run(self.shape.streams)
        });
        let mut total = RoundTally::new();
        for (wire, tally) in join_all(each.collect::<Vec<_>>()).await {
            total.merge(&tally);
            self.connections.extend(wire);
        }
        total.duration = if self.calls.each_once { begun.elapsed().min(duration) } else { duration };
        Ok(total)
    }
}

/// A call in flight.
struct CallInFlight {
    since: Instant,
    expected: ExpectedAnswer,
    is_right: Option<bool>,
    /// The beginning of its answer.
    received: Vec<u8>,
}

/// One connection's part of a round.
struct ConnectionDriver<'a> {
    connection: Http2Connection,
    calls: &'a CallSource,
    in_flight: usize,
    calls_in_flight: HashMap<u32, CallInFlight>,
    tally: RoundTally,
    started_at: Instant,
    until: Instant,
    /// Between two calls; None = closed loop.
    interval: Option<Duration>,
    /// When the next call is due.
    next_due: Instant,
    spin_waits: bool,
    exhausted: bool,
}

impl<'a> ConnectionDriver<'a> {
    fn new(
        wire: Http2Connection,
        shape: LoadShape,
        at: usize,
        calls: &'a CallSource,
        begun: Instant,
        until: Instant,
    ) -> ConnectionDriver<'a> {
        let connections = shape.connections.max(1);
        let every = shape.rate.map(|rate| Duration::from_secs_f64(connections as f64 / rate.max(0.001)));
        // Connections take turns.
        let offset = every.map_or(Duration::ZERO, |every| every.mul_f64(at as f64 / connections as f64));
        ConnectionDriver {
            connection: wire,
            calls,
            in_flight: shape.in_flight.max(1),
            calls_in_flight: HashMap::new(),
            tally: RoundTally::new(),
            started_at: begun,
            until,
            interval: every,
            next_due: begun + offset,
            spin_waits: shape.spin_waits,
            exhausted: false,
        }
    }

    /// Drives the connection through the round; gives it back if it is still good.
    async fn run(mut self, streams: Option<usize>) -> (Option<Http2Connection>, RoundTally) {
        let driven = match streams {
            Some(streams) => self.drive_streams(streams).await,
            None => self.drive_unary().await,
        };
        if let Err(error) = driven {
            tracing::debug!(error = &error as &dyn std::error::Error, "a connection was lost");
            self.tally.failed += self.calls_in_flight.len() as u64;
            return (None, self.tally);
        }
        self.tally.failed += self.calls_in_flight.len() as u64;
        (self.calls_in_flight.is_empty().then_some(self.connection), self.tally)
    }

    async fn drive_unary(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            if now >= self.until || self.exhausted {
                break;
            }
            self.send_due(now);
            self.connection.flush().await?;
            if self.calls_in_flight.is_empty() && self.connection.is_exhausted() {
                // The server asked to open no more calls, and all are answered.
                break;
            }
            let wake = match self.interval {
                Some(_) if self.calls_in_flight.len() < self.in_flight => self.next_due.min(self.until),
                _ => self.until,
            };
            tokio::select! {
                read = self.connection.receive() => read?,
                () = wait_until(wake, self.spin_waits) => continue,
            }
            self.process_events(Instant::now());
        }
        let last = async {
            while !self.calls_in_flight.is_empty() {
                self.connection.receive().await?;
                self.process_events(Instant::now());
                self.connection.flush().await?;
            }
            Ok(())
        };
        timeout(DRAIN_TIMEOUT, last).await.unwrap_or(Ok(()))
    }

    fn send_due(&mut self, now: Instant) {
        while self.calls_in_flight.len() < self.in_flight {
            let since = if self.interval.is_some() { self.next_due } else { now };
            if since > now {
                return;
            }
            let Some(call) = self.calls.next_call() else {
                self.exhausted = true;
                return;
            };
            if !self.connection.can_open_call(call.message.len()) {
                return;
            }
            // A call that the server has no window for stays due.
            self.next_due += self.interval.unwrap_or_default();
            let id = self.connection.open_stream();
            self.connection.send(id, &call.message, true);
            let said = Vec::new();
            self.calls_in_flight
                .insert(id, CallInFlight { since, expected: call.expected, is_right: None, received: said });
        }
    }

    fn process_events(&mut self, now: Instant) {
        while let Some(frame) = self.connection.next_event() {
            match frame {
                Http2Event::Data { id, range, end } => {
                    if let Some(open) = self.calls_in_flight.get_mut(&id)
                        && open.is_right.is_none()
                    {
                        // An answer's beginning is all that is looked at.
                        open.received
                            .extend(self.connection.bytes(range).iter().take(FRAME_PREFIX_BYTES + 2));
                        if open.received.len() >= FRAME_PREFIX_BYTES + 2 || end {
                            open.is_right = Some(open.expected.matches(&open.received));
                        }
                    }
                    if end {
                        self.finish_call(id, now);
                    }
                }
                Http2Event::Headers { id, end: true } => self.finish_call(id, now),
                Http2Event::Reset { id } => {
                    self.tally.failed += u64::from(self.calls_in_flight.remove(&id).is_some());
                }
                Http2Event::Headers { .. } | Http2Event::WindowUpdate { .. } => {}
            }
        }
    }

    fn finish_call(&mut self, id: u32, now: Instant) {
        let Some(open) = self.calls_in_flight.remove(&id) else { return };
        let right =
            open.is_right.or((!open.received.is_empty()).then(|| open.expected.matches(&open.received)));
        match right {
            // It came too late to count.
            Some(_) if now > self.until => {}
            Some(right) => self.tally.record(right, open.since, now),
            // Headers alone: a refusal.
            None => {
                self.tally.failed += 1;
                self.tally.refused += 1;
            }
        }
    }

    /// The same over long streams: each keeps so many messages in flight, and answers come in order.
    async fn drive_streams(&mut self, streams: usize) -> io::Result<()> {
        let mut lanes: HashMap<u32, LongStream> = HashMap::new();
        for _ in 0..streams.max(1) {
            let id = self.connection.open_stream();
            lanes.insert(id, LongStream::new(self.connection.initial_stream_window()));
        }
        while Instant::now() < self.until && !lanes.is_empty() {
            let now = Instant::now();
            for (id, lane) in &mut lanes {
                lane.send_calls(*id, &mut self.connection, self.calls, self.in_flight, now);
            }
            self.connection.flush().await?;
            tokio::select! {
                read = self.connection.receive() => read?,
                () = sleep_until(self.until) => break,
            }
            let now = Instant::now();
            while let Some(frame) = self.connection.next_event() {
                match frame {
                    Http2Event::Data { id, range, .. } => {
                        if let Some(lane) = lanes.get_mut(&id) {
                            lane.receive_data(self.connection.bytes(range), &mut self.tally, now);
                        }
                    }
                    Http2Event::WindowUpdate { id, more } => {
                        if let Some(lane) = lanes.get_mut(&id) {
                            lane.window += i64::from(more);
                        }
                    }
                    Http2Event::Reset { id } | Http2Event::Headers { id, end: true } => {
                        // A stream that ends by itself was refused.
                        let lost = lanes.remove(&id).map_or(0, |lane| lane.awaiting_answers.len());
                        self.tally.failed += lost as u64;
                    }
                    Http2Event::Headers { .. } => {}
                }
            }
        }
        if lanes.is_empty() && self.started_at + Duration::from_millis(1) < self.until {
            return Err(io::Error::other("the server ended every stream"));
        }
        Ok(())
    }
}

/// Waits until then; `spins`: a short wait gives others their turn, and ends.
async fn wait_until(until: Instant, spins: bool) {
    if spins && until.duration_since(Instant::now()) < MIN_TIMER_WAIT {
        tokio::task::yield_now().await;
    } else {
        sleep_until(until).await;
    }
}

/// A long stream.
struct LongStream {
    window: i64,
    awaiting_answers: std::collections::VecDeque<(Instant, ExpectedAnswer)>,
    received: Vec<u8>,
}

impl LongStream {
    fn new(window: i64) -> LongStream {
        LongStream { window, awaiting_answers: std::collections::VecDeque::new(), received: Vec::new() }
    }

    fn send_calls(
        &mut self,
        id: u32,
        wire: &mut Http2Connection,
        calls: &CallSource,
        in_flight: usize,
        now: Instant,
    ) {
        while self.awaiting_answers.len() < in_flight {
            let Some(call) = calls.next_call() else { return };
            let length = call.message.len();
            if !wire.has_window_for(length) || self.window < i64::try_from(length).unwrap_or(i64::MAX) {
                return;
            }
            self.window -= i64::try_from(length).unwrap_or(i64::MAX);
            wire.send(id, &call.message, false);
            self.awaiting_answers.push_back((now, call.expected));
        }
    }

    /// Takes a piece of the answers; a message may lie in several.
    fn receive_data(&mut self, bytes: &[u8], tally: &mut RoundTally, now: Instant) {
        self.received.extend(bytes);
        let mut at = 0;
        while let Some(&[_, a, b, c, d]) = self.received.get(at..at + FRAME_PREFIX_BYTES) {
            let length = FRAME_PREFIX_BYTES
                + usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX / 2);
            let Some(message) = self.received.get(at..at + length) else { break };
            if let Some((since, expected)) = self.awaiting_answers.pop_front() {
                tally.record(expected.matches(message), since, now);
            }
            at += length;
        }
        self.received.drain(..at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_by_its_first_field() {
        let allowed = [0, 0, 0, 0, 4, 8, 1, 16, 1];
        let denied = [0, 0, 0, 0, 2, 16, 3];
        assert!(
            ExpectedAnswer::FirstBool(true).matches(&allowed)
                && !ExpectedAnswer::FirstBool(true).matches(&denied)
        );
        assert!(
            ExpectedAnswer::FirstBool(false).matches(&denied)
                && !ExpectedAnswer::FirstBool(false).matches(&allowed)
        );
        assert!(ExpectedAnswer::Any.matches(&denied));
    }

    #[test]
    fn messages_of_a_stream_are_told_apart_wherever_they_are_cut() {
        let message = [0, 0, 0, 0, 2, 8, 1];
        let both = [message, message].concat();
        let now = Instant::now();
        for cut in 0..both.len() {
            let (mut lane, mut tally) = (LongStream::new(0), RoundTally::new());
            lane.awaiting_answers.extend([(now, ExpectedAnswer::FirstBool(true)); 2]);
            lane.receive_data(&both[..cut], &mut tally, now);
            lane.receive_data(&both[cut..], &mut tally, now);
            assert_eq!((tally.answered, tally.wrong), (2, 0), "{cut}");
        }
    }

    #[test]
    fn calls_that_are_made_once_come_to_an_end() {
        let call = PreparedCall { message: Bytes::new(), expected: ExpectedAnswer::Any };
        let once = CallSource::each_once(vec![call.clone(); 2]);
        assert!(once.next_call().is_some() && once.next_call().is_some() && once.next_call().is_none());
        let ring = CallSource::cycling(vec![call]);
        assert!(ring.next_call().is_some() && ring.next_call().is_some());
    }
}
