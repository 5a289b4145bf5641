//! One connection from its first byte to its last: TLS, the limits of HTTP/2 that tonic leaves open, its age.

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
    Limits,
    budget::ConnectionBudget,
    certificate::Certificate,
    counts::{Connected, Counts, Refused},
    socket::{Socket, Stream},
    tls::{self, Tls},
};

use super::{
    admission::{Door, Visitor},
    early_shed::EarlyShed,
    gate::Services,
    io::OneBuffer,
    load::{Calls, ConnectionQueue, Lane},
    outgoing::{ConnectionSendBudget, PERIOD},
    reply::Reply,
    rpc,
    sending::{SendBody, Streams},
    serve::stopped,
    status::overloaded,
    watches::{Draining, LongCalls},
};

/// Streams that the server had to reset for the peer's errors, before the connection goes (CVE-2025-8671).
const MAX_ERROR_RESETS: usize = 1024;
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(5);
/// What HTTP/2 may hold of the answers of one stream, beyond what its peer has taken.
const MAX_STREAM_BUFFER: usize = 64 << 10;
/// What a peer may send of a message, and of all messages, before it is read: HTTP/2 keeps so much for each connection.
/// A message of 4 MiB takes 32 round trips.
const WINDOW: u32 = 128 << 10;
/// How long a handshake may take once the server stops. Whoever connected just before has a call on its way.
const LAST_HANDSHAKE: Duration = Duration::from_secs(1);
/// How long calls may go on after their connection has said that it ends: as long as the longest of them may take.
const LAST_CALLS: Duration = Duration::from_secs(600);

/// A listener, as its connections know it.
#[derive(Debug)]
pub(super) struct Entrance {
    pub(super) door: Arc<Door>,
    pub(super) limits: Limits,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) counts: Arc<Counts>,
    /// How many connections there were: the age of each is spread by it.
    pub(super) ever: AtomicU64,
}

impl Entrance {
    /// How old the next connection may become. The golden ratio spreads the ages evenly however many there are.
    fn age(&self) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a rounded age does as well")]
        let number = self.ever.fetch_add(1, Ordering::Relaxed) as f64;
        let spread = (number * 0.618_033_988_749_895).fract();
        self.limits.age.mul_f64(0.9 + 0.2 * spread)
    }
}

/// A connection, and its places among those of its listener and of the process.
pub(super) struct Arrived {
    pub(super) socket: Socket,
    pub(super) peer: Option<SocketAddr>,
    pub(super) entrance: Arc<Entrance>,
    pub(super) _places: [OwnedSemaphorePermit; 2],
    pub(super) _counted: Connected,
}

/// What the first bytes have shown.
struct Greeted {
    bytes: OneBuffer,
    certificate: Option<Certificate>,
}

/// Serves a connection until it ends, or until `stopping` turns true and its calls have ended.
pub(super) async fn serve(
    arrived: Arrived,
    services: Arc<Services>,
    lane: Arc<Lane>,
    mut stopping: watch::Receiver<bool>,
) {
    let Arrived { socket, peer, entrance, _places, _counted } = arrived;
    let greeted = tokio::select! {
        greeted = greet(socket, entrance.tls.as_deref()) => greeted,
        () = patience(entrance.limits.handshake, &mut stopping) => Err(Refused::Timeout),
    };
    let Greeted { bytes, certificate } = match greeted {
        Ok(greeted) => greeted,
        Err(why) => {
            entrance.counts.refuse(why);
            return tracing::debug!(peer = shown(peer), why = why.as_str(), "a connection was not served");
        }
    };
    let ends = certificate.as_ref().map(|certificate| certificate.ends);
    let visitor = Visitor {
        door: entrance.door.clone(),
        peer: peer.map(|peer| peer.ip().to_canonical()),
        identity: certificate.and_then(|certificate| entrance.door.identify(&certificate)),
        memory: crate::engine::known::Memory::default(),
        watches: LongCalls::default(),
        memory_budget: ConnectionBudget::new(services.memory.clone()),
        proven: Arc::default(),
    };
    // A certificate proves nothing beyond its end.
    let now = services.now().as_micros().div_euclid(1_000_000);
    let left = ends.map(|ends| Duration::from_secs(u64::try_from(ends - now).unwrap_or(0)));
    let age = entrance.age();
    let age = left.map_or(age, |left| age.min(left));
    speak(bytes, services, visitor, lane, &entrance.limits, age, stopping).await;
}

