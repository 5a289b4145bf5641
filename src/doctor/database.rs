//! Checks the database, the replicas that serve it, and the clocks of both.

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

/// Keys expire by wall clocks; people notice a difference of this size.
const CLOCK_WARN_THRESHOLD: Duration = Duration::from_secs(1);
/// Keys visibly start and expire at the wrong time.
const CLOCK_FAIL_THRESHOLD: Duration = Duration::from_secs(60);
/// The free disk space that a small SQLite file needs; a larger one needs its own size.
const MIN_FREE_BYTES: u64 = 1 << 30;
/// How long replicas may take to acknowledge what was committed before the check.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(4);

/// Checks the database of the settings and returns its newest revision.
pub(super) async fn check_database(
    settings: &ServerSettings,
    clock: &dyn Clock,
    findings: &mut DoctorReport,
) -> Option<Revision> {
    let inspection = match inspect::inspect(&settings.database).await {
        Ok(inspection) => inspection,
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
    findings.pass("store", format!("{} is reachable", inspection.display_name));
    check_schema(&inspection, findings);
    match &inspection.kind {
        DatabaseKind::Sqlite(facts) => check_sqlite_file(facts, findings),
        DatabaseKind::Postgres(facts) => check_postgres_server(facts, findings),
    }
    let head = check_log(&inspection, findings);
    let store = inspection.store?;
    match store.clone().replica_registry() {
        Some(registry) => check_replicas(&registry, clock, findings).await,
        None => findings.pass("replicas", "an SQLite file has one owner: no lease, no other replicas"),
    }
    store.close().await;
    head
}

fn check_schema(inspection: &DatabaseInspection, findings: &mut DoctorReport) {
    const TOPIC: &str = "schema";
    let known = inspection.newest_schema_version;
    match inspection.schema_version {
        Some(found) if found == known => {
            findings.pass(TOPIC, format!("version {found}, the newest that this keyward knows"))
        }
        Some(found) if found < known => findings.warn(
            TOPIC,
            format!(
                "version {found}; this keyward knows {known}: only servers of older versions have run on it"
            ),
            "start a server of this version, which migrates it; the log was not checked",
        ),
        Some(found) => findings.fail(
            TOPIC,
            format!("version {found}, but this keyward knows only versions up to {known}"),
            "use the keyward that migrated it",
        ),
        None => findings.fail(
            TOPIC,
            "no keyward has ever used this database",
            "is it the right one? keyward serve creates the tables",
        ),
    }
}

fn check_sqlite_file(facts: &SqliteFileInfo, findings: &mut DoctorReport) {
    const TOPIC: &str = "file";
    let fix = "chmod 600 for the file, its -wal and its -shm: it holds digests and names";
    match facts.mode & 0o077 {
        0 => findings.pass(TOPIC, "only its owner can read it"),
        _ => findings.fail(
            TOPIC,
            format!("other users than its owner may open it (mode {:03o})", facts.mode),
            fix,
        ),
    }
    let (free, wanted) = (facts.free_bytes >> 20, MIN_FREE_BYTES.max(facts.size_bytes) >> 20);
    if free < wanted {
        let message = format!(
            "{free} MiB are free on its disk, but {wanted} should be: on a full disk every change fails"
        );
        findings.warn(TOPIC, message, "free disk space");
    } else {
        findings.pass(TOPIC, format!("{free} MiB are free on its disk"));
    }
    match &facts.integrity_check {
        Some(Ok(())) => findings.pass(TOPIC, "its structure is whole"),
        Some(Err(what)) => findings.fail(
            TOPIC,
            format!("it is damaged: {what}"),
            "restore the newest backup; keep this file for inspection",
        ),
        None => findings.skip(TOPIC, "its structure: the file is large; a server checks it at startup"),
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
        let message =
            format!("full_page_writes is {}: a power failure may corrupt pages", facts.full_page_writes);
        findings.warn(
            TOPIC,
            message,
            "set full_page_writes = on, unless the file system writes whole pages atomically",
        );
    }
    if facts.synchronous_standbys.is_empty() {
        let message = "it has no synchronous standbys: if its disk is lost, the newest changes are lost, revocations included";
        findings.warn(TOPIC, message, "set synchronous_standby_names, or accept it");
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

fn check_log(inspection: &DatabaseInspection, findings: &mut DoctorReport) -> Option<Revision> {
    const TOPIC: &str = "log";
    match inspection.log_check.as_ref() {
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
                "restore the newest backup; keep this database for inspection",
            );
            None
        }
    }
}

async fn check_replicas(registry: &Arc<dyn ReplicaRegistry>, clock: &dyn Clock, findings: &mut DoctorReport) {
    let before = clock.now();
    let first = tokio::time::timeout(CHECK_TIMEOUT, registry.list_replicas(&[])).await;
    let after = clock.now();
    let config = tokio::time::timeout(CHECK_TIMEOUT, registry.lease_config()).await;
    let (Ok(Ok(snapshot)), Ok(Ok(config))) = (first, config) else {
        findings.fail("replicas", "the database did not list its replicas", "check its log");
        return;
    };
    check_clocks(before, after, snapshot.listing.database_time, findings);
    let snapshot = wait_until_caught_up(registry, snapshot).await;
    check_leases(config.lease, config.longest_lease, &snapshot, findings);
    check_replica_rows(config.longest_lease, &snapshot, findings);
}

/// Waits for a limited time until every replica has acknowledged the head of the first snapshot; returns the newest snapshot.
async fn wait_until_caught_up(
    registry: &Arc<dyn ReplicaRegistry>,
    first: ReplicaSnapshot,
) -> ReplicaSnapshot {
    let head = first.head;
    let behind = |snapshot: &ReplicaSnapshot| {
        snapshot.listing.rows.iter().any(|row| row.applied.is_some_and(|applied| applied < head))
    };
    let mut newest = first;
    let waiting = async {
        while behind(&newest) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            match registry.list_replicas(&[]).await {
                Ok(snapshot) => newest = ReplicaSnapshot { head, ..snapshot },
                Err(_) => return,
            }
        }
    };
    // Replicas that are still behind are reported as they are.
    let _ = tokio::time::timeout(CATCH_UP_TIMEOUT, waiting).await;
    newest
}

