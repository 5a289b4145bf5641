//! Rejects a log entry that a registered replica of an older release could not read.
//!
//! Without this fence, such a replica would stop at an unknown value during a rolling upgrade, whenever a tenant chose
//! one.
//!
//! A commit checks this under its lock on the head, and only if its entries contain such a value. Afterwards the
//! database refuses to register a replica that reads only older formats: see the migration `log_format`. An SQLite file
//! has one process, which reads what it writes, so nothing is checked there.

use crate::domain::log_format::{LogFormat, NewerValue};

use super::{WriteRejection, WriteRequest};

/// The newest format in the log, and the registered replicas that cannot read the format in question. The default
/// rejects nothing.
#[derive(Debug, Default)]
pub(super) struct LogFence {
    /// The newest format that the log contains.
    pub(super) newest: LogFormat,
    /// Names of replicas, each with the newest format that it reads.
    pub(super) replicas: Vec<(String, LogFormat)>,
}

impl LogFence {
    /// The format of a run's entries; `None` if every release reads them.
    pub(super) fn format(run: &[WriteRequest]) -> Option<LogFormat> {
        run.iter().filter_map(newer_value).map(NewerValue::format).max()
    }

    /// Checks that every registered replica can read the entry of a write.
    pub(super) fn check(&self, write: &WriteRequest) -> Result<(), WriteRejection> {
        // A change that ends rights repeats what the log contains, and nothing may keep it from being made.
        let Some(value) = newer_value(write).filter(|_| !write.action.is_restriction()) else {
            return Ok(());
        };
        if value.format() <= self.newest {
            return Ok(());
        }
        let too_old = self.replicas.iter().filter(|(_, reads)| *reads < value.format());
        let replicas: Vec<_> = too_old.map(|(name, _)| name.clone()).collect();
        match replicas.is_empty() {
            true => Ok(()),
            false => Err(WriteRejection::ReplicaTooOld { value: value.to_string(), replicas }),
        }
    }

    /// Records the format of an accepted write: the new one if the log did not contain it before.
    pub(super) fn raise(&mut self, write: &WriteRequest) -> Option<LogFormat> {
        let format = newer_value(write)?.format();
        let raises = format > self.newest;
        self.newest = self.newest.max(format);
        raises.then_some(format)
    }
}

fn newer_value(write: &WriteRequest) -> Option<NewerValue<'_>> {
    NewerValue::find(&write.change, write.actor.account.as_ref())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::{
        account::Role,
        log::{AuditAction, RecordChange},
        name::RoleName,
        scope::Scope,
        time::{Revision, Timestamp},
    };

    fn write(scope: &str, action: AuditAction) -> WriteRequest {
        let role = Role {
            account: None,
            name: RoleName::parse("agent").unwrap(),
            scopes: [Scope::parse_grant(scope).unwrap()].into_iter().collect(),
            revision: Revision::default(),
        };
        let at = Timestamp::from_micros(1);
        WriteRequest::from_system(RecordChange::Role(Arc::new(role)), None, action, "test", at)
    }

    fn fence(newest: LogFormat) -> LogFence {
        let replicas = [("old", LogFormat::FIRST), ("new", LogFormat::NEWEST)];
        let replicas = replicas.map(|(name, reads)| (name.to_owned(), reads)).into();
        LogFence { newest, replicas }
    }

    #[test]
    fn only_what_an_older_replica_cannot_read_is_refused_and_the_replica_named() {
        let fence = fence(LogFormat::FIRST);
        let (value, replicas) = ("scope \"a/b\"".to_owned(), vec!["old".to_owned()]);
        let refused = Err(WriteRejection::ReplicaTooOld { value, replicas });
        assert_eq!(fence.check(&write("a/b", AuditAction::RolePut)), refused);
        assert_eq!(fence.check(&write("a:b", AuditAction::RolePut)), Ok(()));
        assert_eq!(
            LogFence::default().check(&write("a/b", AuditAction::RolePut)),
            Ok(()),
            "nobody is registered"
        );
    }

    #[test]
    fn what_the_log_contains_already_and_what_ends_rights_is_never_refused() {
        assert_eq!(fence(LogFormat::NEWEST).check(&write("a/b", AuditAction::RolePut)), Ok(()));
        assert_eq!(fence(LogFormat::FIRST).check(&write("a/b", AuditAction::RoleDeleted)), Ok(()));
    }

    #[test]
    fn a_run_raises_the_format_of_the_log_once_and_only_if_it_needs_to() {
        let plain = [write("a:b", AuditAction::RolePut), write("*", AuditAction::RolePut)];
        assert_eq!(LogFence::format(&plain), None, "nothing is asked for them");
        let newer = write("a/b", AuditAction::RolePut);
        assert_eq!(
            LogFence::format(&[write("a", AuditAction::RolePut), newer.clone()]),
            Some(LogFormat::NEWEST)
        );
        let mut fence = fence(LogFormat::FIRST);
        let raised = [&plain[0], &newer, &newer].map(|write| fence.raise(write));
        assert_eq!(raised, [None, Some(LogFormat::NEWEST), None]);
    }
}
