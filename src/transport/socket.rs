//! Binds TCP and Unix sockets before the server is ready, and accepts connections when it is.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream},
};
use tokio_rustls::server::TlsStream;

use super::ListenAddress;

/// Length of the queue of connections that are not accepted yet.
const BACKLOG: u32 = 1024;

/// Why an address cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The operating system returned an error.
    #[error("{}{}", .0, suggest_remedy(.0))]
    System(#[from] io::Error),
    /// The host name cannot be looked up.
    #[error("its host cannot be looked up: {0}; name an address of this machine, such as 127.0.0.1")]
    Lookup(#[source] io::Error),
    /// The host name resolves to no address.
    #[error("it has no address")]
    NoAddress,
    /// Another process accepts connections on the socket file.
    #[error("another server answers there")]
    InUse,
    /// The path exists and is no socket.
    #[error("there is a file that is no socket; move it away, or name another path")]
    NotASocket,
    /// The address is reachable from other machines, and the listener is plaintext.
    #[error(
        "{0} is not this machine alone, and without TLS tokens would be readable on the way: give the listener \
         [listener.tls], or allow it with --insecure (KEYWARD_INSECURE=true, insecure = true) where something else \
         protects the network"
    )]
    PlaintextExposed(SocketAddr),
}

/// Advice for an error of the operating system, if its kind allows any.
fn suggest_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; is another server running there?",
        io::ErrorKind::AddrNotAvailable => "; name an address of this machine",
        io::ErrorKind::NotFound => "; create its folder, or name another path",
        _ => "",
    }
}

/// Whether other machines can reach an address.
#[must_use]
pub(crate) fn is_exposed_address(address: &SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}

/// The first address of `host:port` that other machines can reach. The DNS lookup may take seconds.
///
/// # Errors
/// If the name cannot be resolved.
pub(crate) fn find_exposed_address(address: &str) -> io::Result<Option<SocketAddr>> {
    Ok(address.to_socket_addrs()?.find(is_exposed_address))
}

/// A bound address that does not accept connections yet.
#[derive(Debug)]
pub enum BoundSocket {
    /// A TCP socket, bound to its port.
    Tcp(TcpSocket),
    /// A Unix socket, bound to its file.
    Unix(UnixSocket, SocketFile),
}

impl BoundSocket {
    /// Binds an address. Unless plaintext may leave the machine, an address that others can reach is an error.
    ///
    /// # Errors
    /// If the address cannot be bound, or must not be.
    pub async fn bind(address: &ListenAddress, may_be_exposed: bool) -> Result<BoundSocket, BindError> {
        match address {
            ListenAddress::Tcp(address) => bind_tcp(address, may_be_exposed).await.map(BoundSocket::Tcp),
            ListenAddress::Unix { path, mode } => bind_unix(path, *mode).await,
        }
    }

    /// Starts listening for connections.
    ///
    /// # Errors
    /// If the operating system returns an error.
    pub fn listen(self) -> io::Result<OpenListener> {
        Ok(match self {
            BoundSocket::Tcp(socket) => OpenListener::Tcp(socket.listen(BACKLOG)?),
            BoundSocket::Unix(socket, file) => OpenListener::Unix(socket.listen(BACKLOG)?, file),
        })
    }
}

async fn bind_tcp(address: &str, may_be_exposed: bool) -> Result<TcpSocket, BindError> {
    let mut last = BindError::NoAddress;
    for address in tokio::net::lookup_host(address).await.map_err(BindError::Lookup)? {
        if !may_be_exposed && is_exposed_address(&address) {
            return Err(BindError::PlaintextExposed(address));
        }
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        match socket.bind(address) {
            Ok(()) => return Ok(socket),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

async fn bind_unix(path: &Path, mode: u32) -> Result<BoundSocket, BindError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket),
        // A killed server leaves its file; if a process answers, the file is in use.
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => return Err(BindError::InUse),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) => return Err(error.into()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    // Connections are possible only after `listen`, when these permissions apply.
    let file = SocketFile::from_path(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(BoundSocket::Unix(socket, file))
}

/// A Unix socket, bound to its file.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file, to recognize a replacement.
    device_and_inode: (u64, u64),
}

impl SocketFile {
    fn from_path(path: &Path) -> io::Result<SocketFile> {
        let found = std::fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), device_and_inode: (found.dev(), found.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.device_and_inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, path = %self.path.display(), "socket file not removed");
        }
    }
}

/// The address that a listener is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalAddress {
    /// An address with its port.
    Tcp(SocketAddr),
    /// A Unix socket, bound to its file.
    Unix(PathBuf),
}

impl LocalAddress {
    /// The address of a TCP listener.
    #[must_use]
    pub fn as_tcp(&self) -> Option<SocketAddr> {
        match self {
            LocalAddress::Tcp(address) => Some(*address),
            LocalAddress::Unix(_) => None,
        }
    }
}

impl fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LocalAddress::Tcp(address) => address.fmt(f),
            LocalAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket that accepts connections.
#[derive(Debug)]
pub enum OpenListener {
    /// A TCP socket, without TLS so far.
    Tcp(TcpListener),
    /// A Unix socket, bound to its file.
    Unix(UnixListener, SocketFile),
}

impl OpenListener {
    /// The address that the listener is bound to.
    ///
    /// # Errors
    /// If the operating system returns an error.
    pub fn local_address(&self) -> io::Result<LocalAddress> {
        Ok(match self {
            OpenListener::Tcp(listener) => LocalAddress::Tcp(listener.local_addr()?),
            OpenListener::Unix(_, file) => LocalAddress::Unix(file.path.clone()),
        })
    }

