//! Tests the filter between a real HTTP/2 client and a real server: the server must see what the client
//! sent, except for refused calls.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::AtomicBool},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioExecutor;
use proptest::prelude::*;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::{
    grpc::{connection_io::SingleWriteIo, load_shed::WorkerQueue},
    transport::socket::TransportStream,
};

const CHECK: &str = "/keyward.v1.AuthzService/Check";
const REVOKE: &str = "/keyward.v1.KeyService/Revoke";

/// Starts a server that echoes headers and bytes, and connects to it.
async fn connect() -> (SendRequest<Bytes>, Arc<WorkerQueue>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let worker_queue = Arc::new(WorkerQueue::new(4096));
    let queue = ConnectionQueue::new(worker_queue.clone(), Arc::default(), Arc::new(AtomicBool::new(true)));
    tokio::spawn(async move {
        let mut bytes = SingleWriteIo::read_preface(TransportStream::Tcp(accepted)).await.unwrap().unwrap();
        bytes.enable_early_shed(EarlyShed::new(queue));
        let service = service_fn(async |request: Request<Incoming>| {
            let (parts, body) = request.into_parts();
            let mut response = Response::new(Full::new(body.collect().await.unwrap().to_bytes()));
            *response.headers_mut() = parts.headers;
            Ok::<_, Infallible>(response)
        });
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = server.serve_connection(bytes, service).await;
    });
    let (sender, connection) = h2::client::handshake(client).await.unwrap();
    tokio::spawn(connection);
    (sender, worker_queue)
}

/// Makes one call and returns its response.
async fn call(sender: &SendRequest<Bytes>, path: &str, headers: &HeaderMap, body: &[u8]) -> Response<Bytes> {
    let mut request = Request::post(format!("http://x{path}")).body(()).unwrap();
    *request.headers_mut() = headers.clone();
    let mut sender = sender.clone().ready().await.unwrap();
    let (answer, mut message) = sender.send_request(request, body.is_empty()).unwrap();
    let half = body.len() / 2;
    if !body.is_empty() {
        // The message of a refused call may find its stream closed.
        let _ = message.send_data(Bytes::copy_from_slice(&body[..half]), false);
        let _ = message.send_data(Bytes::copy_from_slice(&body[half..]), true);
    }
    let (parts, mut body) = answer.await.unwrap().into_parts();
    let mut bytes = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.unwrap();
        body.flow_control().release_capacity(piece.len()).unwrap();
        bytes.extend(piece);
    }
    Response::from_parts(parts, bytes.into())
}

fn is_refused(answer: &Response<Bytes>) -> bool {
    answer.headers().get("grpc-status").is_some_and(|status| status == "14")
}

fn headers(fields: &[(u8, u16)]) -> HeaderMap {
    let each = fields.iter().map(|(name, value)| {
        let value = format!("{}{value}", "v".repeat(usize::from(*value) / 64));
        (format!("x-header-{name}").parse().unwrap(), value.parse().unwrap())
    });
    HeaderMap::from_iter(each)
}

#[tokio::test]
async fn a_refused_check_has_the_same_status_as_a_refusal_by_the_router() {
    let (sender, worker_queue) = connect().await;
    worker_queue.set_limit(0);
    let answer = call(&sender, CHECK, &HeaderMap::new(), b"message").await;
    let status = tonic::Status::from_header_map(answer.headers()).unwrap();
    assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, overloaded().message()));
    assert_eq!(status.details(), overloaded().details());
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    assert_eq!(answer.headers()["grpc-retry-pushback-ms"], "100");
    assert!(answer.body().is_empty());
    assert_eq!(worker_queue.shed_calls(), 1);
    assert!(!is_refused(&call(&sender, REVOKE, &HeaderMap::new(), b"message").await), "it is no Check");
    worker_queue.set_limit(4096);
    assert_eq!(call(&sender, CHECK, &HeaderMap::new(), b"message").await.body(), "message");
}

#[tokio::test]
async fn messages_of_refused_calls_take_no_window_from_others() {
    let (sender, worker_queue) = connect().await;
    let large = vec![b'x'; 48 << 10];
    for _ in 0..20 {
        worker_queue.set_limit(0);
        assert!(is_refused(&call(&sender, CHECK, &HeaderMap::new(), &large).await));
        worker_queue.set_limit(4096);
        assert_eq!(call(&sender, CHECK, &HeaderMap::new(), &large).await.body().len(), large.len());
    }
}

