//! Accepts the connections of each listener and assigns them to serving threads, one single-threaded runtime per core.
//!
//! A single connection belongs in `connection.rs`.
//!
//! Work stealing halves the throughput of a server of small messages. So each connection stays on the thread that it
//! was assigned to: the one with the fewest connections.

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
    ListenerSettings,
    listener_metrics::{ConnectionRefusal, ListenerCounters},
    socket::{AcceptedSocket, OpenListener},
    tls::ListenerTls,
};

use super::{
    auth::ListenerPolicy,
    connection::{self, AcceptedConnection, ListenerState},
    load_shed::WorkerQueue,
    router::Router,
    shutdown::wait_until_stopping,
};

/// Pause after a failed accept; usually the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Minimum interval between log lines about events that may happen many times a second.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

struct WorkerThread {
    connections: mpsc::UnboundedSender<AcceptedConnection>,
    open_connections: Arc<AtomicUsize>,
    queue: Arc<WorkerQueue>,
    thread: JoinHandle<()>,
}

/// The threads that serve connections.
pub struct WorkerPool {
    workers: Vec<WorkerThread>,
    /// Permits for the connections of all listeners together.
    connection_permits: Arc<Semaphore>,
    /// Signals connections to drain.
    stopping: watch::Sender<bool>,
}

impl std::fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerPool").field("threads", &self.workers.len()).finish_non_exhaustive()
    }
}

/// Limits of the worker threads.
#[derive(Clone, Copy, Debug)]
pub struct WorkerCapacity {
    /// Number of threads.
    pub threads: usize,
    /// Maximum number of connections of all listeners.
    pub max_connections: usize,
    /// Maximum number of waiting calls per thread.
    pub max_queued: usize,
    /// Time limit for calls in flight at shutdown.
    pub drain_timeout: Duration,
}

impl WorkerPool {
    /// Starts the threads, each with its own runtime.
    ///
    /// # Errors
    /// Fails if the operating system cannot start a thread.
    pub fn start(capacity: WorkerCapacity, router: &Arc<Router>) -> io::Result<WorkerPool> {
        let WorkerCapacity { threads, max_connections, max_queued, drain_timeout } = capacity;
        let (stop_sender, stopping) = watch::channel(false);
        let workers = (0..threads.max(1))
            .map(|number| start_worker(number, router.clone(), stopping.clone(), max_queued, drain_timeout));
        let connection_permits = Arc::new(Semaphore::new(max_connections));
        Ok(WorkerPool {
            workers: workers.collect::<Result<_, _>>()?,
            connection_permits,
            stopping: stop_sender,
        })
    }

    /// Returns a reader of the number of calls that the threads have refused.
    pub(crate) fn shed_counter(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let queues: Vec<_> = self.workers.iter().map(|worker| worker.queue.clone()).collect();
        move || queues.iter().map(|queue| queue.shed_calls()).sum()
    }

    /// Assigns a connection to the thread with the fewest.
    fn assign(&self, accepted: AcceptedConnection) {
        let idlest = self.workers.iter().min_by_key(|worker| worker.open_connections.load(Ordering::Relaxed));
        let Some(worker) = idlest else { return };
        worker.open_connections.fetch_add(1, Ordering::Relaxed);
        // If the worker has ended, the connection is dropped and closes.
        let _ = worker.connections.send(accepted);
    }

    /// Lets the threads finish the calls in flight within the drain timeout, and joins them. Listeners must be closed
    /// before: a client reconnects at once after GOAWAY, and a closing listener would reset it.
    pub(crate) fn drain_and_join(self) {
        self.stopping.send_replace(true);
        // Signal all threads before joining any: the drain timeout starts with the signal.
        let into_thread = |WorkerThread { connections, thread, .. }| {
            drop(connections);
            thread
        };
        let threads: Vec<_> = self.workers.into_iter().map(into_thread).collect();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("serving thread panicked");
            }
        }
    }
}

fn start_worker(
    number: usize,
    router: Arc<Router>,
    stopping: watch::Receiver<bool>,
    max_queued: usize,
    drain_timeout: Duration,
) -> io::Result<WorkerThread> {
    let (open_connections, queue) = (Arc::new(AtomicUsize::new(0)), Arc::new(WorkerQueue::new(max_queued)));
    let (park_queue, unpark_queue) = (queue.clone(), queue.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(move || park_queue.on_park())
        .on_thread_unpark(move || unpark_queue.on_unpark())
        .build()?;
    let (connections, incoming) = mpsc::unbounded_channel();
    let worker_loop =
        WorkerLoop { router, stopping, open_connections: open_connections.clone(), queue: queue.clone() };
    let thread = std::thread::Builder::new()
        .name(format!("keyward-serve-{number}"))
        .spawn(move || runtime.block_on(worker_loop.run(incoming, drain_timeout)))?;
    Ok(WorkerThread { connections, open_connections, queue, thread })
}

/// The state of a serving thread.
struct WorkerLoop {
    router: Arc<Router>,
    stopping: watch::Receiver<bool>,
    open_connections: Arc<AtomicUsize>,
    queue: Arc<WorkerQueue>,
}

impl WorkerLoop {
    /// Serves connections until the listeners are closed and no more can come.
    async fn run(self, mut incoming: mpsc::UnboundedReceiver<AcceptedConnection>, drain_timeout: Duration) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                next = incoming.recv() => {
                    let Some(accepted) = next else { break };
                    let (router, queue) = (self.router.clone(), self.queue.clone());
                    let stopping = self.stopping.clone();
                    let open = OpenConnection(self.open_connections.clone());
                    connections.spawn(async move {
                        let _open = open;
                        connection::serve_connection(accepted, router, queue, stopping).await;
                    });
                }
                Some(_) = connections.join_next() => {}
            }
        }
        let rest = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(drain_timeout, rest).await.is_err() {
            tracing::warn!("drain timed out: calls still in flight");
        }
    }
}

