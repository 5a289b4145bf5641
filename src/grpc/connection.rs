//! Serves one connection from its first byte to its last: TLS, the HTTP/2 limits that tonic leaves open, and its age.
//!
//! Accepting connections belongs in `serve.rs`, calls in `router.rs`.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioTimer;
use tokio::{
    net::{TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, watch},
    time::Instant,
};

use crate::transport::{
    ConnectionLimits,
    certificate::CertificateInfo,
    listener_metrics::{ConnectionRefusal, ListenerCounters, OpenConnectionGuard},
    memory_budget::ConnectionMemoryBudget,
    socket::{AcceptedSocket, TransportStream},
    tls::{self, ListenerTls},
};

use super::{
    auth::{ConnectionContext, ListenerPolicy},
    connection_io::SingleWriteIo,
    early_shed::EarlyShed,
    load_shed::{ConnectionCalls, ConnectionQueue, WorkerQueue},
    long_calls::{DrainReason, LongCalls},
    response_body::ResponseBody,
    response_sender::{SendBody, StreamExecutor},
    router::Router,
    rpc,
    send_budget::{CHARGE_PERIOD, ConnectionSendBudget},
    shutdown::wait_until_stopping,
    status::overloaded,
};

/// Streams that the server resets for the peer's errors before it ends the connection (CVE-2025-8671).
const MAX_ERROR_RESETS: usize = 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a stream's response that HTTP/2 may buffer.
const MAX_STREAM_BUFFER: usize = 64 << 10;
/// Bytes that a peer may send, per stream and per connection, before they are read. HTTP/2 buffers up to that much, and
/// a message of 4 MiB takes 32 round trips.
const FLOW_CONTROL_WINDOW: u32 = 128 << 10;
/// How long a handshake may take once the server stops: a peer that just connected has a call on its way.
const SHUTDOWN_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long calls may continue after GOAWAY: as long as the longest call may take.
const CONNECTION_DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// The state of a listener that its connections share.
#[derive(Debug)]
pub(super) struct ListenerState {
    pub(super) policy: Arc<ListenerPolicy>,
    pub(super) limits: ConnectionLimits,
    pub(super) tls: Option<Arc<ListenerTls>>,
    pub(super) counters: Arc<ListenerCounters>,
    /// Connections accepted so far; spreads their maximum ages.
    pub(super) accepted_total: AtomicU64,
}

impl ListenerState {
    /// Maximum age of the next connection. The golden ratio spreads the ages evenly, however many there are.
    fn next_max_age(&self) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a rounded age does as well")]
        let count = self.accepted_total.fetch_add(1, Ordering::Relaxed) as f64;
        let spread = (count * 0.618_033_988_749_895).fract();
        self.limits.max_age.mul_f64(0.9 + 0.2 * spread)
    }
}

/// An accepted connection, with its permits of the listener and of the process.
pub(super) struct AcceptedConnection {
    pub(super) socket: AcceptedSocket,
    pub(super) peer: Option<SocketAddr>,
    pub(super) listener: Arc<ListenerState>,
    pub(super) _permits: [OwnedSemaphorePermit; 2],
    pub(super) _open_guard: OpenConnectionGuard,
}

/// A connection after its handshake.
struct HandshakenConnection {
    io: SingleWriteIo,
    certificate: Option<CertificateInfo>,
}

/// Serves a connection until it ends, or until `stopping` turns true and its calls have ended.
pub(super) async fn serve_connection(
    accepted: AcceptedConnection,
    router: Arc<Router>,
    worker_queue: Arc<WorkerQueue>,
    mut stopping: watch::Receiver<bool>,
) {
    let AcceptedConnection { socket, peer, listener, _permits, _open_guard } = accepted;
    let handshaken = tokio::select! {
        handshaken = handshake(socket, listener.tls.as_deref()) => handshaken,
        () = wait_for_handshake_timeout(listener.limits.handshake_timeout, &mut stopping) => Err(ConnectionRefusal::HandshakeTimeout),
    };
    let HandshakenConnection { io, certificate } = match handshaken {
        Ok(handshaken) => handshaken,
        Err(why) => {
            listener.counters.count_refusal(why);
            return tracing::debug!(peer = display_peer(peer), why = why.as_str(), "connection not served");
        }
    };
    let expires_at = certificate.as_ref().map(|certificate| certificate.expires_at);
    let context = ConnectionContext {
        policy: listener.policy.clone(),
        peer: peer.map(|peer| peer.ip().to_canonical()),
        identity: certificate.and_then(|certificate| listener.policy.identify_certificate(&certificate)),
        caller_cache: crate::engine::caller_cache::CallerCache::default(),
        long_calls: LongCalls::default(),
        memory_budget: ConnectionMemoryBudget::new(router.memory_budget.clone()),
        has_proven_caller: Arc::default(),
    };
    // The connection must not outlive the client certificate.
    let now = router.now().as_micros().div_euclid(1_000_000);
    let remaining =
        expires_at.map(|expires_at| Duration::from_secs(u64::try_from(expires_at - now).unwrap_or(0)));
    let max_age = listener.next_max_age();
    let max_age = remaining.map_or(max_age, |remaining| max_age.min(remaining));
    serve_http2(io, router, context, worker_queue, &listener.limits, max_age, stopping).await;
}