#[tokio::test]
async fn a_refused_call_may_be_taken_back_and_the_connection_goes_on() {
    let (sender, worker_queue) = connect().await;
    worker_queue.set_limit(0);
    for _ in 0..300 {
        let mut ready = sender.clone().ready().await.unwrap();
        let request = Request::post(format!("http://x{CHECK}")).body(()).unwrap();
        let (answer, mut message) = ready.send_request(request, false).unwrap();
        assert_eq!(answer.await.unwrap().headers()["grpc-status"], "14");
        message.send_reset(h2::Reason::CANCEL);
    }
    worker_queue.set_limit(4096);
    assert_eq!(call(&sender, CHECK, &HeaderMap::new(), b"message").await.body(), "message");
    assert_eq!(worker_queue.shed_calls(), 300);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_passes_is_what_was_sent_whatever_was_refused_before(
        calls in proptest::collection::vec(
            (any::<bool>(), any::<bool>(), proptest::collection::vec((0u8..40, any::<u16>()), 0..6)),
            1..60,
        ),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (sender, worker_queue) = connect().await;
            for (full, check, fields) in calls {
                worker_queue.set_limit(if full { 0 } else { 4096 });
                let sent = headers(&fields);
                let answer = call(&sender, if check { CHECK } else { REVOKE }, &sent, b"message").await;
                prop_assert_eq!(is_refused(&answer), full && check);
                if !is_refused(&answer) {
                    let mut came = answer.headers().clone();
                    came.remove("date");
                    came.remove("content-length");
                    prop_assert_eq!(came, sent);
                    prop_assert_eq!(&answer.body()[..], b"message");
                }
            }
            Ok::<_, TestCaseError>(())
        })?;
    }

    #[test]
    fn bytes_that_are_no_frames_pass_or_end_the_connection(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        cut in 0usize..400,
        full in any::<bool>(),
    ) {
        let worker_queue = Arc::new(WorkerQueue::new(4096));
        worker_queue.set_limit(if full { 0 } else { 4096 });
        let whole = filtered(&worker_queue, &[&bytes]);
        let cut = cut.min(bytes.len());
        prop_assert_eq!(filtered(&worker_queue, &[&bytes[..cut], &bytes[cut..]]), whole, "it does not matter how they come");
    }

    #[test]
    fn a_boundary_is_found_however_frames_are_cut(
        lengths in proptest::collection::vec(0usize..40, 1..10),
        step in 1usize..50,
    ) {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for length in lengths {
            FrameHead { length, frame_type: frame_type::DATA, flags: 0, stream: 1 }.write(&mut bytes);
            bytes.extend(vec![7; length]);
            ends.push(bytes.len());
        }
        let (mut boundary, mut at) = (FrameBoundary::default(), 0);
        for piece in bytes.chunks(step) {
            boundary.advance(piece);
            at += piece.len();
            prop_assert_eq!(boundary.is_at_boundary(), ends.contains(&at));
        }
    }
}

/// What passes of bytes that come in these pieces.
fn filtered(worker_queue: &Arc<WorkerQueue>, pieces: &[&[u8]]) -> Option<Vec<u8>> {
    let queue = ConnectionQueue::new(worker_queue.clone(), Arc::default(), Arc::new(AtomicBool::new(true)));
    let (mut shed, mut passed) = (EarlyShed::new(queue), Vec::new());
    for piece in pieces {
        shed.filter(piece, &mut passed).ok()?;
    }
    passed.extend(shed.take_partial_frame());
    Some(passed)
}

#[test]
fn nothing_is_written_between_headers_and_their_continuation() {
    let mut bytes = Vec::new();
    FrameHead { length: 1, frame_type: frame_type::HEADERS, flags: 0, stream: 1 }.write(&mut bytes);
    bytes.push(0x88);
    let mut boundary = FrameBoundary::default();
    boundary.advance(&bytes);
    assert!(!boundary.is_at_boundary());
    bytes.clear();
    FrameHead { length: 0, frame_type: frame_type::CONTINUATION, flags: END_HEADERS, stream: 1 }
        .write(&mut bytes);
    boundary.advance(&bytes);
    assert!(boundary.is_at_boundary());
}

fn frame(frame_type: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    FrameHead { length: payload.len(), frame_type, flags, stream }.write(&mut bytes);
    bytes.extend(payload);
    bytes
}

/// Headers of a call to a path, whose place in the table the peer will use (0x44) or not (0x04).
fn headers_of(path: &str, representation: u8) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, representation];
    write_string(&mut block, path.as_bytes());
    block
}

/// A filter that refuses Checks, and has refused the one on stream 1.
fn refusing() -> EarlyShed {
    let worker_queue = Arc::new(WorkerQueue::new(4096));
    worker_queue.set_limit(0);
    let queue = ConnectionQueue::new(worker_queue, Arc::default(), Arc::new(AtomicBool::new(true)));
    let mut shed = EarlyShed::new(queue);
    assert!(passed(&mut shed, &check(1)).unwrap().is_empty() && shed.tracking == HeaderTracking::Rewritten);
    shed
}

