//! The database, the clocks of its replicas' hosts against its own, and the replicas that serve it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    clock::Clock,
    config::{replicas::format_lease, server::ServerSettings},
    domain::{
        lease::{LeaseDuration, ReplicaRow},
        time::{Revision, Timestamp},
    },
    store::{
        OpenError,
        inspect::{self, DatabaseInspection, DatabaseKind, PostgresServerInfo, SqliteFileInfo},
        replica_registry::{ReplicaRegistry, ReplicaSnapshot},
    },
};

use super::report::{CHECK_TIMEOUT, DoctorReport, format_rounded};

/// Expiry goes by wall clocks: what people would notice.
const CLOCK_WARN_THRESHOLD: Duration = Duration::from_secs(1);
/// Keys live and die visibly at the wrong time.
const CLOCK_FAIL_THRESHOLD: Duration = Duration::from_secs(60);
/// What should be free on the disk of a file, beside as much as the file has.
const MIN_FREE_BYTES: u64 = 1 << 30;
/// How long a replica is given to acknowledge what was committed before it was asked about.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(4);

/// Looks at the settings' database. Gives its newest revision.
pub(super) async fn check_database(
    settings: &ServerSettings,
    clock: &dyn Clock,
    findings: &mut DoctorReport,
) -> Option<Revision> {
    let seen = match inspect::inspect(&settings.database).await {
        Ok(seen) => seen,
        Err(error) => {
            let advice = match error {
                OpenError::WalMissing { .. }
                | OpenError::DatabaseFileMissing { .. }
                | OpenError::ForeignWal { .. }
                | OpenError::Unsuitable { .. } => "see docs/operations.md, The SQLite file",
                _ => "start it, or name the right one with --database",
            };
            findings.fail("store", error.to_string(), advice);
            findings.skip("replicas", "the database does not answer");
            return None;
        }
    };
    findings.pass("store", format!("{} is reachable", seen.display_name));
    check_schema(&seen, findings);
    match &seen.kind {
        DatabaseKind::Sqlite(facts) => check_sqlite_file(facts, findings),
        DatabaseKind::Postgres(facts) => check_postgres_server(facts, findings),
    }
    let head = check_log(&seen, findings);
    let store = seen.store?;
    match store.clone().replica_registry() {
        Some(fleet) => check_fleet(&fleet, clock, findings).await,
        None => findings.pass("replicas", "an SQLite file has one owner: no lease, no other replicas"),
    }
    store.close().await;
    head
}

fn check_schema(seen: &DatabaseInspection, findings: &mut DoctorReport) {
    const TOPIC: &str = "schema";
    let known = seen.newest_schema_version;
    match seen.schema_version {
        Some(found) if found == known => findings.pass(TOPIC, format!("version {found}, the newest that this keyward knows")),
        Some(found) if found < known => findings.warn(
            TOPIC,
            format!("version {found}; this keyward knows {known}: servers of an older version run on it, or none has started"),
            "start a server of this version, which migrates it; the log was not looked at",
        ),
        Some(found) => findings.fail(
            TOPIC,
            format!("version {found}, and this keyward knows versions up to {known}"),
            "use the keyward that migrated it",
        ),
        None => findings.fail(TOPIC, "no keyward has ever used this database", "is it the right one? keyward serve makes the tables"),
    }
}

fn check_sqlite_file(facts: &SqliteFileInfo, findings: &mut DoctorReport) {
    const TOPIC: &str = "file";
    let fix = "chmod 600 for the file, its -wal and its -shm: it holds digests and names";
    match facts.mode & 0o077 {
        0 => findings.pass(TOPIC, "only its owner can read it"),
        _ => {
            findings.fail(TOPIC, format!("others than its owner may open it (mode {:03o})", facts.mode), fix)
        }
    }
    let (free, wanted) = (facts.free_bytes >> 20, MIN_FREE_BYTES.max(facts.size_bytes) >> 20);
    if free < wanted {
        let said = format!(
            "{free} MiB are free on its disk, and {wanted} should be: a full disk refuses every change"
        );
        findings.warn(TOPIC, said, "make room");
    } else {
        findings.pass(TOPIC, format!("{free} MiB are free on its disk"));
    }
    match &facts.integrity_check {
        Some(Ok(())) => findings.pass(TOPIC, "its structure is whole"),
        Some(Err(what)) => findings.fail(
            TOPIC,
            format!("it is damaged: {what}"),
            "restore the newest backup; keep this one for a look",
        ),
        None => findings.skip(TOPIC, "its structure: it is large, and a server checks it when it starts"),
    }
    if !facts.is_owned {
        findings.warn(TOPIC, "no server has it open", "start one, or name another file with --database");
    }
}

