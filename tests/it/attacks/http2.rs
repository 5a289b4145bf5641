//! What HTTP/2 lets a peer do, done too often or wrongly.

use std::{
    io::Write as _,
    net::{Shutdown, TcpStream},
    sync::atomic::Ordering,
};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_open_streams_are_refused() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("100,000 open streams", &keyward, move || {
        let mut attacker = AttackConnection::connect(to, &[]);
        let headers = encode_call_headers(EXT_AUTHZ);
        // The headers alone: each waits for its message.
        let mut open = 0;
        while open < 100_000 && {
            let stream = attacker.next_stream_id();
            attacker.send(&frame(HEADERS, END_HEADERS, stream, &headers))
        } {
            open += 1;
        }
        let lost = open < 100_000 || attacker.is_closed();
        assert!(lost || attacker.counters.resets.load(Ordering::Relaxed) > 50_000, "{open}");
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_makes_the_server_reset_streams_loses_the_connection() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("MadeYouReset (window overflow)", &keyward, move || {
        let mut attacker = AttackConnection::connect(to, &[]);
        let (headers, overflow) = (encode_call_headers(EXT_AUTHZ), 0x7fff_ffff_u32.to_be_bytes());
        for _ in 0..20_000 {
            let stream = attacker.next_stream_id();
            let frames =
                [frame(HEADERS, END_HEADERS, stream, &headers), frame(WINDOW_UPDATE, 0, stream, &overflow)];
            if !attacker.send(&frames.concat()) {
                break;
            }
        }
        attacker.wait_until_closed();
        assert!(attacker.counters.resets.load(Ordering::Relaxed) < 2_000);
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_a_refusal_has_overtaken_do_not_cost_the_connection() {
    let keyward = start_server("").await;
    let mut client = AttackConnection::connect(keyward.address, &[]);
    let (headers, mut answers) = (encode_call_headers(CHECK), 0);
    for _ in 0..150 {
        let streams: Vec<_> = (0..20).map(|_| client.next_stream_id()).collect();
        let opened: Vec<_> =
            streams.iter().flat_map(|stream| frame(HEADERS, END_HEADERS, *stream, &headers)).collect();
        assert!(client.send(&opened));
        // Without a credential a call is answered before its message comes.
        answers += streams.len();
        client.wait_until_answered(answers);
        let messages: Vec<_> =
            streams.iter().flat_map(|stream| frame(DATA, END_STREAM, *stream, &[0; 5])).collect();
        assert!(client.send(&messages), "after {answers} refusals");
    }
    assert_eq!(client.counters.resets.load(Ordering::Relaxed), 0);
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_every_call_back_loses_the_connection() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("Rapid Reset", &keyward, move || {
        let (headers, cancel) = (encode_call_headers(EXT_AUTHZ), 8_u32.to_be_bytes());
        for _ in 0..20 {
            let mut attacker = AttackConnection::connect(to, &[]);
            let mut burst = Vec::new();
            for _ in 0..1000 {
                let stream = attacker.next_stream_id();
                burst.extend(frame(HEADERS, END_HEADERS, stream, &headers));
                burst.extend(frame(RST_STREAM, 0, stream, &cancel));
            }
            while attacker.send(&burst) && attacker.next < 200_000 {
                for (at, bytes) in burst.chunks_exact_mut(headers.len() + 9 + 13).enumerate() {
                    let id = (attacker.next + 2 * u32::try_from(at).unwrap()).to_be_bytes();
                    bytes[5..9].copy_from_slice(&id);
                    bytes[headers.len() + 14..headers.len() + 18].copy_from_slice(&id);
                }
                attacker.next += 2000;
            }
            attacker.wait_until_closed();
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_an_end_lose_the_connection() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("CONTINUATION flood", &keyward, move || {
        for _ in 0..20 {
            let mut attacker = AttackConnection::connect(to, &[]);
            let stream = attacker.next_stream_id();
            attacker.send(&frame(HEADERS, 0, stream, &encode_call_headers(CHECK)));
            let more = frame(CONTINUATION, 0, stream, &encode_header("x", &"y".repeat(120)).repeat(100));
            for _ in 0..10_000 {
                if !attacker.send(&more) {
                    break;
                }
            }
            attacker.wait_until_closed();
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_claim_much_and_bring_nothing_cost_nothing() {
    let keyward = start_server("").await;
    let to = keyward.address;
    let reserved = memory_kib(keyward.process.id(), "VmPeak:");
    assert_withstands("256 messages of 4 GiB announced", &keyward, move || {
        let headers = encode_call_headers(EXT_AUTHZ);
        for claimed in [u32::MAX, 3 << 20, 128 << 10] {
            let mut attacker = AttackConnection::connect(to, &[]);
            for _ in 0..256 {
                let stream = attacker.next_stream_id();
                let prefix = [&[0], &claimed.to_be_bytes()[..]].concat();
                let frames =
                    [frame(HEADERS, END_HEADERS, stream, &headers), frame(DATA, 0, stream, &prefix)].concat();
                assert!(attacker.send(&frames));
            }
            // The largest that may come is waited for; the others are refused by what they claim.
            if claimed > 128 << 10 {
                attacker.wait_until_answered(256);
            }
        }
    })
    .await;
    // Memory that is reserved and never touched is not resident, and has an end all the same.
    let more = memory_kib(keyward.process.id(), "VmPeak:") - reserved;
    assert!(more < 1 << 20, "{more} KiB were reserved");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_are_few() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("8,000 unread answers of reflection", &keyward, move || {
        // SETTINGS_INITIAL_WINDOW_SIZE = 0: no byte of an answer may be sent.
        let no_window = [0, 4, 0, 0, 0, 0];
        // `list_services`, and `file_containing_symbol` of the largest file.
        let symbol = b"keyward.v1.KeyService";
        let message = [&[0x22, u8::try_from(symbol.len()).unwrap()], &symbol[..]].concat();
        let message = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()], &message[..]].concat();
        let headers = encode_call_headers(REFLECTION);
        let crowd: Vec<_> = (0..32)
            .map(|_| {
                let mut attacker = AttackConnection::connect(to, &no_window);
                for _ in 0..250 {
                    let stream = attacker.next_stream_id();
                    let frames = [
                        frame(HEADERS, END_HEADERS, stream, &headers),
                        frame(DATA, END_STREAM, stream, &message),
                    ];
                    attacker.send(&frames.concat());
                }
                attacker
            })
            .collect();
        assert_eq!(crowd.len(), 32);
    })
    .await;
    assert!(
        !keyward.fetch_admin_page("/metrics").1.contains("keyward_calls_shed_total 0"),
        "most were turned away"
    );
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_small_frames_are_borne_or_end_the_connection() {
    let keyward = start_server("").await;
    let to = keyward.address;
    // Less than the frames themselves: an answer that is kept for each would be more.
    assert_withstands_within(8 * 1024, "floods of PING, SETTINGS, empty DATA", &keyward, move || {
        let ping = frame(PING, 0, 0, &[7; 8]).repeat(1000);
        let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000);
        for flood in [ping, settings] {
            let mut attacker = AttackConnection::connect(to, &[]);
            let mut sent = 0;
            while sent < 300 && attacker.send(&flood) {
                sent += 1;
            }
        }
        let mut attacker = AttackConnection::connect(to, &[]);
        let stream = attacker.next_stream_id();
        attacker.send(&frame(HEADERS, END_HEADERS, stream, &encode_call_headers(EXT_AUTHZ)));
        let empty = frame(DATA, 0, stream, &[]).repeat(1000);
        let mut sent = 0;
        while sent < 300 && attacker.send(&empty) {
            sent += 1;
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http2_is_closed() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("other protocols, broken frames", &keyward, move || {
        let oversize = [PREFACE, &frame(SETTINGS, 0, 0, &[]), &[0xff; 64]].concat();
        let self_dependent = {
            let mut block = 1_u32.to_be_bytes().to_vec();
            block.push(0);
            block.extend(encode_call_headers(CHECK));
            [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS | 0x20, 1, &block)].concat()
        };
        for garbage in
            [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), vec![0; 1 << 16], vec![22, 3, 1, 0, 0], oversize]
        {
            for _ in 0..50 {
                let mut stream = TcpStream::connect(to).unwrap();
                let _ = stream.write_all(&garbage);
                let _ = stream.shutdown(Shutdown::Write);
                read_until_closed(&stream);
            }
        }
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(&self_dependent).unwrap();
    })
    .await;
    // What does not begin as HTTP/2 does gets no answer in it.
    let refused = "keyward_connections_refused_total{listener=\"main\",reason=\"protocol\"} 150";
    assert!(keyward.fetch_admin_page("/metrics").1.contains(refused));
    keyward.stop();
}