fn passed(shed: &mut EarlyShed, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut passed = Vec::new();
    shed.filter(bytes, &mut passed).ok().map(|()| passed)
}

fn check(stream: u32) -> Vec<u8> {
    frame(frame_type::HEADERS, END_HEADERS | END_STREAM, stream, &headers_of(CHECK, 0x44))
}

#[test]
fn rewritten_headers_may_come_in_several_frames() {
    let block = headers_of(REVOKE, 0x04);
    let (begin, end) = block.split_at(5);
    let whole = frame(frame_type::HEADERS, END_STREAM | END_HEADERS, 3, &block);
    let first = frame(frame_type::HEADERS, END_STREAM, 3, begin);
    let parts = [&first[..], &frame(frame_type::CONTINUATION, END_HEADERS, 3, end)].concat();
    assert_eq!(passed(&mut refusing(), &parts), passed(&mut refusing(), &whole));

    let other = [&first[..], &frame(frame_type::DATA, 0, 3, b"x")].concat();
    assert_eq!(passed(&mut refusing(), &other), None, "nothing may come between");
    let endless =
        [&first[..], &frame(frame_type::CONTINUATION, 0, 3, &[0; MAX_FRAME_LEN]).repeat(4)].concat();
    assert_eq!(passed(&mut refusing(), &endless), None, "their bytes are bounded");
}

#[test]
fn empty_headers_end_a_call_that_is_rewritten() {
    let mut shed = refusing();
    let first = frame(frame_type::HEADERS, END_HEADERS, 3, &headers_of(REVOKE, 0x04));
    assert!(passed(&mut shed, &first).is_some_and(|passed| !passed.is_empty()));
    let end = frame(frame_type::HEADERS, END_HEADERS | END_STREAM, 3, &[]);
    assert_eq!(passed(&mut shed, &end), Some(end));
}

#[test]
fn a_peer_that_shrinks_its_header_table_has_no_call_refused_early() {
    let mut shed = refusing();
    let answers = shed.refusals().len();
    let settings = frame(frame_type::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9, 0, 1, 0, 0, 0, 0]);
    assert_eq!(passed(&mut shed, &settings).as_ref(), Some(&settings));
    assert!(passed(&mut shed, &check(3)).is_some_and(|passed| !passed.is_empty()));
    assert_eq!(shed.refusals().len(), answers);
}

#[test]
fn answers_that_wait_are_bounded_however_many_calls_come_at_once() {
    let mut shed = refusing();
    let calls: Vec<u8> = (1..1000).flat_map(|at| check(2 * at + 1)).collect();
    assert!(passed(&mut shed, &calls).is_some_and(|passed| !passed.is_empty()));
    assert!(
        shed.refusals().len() <= MAX_REFUSAL_BYTES + FRAME_HEAD_LEN + REFUSAL_HEADERS.len(),
        "{}",
        shed.refusals().len()
    );
}

#[test]
fn the_stream_of_a_refused_call_is_not_opened_again() {
    let again = frame(frame_type::HEADERS, END_HEADERS | END_STREAM, 1, &headers_of(REVOKE, 0x04));
    assert_eq!(passed(&mut refusing(), &again), None);
}

#[test]
fn a_query_makes_no_other_call_of_a_check() {
    let asked = headers_of(&format!("{CHECK}?x"), 0x44);
    let asked = frame(frame_type::HEADERS, END_HEADERS | END_STREAM, 3, &asked);
    assert_eq!(passed(&mut refusing(), &asked), Some(Vec::new()));
}

#[test]
fn headers_with_padding_and_priority_are_read() {
    let worker_queue = Arc::new(WorkerQueue::new(4096));
    worker_queue.set_limit(0);
    let queue = ConnectionQueue::new(worker_queue.clone(), Arc::default(), Arc::new(AtomicBool::new(true)));
    let (mut shed, mut passed) = (EarlyShed::new(queue), Vec::new());
    let mut block = vec![0x83, 0x86, 0x44];
    write_string(&mut block, CHECK.as_bytes());
    let payload = [&[3, 0, 0, 0, 0, 16], &block[..], &[0; 3]].concat();
    let mut bytes = Vec::new();
    let flags = PADDED | PRIORITY | END_HEADERS | END_STREAM;
    FrameHead { length: payload.len(), frame_type: frame_type::HEADERS, flags, stream: 1 }.write(&mut bytes);
    bytes.extend(payload);
    shed.filter(&bytes, &mut passed).unwrap();
    assert!(passed.is_empty() && !shed.refusals().is_empty());
}
