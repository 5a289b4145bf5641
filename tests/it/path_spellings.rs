//! The table of spellings in `docs/gateway.md`: every row of it is sent, and answered as it says.

use keyward::domain::route::path::{CanonicalPath, normalize_host};

use crate::{
    forward_auth::ForwardAuthServer,
    raw_http::{RawConnection, RawRequest, RawResponse},
};

const DOC: &str = include_str!("../../docs/gateway.md");
const HEAD: &str = "| Sent | Answer | Why |";
/// Fewer rows, and the table was not found whole.
const FEWEST: usize = 60;

/// One row.
struct SpellingRow {
    sent: String,
    /// The one spelling that rules see; None = it is refused.
    judged_as: Option<String>,
}

fn table() -> Vec<SpellingRow> {
    let lines = DOC.lines().skip_while(|line| *line != HEAD).skip(2).take_while(|line| line.starts_with('|'));
    let quoted = |cell: &str| cell.split('`').nth(1).map(str::to_owned);
    let rows: Vec<_> = lines
        .map(|line| {
            let cells: Vec<_> = line.split(" | ").collect();
            let [sent, answer, ..] = &*cells else { panic!("{line}") };
            let judged_as = if *answer == "400" { None } else { Some(quoted(answer).expect(line)) };
            SpellingRow { sent: quoted(sent).expect(line), judged_as }
        })
        .collect();
    assert!(rows.len() >= FEWEST, "{} rows", rows.len());
    rows
}

/// What nginx asks about such a request to a public route.
fn question(target: &str, host: &str) -> RawRequest {
    RawRequest::get("/auth/nginx?public=true")
        .header("X-Original-Method", "GET")
        .header("X-Original-Host", host)
        .header("X-Original-URI", target)
}

/// 200, or the status that nginx is to make of the answer.
fn status(response: &RawResponse) -> String {
    response.header("x-keyward-status").map_or_else(|| response.status.to_string(), str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_spelling_of_the_table_is_answered_as_the_table_says() {
    let front = ForwardAuthServer::start().await;
    let mut connection = RawConnection::open(front.address).unwrap();
    let mut wrong = Vec::new();
    for SpellingRow { sent, judged_as } in table() {
        let (request, spelling) = match sent.strip_prefix("Host: ") {
            Some(name) => (question("/admin", name), normalize_host(name)),
            None => {
                let spelling =
                    CanonicalPath::parse(&sent).ok().map(|path| format!("/{}", path.segments().join("/")));
                (question(&sent, "api.test"), spelling)
            }
        };
        let response = connection.send(&request).unwrap();
        let expected = if judged_as.is_some() { "200" } else { "400" };
        if spelling != judged_as || status(&response) != expected {
            wrong.push(format!("{sent}: {} {spelling:?}, and not {judged_as:?}", status(&response)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