/// Checks the database's clock, which was read between two readings of this machine's clock.
fn check_clocks(before: Timestamp, after: Timestamp, database: Timestamp, findings: &mut DoctorReport) {
    const TOPIC: &str = "clocks";
    let apart = before.saturating_duration_since(database).max(database.saturating_duration_since(after));
    let message = format!(
        "the clocks of the database and of this machine differ by at least {}",
        format_rounded(apart)
    );
    let fix = "synchronize clocks (NTP) on every host: keys expire by each replica's clock";
    if apart >= CLOCK_FAIL_THRESHOLD {
        findings.fail(TOPIC, message, fix);
    } else if apart >= CLOCK_WARN_THRESHOLD {
        findings.warn(TOPIC, message, fix);
    } else {
        findings.pass(
            TOPIC,
            format!(
                "the clocks of the database and of this machine agree to within {}",
                format_rounded(CLOCK_WARN_THRESHOLD)
            ),
        );
    }
}

fn check_leases(
    lease: LeaseDuration,
    longest: LeaseDuration,
    snapshot: &ReplicaSnapshot,
    findings: &mut DoctorReport,
) {
    const TOPIC: &str = "lease";
    let message =
        format!("{}; no replica holds one longer than {}", format_lease(lease), format_lease(longest));
    if lease.length().is_none() {
        let fix =
            "keyward replicas lease 60s, unless availability in any outage matters more than revocation";
        findings.warn(TOPIC, format!("{message}: a disconnected replica accepts revoked keys forever"), fix);
    } else {
        findings.pass(TOPIC, message);
    }
    if !snapshot.listing.is_complete() {
        let message = "the database may have lost rows (a failover, a restored backup): restricting changes wait until every lease has expired";
        findings.warn(TOPIC, message, "wait that long; replace a static lease by a finite one");
    }
}

fn check_replica_rows(longest: LeaseDuration, snapshot: &ReplicaSnapshot, findings: &mut DoctorReport) {
    const TOPIC: &str = "replicas";
    let rows = &snapshot.listing.rows;
    if rows.is_empty() {
        findings.fail(TOPIC, "none serves the database", "start keyward serve");
        return;
    }
    let name = |row: &ReplicaRow| snapshot.names.get(&row.id).cloned().unwrap_or_default();
    let mut names = BTreeMap::<String, usize>::new();
    for row in rows {
        *names.entry(name(row)).or_default() += 1;
        check_replica_row(&name(row), row, longest, snapshot, findings);
    }
    for (name, count) in names.into_iter().filter(|(_, count)| *count > 1) {
        let message = format!("{count} replicas are called {name}: reports cannot distinguish them");
        findings.warn(
            TOPIC,
            message,
            "give each its own --replica-name; the row of a killed one disappears after its lease",
        );
    }
}

fn check_replica_row(
    name: &str,
    row: &ReplicaRow,
    longest: LeaseDuration,
    snapshot: &ReplicaSnapshot,
    findings: &mut DoctorReport,
) {
    const TOPIC: &str = "replicas";
    let silent = snapshot.listing.database_time.saturating_duration_since(row.last_seen);
    let seen = format!("{name} renewed {} ago", format_rounded(silent));
    let late = longest.length().map_or(Duration::from_secs(60), |length| length / 2);
    let dead = longest.length().is_some_and(|length| silent > length);
    let fix = format!("check the process; if it is gone: keyward replicas attest-dead {name} --seen-gone");
    match row.applied {
        _ if dead => {
            let message = format!(
                "{seen}, longer than any lease: it answers no Check, and restricting changes may wait for it"
            );
            findings.fail(TOPIC, message, fix);
        }
        _ if silent > late => {
            findings.warn(TOPIC, format!("{seen}: its connection to the database is slow or broken"), fix)
        }
        None => {
            findings.warn(TOPIC, format!("{name} is starting: it holds no lease yet"), "wait for its /readyz")
        }
        Some(applied) if applied < snapshot.head => {
            let message =
                format!("{seen}, and has not acknowledged revision {} yet, only {applied}", snapshot.head);
            findings.warn(TOPIC, message, "check its log: it does not follow the database");
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
