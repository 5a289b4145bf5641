//! Serving: an accept loop of our own for each listener, and one single-threaded runtime per core.
//!
//! The work-stealing scheduler halves a server of small messages, so each connection stays on the thread that
//! it was given to: the one with the fewest.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::Instant,
};

use crate::transport::{
    Listener,
    counts::{Counts, Refused},
    socket::{Open, Socket},
    tls::Tls,
};

use super::{
    admission::Door,
    connection::{self, Arrived, Entrance},
    gate::Services,
    load::Lane,
};

/// How long to leave a listener alone when accepting failed: mostly the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often the log is told of what may happen many times a second.
const TELL_EVERY: Duration = Duration::from_secs(10);

struct Worker {
    connections: mpsc::UnboundedSender<Arrived>,
    load: Arc<AtomicUsize>,
    lane: Arc<Lane>,
    thread: JoinHandle<()>,
}

/// The threads that serve connections.
pub struct Workers {
    workers: Vec<Worker>,
    /// Places for the connections of every listener together.
    room: Arc<Semaphore>,
    /// Tells connections that they end.
    ending: watch::Sender<bool>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &self.workers.len()).finish_non_exhaustive()
    }
}

/// How much the workers take.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// How many threads there are.
    pub threads: usize,
    /// How many connections there may be, over all listeners.
    pub connections: usize,
    /// How many calls of a thread may wait for their turn.
    pub queued: usize,
    /// How long calls in flight may take to end, at a stop.
    pub drain: Duration,
}

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(capacity: Capacity, services: &Arc<Services>) -> io::Result<Workers> {
        let Capacity { threads, connections, queued, drain } = capacity;
        let (ending, stopping) = watch::channel(false);
        let workers =
            (0..threads.max(1)).map(|at| start(at, services.clone(), stopping.clone(), queued, drain));
        let room = Arc::new(Semaphore::new(connections));
        Ok(Workers { workers: workers.collect::<Result<_, _>>()?, room, ending })
    }

    /// Tells how many calls the threads have turned away, whenever it is asked.
    pub fn shed(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let lanes: Vec<_> = self.workers.iter().map(|worker| worker.lane.clone()).collect();
        move || lanes.iter().map(|lane| lane.shed()).sum()
    }

    /// Gives a connection to the thread with the fewest.
    fn serve(&self, arrived: Arrived) {
        let idlest = self.workers.iter().min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        let Some(worker) = idlest else { return };
        worker.load.fetch_add(1, Ordering::Relaxed);
        // A worker that has ended takes no more; the connection closes.
        let _ = worker.connections.send(arrived);
    }

    /// Has the threads finish the calls in flight, as long as they may, and end; waits for that. Listeners close before:
    /// a client that is told to go connects again at once, and a listener that closes just then would reset it.
    pub fn finish(self) {
        self.ending.send_replace(true);
        // All of them, before any is waited for: the time to drain begins with that.
        let ends = |Worker { connections, thread, .. }| {
            drop(connections);
            thread
        };
        let threads: Vec<_> = self.workers.into_iter().map(ends).collect();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a serving thread ended in a panic");
            }
        }
    }
}

