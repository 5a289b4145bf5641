//! Peers who say nothing, or too little, for as long as they are let.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
};

use super::*;
use crate::test_ca::TestCa;

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_little_is_let_go() {
    let keyward = start_server(
        "[[listener]]\nname = 'brief'\naddress = '127.0.0.1:0'\nservices = ['check', 'health']\n\
         handshake_timeout = '500ms'\nmax_connection_idle = '1s'\n",
    )
    .await;
    let to = keyward.process.listener_address("brief").unwrap().parse().unwrap();
    assert_withstands("400 silent connections, 50 that only answer pings", &keyward, move || {
        let silent: Vec<_> = (0..200).map(|_| TcpStream::connect::<SocketAddr>(to).unwrap()).collect();
        let begun = (0..200).map(|_| {
            let mut stream = TcpStream::connect(to).unwrap();
            stream.write_all(b"PRI * HT").unwrap();
            stream
        });
        silent.iter().chain(&begun.collect::<Vec<_>>()).for_each(read_until_closed);
        // These answer pings, and ask nothing.
        let alive: Vec<_> = (0..50).map(|_| AttackConnection::connect(to, &[])).collect();
        alive.iter().for_each(AttackConnection::wait_until_closed);
    })
    .await;
    let (_, metrics) = keyward.fetch_admin_page("/metrics");
    let refused = "keyward_connections_refused_total{listener=\"brief\",reason=\"timeout\"} 400";
    assert!(metrics.contains(refused), "{metrics}");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_handshake_that_does_not_go_on_is_let_go() {
    let (home, authority) = (TestHome::new(), TestCa::new("ours"));
    authority.issue_server_certificate(2040).write_files(&home.path("cert.pem"), &home.path("key.pem"));
    let table = "[[listener]]\nname = 'secure'\naddress = '127.0.0.1:0'\nservices = ['check']\nhandshake_timeout = '500ms'\n\
                 [listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'\n";
    std::fs::write(home.path("keyward.toml"), table).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root_caller().create_account("acme").await;
    let to: SocketAddr = keyward.process.listener_address("secure").unwrap().parse().unwrap();
    assert_withstands("400 unfinished TLS handshakes", &keyward, move || {
        let begun: Vec<_> = (0..400)
            .map(|_| {
                let mut stream = TcpStream::connect(to).unwrap();
                // The start of a record that never ends.
                stream.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
                stream
            })
            .collect();
        begun.iter().for_each(read_until_closed);
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_answers_no_ping_is_let_go() {
    // Without calls it could stay for minutes.
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("200 connections that fell silent", &keyward, move || {
        let silent: Vec<_> = (0..200)
            .map(|_| {
                let mut stream = TcpStream::connect(to).unwrap();
                stream.write_all(PREFACE).unwrap();
                stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
                stream
            })
            .collect();
        silent.iter().for_each(read_until_closed);
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_management_that_does_not_arrive_is_given_up() {
    let keyward = start_server("").await;
    let to = keyward.address;
    let bearer = format!("Bearer {}", keyward.home.root_key().trim());
    assert_withstands("256 requests to management that stop in the middle", &keyward, move || {
        let mut attacker = AttackConnection::connect(to, &[]);
        let headers =
            [encode_call_headers("/keyward.v1.KeyService/Create"), encode_header("authorization", &bearer)]
                .concat();
        for _ in 0..256 {
            let stream = attacker.next_stream_id();
            let begun = [0, 0, 0, 0, 100, 1];
            let frames =
                [frame(HEADERS, END_HEADERS, stream, &headers), frame(DATA, 0, stream, &begun)].concat();
            assert!(attacker.send(&frames));
        }
        attacker.wait_until_answered(256);
    })
    .await;
    keyward.stop();
}
