//! The database, the clocks of its replicas' hosts against its own, and the replicas that serve it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    clock::Clock,
    config::{replicas::lease_text, server::Settings},
    domain::{
        lease::{Lease, Row},
        time::{Revision, Timestamp},
    },
    store::{
        OpenError,
        fleet::{Fleet, Roster},
        look::{self, FileFacts, Kind, Seen, ServerFacts},
    },
};

use super::{Findings, PATIENCE, spoken};

/// Expiry goes by wall clocks: what people would notice.
const CLOCK_WARNS: Duration = Duration::from_secs(1);
/// Keys live and die visibly at the wrong time.
const CLOCK_FAILS: Duration = Duration::from_secs(60);
/// What should be free on the disk of a file, beside as much as the file has.
const FREE: u64 = 1 << 30;
/// How long a replica is given to acknowledge what was committed before it was asked about.
const CATCH_UP: Duration = Duration::from_secs(4);

/// Looks at the settings' database. Gives its newest revision.
pub(super) async fn examine(
    settings: &Settings,
    clock: &dyn Clock,
    findings: &mut Findings,
) -> Option<Revision> {
    let seen = match look::look(&settings.database).await {
        Ok(seen) => seen,
        Err(error) => {
            let advice = match error {
                OpenError::WithoutWal { .. }
                | OpenError::WithoutDatabase { .. }
                | OpenError::ForeignWal { .. }
                | OpenError::Unsuitable { .. } => "see docs/operations.md, The SQLite file",
                _ => "start it, or name the right one with --database",
            };
            findings.fail("store", error.to_string(), advice);
            findings.unseen("replicas", "the database does not answer");
            return None;
        }
    };
    findings.good("store", format!("{} is reachable", seen.shown));
    schema(&seen, findings);
    match &seen.kind {
        Kind::Sqlite(facts) => file(facts, findings),
        Kind::Postgres(facts) => server(facts, findings),
    }
    let head = log(&seen, findings);
    let store = seen.store?;
    match store.clone().fleet() {
        Some(fleet) => fleet_of(&fleet, clock, findings).await,
        None => findings.good("replicas", "an SQLite file has one owner: no lease, no other replicas"),
    }
    store.close().await;
    head
}

fn schema(seen: &Seen, findings: &mut Findings) {
    const ABOUT: &str = "schema";
    let known = seen.known;
    match seen.schema {
        Some(found) if found == known => findings.good(ABOUT, format!("version {found}, the newest that this keyward knows")),
        Some(found) if found < known => findings.warn(
            ABOUT,
            format!("version {found}; this keyward knows {known}: servers of an older version run on it, or none has started"),
            "start a server of this version, which migrates it; the log was not looked at",
        ),
        Some(found) => findings.fail(
            ABOUT,
            format!("version {found}, and this keyward knows versions up to {known}"),
            "use the keyward that migrated it",
        ),
        None => findings.fail(ABOUT, "no keyward has ever used this database", "is it the right one? keyward serve makes the tables"),
    }
}

fn file(facts: &FileFacts, findings: &mut Findings) {
    const ABOUT: &str = "file";
    let fix = "chmod 600 for the file, its -wal and its -shm: it holds digests and names";
    match facts.mode & 0o077 {
        0 => findings.good(ABOUT, "only its owner can read it"),
        _ => {
            findings.fail(ABOUT, format!("others than its owner may open it (mode {:03o})", facts.mode), fix)
        }
    }
    let (free, wanted) = (facts.free >> 20, FREE.max(facts.bytes) >> 20);
    if free < wanted {
        let said = format!(
            "{free} MiB are free on its disk, and {wanted} should be: a full disk refuses every change"
        );
        findings.warn(ABOUT, said, "make room");
    } else {
        findings.good(ABOUT, format!("{free} MiB are free on its disk"));
    }
    match &facts.structure {
        Some(Ok(())) => findings.good(ABOUT, "its structure is whole"),
        Some(Err(what)) => findings.fail(
            ABOUT,
            format!("it is damaged: {what}"),
            "restore the newest backup; keep this one for a look",
        ),
        None => findings.unseen(ABOUT, "its structure: it is large, and a server checks it when it starts"),
    }
    if !facts.owned {
        findings.warn(ABOUT, "no server has it open", "start one, or name another file with --database");
    }
}