/// Waits until the handshake must be complete.
async fn wait_for_handshake_timeout(handshake: Duration, stopping: &mut watch::Receiver<bool>) {
    let after_stop = async {
        wait_until_stopping(stopping).await;
        tokio::time::sleep(SHUTDOWN_HANDSHAKE_TIMEOUT).await;
    };
    tokio::select! {
        () = tokio::time::sleep(handshake) => {}
        () = after_stop => {}
    }
}

fn display_peer(peer: Option<SocketAddr>) -> Option<tracing::field::DisplayValue<SocketAddr>> {
    peer.map(tracing::field::display)
}

/// Accepts TLS, if the listener has it, and reads the HTTP/2 preface.
async fn handshake(
    socket: AcceptedSocket,
    tls: Option<&ListenerTls>,
) -> Result<HandshakenConnection, ConnectionRefusal> {
    let (stream, certificate) = accept_tls(socket, tls).await.map_err(|error| {
        tracing::debug!(error = &error as &dyn std::error::Error, "TLS handshake failed");
        ConnectionRefusal::TlsHandshake
    })?;
    match SingleWriteIo::read_preface(stream).await {
        Ok(Some(io)) => Ok(HandshakenConnection { io, certificate }),
        Ok(None) | Err(_) => Err(ConnectionRefusal::Protocol),
    }
}

async fn accept_tls(
    socket: AcceptedSocket,
    tls: Option<&ListenerTls>,
) -> io::Result<(TransportStream, Option<CertificateInfo>)> {
    Ok(match (socket, tls) {
        (AcceptedSocket::Unix(stream), _) => (TransportStream::Unix(UnixStream::from_std(stream)?), None),
        (AcceptedSocket::Tcp(stream), None) => (TransportStream::Tcp(TcpStream::from_std(stream)?), None),
        (AcceptedSocket::Tcp(stream), Some(tls)) => {
            let stream = tls.accept(TcpStream::from_std(stream)?).await?;
            let certificate = tls::client_certificate(&stream);
            (TransportStream::Tls(Box::new(stream)), certificate)
        }
    })
}

async fn serve_http2(
    mut io: SingleWriteIo,
    router: Arc<Router>,
    context: ConnectionContext,
    worker_queue: Arc<WorkerQueue>,
    limits: &ConnectionLimits,
    max_age: Duration,
    mut stopping: watch::Receiver<bool>,
) {
    let (calls, peer, long_calls) =
        (Arc::new(ConnectionCalls::default()), context.peer, context.long_calls.clone());
    let call_counter = calls.clone();
    let queue = ConnectionQueue::new(worker_queue, calls.clone(), context.has_proven_caller.clone());
    io.enable_early_shed(EarlyShed::new(queue.clone()));
    let call_queue = queue.clone();
    let send_budget = ConnectionSendBudget::new(router.send_budget.clone());
    let connection_budget = send_budget.clone();
    // Each call clones one reference count, in this connection's memory.
    let shared = Arc::new((router, context));
    let service = service_fn(move |request: Request<Incoming>| {
        let (shared, call, send_budget) =
            (shared.clone(), call_counter.track_call(), connection_budget.clone());
        let slot = if send_budget.has_room() {
            call_queue.try_enqueue(rpc::is_check_path(request.uri().path().as_bytes()))
        } else {
            call_queue.reject();
            None
        };
        // Boxed: each call becomes a task and is moved several times on the way.
        Box::pin(async move {
            let (router, context) = &*shared;
            let answer = match slot {
                Some(slot) => router.serve_call(request, context, slot.start_call()).await,
                None => overloaded().into_http().map(ResponseBody::Tonic),
            };
            Ok::<_, Infallible>(SendBody::wrap_response(answer, &send_budget, call))
        })
    });
    let connection = http2::Builder::new(StreamExecutor(send_budget.clone()))
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams)
        .max_pending_accept_reset_streams(limits.max_pending_resets)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(limits.max_header_bytes)
        .max_send_buf_size(MAX_STREAM_BUFFER)
        .initial_stream_window_size(FLOW_CONTROL_WINDOW)
        .initial_connection_window_size(FLOW_CONTROL_WINDOW)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        // gRPC clients do not read the date, and every response would pay for it.
        .auto_date_header(false)
        .serve_connection(io, service);
    tokio::pin!(connection);
    let serving = async {
        tokio::select! {
            result = run_http2(connection.as_mut(), &queue) => return result,
            () = wait_until_expired(&calls, limits.max_idle, max_age, &mut stopping) => {}
        }
        connection.as_mut().graceful_shutdown();
        long_calls.drain(if *stopping.borrow() { DrainReason::Stopping } else { DrainReason::Aged });
        tokio::time::timeout(CONNECTION_DRAIN_TIMEOUT, run_http2(connection.as_mut(), &queue))
            .await
            .unwrap_or(Ok(()))
    };
    let result = tokio::select! {
        result = serving => result,
        () = wait_until_send_stalled(&send_budget) => {
            let peer = peer.map(tracing::field::display);
            return tracing::debug!(peer, "connection closed: peer does not read its responses");
        }
    };
    if let Err(error) = result {
        // Peers that vanish or speak another protocol are common.
        let peer = peer.map(tracing::field::display);
        tracing::debug!(error = &error as &dyn std::error::Error, peer, "connection ended with an error");
    }
}