fn check_postgres_server(facts: &PostgresServerInfo, findings: &mut DoctorReport) {
    const TOPIC: &str = "postgresql";
    match &facts.unsuitable_reason {
        Some((what, fix)) => findings.fail(TOPIC, what.clone(), *fix),
        None => {
            findings.pass(TOPIC, format!("version {}, a primary, fsync on", facts.version_number / 10_000))
        }
    }
    if facts.full_page_writes != "on" {
        let said = format!("full_page_writes is {}: a power cut may tear pages", facts.full_page_writes);
        findings.warn(TOPIC, said, "set full_page_writes = on, unless its file system writes whole pages");
    }
    if facts.synchronous_standbys.is_empty() {
        let said = "it has no synchronous standbys: should its disk be lost, so are the newest changes, revocations included";
        findings.warn(TOPIC, said, "set synchronous_standby_names, or accept it");
    } else {
        findings
            .pass(TOPIC, format!("commits wait for synchronous standbys ({})", facts.synchronous_standbys));
    }
    match facts.synchronous_commit.as_str() {
        "on" | "remote_apply" => {
            findings.pass(TOPIC, format!("synchronous_commit is {}", facts.synchronous_commit))
        }
        weak => findings.pass(
            TOPIC,
            format!("synchronous_commit is {weak} by default; Keyward's transactions set it to on"),
        ),
    }
}

fn check_log(seen: &DatabaseInspection, findings: &mut DoctorReport) -> Option<Revision> {
    const TOPIC: &str = "log";
    match seen.log_check.as_ref() {
        None => {
            findings.skip(TOPIC, "its hash chain");
            None
        }
        Some(Ok(head)) => {
            let start: String = head.hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            findings.pass(
                TOPIC,
                format!("its newest part is whole; it ends at revision {}, hash {start}…", head.revision),
            );
            Some(head.revision)
        }
        Some(Err(error)) => {
            findings.fail(
                TOPIC,
                error.to_string(),
                "restore the newest backup; keep this database for a look",
            );
            None
        }
    }
}

async fn check_fleet(fleet: &Arc<dyn ReplicaRegistry>, clock: &dyn Clock, findings: &mut DoctorReport) {
    let before = clock.now();
    let first = tokio::time::timeout(CHECK_TIMEOUT, fleet.list_replicas(&[])).await;
    let after = clock.now();
    let terms = tokio::time::timeout(CHECK_TIMEOUT, fleet.lease_config()).await;
    let (Ok(Ok(roster)), Ok(Ok(terms))) = (first, terms) else {
        findings.fail("replicas", "the database did not say who serves it", "look at its log");
        return;
    };
    check_clocks(before, after, roster.listing.database_time, findings);
    let roster = wait_until_caught_up(fleet, roster).await;
    check_leases(terms.lease, terms.longest_lease, &roster, findings);
    check_replica_rows(terms.longest_lease, &roster, findings);
}

/// The same a little later, if a replica has not acknowledged yet what was committed when it was first looked at.
async fn wait_until_caught_up(fleet: &Arc<dyn ReplicaRegistry>, first: ReplicaSnapshot) -> ReplicaSnapshot {
    let head = first.head;
    let behind = |roster: &ReplicaSnapshot| {
        roster.listing.rows.iter().any(|row| row.applied.is_some_and(|applied| applied < head))
    };
    let mut newest = first;
    let waiting = async {
        while behind(&newest) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            match fleet.list_replicas(&[]).await {
                Ok(roster) => newest = ReplicaSnapshot { head, ..roster },
                Err(_) => return,
            }
        }
    };
    // What is still behind then is told as it is.
    let _ = tokio::time::timeout(CATCH_UP_TIMEOUT, waiting).await;
    newest
}

/// The database's clock, which was read between two readings of ours.
fn check_clocks(before: Timestamp, after: Timestamp, database: Timestamp, findings: &mut DoctorReport) {
    const TOPIC: &str = "clocks";
    let apart = before.saturating_duration_since(database).max(database.saturating_duration_since(after));
    let said =
        format!("the database's clock and this machine's are at least {} apart", format_rounded(apart));
    let fix = "synchronise clocks (NTP) on every host: keys expire by each replica's own";
    if apart >= CLOCK_FAIL_THRESHOLD {
        findings.fail(TOPIC, said, fix);
    } else if apart >= CLOCK_WARN_THRESHOLD {
        findings.warn(TOPIC, said, fix);
    } else {
        findings.pass(
            TOPIC,
            format!(
                "the database's clock and this machine's agree to within {}",
                format_rounded(CLOCK_WARN_THRESHOLD)
            ),
        );
    }
}

