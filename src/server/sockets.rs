//! The addresses of a server: taken first, and opened to everybody when the rest is ready. Certificates are read before
//! anything is taken.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{
    config::server::{ENVOY, MAIN, Settings},
    grpc::serve::Opened,
    reload,
    transport::{
        Address, Listener,
        counts::Report,
        socket::{Bound, Open, Taken},
        tls::{Material, Tls},
    },
};

/// A gRPC listener, and its certificates as they were read.
struct Prepared {
    listener: Listener,
    taken: Taken,
    tls: Option<(Arc<Tls>, Material)>,
}

/// The addresses, taken.
pub(super) struct Sockets {
    grpc: Vec<Prepared>,
    admin: Taken,
    forward: Option<Taken>,
}

/// The addresses, open to everybody.
pub(super) struct Listeners {
    pub(super) grpc: Vec<Opened>,
    pub(super) admin: TcpListener,
    pub(super) forward: Option<TcpListener>,
    /// Certificates that are watched: whose they are, and what was read.
    certificates: Vec<(String, Arc<Tls>, Material)>,
    /// What each gRPC listener counts.
    pub(super) report: Report,
}

/// Where each listens.
pub(super) struct Addresses {
    /// The gRPC listeners, the main one first: name, place, whether it speaks TLS.
    pub(super) grpc: Vec<(String, Bound, bool)>,
    pub(super) admin: SocketAddr,
    pub(super) forward: Option<SocketAddr>,
}

impl Addresses {
    /// Where Envoy alone is served, by the setting of its own.
    pub(super) fn envoy(&self) -> Option<SocketAddr> {
        self.grpc.iter().find(|(name, ..)| name == ENVOY).and_then(|(_, bound, _)| bound.tcp())
    }

    /// A port that is this server's own.
    pub(super) fn port(&self) -> u16 {
        let first = self.grpc.iter().find_map(|(_, bound, _)| bound.tcp());
        first.unwrap_or(self.admin).port()
    }
}

impl Listeners {
    pub(super) fn addresses(&self) -> std::io::Result<Addresses> {
        let grpc = self.grpc.iter().map(|opened| {
            let Opened { listener, open, tls, .. } = opened;
            Ok((listener.name.clone(), open.bound()?, tls.is_some()))
        });
        Ok(Addresses {
            grpc: grpc.collect::<std::io::Result<_>>()?,
            admin: self.admin.local_addr()?,
            forward: self.forward.as_ref().map(TcpListener::local_addr).transpose()?,
        })
    }

    /// Starts to watch the certificates.
    pub(super) fn watch(&mut self, asked: &watch::Receiver<()>) -> Vec<JoinHandle<()>> {
        let watched = std::mem::take(&mut self.certificates);
        let watch = |(listener, tls, material): (String, Arc<Tls>, Material)| {
            let asked = asked.clone();
            tokio::spawn(async move {
                let reader = tls.clone();
                let read = move || reader.files().read();
                let take = |material: &Material| renew(&listener, &tls, material);
                reload::watch(&tls.files().certificate, material, read, take, asked).await;
            })
        };
        watched.into_iter().map(watch).collect()
    }
}

fn renew(listener: &str, tls: &Tls, material: &Material) {
    match tls.renew(material) {
        Ok(()) => tracing::info!(listener, expires = tls.expires(), "the certificate was read anew"),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                listener,
                "the new certificate cannot be used; the one before stays in force"
            );
        }
    }
}

impl Sockets {
    pub(super) async fn bind(settings: &Settings) -> anyhow::Result<Sockets> {
        let mut grpc = Vec::new();
        for listener in settings.grpc_listeners() {
            let tls = listener.tls.clone().map(|files| Tls::open(files, b"h2")).transpose();
            let tls = tls.with_context(|| format!("the listener {:?} cannot speak TLS", listener.name))?;
            let may_be_exposed = settings.insecure || tls.is_some();
            let taken = bind(&listener.name, &listener.address, may_be_exposed).await?;
            grpc.push(Prepared { listener, taken, tls });
        }
        let tcp = |address: &str| Address::Tcp(address.to_owned());
        let forward = match settings.forward_auth_listen.as_deref() {
            Some(address) => Some(bind("forward_auth_listen", &tcp(address), settings.insecure).await?),
            None => None,
        };
        // The admin pages hold no secret, and whoever scrapes them is elsewhere.
        let admin = bind("admin_listen", &tcp(&settings.admin_listen), true).await?;
        Ok(Sockets { grpc, admin, forward })
    }

    pub(super) fn listen(self) -> anyhow::Result<Listeners> {
        let (mut grpc, mut certificates, mut report) = (Vec::new(), Vec::new(), Report::default());
        for Prepared { listener, taken, tls } in self.grpc {
            let open = taken.listen().with_context(|| cannot_listen(&listener.name))?;
            let tls = tls.map(|(tls, material)| {
                certificates.push((listener.name.clone(), tls.clone(), material));
                tls
            });
            let counts = Arc::default();
            report.add(&listener.name, Arc::clone(&counts), tls.clone());
            grpc.push(Opened { listener, open, tls, counts });
        }
        let admin = tcp("admin_listen", self.admin)?;
        let forward = self.forward.map(|taken| tcp("forward_auth_listen", taken)).transpose()?;
        Ok(Listeners { grpc, admin, forward, certificates, report })
    }
}

fn tcp(setting: &str, taken: Taken) -> anyhow::Result<TcpListener> {
    match taken.listen().with_context(|| cannot_listen(setting))? {
        Open::Tcp(listener) => Ok(listener),
        Open::Unix(..) => anyhow::bail!("{setting} must be host:port"),
    }
}

/// Takes an address, and lets nobody connect yet.
async fn bind(listener: &str, address: &Address, may_be_exposed: bool) -> anyhow::Result<Taken> {
    let bound = Taken::bind(address, may_be_exposed).await;
    bound.with_context(|| format!("{} = \"{address}\" cannot be bound", setting_of(listener)))
}

fn cannot_listen(listener: &str) -> String {
    format!("{} cannot be listened on; is another server running there?", setting_of(listener))
}

/// The setting that has a listener's address.
fn setting_of(listener: &str) -> String {
    match listener {
        MAIN => "listen".to_owned(),
        ENVOY => "envoy_listen".to_owned(),
        "admin_listen" | "forward_auth_listen" => listener.to_owned(),
        name => format!("listener {name:?}: address"),
    }
}