/// Runs HTTP/2 until it ends. Whenever HTTP/2 waits, it has delivered every call that it accepted.
async fn run_http2<C: Future>(mut connection: Pin<&mut C>, queue: &ConnectionQueue) -> C::Output {
    poll_fn(|cx| {
        let polled = connection.as_mut().poll(cx);
        queue.forget_undelivered();
        polled
    })
    .await
}

/// Waits until response bytes have been unread for minutes. Streams that flow control blocks end long before that.
async fn wait_until_send_stalled(send_budget: &ConnectionSendBudget) {
    loop {
        tokio::time::sleep(CHARGE_PERIOD).await;
        if send_budget.begin_period() {
            return;
        }
    }
}

/// Waits until a connection must drain: it is old or idle, or the server stops.
async fn wait_until_expired(
    calls: &ConnectionCalls,
    max_idle: Duration,
    max_age: Duration,
    stopping: &mut watch::Receiver<bool>,
) {
    let end = Instant::now() + max_age;
    let idling = async {
        let mut before = None;
        loop {
            let now = calls.total_if_idle();
            if now.is_some() && now == before {
                return;
            }
            before = now;
            tokio::time::sleep(max_idle).await;
        }
    };
    tokio::select! {
        () = idling => {}
        () = tokio::time::sleep_until(end) => {}
        () = wait_until_stopping(stopping) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ServiceSet;

    #[tokio::test]
    async fn a_connection_without_calls_ends_and_one_with_calls_goes_on_until_it_is_old() {
        let (_sender, mut stopping) = watch::channel(false);
        let (idle, age) = (Duration::from_millis(1), Duration::from_millis(50));
        let calls = Arc::new(ConnectionCalls::default());
        wait_until_expired(&calls, idle, Duration::from_secs(3600), &mut stopping).await;
        let _call = calls.track_call();
        let started_at = Instant::now();
        wait_until_expired(&calls, idle, age, &mut stopping).await;
        assert!(Instant::now() - started_at >= age);
    }

    #[test]
    fn ages_differ_by_up_to_a_tenth_either_way() {
        let limits = ConnectionLimits::for_services(ServiceSet::all());
        let listener = ListenerState {
            policy: Arc::new(ListenerPolicy::from_settings(
                &crate::transport::ListenerSettings::new_plaintext("main", "127.0.0.1:0", ServiceSet::all()),
            )),
            limits,
            tls: None,
            counters: Arc::default(),
            accepted_total: AtomicU64::new(0),
        };
        let mut ages: Vec<_> = (0..100).map(|_| listener.next_max_age().as_secs()).collect();
        ages.sort_unstable();
        assert!(ages[0] >= 3240 && ages[99] <= 3960 && ages[99] - ages[0] > 600, "{ages:?}");
        assert!(ages.windows(2).all(|pair| pair[1] - pair[0] < 30), "no crowd, and no gap: {ages:?}");
    }
}