fn server(facts: &ServerFacts, findings: &mut Findings) {
    const ABOUT: &str = "postgresql";
    match &facts.objection {
        Some((what, fix)) => findings.fail(ABOUT, what.clone(), *fix),
        None => findings.good(ABOUT, format!("version {}, a primary, fsync on", facts.version / 10_000)),
    }
    if facts.full_page_writes != "on" {
        let said = format!("full_page_writes is {}: a power cut may tear pages", facts.full_page_writes);
        findings.warn(ABOUT, said, "set full_page_writes = on, unless its file system writes whole pages");
    }
    if facts.standbys.is_empty() {
        let said = "it has no synchronous standbys: should its disk be lost, so are the newest changes, revocations included";
        findings.warn(ABOUT, said, "set synchronous_standby_names, or accept it");
    } else {
        findings.good(ABOUT, format!("commits wait for synchronous standbys ({})", facts.standbys));
    }
    match facts.synchronous_commit.as_str() {
        "on" | "remote_apply" => {
            findings.good(ABOUT, format!("synchronous_commit is {}", facts.synchronous_commit))
        }
        weak => findings.good(
            ABOUT,
            format!("synchronous_commit is {weak} by default; Keyward's transactions set it to on"),
        ),
    }
}

fn log(seen: &Seen, findings: &mut Findings) -> Option<Revision> {
    const ABOUT: &str = "log";
    match seen.log.as_ref() {
        None => {
            findings.unseen(ABOUT, "its hash chain");
            None
        }
        Some(Ok(head)) => {
            let start: String = head.hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            findings.good(
                ABOUT,
                format!("its newest part is whole; it ends at revision {}, hash {start}…", head.revision),
            );
            Some(head.revision)
        }
        Some(Err(error)) => {
            findings.fail(
                ABOUT,
                error.to_string(),
                "restore the newest backup; keep this database for a look",
            );
            None
        }
    }
}

async fn fleet_of(fleet: &Arc<dyn Fleet>, clock: &dyn Clock, findings: &mut Findings) {
    let before = clock.now();
    let first = tokio::time::timeout(PATIENCE, fleet.roster(&[])).await;
    let after = clock.now();
    let terms = tokio::time::timeout(PATIENCE, fleet.terms()).await;
    let (Ok(Ok(roster)), Ok(Ok(terms))) = (first, terms) else {
        findings.fail("replicas", "the database did not say who serves it", "look at its log");
        return;
    };
    clocks(before, after, roster.listing.db_now, findings);
    let roster = settled(fleet, roster).await;
    leases(terms.lease, terms.longest, &roster, findings);
    replicas(terms.longest, &roster, findings);
}

/// The same a little later, if a replica has not acknowledged yet what was committed when it was first looked at.
async fn settled(fleet: &Arc<dyn Fleet>, first: Roster) -> Roster {
    let head = first.head;
    let behind = |roster: &Roster| {
        roster.listing.rows.iter().any(|row| row.applied.is_some_and(|applied| applied < head))
    };
    let mut newest = first;
    let waiting = async {
        while behind(&newest) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            match fleet.roster(&[]).await {
                Ok(roster) => newest = Roster { head, ..roster },
                Err(_) => return,
            }
        }
    };
    // What is still behind then is told as it is.
    let _ = tokio::time::timeout(CATCH_UP, waiting).await;
    newest
}

/// The database's clock, which was read between two readings of ours.
fn clocks(before: Timestamp, after: Timestamp, database: Timestamp, findings: &mut Findings) {
    const ABOUT: &str = "clocks";
    let apart = before.since(database).max(database.since(after));
    let said = format!("the database's clock and this machine's are at least {} apart", spoken(apart));
    let fix = "synchronise clocks (NTP) on every host: keys expire by each replica's own";
    if apart >= CLOCK_FAILS {
        findings.fail(ABOUT, said, fix);
    } else if apart >= CLOCK_WARNS {
        findings.warn(ABOUT, said, fix);
    } else {
        findings.good(
            ABOUT,
            format!("the database's clock and this machine's agree to within {}", spoken(CLOCK_WARNS)),
        );
    }
}

