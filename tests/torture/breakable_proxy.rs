//! A stretch of network that can be broken: a TCP proxy with one stable address before a Unix socket, which
//! can be another one from one moment to the next. What is cut is silent: nothing is refused, nothing is closed, and what was on its way arrives late.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    runtime::Handle,
    sync::watch,
};

/// What the network does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetworkCondition {
    /// Nothing gets through to the target.
    pub(crate) cut_there: bool,
    /// Nothing gets through from the target.
    pub(crate) cut_back: bool,
    /// New connections are closed at once.
    pub(crate) refuse: bool,
    /// How much later everything arrives, each way.
    pub(crate) delay: Duration,
}

/// A proxy. It ends with its runtime.
pub(crate) struct BreakableProxy {
    pub(crate) address: SocketAddr,
    state: watch::Sender<(PathBuf, NetworkCondition)>,
    /// Grows when every connection is to end.
    life: Arc<AtomicU64>,
}

impl BreakableProxy {
    /// Listens on this address, and leads to `target`.
    pub(crate) fn open(runtime: &Handle, address: SocketAddr, target: PathBuf) -> BreakableProxy {
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (state, watched) = watch::channel((target, NetworkCondition::default()));
        let life = Arc::new(AtomicU64::new(0));
        let _context = runtime.enter();
        let listener = TcpListener::from_std(listener).unwrap();
        runtime.spawn(accept(listener, watched, life.clone()));
        BreakableProxy { address, state, life }
    }

    /// Leads somewhere else; what is connected is cut off.
    pub(crate) fn retarget(&self, target: &Path) {
        self.state.send_modify(|(now, _)| target.clone_into(now));
        self.reset();
    }

    /// Ends every connection.
    pub(crate) fn reset(&self) {
        self.life.fetch_add(1, Ordering::Relaxed);
        self.state.send_modify(|_| {});
    }

    pub(crate) fn set(&self, weather: NetworkCondition) {
        self.state.send_modify(|(_, now)| *now = weather);
        if weather.refuse {
            self.reset();
        }
    }
}

type ProxyStateReceiver = watch::Receiver<(PathBuf, NetworkCondition)>;

async fn accept(listener: TcpListener, watched: ProxyStateReceiver, life: Arc<AtomicU64>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if !watched.borrow().1.refuse => {
                let born = life.load(Ordering::Relaxed);
                tokio::spawn(connect(stream, watched.clone(), life.clone(), born));
            }
            Ok(_) => {}
            // Out of files, mostly: whoever comes next may have more luck.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Serves a connection until it ends, or everything of its life does.
async fn connect(stream: TcpStream, mut watched: ProxyStateReceiver, life: Arc<AtomicU64>, born: u64) {
    let mut own = watched.clone();
    let ended = async { while life.load(Ordering::Relaxed) == born && own.changed().await.is_ok() {} };
    let serve = async {
        wait_until_passing(&mut watched, |weather| !weather.cut_there && !weather.cut_back).await;
        let target = watched.borrow().0.clone();
        let _ = stream.set_nodelay(true);
        let (from, to) = stream.into_split();
        let (back, there) = UnixStream::connect(target).await?.into_split();
        pump_both(from, there, back, to, &watched).await
    };
    tokio::select! {
        () = ended => {}
        // Both ends learn that it is over when they are dropped; why is nobody's business.
        _ = serve => {}
    }
}

async fn pump_both(
    from: impl AsyncRead + Unpin,
    there: impl AsyncWrite + Unpin,
    back: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    watched: &ProxyStateReceiver,
) -> io::Result<()> {
    let there = pump(from, there, watched.clone(), |weather| !weather.cut_there);
    let back = pump(back, to, watched.clone(), |weather| !weather.cut_back);
    tokio::try_join!(there, back).map(|_| ())
}

/// Carries bytes, and the end of them, while `passes`.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut watched: ProxyStateReceiver,
    passes: impl Fn(NetworkCondition) -> bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await;
        wait_until_passing(&mut watched, &passes).await;
        let delay = watched.borrow().1.delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        match read? {
            0 => return to.shutdown().await,
            bytes => to.write_all(&buffer[..bytes]).await?,
        }
    }
}

/// Waits until the weather lets this through.
async fn wait_until_passing(watched: &mut ProxyStateReceiver, passes: impl Fn(NetworkCondition) -> bool) {
    // The sender lives as long as the link, and the link as long as the run.
    let _ = watched.wait_for(|(_, weather)| passes(*weather)).await;
}
