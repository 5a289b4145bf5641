//! Answers that nobody reads.

use super::*;

const AUDIT_LIST: &str = "/keyward.v1.AuditService/List";
/// No byte of an answer may be sent (SETTINGS_INITIAL_WINDOW_SIZE).
const NO_WINDOW: [u8; 6] = [0, 4, 0, 0, 0, 0];

/// A call with a credential and one message.
fn whole_call(stream: u32, path: &str, bearer: &str, message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    let prefix = [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..]].concat();
    let headers = [encode_call_headers(path), encode_header("authorization", bearer)].concat();
    let data = [prefix, message].concat();
    [frame(HEADERS, END_HEADERS, stream, &headers), frame(DATA, END_STREAM, stream, &data)].concat()
}

/// Fills the log with entries of 20 KB.
async fn fill_log(keyward: &KeywardProcess) {
    let scopes: Vec<_> = (0..200).map(|at| format!("{at:03}{}", "x".repeat(100))).collect();
    for call in 0..6_u8 {
        let keys = (0..150).map(|at| pb::ImportKey {
            scopes: scopes.clone(),
            account: "acme".into(),
            environment: "production".into(),
            sha256: [[call; 16], [at; 16]].concat(),
            hint: "old_".into(),
            ..Default::default()
        });
        let request = pb::ImportKeysRequest { keys: keys.collect() };
        let results = keyward.root_caller().keys.import(request).await.unwrap().into_inner().results;
        assert!(results.iter().all(|result| result.error.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_nobody_reads_are_bounded_and_their_streams_end() {
    let keyward = start_server("").await;
    fill_log(&keyward).await;
    let to = keyward.address;
    let scopes = vec!["keyward:audit:read".to_owned()];
    let reader = pb::CreateKeyRequest { scopes, ..plain_key_request() };
    let bearer = format!("Bearer {}", keyward.root_caller().create_key(reader).await.unwrap().1);
    let ((begun, begins), answered) = (tokio::sync::oneshot::channel(), Arc::new(AtomicBool::new(false)));
    let (mut reader, told) = (keyward.root_caller(), answered.clone());
    let reading = tokio::spawn(async move {
        begins.await.unwrap();
        reader.audit.list(pb::ListAuditEntriesRequest::default()).await.unwrap();
        told.store(true, Ordering::Relaxed);
    });
    assert_withstands_within(96 * 1024, "25 unread lists of the audit log", &keyward, move || {
        let mut attacker = AttackConnection::connect(to, &NO_WINDOW);
        let request = pb::ListAuditEntriesRequest { page_size: Some(1000), ..Default::default() };
        for _ in 0..25 {
            let stream = attacker.next_stream_id();
            assert!(attacker.send(&whole_call(stream, AUDIT_LIST, &bearer, &request)));
        }
        begun.send(()).unwrap();
        attacker.wait_until_answered(25);
        wait_for("the streams to be ended", || {
            (attacker.counters.resets.load(Ordering::Relaxed) >= 4).then_some(())
        });
        wait_for("somebody else's list", || answered.load(Ordering::Relaxed).then_some(()));
    })
    .await;
    reading.await.unwrap();
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_answers_that_nobody_reads_end_their_streams() {
    let keyward = start_server("").await;
    let to = keyward.address;
    assert_withstands("2,560 unread answers of health", &keyward, move || {
        let crowd: Vec<_> = (0..10)
            .map(|_| {
                let mut attacker = AttackConnection::connect(to, &NO_WINDOW);
                for _ in 0..256 {
                    let stream = attacker.next_stream_id();
                    let request = tonic_health::pb::HealthCheckRequest::default();
                    attacker.send(&whole_call(stream, "/grpc.health.v1.Health/Check", "x", &request));
                }
                attacker
            })
            .collect();
        for attacker in &crowd {
            wait_for("the streams to be ended", || {
                (attacker.counters.resets.load(Ordering::Relaxed) >= 256).then_some(())
            });
        }
    })
    .await;
    keyward.stop();
}