    /// Waits for the next connection, which belongs to no runtime yet. Returns the peer's address; a Unix socket has
    /// none.
    ///
    /// # Errors
    /// If accepting fails; a later attempt may succeed.
    pub(crate) async fn accept(&self) -> io::Result<(AcceptedSocket, Option<SocketAddr>)> {
        match self {
            OpenListener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((AcceptedSocket::from_tcp(stream.into_std()?), Some(peer)))
            }
            OpenListener::Unix(listener, _) => {
                Ok((AcceptedSocket::Unix(listener.accept().await?.0.into_std()?), None))
            }
        }
    }

    /// Accepts the connections that are already in the queue, then closes.
    ///
    /// Closing the listener would reset them, and their callers could not know that their calls never ran.
    pub(crate) fn accept_pending_and_close(self, mut take: impl FnMut(AcceptedSocket, Option<SocketAddr>)) {
        let ended = match self {
            OpenListener::Tcp(listener) => listener.into_std().map(|listener| {
                accept_pending(|| {
                    let (stream, peer) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    take(AcceptedSocket::from_tcp(stream), Some(peer));
                    Ok(())
                })
            }),
            OpenListener::Unix(listener, _file) => listener.into_std().map(|listener| {
                accept_pending(|| {
                    let (stream, _) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    take(AcceptedSocket::Unix(stream), None);
                    Ok(())
                })
            }),
        };
        if let Err(error) = ended {
            tracing::debug!(error = &error as &dyn std::error::Error, "queued connections not accepted");
        }
    }
}

/// Accepts until the queue is empty or a limit is reached. A connection that failed does not affect the others.
fn accept_pending(mut accept: impl FnMut() -> io::Result<()>) {
    for _ in 0..BACKLOG {
        match accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "queued connection not accepted");
            }
            Ok(()) => {}
        }
    }
}

/// A connection that is not registered with a runtime.
#[derive(Debug)]
pub(crate) enum AcceptedSocket {
    /// A TCP socket, without TLS so far.
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl AcceptedSocket {
    /// Small responses must not wait for more bytes (Nagle's algorithm).
    fn from_tcp(stream: std::net::TcpStream) -> AcceptedSocket {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = &error as &dyn std::error::Error, "TCP_NODELAY not set");
        }
        AcceptedSocket::Tcp(stream)
    }
}

/// The byte stream of a connection.
pub(crate) enum TransportStream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

impl fmt::Debug for TransportStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TransportStream")
    }
}

macro_rules! delegate_poll {
    ($self:ident, $poll:ident($($argument:ident),*)) => {
        match $self.get_mut() {
            TransportStream::Tcp(stream) => Pin::new(stream).$poll($($argument),*),
            TransportStream::Tls(stream) => Pin::new(stream).$poll($($argument),*),
            TransportStream::Unix(stream) => Pin::new(stream).$poll($($argument),*),
        }
    };
}

impl AsyncRead for TransportStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        delegate_poll!(self, poll_read(cx, buffer))
    }
}

impl AsyncWrite for TransportStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        delegate_poll!(self, poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate_poll!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate_poll!(self, poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> ListenAddress {
        ListenAddress::Unix { path: path.to_owned(), mode: 0o600 }
    }

    #[tokio::test]
    async fn a_socket_file_has_its_mode_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let open = BoundSocket::bind(&unix(&path), false).await.unwrap().listen().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(open.local_address().unwrap().to_string(), format!("unix:{}", path.display()));
        assert!(matches!(BoundSocket::bind(&unix(&path), false).await, Err(BindError::InUse)));
        drop(open);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn who_has_connected_is_accepted_by_a_listener_that_closes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let open = BoundSocket::bind(&unix(&path), false).await.unwrap().listen().unwrap();
        let _unix = [(); 2].map(|()| std::os::unix::net::UnixStream::connect(&path).unwrap());
        let mut taken = 0;
        open.accept_pending_and_close(|_, _| taken += 1);
        assert_eq!(taken, 2);
        assert!(!path.exists());
        let address = ListenAddress::Tcp("127.0.0.1:0".to_owned());
        let open = BoundSocket::bind(&address, false).await.unwrap().listen().unwrap();
        let at = open.local_address().unwrap().as_tcp().unwrap();
        let clients = [(); 3].map(|()| std::net::TcpStream::connect(at).unwrap());
        let mut peers = Vec::new();
        open.accept_pending_and_close(|_, peer| peers.extend(peer));
        assert_eq!(peers, clients.map(|client| client.local_addr().unwrap()));
        assert!(std::net::TcpStream::connect(at).is_err());
    }

    #[tokio::test]
    async fn what_a_killed_server_left_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let taken = BoundSocket::bind(&unix(&path), false).await.unwrap();
        // Another server has made its own meanwhile.
        std::fs::remove_file(&path).unwrap();
        let _others = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(taken);
        assert!(path.exists(), "another's socket stays");
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(BoundSocket::bind(&unix(&file), false).await, Err(BindError::NotASocket)));
        assert!(file.exists());
    }

    #[tokio::test]
    async fn plaintext_stays_on_this_machine_unless_it_may_leave() {
        for inside in ["127.0.0.1:0", "[::1]:0", "localhost:0"] {
            let taken = BoundSocket::bind(&ListenAddress::Tcp(inside.to_owned()), false).await;
            assert!(!matches!(taken, Err(BindError::PlaintextExposed(_))), "{inside}");
        }
        for outside in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            let address = ListenAddress::Tcp(outside.to_owned());
            assert!(
                matches!(BoundSocket::bind(&address, false).await, Err(BindError::PlaintextExposed(_))),
                "{outside}"
            );
        }
        assert!(BoundSocket::bind(&ListenAddress::Tcp("0.0.0.0:0".to_owned()), true).await.is_ok());
    }
}