/// Waits until a connection should have said who it is.
async fn patience(handshake: Duration, stopping: &mut watch::Receiver<bool>) {
    let last = async {
        stopped(stopping).await;
        tokio::time::sleep(LAST_HANDSHAKE).await;
    };
    tokio::select! {
        () = tokio::time::sleep(handshake) => {}
        () = last => {}
    }
}

fn shown(peer: Option<SocketAddr>) -> Option<tracing::field::DisplayValue<SocketAddr>> {
    peer.map(tracing::field::display)
}

/// TLS, where there is any, and the preface of HTTP/2.
async fn greet(socket: Socket, tls: Option<&Tls>) -> Result<Greeted, Refused> {
    let (stream, certificate) = enter(socket, tls).await.map_err(|error| {
        tracing::debug!(error = &error as &dyn std::error::Error, "a connection was not agreed on");
        Refused::Tls
    })?;
    match OneBuffer::open(stream).await {
        Ok(Some(bytes)) => Ok(Greeted { bytes, certificate }),
        Ok(None) | Err(_) => Err(Refused::Protocol),
    }
}

async fn enter(socket: Socket, tls: Option<&Tls>) -> io::Result<(Stream, Option<Certificate>)> {
    Ok(match (socket, tls) {
        (Socket::Unix(stream), _) => (Stream::Unix(UnixStream::from_std(stream)?), None),
        (Socket::Tcp(stream), None) => (Stream::Tcp(TcpStream::from_std(stream)?), None),
        (Socket::Tcp(stream), Some(tls)) => {
            let stream = tls.accept(TcpStream::from_std(stream)?).await?;
            let certificate = tls::shown(&stream);
            (Stream::Tls(Box::new(stream)), certificate)
        }
    })
}

async fn speak(
    mut bytes: OneBuffer,
    services: Arc<Services>,
    visitor: Visitor,
    lane: Arc<Lane>,
    limits: &Limits,
    age: Duration,
    mut stopping: watch::Receiver<bool>,
) {
    let (calls, peer, watches) = (Arc::new(Calls::default()), visitor.peer, visitor.watches.clone());
    let counted = calls.clone();
    let queue = ConnectionQueue::new(lane, calls.clone(), visitor.proven.clone());
    bytes.shed_early(EarlyShed::new(queue.clone()));
    let queued = queue.clone();
    let unsent = ConnectionSendBudget::new(services.outgoing.clone());
    let sent = unsent.clone();
    // One count a call, on this connection's own memory, keeps all of it alive.
    let here = Arc::new((services, visitor));
    let service = service_fn(move |request: Request<Incoming>| {
        let (here, call, unsent) = (here.clone(), counted.begin(), sent.clone());
        let turn = if unsent.has_room() {
            queued.queue(rpc::is_check(request.uri().path().as_bytes()))
        } else {
            queued.turn_away();
            None
        };
        // Moved about as a pointer: each call is a task, and is moved several times on the way there.
        Box::pin(async move {
            let (services, visitor) = &*here;
            let answer = match turn {
                Some(turn) => services.answer(request, visitor, turn.begin()).await,
                None => overloaded().into_http().map(Reply::Any),
            };
            Ok::<_, Infallible>(SendBody::respond(answer, &unsent, call))
        })
    });
    let connection = http2::Builder::new(Streams(unsent.clone()))
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(limits.header_bytes)
        .max_send_buf_size(MAX_STREAM_BUFFER)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_PATIENCE)
        // No client of gRPC reads it, and every answer would pay for it.
        .auto_date_header(false)
        .serve_connection(bytes, service);
    tokio::pin!(connection);
    let serving = async {
        tokio::select! {
            ended = settled(connection.as_mut(), &queue) => return ended,
            () = over(&calls, limits.idle, age, &mut stopping) => {}
        }
        connection.as_mut().graceful_shutdown();
        watches.drain(if *stopping.borrow() { Draining::Stopping } else { Draining::Aged });
        tokio::time::timeout(LAST_CALLS, settled(connection.as_mut(), &queue)).await.unwrap_or(Ok(()))
    };
    let ended = tokio::select! {
        ended = serving => ended,
        () = overdue(&unsent) => {
            let peer = peer.map(tracing::field::display);
            return tracing::debug!(peer, "connection closed: peer does not read its answers");
        }
    };
    if let Err(error) = ended {
        // Peers that vanish or speak another protocol are everyday.
        let peer = peer.map(tracing::field::display);
        tracing::debug!(error = &error as &dyn std::error::Error, peer, "a connection ended with an error");
    }
}

