//! What a Check costs in instructions, which unlike time are the same on every machine: counted by callgrind in the very
//! binary that serves. Whoever makes the way of a Check longer has to say so here.

use std::process::Command;

use keyward::pb;

use crate::{
    process::{Home, plain_key, wait_for},
    support::check,
};

/// Instructions of a Check from its headers to its written answer, in the profile of the tests, where our own code is not
/// optimised; HTTP/2 is not among them. Measured: 84,700. A change that goes beyond this is to be explained.
const AT_MOST: u64 = 95_000;
const CHECKS: u64 = 200;

/// The server in callgrind, which counts within the short way of a Check alone.
fn counted(home: &Home) -> Command {
    let serve = home.serve();
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=callgrind.out"])
        // The function as older and newer symbols name it, and none of those within it: each would toggle again.
        .arg("--toggle-collect=*answer_directly::{{closure}}")
        .arg("--toggle-collect=*answer_directly::{closure#0}")
        .arg(serve.get_program())
        .args(serve.get_args())
        .args(["--threads", "1"])
        .current_dir(home.path(""));
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => valgrind.env(name, value),
            None => valgrind.env_remove(name),
        };
    }
    valgrind
}

/// What callgrind has counted in all, once it has written that down.
fn total(home: &Home) -> u64 {
    wait_for("callgrind's count", || {
        let text = std::fs::read_to_string(home.path("callgrind.out")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("totals: "))?;
        line.trim().parse().ok()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_takes_no_more_instructions_than_are_known() {
    let home = Home::new();
    let server = home.start_as(counted(&home)).unwrap();
    server.root().make_account("acme").await;
    let (_, token) = server.root().create(plain_key()).await.unwrap();
    let mut caller = server.root();
    for _ in 0..CHECKS {
        let answer = caller.authz.check(check(&token, "monitors:read")).await.unwrap().into_inner();
        assert_eq!(answer.reason(), pb::Reason::Ok);
    }
    let each = total(&server.stop()) / CHECKS;
    println!("{each} instructions");
    assert!((AT_MOST / 2..=AT_MOST).contains(&each), "{each} instructions, not {AT_MOST} at the most");
}