fn check_leases(
    lease: LeaseDuration,
    longest: LeaseDuration,
    roster: &ReplicaSnapshot,
    findings: &mut DoctorReport,
) {
    const TOPIC: &str = "lease";
    let said = format!("{}, nobody holds one longer than {}", format_lease(lease), format_lease(longest));
    if lease.length().is_none() {
        let fix =
            "keyward replicas lease 60s, unless answering through any outage matters more than revocation";
        findings.warn(
            TOPIC,
            format!("{said}: a replica that is cut off allows what was revoked, for ever"),
            fix,
        );
    } else {
        findings.pass(TOPIC, said);
    }
    if !roster.listing.is_complete() {
        let said = "the database may have lost rows (a failover, a restored backup): narrowing changes wait for every lease to run out";
        findings.warn(TOPIC, said, "wait that long; with a static lease set a finite one");
    }
}

fn check_replica_rows(longest: LeaseDuration, roster: &ReplicaSnapshot, findings: &mut DoctorReport) {
    const TOPIC: &str = "replicas";
    let rows = &roster.listing.rows;
    if rows.is_empty() {
        findings.fail(TOPIC, "none serves the database", "start keyward serve");
        return;
    }
    let name = |row: &ReplicaRow| roster.names.get(&row.id).cloned().unwrap_or_default();
    let mut names = BTreeMap::<String, usize>::new();
    for row in rows {
        *names.entry(name(row)).or_default() += 1;
        check_replica_row(&name(row), row, longest, roster, findings);
    }
    for (name, count) in names.into_iter().filter(|(_, count)| *count > 1) {
        let said = format!("{count} replicas are called {name}: reports cannot tell them apart");
        findings.warn(
            TOPIC,
            said,
            "give each its own --replica-name; if one was killed, its row goes when its lease is over",
        );
    }
}

fn check_replica_row(
    name: &str,
    row: &ReplicaRow,
    longest: LeaseDuration,
    roster: &ReplicaSnapshot,
    findings: &mut DoctorReport,
) {
    const TOPIC: &str = "replicas";
    let silent = roster.listing.database_time.saturating_duration_since(row.last_seen);
    let seen = format!("{name} renewed {} ago", format_rounded(silent));
    let late = longest.length().map_or(Duration::from_secs(60), |length| length / 2);
    let dead = longest.length().is_some_and(|length| silent > length);
    let fix = format!("look at the process; if it is gone: keyward replicas attest-dead {name} --seen-gone");
    match row.applied {
        _ if dead => {
            let said = format!(
                "{seen}, longer than any lease: it answers no Check if it runs, and narrowing changes may wait for it"
            );
            findings.fail(TOPIC, said, fix);
        }
        _ if silent > late => {
            findings.warn(TOPIC, format!("{seen}: its way to the database is slow or broken"), fix)
        }
        None => {
            findings.warn(TOPIC, format!("{name} is starting: it holds no lease yet"), "wait for its /readyz")
        }
        Some(applied) if applied < roster.head => {
            let said =
                format!("{seen}, and has not acknowledged revision {} yet, only {applied}", roster.head);
            findings.warn(TOPIC, said, "look at its log: it does not follow");
        }
        Some(applied) => findings.pass(TOPIC, format!("{seen}, revision {applied}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Severity;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn clocks_are_judged_by_what_must_lie_between_them() {
        let at = |count| Timestamp::from_micros(0).saturating_add(seconds(count));
        for (database, level) in [
            (100, Severity::Ok),
            (104, Severity::Ok),
            (110, Severity::Warning),
            (98, Severity::Warning),
            (200, Severity::Failure),
        ] {
            let mut findings = DoctorReport::default();
            check_clocks(at(100), at(104), at(database), &mut findings);
            assert_eq!(findings.iter().next().unwrap().severity, level, "{database}");
        }
    }

    #[test]
    fn a_file_is_for_its_owner_and_needs_room() {
        let good = SqliteFileInfo {
            mode: 0o600,
            size_bytes: 1 << 20,
            free_bytes: 2 << 30,
            is_owned: true,
            integrity_check: Some(Ok(())),
        };
        let grave = |facts: SqliteFileInfo| {
            let mut findings = DoctorReport::default();
            check_sqlite_file(&facts, &mut findings);
            findings
                .iter()
                .filter(|found| found.severity != Severity::Ok)
                .map(|found| found.severity)
                .collect::<Vec<_>>()
        };
        assert_eq!(grave(good.clone()), []);
        assert_eq!(grave(SqliteFileInfo { mode: 0o644, ..good.clone() }), [Severity::Failure]);
        assert_eq!(grave(SqliteFileInfo { free_bytes: 1 << 20, ..good.clone() }), [Severity::Warning]);
        assert_eq!(grave(SqliteFileInfo { is_owned: false, ..good.clone() }), [Severity::Warning]);
        assert_eq!(grave(SqliteFileInfo { integrity_check: None, ..good.clone() }), [Severity::Skipped]);
        assert_eq!(
            grave(SqliteFileInfo { integrity_check: Some(Err("torn".into())), ..good }),
            [Severity::Failure]
        );
    }
}