/// Runs HTTP/2 until it ends. Whenever it waits it has given out every call that it has accepted.
async fn settled<C: Future>(mut connection: Pin<&mut C>, queue: &ConnectionQueue) -> C::Output {
    poll_fn(|cx| {
        let polled = connection.as_mut().poll(cx);
        queue.settle();
        polled
    })
    .await
}

/// Waits until bytes of the connection's answers have not been taken for minutes. Streams without a window end by
/// themselves long before that.
async fn overdue(unsent: &ConnectionSendBudget) {
    loop {
        tokio::time::sleep(PERIOD).await;
        if unsent.begin_period() {
            return;
        }
    }
}

/// Waits until a connection has had its time: it is old, or idle, or the server stops.
async fn over(calls: &Calls, idle: Duration, age: Duration, stopping: &mut watch::Receiver<bool>) {
    let end = Instant::now() + age;
    let idling = async {
        let mut before = None;
        loop {
            let now = calls.idle_after();
            if now.is_some() && now == before {
                return;
            }
            before = now;
            tokio::time::sleep(idle).await;
        }
    };
    tokio::select! {
        () = idling => {}
        () = tokio::time::sleep_until(end) => {}
        () = stopped(stopping) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Services as Served;

    #[tokio::test]
    async fn a_connection_without_calls_ends_and_one_with_calls_goes_on_until_it_is_old() {
        let (_sender, mut stopping) = watch::channel(false);
        let (idle, age) = (Duration::from_millis(1), Duration::from_millis(50));
        let calls = Arc::new(Calls::default());
        over(&calls, idle, Duration::from_secs(3600), &mut stopping).await;
        let _call = calls.begin();
        let begun = Instant::now();
        over(&calls, idle, age, &mut stopping).await;
        assert!(Instant::now() - begun >= age);
    }

    #[test]
    fn ages_differ_by_up_to_a_tenth_either_way() {
        let limits = Limits::of(Served::all());
        let entrance = Entrance {
            door: Arc::new(Door::of(&crate::transport::Listener::plain(
                "main",
                "127.0.0.1:0",
                Served::all(),
            ))),
            limits,
            tls: None,
            counts: Arc::default(),
            ever: AtomicU64::new(0),
        };
        let mut ages: Vec<_> = (0..100).map(|_| entrance.age().as_secs()).collect();
        ages.sort_unstable();
        assert!(ages[0] >= 3240 && ages[99] <= 3960 && ages[99] - ages[0] > 600, "{ages:?}");
        assert!(ages.windows(2).all(|pair| pair[1] - pair[0] < 30), "no crowd, and no gap: {ages:?}");
    }
}
