//! Sockets: taken before the server is ready, opened when it is. TCP and Unix sockets look the same from here on.

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

use super::Address;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why an address cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The system refused.
    #[error("{}{}", .0, remedy(.0))]
    System(#[from] io::Error),
    /// The host name cannot be looked up.
    #[error("its host cannot be looked up: {0}; name an address of this machine, such as 127.0.0.1")]
    Lookup(#[source] io::Error),
    /// The name stands for no address.
    #[error("it has no address")]
    Nowhere,
    /// Another process answers on the socket file.
    #[error("another server answers there")]
    Taken,
    /// Where the socket should be there is something else.
    #[error("there is a file that is no socket; move it away, or name another path")]
    NoSocket,
    /// Plaintext would leave the machine.
    #[error(
        "{0} is not this machine alone, and without TLS tokens would be readable on the way: give the listener \
         [listener.tls], or allow it with --insecure (KEYWARD_INSECURE=true, insecure = true) where something else \
         protects the network"
    )]
    Plaintext(SocketAddr),
}

/// What to do about a refusal of the system, as far as its kind shows that.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; is another server running there?",
        io::ErrorKind::AddrNotAvailable => "; name an address of this machine",
        io::ErrorKind::NotFound => "; create its folder, or name another path",
        _ => "",
    }
}

/// Whether others than this machine reach an address.
#[must_use]
pub fn is_exposed(address: &SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}

/// The first address beyond this machine among those of `host:port`. Looks names up, which may take seconds.
///
/// # Errors
/// When the name cannot be looked up.
pub fn first_exposed(address: &str) -> io::Result<Option<SocketAddr>> {
    Ok(address.to_socket_addrs()?.find(is_exposed))
}

/// An address that is ours, and that nobody can connect to yet.
#[derive(Debug)]
pub enum Taken {
    /// `host:port`.
    Tcp(TcpSocket),
    /// A socket file.
    Unix(UnixSocket, SocketFile),
}

impl Taken {
    /// Takes an address. Unless plaintext may leave the machine, one that others reach is refused.
    ///
    /// # Errors
    /// When it cannot be had, or must not.
    pub async fn bind(address: &Address, may_be_exposed: bool) -> Result<Taken, BindError> {
        match address {
            Address::Tcp(address) => bind_tcp(address, may_be_exposed).await.map(Taken::Tcp),
            Address::Unix { path, mode } => bind_unix(path, *mode).await,
        }
    }

    /// Opens it to everybody.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn listen(self) -> io::Result<Open> {
        Ok(match self {
            Taken::Tcp(socket) => Open::Tcp(socket.listen(BACKLOG)?),
            Taken::Unix(socket, file) => Open::Unix(socket.listen(BACKLOG)?, file),
        })
    }
}

async fn bind_tcp(address: &str, may_be_exposed: bool) -> Result<TcpSocket, BindError> {
    let mut last = BindError::Nowhere;
    for address in tokio::net::lookup_host(address).await.map_err(BindError::Lookup)? {
        if !may_be_exposed && is_exposed(&address) {
            return Err(BindError::Plaintext(address));
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

async fn bind_unix(path: &Path, mode: u32) -> Result<Taken, BindError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NoSocket),
        // Left by a server that was killed, unless somebody answers.
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => return Err(BindError::Taken),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) => return Err(error.into()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    // Nobody can connect before it listens, so nobody gets in before these hold.
    let file = SocketFile::made(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(Taken::Unix(socket, file))
}

/// A socket file; it is taken away with this value, unless it is another's by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    is: (u64, u64),
}

impl SocketFile {
    fn made(path: &Path) -> io::Result<SocketFile> {
        let found = std::fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), is: (found.dev(), found.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours =
            std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.is);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, path = %self.path.display(), "a socket file was left");
        }
    }
}

/// Where a listener turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// An address with its port.
    Tcp(SocketAddr),
    /// A socket file.
    Unix(PathBuf),
}

impl Bound {
    /// The address, of TCP.
    #[must_use]
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Bound::Tcp(address) => Some(*address),
            Bound::Unix(_) => None,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Tcp(address) => address.fmt(f),
            Bound::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An open listener.
#[derive(Debug)]
pub enum Open {
    /// TCP.
    Tcp(TcpListener),
    /// A socket file.
    Unix(UnixListener, SocketFile),
}

impl Open {
    /// Where it is.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn bound(&self) -> io::Result<Bound> {
        Ok(match self {
            Open::Tcp(listener) => Bound::Tcp(listener.local_addr()?),
            Open::Unix(_, file) => Bound::Unix(file.path.clone()),
        })
    }

