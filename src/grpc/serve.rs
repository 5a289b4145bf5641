//! Connections: an accept loop of our own, and one single-threaded runtime per core to serve them.
//!
//! The work-stealing scheduler halves a server of small messages, so each connection stays on the thread that
//! it was given to: the one with the fewest. The limits of HTTP/2 that tonic leaves open are set here.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
};

use super::{
    gate::{Door, Services},
    io::OneBuffer,
};

const MAX_HEADERS: u32 = 16 * 1024;
/// Streams that the server had to reset for the peer's errors, before the connection goes (CVE-2025-8671).
const MAX_ERROR_RESETS: usize = 1024;
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a peer may take to say that it speaks HTTP/2.
const PREFACE_PATIENCE: Duration = Duration::from_secs(10);
const PREFACE_PAUSE: Duration = Duration::from_millis(10);
/// How many connections there may be by each door, over all threads.
const MAX_CONNECTIONS: usize = 10_000;
/// How long to leave the listener alone when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a peer may do on one connection.
struct Limits {
    /// Calls at once.
    streams: u32,
    /// Calls that it took back before we looked at them (CVE-2023-44487).
    pending_resets: usize,
}

impl Limits {
    const fn of(door: Door) -> Limits {
        match door {
            Door::All => Limits { streams: 256, pending_resets: 20 },
            // All clients of an Envoy share a few connections, and Envoy takes a call back whenever a client goes
            // away or its patience of 200 ms ends: a short stall must not cost the connection.
            Door::Envoy => Limits { streams: 1024, pending_resets: 1024 },
        }
    }
}

/// A connection, and its place among those of its door.
struct Arrived {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    door: Door,
    _place: OwnedSemaphorePermit,
}

struct Worker {
    connections: mpsc::UnboundedSender<Arrived>,
    load: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

/// The threads that serve connections.
pub struct Workers {
    workers: Vec<Worker>,
    /// Places for the connections of each door: a full one must not close another.
    places: [Arc<Semaphore>; 2],
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `count` threads. When `stopping` turns true they finish the calls in flight, for `drain` at the
    /// most, and end.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        count: usize,
        services: &Arc<Services>,
        stopping: &watch::Receiver<bool>,
        drain: Duration,
    ) -> io::Result<Workers> {
        let workers = (0..count.max(1)).map(|at| start(at, services.clone(), stopping.clone(), drain));
        let places = [(); 2].map(|()| Arc::new(Semaphore::new(MAX_CONNECTIONS)));
        Ok(Workers { workers: workers.collect::<Result<_, _>>()?, places })
    }

    /// Gives a connection to the thread with the fewest.
    fn serve(&self, stream: TcpStream, peer: SocketAddr, door: Door) {
        let Ok(place) = self.places[door as usize].clone().try_acquire_owned() else {
            return tracing::warn!(%peer, ?door, "refused: there are {MAX_CONNECTIONS} connections already");
        };
        let idlest = self.workers.iter().min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        let (Some(worker), Ok(stream)) = (idlest, stream.into_std()) else {
            return;
        };
        worker.load.fetch_add(1, Ordering::Relaxed);
        // A worker that has ended takes no more; the connection closes.
        let _ = worker.connections.send(Arrived { stream, peer, door, _place: place });
    }

    /// Waits until every thread has ended.
    pub fn join(self) {
        for Worker { connections, thread, .. } in self.workers {
            drop(connections);
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
    drain: Duration,
) -> io::Result<Worker> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (connections, incoming) = mpsc::unbounded_channel();
    let load = Arc::new(AtomicUsize::new(0));
    let counted = load.clone();
    let thread = std::thread::Builder::new()
        .name(format!("keyward-serve-{at}"))
        .spawn(move || runtime.block_on(work(incoming, services, stopping, counted, drain)))?;
    Ok(Worker { connections, load, thread })
}

async fn work(
    mut incoming: mpsc::UnboundedReceiver<Arrived>,
    services: Arc<Services>,
    mut stopping: watch::Receiver<bool>,
    load: Arc<AtomicUsize>,
    drain: Duration,
) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            next = incoming.recv() => {
                let Some(arrived) = next else { break };
                let (services, stopping, load) = (services.clone(), stopping.clone(), load.clone());
                connections.spawn(async move {
                    connection(arrived, services, stopping).await;
                    load.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Some(_) = connections.join_next() => {}
            () = stopped(&mut stopping) => break,
        }
    }
    let rest = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, rest).await.is_err() {
        tracing::warn!("calls were still in flight when the time to drain was over");
    }
}

async fn connection(arrived: Arrived, services: Arc<Services>, mut stopping: watch::Receiver<bool>) {
    let Arrived { stream, peer, door, _place } = arrived;
    let stream = match TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => {
            return tracing::warn!(error = &error as &dyn std::error::Error, "a connection was lost");
        }
    };
    if !matches!(tokio::time::timeout(PREFACE_PATIENCE, preface(&stream)).await, Ok(Ok(true))) {
        return tracing::debug!(%peer, "a connection sent no HTTP/2 preface");
    }
    let service = service_fn(move |request: Request<Incoming>| {
        let services = services.clone();
        async move { Ok::<_, Infallible>(services.answer(request, peer, door).await) }
    });
    let limits = Limits::of(door);
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_PATIENCE)
        .serve_connection(OneBuffer::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // Peers that vanish or speak another protocol are everyday.
        tracing::debug!(error = &error as &dyn std::error::Error, %peer, "a connection ended with an error");
    }
}

/// Waits until `stopping` turns true.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // The sender is gone only when the server is.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Waits for the 24 bytes with which HTTP/2 begins (RFC 9113, section 3.4), without taking them; false when the
/// peer ends before.
async fn preface(stream: &TcpStream) -> io::Result<bool> {
    const LENGTH: usize = 24;
    let mut bytes = [0; LENGTH];
    loop {
        match stream.peek(&mut bytes).await? {
            0 => return Ok(false),
            LENGTH => return Ok(true),
            // What is there already would be told again at once.
            _ => tokio::time::sleep(PREFACE_PAUSE).await,
        }
    }
}

/// Accepts the connections of one door until `stopping` turns true.
pub async fn accept(
    listener: TcpListener,
    door: Door,
    workers: &Workers,
    mut stopping: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stopping) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Small answers must not wait to be joined by others.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(error = &error as &dyn std::error::Error, "TCP_NODELAY was not set");
                }
                workers.serve(stream, peer, door);
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "accepting failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
