//! The addresses of a server: taken first, and opened to everybody when the rest is ready.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};

use crate::config::server::Settings;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;

/// The addresses, taken.
pub(super) struct Sockets {
    pub(super) main: TcpSocket,
    pub(super) admin: TcpSocket,
    pub(super) envoy: Option<TcpSocket>,
    pub(super) forward: Option<TcpSocket>,
}

/// The addresses, open to everybody.
pub(super) struct Listeners {
    pub(super) main: TcpListener,
    pub(super) admin: TcpListener,
    pub(super) envoy: Option<TcpListener>,
    pub(super) forward: Option<TcpListener>,
}

/// Where each listens.
pub(super) struct Addresses {
    pub(super) main: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) envoy: Option<SocketAddr>,
    pub(super) forward: Option<SocketAddr>,
}

impl Listeners {
    pub(super) fn addresses(&self) -> std::io::Result<Addresses> {
        let some =
            |listener: &Option<TcpListener>| listener.as_ref().map(TcpListener::local_addr).transpose();
        Ok(Addresses {
            main: self.main.local_addr()?,
            admin: self.admin.local_addr()?,
            envoy: some(&self.envoy)?,
            forward: some(&self.forward)?,
        })
    }
}

impl Sockets {
    pub(super) async fn bind(settings: &Settings) -> anyhow::Result<Sockets> {
        Ok(Sockets {
            main: bind("listen", &settings.listen).await?,
            admin: bind("admin_listen", &settings.admin_listen).await?,
            envoy: bind_some("envoy_listen", settings.envoy_listen.as_deref()).await?,
            forward: bind_some("forward_auth_listen", settings.forward_auth_listen.as_deref()).await?,
        })
    }

    pub(super) fn listen(self, settings: &Settings) -> anyhow::Result<Listeners> {
        let listen = |socket: TcpSocket, setting: &str, address: &str| {
            socket.listen(BACKLOG).with_context(|| cannot_bind(setting, address))
        };
        let some = |socket: Option<TcpSocket>, setting: &str, address: &Option<String>| {
            let address = address.as_deref().unwrap_or_default();
            socket.map(|socket| listen(socket, setting, address)).transpose()
        };
        Ok(Listeners {
            main: listen(self.main, "listen", &settings.listen)?,
            admin: listen(self.admin, "admin_listen", &settings.admin_listen)?,
            envoy: some(self.envoy, "envoy_listen", &settings.envoy_listen)?,
            forward: some(self.forward, "forward_auth_listen", &settings.forward_auth_listen)?,
        })
    }
}

async fn bind_some(setting: &str, address: Option<&str>) -> anyhow::Result<Option<TcpSocket>> {
    match address {
        Some(address) => bind(setting, address).await.map(Some),
        None => Ok(None),
    }
}

/// Takes an address, and lets nobody connect yet.
async fn bind(setting: &str, address: &str) -> anyhow::Result<TcpSocket> {
    let failed = || cannot_bind(setting, address);
    let mut last = None;
    for address in tokio::net::lookup_host(address).await.with_context(failed)? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        match socket.bind(address) {
            Ok(()) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| anyhow::anyhow!("it has no address"), Into::into)).with_context(failed)
}

fn cannot_bind(setting: &str, address: &str) -> String {
    format!("{setting} = {address:?} cannot be bound; is another server running there?")
}