    /// Waits for the next connection, which belongs to no runtime yet. The address is the peer's; a Unix socket's has
    /// none.
    ///
    /// # Errors
    /// When accepting fails; the next may succeed.
    pub async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        match self {
            Open::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Socket::tcp(stream.into_std()?), Some(peer)))
            }
            Open::Unix(listener, _) => Ok((Socket::Unix(listener.accept().await?.0.into_std()?), None)),
        }
    }

    /// Accepts what has connected already, and closes: connections that nobody has accepted are reset when their
    /// listener closes, and their callers cannot know that their calls were not heard.
    pub fn close(self, mut take: impl FnMut(Socket, Option<SocketAddr>)) {
        let ended = match self {
            Open::Tcp(listener) => listener.into_std().map(|listener| {
                waiting(|| {
                    let (stream, peer) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    take(Socket::tcp(stream), Some(peer));
                    Ok(())
                })
            }),
            Open::Unix(listener, _file) => listener.into_std().map(|listener| {
                waiting(|| {
                    let (stream, _) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    take(Socket::Unix(stream), None);
                    Ok(())
                })
            }),
        };
        if let Err(error) = ended {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "the last connections were not accepted"
            );
        }
    }
}

/// Accepts until nobody waits. Who comes meanwhile is not waited for without an end, and of one who went away the others
/// know nothing.
fn waiting(mut accept: impl FnMut() -> io::Result<()>) {
    for _ in 0..BACKLOG {
        match accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "one of the last connections was not accepted");
            }
            Ok(()) => {}
        }
    }
}

/// A connection that belongs to no runtime.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// A Unix socket.
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    /// Small answers must not wait to be joined by others.
    fn tcp(stream: std::net::TcpStream) -> Socket {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = &error as &dyn std::error::Error, "TCP_NODELAY was not set");
        }
        Socket::Tcp(stream)
    }
}

/// A connection's bytes.
pub enum Stream {
    /// TCP in plaintext.
    Tcp(TcpStream),
    /// TCP with TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// A Unix socket.
    Unix(UnixStream),
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

macro_rules! each {
    ($self:ident, $poll:ident($($argument:ident),*)) => {
        match $self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).$poll($($argument),*),
            Stream::Tls(stream) => Pin::new(stream).$poll($($argument),*),
            Stream::Unix(stream) => Pin::new(stream).$poll($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> Address {
        Address::Unix { path: path.to_owned(), mode: 0o600 }
    }

    #[tokio::test]
    async fn a_socket_file_has_its_mode_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let open = Taken::bind(&unix(&path), false).await.unwrap().listen().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(open.bound().unwrap().to_string(), format!("unix:{}", path.display()));
        assert!(matches!(Taken::bind(&unix(&path), false).await, Err(BindError::Taken)));
        drop(open);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn who_has_connected_is_accepted_by_a_listener_that_closes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let open = Taken::bind(&unix(&path), false).await.unwrap().listen().unwrap();
        let _unix = [(); 2].map(|()| std::os::unix::net::UnixStream::connect(&path).unwrap());
        let mut taken = 0;
        open.close(|_, _| taken += 1);
        assert_eq!(taken, 2);
        assert!(!path.exists());
        let address = Address::Tcp("127.0.0.1:0".to_owned());
        let open = Taken::bind(&address, false).await.unwrap().listen().unwrap();
        let at = open.bound().unwrap().tcp().unwrap();
        let clients = [(); 3].map(|()| std::net::TcpStream::connect(at).unwrap());
        let mut peers = Vec::new();
        open.close(|_, peer| peers.extend(peer));
        assert_eq!(peers, clients.map(|client| client.local_addr().unwrap()));
        assert!(std::net::TcpStream::connect(at).is_err());
    }

    #[tokio::test]
    async fn what_a_killed_server_left_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let taken = Taken::bind(&unix(&path), false).await.unwrap();
        // Another server has made its own meanwhile.
        std::fs::remove_file(&path).unwrap();
        let _others = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(taken);
        assert!(path.exists(), "another's socket stays");
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(Taken::bind(&unix(&file), false).await, Err(BindError::NoSocket)));
        assert!(file.exists());
    }

    #[tokio::test]
    async fn plaintext_stays_on_this_machine_unless_it_may_leave() {
        for inside in ["127.0.0.1:0", "[::1]:0", "localhost:0"] {
            let taken = Taken::bind(&Address::Tcp(inside.to_owned()), false).await;
            assert!(!matches!(taken, Err(BindError::Plaintext(_))), "{inside}");
        }
        for outside in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            let address = Address::Tcp(outside.to_owned());
            assert!(matches!(Taken::bind(&address, false).await, Err(BindError::Plaintext(_))), "{outside}");
        }
        assert!(Taken::bind(&Address::Tcp("0.0.0.0:0".to_owned()), true).await.is_ok());
    }
}
