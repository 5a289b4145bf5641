//! Binds the addresses of a server at the start, and listens on them when the rest is ready.
//!
//! Certificates are read before an address is bound.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{
    config::server::{ENVOY_LISTENER, MAIN_LISTENER, ServerSettings},
    file_watcher,
    grpc::serve::BoundListener,
    transport::{
        ListenAddress, ListenerSettings,
        listener_metrics::ListenerMetrics,
        socket::{BoundSocket, LocalAddress, OpenListener},
        tls::{ListenerTls, TlsMaterial},
    },
};

/// A bound gRPC listener with its certificate.
struct PreparedListener {
    listener: ListenerSettings,
    socket: BoundSocket,
    tls: Option<(Arc<ListenerTls>, TlsMaterial)>,
}

/// Bound addresses that accept no connections yet.
pub(super) struct BoundSockets {
    grpc: Vec<PreparedListener>,
    admin: BoundSocket,
    forward_auth: Option<BoundSocket>,
}

/// Listening sockets.
pub(super) struct OpenListeners {
    pub(super) grpc: Vec<BoundListener>,
    pub(super) admin: TcpListener,
    pub(super) forward_auth: Option<TcpListener>,
    /// Certificates to watch: listener, TLS state, and the files' content as read.
    certificates: Vec<(String, Arc<ListenerTls>, TlsMaterial)>,
    /// The counters of each gRPC listener.
    pub(super) report: ListenerMetrics,
}

/// The addresses of all listeners.
pub(super) struct ListenAddresses {
    /// The gRPC listeners, the main one first: name, address, whether it uses TLS.
    pub(super) grpc: Vec<(String, LocalAddress, bool)>,
    pub(super) admin: SocketAddr,
    pub(super) forward_auth: Option<SocketAddr>,
}

impl ListenAddresses {
    /// The address of the setting `envoy_listen`, if it is set.
    pub(super) fn envoy_address(&self) -> Option<SocketAddr> {
        self.grpc.iter().find(|(name, ..)| name == ENVOY_LISTENER).and_then(|(_, bound, _)| bound.as_tcp())
    }

    /// A port of this server, for the default name of its replica.
    pub(super) fn advertised_port(&self) -> u16 {
        let first = self.grpc.iter().find_map(|(_, bound, _)| bound.as_tcp());
        first.unwrap_or(self.admin).port()
    }
}

impl OpenListeners {
    pub(super) fn addresses(&self) -> std::io::Result<ListenAddresses> {
        let grpc = self.grpc.iter().map(|opened| {
            let BoundListener { settings: listener, socket: open, tls, .. } = opened;
            Ok((listener.name.clone(), open.local_address()?, tls.is_some()))
        });
        Ok(ListenAddresses {
            grpc: grpc.collect::<std::io::Result<_>>()?,
            admin: self.admin.local_addr()?,
            forward_auth: self.forward_auth.as_ref().map(TcpListener::local_addr).transpose()?,
        })
    }

    /// Starts a task for each certificate that reloads it on change.
    pub(super) fn watch_certificates(&mut self, reload: &watch::Receiver<()>) -> Vec<JoinHandle<()>> {
        let watched = std::mem::take(&mut self.certificates);
        let watch = |(listener, tls, material): (String, Arc<ListenerTls>, TlsMaterial)| {
            let reload = reload.clone();
            tokio::spawn(async move {
                let reader = tls.clone();
                let read = move || reader.files().read();
                let take = |material: &TlsMaterial| replace_certificate(&listener, &tls, material);
                file_watcher::watch_file(&tls.files().certificate, material, read, take, reload).await;
            })
        };
        watched.into_iter().map(watch).collect()
    }
}

fn replace_certificate(listener: &str, tls: &ListenerTls, material: &TlsMaterial) {
    match tls.reload(material) {
        Ok(()) => {
            tracing::info!(listener, expires = tls.certificate_expiry(), "certificate reloaded")
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                listener,
                "the new certificate cannot be used; the previous one stays in use"
            );
        }
    }
}

impl BoundSockets {
    pub(super) async fn bind(settings: &ServerSettings) -> anyhow::Result<BoundSockets> {
        let mut grpc = Vec::new();
        for listener in settings.grpc_listeners() {
            let tls = listener.tls.clone().map(|files| ListenerTls::load(files, b"h2")).transpose();
            let tls = tls.with_context(|| format!("the listener {:?} cannot speak TLS", listener.name))?;
            let may_be_exposed = settings.insecure || tls.is_some();
            let taken = bind_address(&listener.name, &listener.address, may_be_exposed).await?;
            grpc.push(PreparedListener { listener, socket: taken, tls });
        }
        let tcp = |address: &str| ListenAddress::Tcp(address.to_owned());
        let forward = match settings.forward_auth_listen.as_deref() {
            Some(address) => {
                Some(bind_address("forward_auth_listen", &tcp(address), settings.insecure).await?)
            }
            None => None,
        };
        // The admin pages have no secrets, and scrapers run on other hosts.
        let admin = bind_address("admin_listen", &tcp(&settings.admin_listen), true).await?;
        Ok(BoundSockets { grpc, admin, forward_auth: forward })
    }

    pub(super) fn listen(self) -> anyhow::Result<OpenListeners> {
        let (mut grpc, mut certificates, mut report) = (Vec::new(), Vec::new(), ListenerMetrics::default());
        for PreparedListener { listener, socket: taken, tls } in self.grpc {
            let open = taken.listen().with_context(|| listen_error(&listener.name))?;
            let tls = tls.map(|(tls, material)| {
                certificates.push((listener.name.clone(), tls.clone(), material));
                tls
            });
            let counts = Arc::default();
            report.add_listener(&listener.name, Arc::clone(&counts), tls.clone());
            grpc.push(BoundListener { settings: listener, socket: open, tls, counters: counts });
        }
        let admin = into_tcp_listener("admin_listen", self.admin)?;
        let forward =
            self.forward_auth.map(|taken| into_tcp_listener("forward_auth_listen", taken)).transpose()?;
        Ok(OpenListeners { grpc, admin, forward_auth: forward, certificates, report })
    }
}

fn into_tcp_listener(setting: &str, taken: BoundSocket) -> anyhow::Result<TcpListener> {
    match taken.listen().with_context(|| listen_error(setting))? {
        OpenListener::Tcp(listener) => Ok(listener),
        OpenListener::Unix(..) => anyhow::bail!("{setting} must be host:port"),
    }
}

/// Binds an address without accepting connections.
async fn bind_address(
    listener: &str,
    address: &ListenAddress,
    may_be_exposed: bool,
) -> anyhow::Result<BoundSocket> {
    let bound = BoundSocket::bind(address, may_be_exposed).await;
    bound.with_context(|| format!("{} = \"{address}\" cannot be bound", setting_name(listener)))
}

fn listen_error(listener: &str) -> String {
    format!("{} cannot be listened on; is another server running there?", setting_name(listener))
}

/// The setting with a listener's address.
fn setting_name(listener: &str) -> String {
    match listener {
        MAIN_LISTENER => "listen".to_owned(),
        ENVOY_LISTENER => "envoy_listen".to_owned(),
        "admin_listen" | "forward_auth_listen" => listener.to_owned(),
        name => format!("listener {name:?}: address"),
    }
}
