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
    process::wait_for,
    raw_http::{RawConnection, RawRequest},
};

/// Running clients.
pub(crate) struct BackgroundLoad {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<StatusCounts>>,
}

/// How many requests were answered with each status; 0 is no answer.
pub(crate) type StatusCounts = BTreeMap<u16, usize>;

impl BackgroundLoad {
    /// `clients` connections that send these requests in turn.
    pub(crate) fn start(to: SocketAddr, clients: usize, requests: &[RawRequest]) -> BackgroundLoad {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients = (0..clients).map(|_| {
            let (stop, answered, requests) = (stop.clone(), answered.clone(), requests.to_vec());
            std::thread::spawn(move || run_client(to, &requests, &stop, &answered))
        });
        BackgroundLoad { clients: clients.collect(), stop, answered }
    }

    /// Waits until so many more requests are answered.
    pub(crate) fn wait_for_answers(&self, requests: usize) {
        let end = self.answered.load(Ordering::Relaxed) + requests;
        wait_for("the load to go on", || (self.answered.load(Ordering::Relaxed) >= end).then_some(()));
    }

    /// Ends it.
    pub(crate) fn stop(self) -> StatusCounts {
        self.stop.store(true, Ordering::Relaxed);
        let mut tally = StatusCounts::new();
        for client in self.clients {
            for (status, count) in client.join().unwrap() {
                *tally.entry(status).or_default() += count;
            }
        }
        tally
    }
}

fn run_client(
    to: SocketAddr,
    requests: &[RawRequest],
    stop: &AtomicBool,
    answered: &AtomicUsize,
) -> StatusCounts {
    let (mut tally, mut connection) = (StatusCounts::new(), None);
    for request in requests.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let status = send_and_get_status(&mut connection, to, request).unwrap_or(0);
        *tally.entry(status).or_default() += 1;
        answered.fetch_add(1, Ordering::Relaxed);
    }
    tally
}

fn send_and_get_status(
    connection: &mut Option<RawConnection>,
    to: SocketAddr,
    request: &RawRequest,
) -> io::Result<u16> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => RawConnection::open(to)?,
    };
    let response = open.send(request)?;
    if response.header("connection") != Some("close") {
        *connection = Some(open);
    }
    Ok(response.status)
}