/// One of a thread's open connections. It stops counting when its task ends, also in a panic: otherwise the thread
/// would look busier forever and get fewer connections than the others.
struct OpenConnection(Arc<AtomicUsize>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A listener that is bound but not served yet.
#[derive(Debug)]
pub struct BoundListener {
    /// Settings of the listener.
    pub settings: ListenerSettings,
    /// The listening socket.
    pub socket: OpenListener,
    /// TLS state; `None` for plaintext.
    pub tls: Option<Arc<ListenerTls>>,
    /// Metrics of the listener.
    pub counters: Arc<ListenerCounters>,
}

/// Accepts the connections of one listener until `stopping` turns true, including those that are pending then.
pub async fn accept_connections(
    bound: BoundListener,
    workers: &WorkerPool,
    mut stopping: watch::Receiver<bool>,
) {
    let BoundListener { settings: listener, socket: listening_socket, tls, counters } = bound;
    let policy = Arc::new(ListenerPolicy::from_settings(&listener));
    let mut accept_errors = AcceptLogThrottle::default();
    let mut acceptor = ConnectionAcceptor {
        name: listener.name,
        permits: Arc::new(Semaphore::new(listener.limits.max_connections)),
        listener: Arc::new(ListenerState {
            policy,
            limits: listener.limits,
            tls,
            counters,
            accepted_total: AtomicU64::new(0),
        }),
        workers,
        log_throttle: AcceptLogThrottle::default(),
    };
    loop {
        let accepted = tokio::select! {
            accepted = listening_socket.accept() => accepted,
            () = wait_until_stopping(&mut stopping) => break,
        };
        match accepted {
            Ok((socket, peer)) => acceptor.accept_connection(socket, peer),
            Err(error) => {
                acceptor.listener.counters.count_refusal(ConnectionRefusal::AcceptFailed);
                accept_errors.log(|more| {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, listener = acceptor.name, more, "accepting failed");
                });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    listening_socket.accept_pending_and_close(|socket, peer| acceptor.accept_connection(socket, peer));
}

/// Accepts the connections of one listener, within its limits.
struct ConnectionAcceptor<'a> {
    name: String,
    permits: Arc<Semaphore>,
    listener: Arc<ListenerState>,
    workers: &'a WorkerPool,
    log_throttle: AcceptLogThrottle,
}

impl ConnectionAcceptor<'_> {
    /// Assigns a connection to a worker, if both limits allow it.
    fn accept_connection(&mut self, socket: AcceptedSocket, peer: Option<SocketAddr>) {
        let Some(permits) = acquire_permits(&self.workers.connection_permits, &self.permits) else {
            self.listener.counters.count_refusal(ConnectionRefusal::LimitReached);
            return self.log_throttle.log(|more| {
                tracing::warn!(listener = self.name, ?peer, more, "connection refused: limit reached");
            });
        };
        let (listener, open_guard) = (self.listener.clone(), self.listener.counters.track_connection());
        self.workers.assign(AcceptedConnection {
            socket,
            peer,
            listener,
            _permits: permits,
            _open_guard: open_guard,
        });
    }
}

fn acquire_permits(
    connection_permits: &Arc<Semaphore>,
    permits: &Arc<Semaphore>,
) -> Option<[OwnedSemaphorePermit; 2]> {
    Some([permits.clone().try_acquire_owned().ok()?, connection_permits.clone().try_acquire_owned().ok()?])
}

/// Limits how often a line is logged, and counts the suppressed lines.
#[derive(Default)]
struct AcceptLogThrottle {
    last_logged: Option<Instant>,
    suppressed: u64,
}

impl AcceptLogThrottle {
    fn log(&mut self, write: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.last_logged.is_some_and(|last| now - last < LOG_INTERVAL) {
            self.suppressed += 1;
            return;
        }
        self.last_logged = Some(now);
        write(std::mem::take(&mut self.suppressed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_whose_task_panics_does_not_count_any_more() {
        let open_connections = Arc::new(AtomicUsize::new(2));
        let open = OpenConnection(open_connections.clone());
        let task = tokio::spawn(async move {
            let _open = open;
            panic!("as a fault in a connection would");
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!(open_connections.load(Ordering::Relaxed), 1);
    }
}