fn leases(lease: Lease, longest: Lease, roster: &Roster, findings: &mut Findings) {
    const ABOUT: &str = "lease";
    let said = format!("{}, nobody holds one longer than {}", lease_text(lease), lease_text(longest));
    if lease.length().is_none() {
        let fix =
            "keyward replicas lease 60s, unless answering through any outage matters more than revocation";
        findings.warn(
            ABOUT,
            format!("{said}: a replica that is cut off allows what was revoked, for ever"),
            fix,
        );
    } else {
        findings.good(ABOUT, said);
    }
    if !roster.listing.is_whole() {
        let said = "the database may have lost rows (a failover, a restored backup): narrowing changes wait for every lease to run out";
        findings.warn(ABOUT, said, "wait that long; with a static lease set a finite one");
    }
}

fn replicas(longest: Lease, roster: &Roster, findings: &mut Findings) {
    const ABOUT: &str = "replicas";
    let rows = &roster.listing.rows;
    if rows.is_empty() {
        findings.fail(ABOUT, "none serves the database", "start keyward serve");
        return;
    }
    let name = |row: &Row| roster.names.get(&row.id).cloned().unwrap_or_default();
    let mut names = BTreeMap::<String, usize>::new();
    for row in rows {
        *names.entry(name(row)).or_default() += 1;
        replica(&name(row), row, longest, roster, findings);
    }
    for (name, count) in names.into_iter().filter(|(_, count)| *count > 1) {
        let said = format!("{count} replicas are called {name}: reports cannot tell them apart");
        findings.warn(
            ABOUT,
            said,
            "give each its own --replica-name; if one was killed, its row goes when its lease is over",
        );
    }
}

fn replica(name: &str, row: &Row, longest: Lease, roster: &Roster, findings: &mut Findings) {
    const ABOUT: &str = "replicas";
    let silent = roster.listing.db_now.since(row.last_seen);
    let seen = format!("{name} renewed {} ago", spoken(silent));
    let late = longest.length().map_or(Duration::from_secs(60), |length| length / 2);
    let dead = longest.length().is_some_and(|length| silent > length);
    let fix = format!("look at the process; if it is gone: keyward replicas attest-dead {name} --seen-gone");
    match row.applied {
        _ if dead => {
            let said = format!(
                "{seen}, longer than any lease: it answers no Check if it runs, and narrowing changes may wait for it"
            );
            findings.fail(ABOUT, said, fix);
        }
        _ if silent > late => {
            findings.warn(ABOUT, format!("{seen}: its way to the database is slow or broken"), fix)
        }
        None => {
            findings.warn(ABOUT, format!("{name} is starting: it holds no lease yet"), "wait for its /readyz")
        }
        Some(applied) if applied < roster.head => {
            let said =
                format!("{seen}, and has not acknowledged revision {} yet, only {applied}", roster.head);
            findings.warn(ABOUT, said, "look at its log: it does not follow");
        }
        Some(applied) => findings.good(ABOUT, format!("{seen}, revision {applied}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn clocks_are_judged_by_what_must_lie_between_them() {
        let at = |count| Timestamp::from_micros(0).plus(seconds(count));
        for (database, level) in [
            (100, Level::Good),
            (104, Level::Good),
            (110, Level::Warning),
            (98, Level::Warning),
            (200, Level::Failure),
        ] {
            let mut findings = Findings::default();
            clocks(at(100), at(104), at(database), &mut findings);
            assert_eq!(findings.iter().next().unwrap().level, level, "{database}");
        }
    }

    #[test]
    fn a_file_is_for_its_owner_and_needs_room() {
        let good =
            FileFacts { mode: 0o600, bytes: 1 << 20, free: 2 << 30, owned: true, structure: Some(Ok(())) };
        let grave = |facts: FileFacts| {
            let mut findings = Findings::default();
            file(&facts, &mut findings);
            findings
                .iter()
                .filter(|found| found.level != Level::Good)
                .map(|found| found.level)
                .collect::<Vec<_>>()
        };
        assert_eq!(grave(good.clone()), []);
        assert_eq!(grave(FileFacts { mode: 0o644, ..good.clone() }), [Level::Failure]);
        assert_eq!(grave(FileFacts { free: 1 << 20, ..good.clone() }), [Level::Warning]);
        assert_eq!(grave(FileFacts { owned: false, ..good.clone() }), [Level::Warning]);
        assert_eq!(grave(FileFacts { structure: None, ..good.clone() }), [Level::Unseen]);
        assert_eq!(grave(FileFacts { structure: Some(Err("torn".into())), ..good }), [Level::Failure]);
    }
}
