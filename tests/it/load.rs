//! Steady traffic beside a test: a few clients that send one request after the other until they are told to stop.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crate::{
    http::{Connection, Request},
    process::wait_for,
};

/// Running clients.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Tally>>,
}

/// How many requests were answered with each status; 0 is no answer.
pub(crate) type Tally = BTreeMap<u16, usize>;

impl Load {
    /// `clients` connections that send these requests in turn.
    pub(crate) fn start(to: SocketAddr, clients: usize, requests: &[Request]) -> Load {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients = (0..clients).map(|_| {
            let (stop, answered, requests) = (stop.clone(), answered.clone(), requests.to_vec());
            std::thread::spawn(move || client(to, &requests, &stop, &answered))
        });
        Load { clients: clients.collect(), stop, answered }
    }

    /// Waits until so many more requests are answered.
    pub(crate) fn go_on_for(&self, requests: usize) {
        let end = self.answered.load(Ordering::Relaxed) + requests;
        wait_for("the load to go on", || (self.answered.load(Ordering::Relaxed) >= end).then_some(()));
    }

    /// Ends it.
    pub(crate) fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut tally = Tally::new();
        for client in self.clients {
            for (status, count) in client.join().unwrap() {
                *tally.entry(status).or_default() += count;
            }
        }
        tally
    }
}

fn client(to: SocketAddr, requests: &[Request], stop: &AtomicBool, answered: &AtomicUsize) -> Tally {
    let (mut tally, mut connection) = (Tally::new(), None);
    for request in requests.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let status = status(&mut connection, to, request).unwrap_or(0);
        *tally.entry(status).or_default() += 1;
        answered.fetch_add(1, Ordering::Relaxed);
    }
    tally
}

fn status(connection: &mut Option<Connection>, to: SocketAddr, request: &Request) -> io::Result<u16> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => Connection::open(to)?,
    };
    let response = open.send(request)?;
    if response.header("connection") != Some("close") {
        *connection = Some(open);
    }
    Ok(response.status)
}
