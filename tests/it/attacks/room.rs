//! More connections than there is room for.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::*;

/// How many connections a listener did not serve, for a reason.
fn refused(keyward: &KeywardProcess, listener: &str, reason: &str) -> u64 {
    let page = keyward.fetch_admin_page("/metrics").1;
    let start = format!("keyward_connections_refused_total{{listener=\"{listener}\",reason=\"{reason}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&start)).unwrap().parse().unwrap()
}

/// A server that may open 300 files.
async fn with_300_descriptors() -> KeywardProcess {
    let home = TestHome::new();
    let command = home.serve_command();
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "ulimit -n 300; exec \"$0\" \"$@\""])
        .arg(command.get_program())
        .args(command.get_args());
    limited.current_dir(home.path("."));
    let keyward = home.start_with(limited).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root_caller().create_account("acme").await;
    keyward
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_table_of_file_descriptors_costs_neither_callers_nor_the_database() {
    let keyward = with_300_descriptors().await;
    let (to, mut root) = (keyward.address, keyward.root_caller());
    root.create_key(plain_key_request()).await.unwrap();
    let runtime = tokio::runtime::Handle::current();
    assert_withstands("more connections than file descriptors", &keyward, move || {
        let crowd: Vec<_> = (0..500).filter_map(|_| TcpStream::connect(to).ok()).collect();
        // The last of them was turned away, and not left waiting.
        read_until_closed(crowd.last().unwrap());
        // While the others are there.
        runtime.block_on(root.create_key(plain_key_request())).unwrap();
    })
    .await;
    assert!(refused(&keyward, "main", "full") > 0, "some descriptors are kept for the rest");
    assert_eq!(refused(&keyward, "main", "failed"), 0);
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_free_file_descriptor_waits_for_one_and_does_not_spin() {
    let keyward = with_300_descriptors().await;
    // No port can take the last descriptor any more, so there are none left by decree.
    let limit = |current: u64| {
        let limit = Rlimit { current: Some(current), maximum: Some(300) };
        prlimit(Pid::from_raw(i32::try_from(keyward.process.id()).unwrap()), Resource::Nofile, limit).unwrap()
    };
    limit(8);
    let _page = TcpStream::connect(keyward.admin_address).unwrap();
    let failed = |module: &str| {
        let log = keyward.process.stderr();
        log.lines().filter(|line| line.contains("accepting failed") && line.contains(module)).count()
    };
    wait_for("the pages to fail", || (failed("http1") > 0).then_some(()));
    let mut waiting = TcpStream::connect(keyward.address).unwrap();
    waiting.write_all(PREFACE).unwrap();
    wait_for("the listener to fail", || (failed("grpc::serve") > 0).then_some(()));
    // The admin pages' loop pauses after each failure, and tells of each.
    let before = failed("http1");
    wait_for("some time to pass", || (failed("http1") >= before + 10).then_some(()));
    limit(300);
    waiting.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    assert!(waiting.read(&mut [0; 9]).unwrap() > 0, "it is served when there is room again");
    keyward.root_caller().create_key(plain_key_request()).await.unwrap();
    let tries = refused(&keyward, "main", "failed");
    assert!((1..2000).contains(&tries), "{tries}");
    assert!(failed("grpc::serve") < 10, "nor is the log flooded");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_what_a_listener_takes_are_closed_as_they_come() {
    let few =
        "[[listener]]\nname = 'few'\naddress = '127.0.0.1:0'\nservices = ['check']\nmax_connections = 10";
    let keyward = start_server(few).await;
    let to: SocketAddr = keyward.process.listener_address("few").unwrap().parse().unwrap();
    assert_withstands("more connections than a listener takes", &keyward, move || {
        let crowd: Vec<_> = (0..110).map(|_| TcpStream::connect(to).unwrap()).collect();
        crowd[10..].iter().for_each(read_until_closed);
    })
    .await;
    assert_eq!(refused(&keyward, "few", "full"), 100);
    keyward.stop();
}