fn start(
    at: usize,
    services: Arc<Services>,
    stopping: watch::Receiver<bool>,
    queued: usize,
    drain: Duration,
) -> io::Result<Worker> {
    let (load, lane) = (Arc::new(AtomicUsize::new(0)), Arc::new(Lane::new(queued)));
    let (parked, unparked) = (lane.clone(), lane.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(move || parked.park())
        .on_thread_unpark(move || unparked.unpark())
        .build()?;
    let (connections, incoming) = mpsc::unbounded_channel();
    let working = Working { services, stopping, load: load.clone(), lane: lane.clone() };
    let thread = std::thread::Builder::new()
        .name(format!("keyward-serve-{at}"))
        .spawn(move || runtime.block_on(working.run(incoming, drain)))?;
    Ok(Worker { connections, load, lane, thread })
}

/// What a thread works with.
struct Working {
    services: Arc<Services>,
    stopping: watch::Receiver<bool>,
    load: Arc<AtomicUsize>,
    lane: Arc<Lane>,
}

impl Working {
    /// Serves connections until there are no more to come: the listeners are closed.
    async fn run(self, mut incoming: mpsc::UnboundedReceiver<Arrived>, drain: Duration) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                next = incoming.recv() => {
                    let Some(arrived) = next else { break };
                    let (services, lane) = (self.services.clone(), self.lane.clone());
                    let (stopping, load) = (self.stopping.clone(), self.load.clone());
                    connections.spawn(async move {
                        connection::serve(arrived, services, lane, stopping).await;
                        load.fetch_sub(1, Ordering::Relaxed);
                    });
                }
                Some(_) = connections.join_next() => {}
            }
        }
        let rest = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(drain, rest).await.is_err() {
            tracing::warn!("calls were still in flight when the time to drain was over");
        }
    }
}

/// Waits until `stopping` turns true.
pub(super) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // The sender is gone only when the server is.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// A listener that is to be served.
#[derive(Debug)]
pub struct Opened {
    /// What it is to be.
    pub listener: Listener,
    /// Where connections come from.
    pub open: Open,
    /// Its TLS.
    pub tls: Option<Arc<Tls>>,
    /// What it counts.
    pub counts: Arc<Counts>,
}

/// Accepts the connections of one listener until `stopping` turns true, and those that wait then: who has connected is
/// answered.
pub async fn accept(opened: Opened, workers: &Workers, mut stopping: watch::Receiver<bool>) {
    let Opened { listener, open, tls, counts } = opened;
    let door = Arc::new(Door::of(&listener));
    let mut told = Quiet::default();
    let mut entry = Entry {
        name: listener.name,
        places: Arc::new(Semaphore::new(listener.limits.connections)),
        entrance: Arc::new(Entrance { door, limits: listener.limits, tls, counts, ever: AtomicU64::new(0) }),
        workers,
        told: Quiet::default(),
    };
    loop {
        let accepted = tokio::select! {
            accepted = open.accept() => accepted,
            () = stopped(&mut stopping) => break,
        };
        match accepted {
            Ok((socket, peer)) => entry.admit(socket, peer),
            Err(error) => {
                entry.entrance.counts.refuse(Refused::Failed);
                told.say(|more| {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, listener = entry.name, more, "accepting failed");
                });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    open.close(|socket, peer| entry.admit(socket, peer));
}

/// Where the connections of a listener come in.
struct Entry<'a> {
    name: String,
    places: Arc<Semaphore>,
    entrance: Arc<Entrance>,
    workers: &'a Workers,
    told: Quiet,
}

impl Entry<'_> {
    /// Gives a connection to a worker, where there is room for it.
    fn admit(&mut self, socket: Socket, peer: Option<SocketAddr>) {
        let Some(places) = place(&self.workers.room, &self.places) else {
            self.entrance.counts.refuse(Refused::Full);
            return self.told.say(|more| {
                tracing::warn!(
                    listener = self.name,
                    ?peer,
                    more,
                    "refused: there are as many connections already as there may be"
                );
            });
        };
        let (entrance, counted) = (self.entrance.clone(), self.entrance.counts.connected());
        self.workers.serve(Arrived { socket, peer, entrance, _places: places, _counted: counted });
    }
}

fn place(room: &Arc<Semaphore>, places: &Arc<Semaphore>) -> Option<[OwnedSemaphorePermit; 2]> {
    Some([places.clone().try_acquire_owned().ok()?, room.clone().try_acquire_owned().ok()?])
}

/// Says a thing now and then, and how often it was left unsaid.
#[derive(Default)]
struct Quiet {
    said: Option<Instant>,
    unsaid: u64,
}

impl Quiet {
    fn say(&mut self, say: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.said.is_some_and(|said| now - said < TELL_EVERY) {
            self.unsaid += 1;
            return;
        }
        self.said = Some(now);
        say(std::mem::take(&mut self.unsaid));
    }
}
