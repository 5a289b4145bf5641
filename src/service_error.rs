//! The errors of the use cases.
//!
//! `grpc/status.rs` turns them into statuses; nothing here knows gRPC. No text here contains a token or a message of
//! the database.

use std::fmt::Display;

use crate::{
    clock::EntropyError,
    domain::{account::AccountLimitReached, name::AccountId},
    engine::CheckError,
    replication::propagation::PropagationError,
    store::{StoreError, WriteRejection, group_commit::WriteError},
};

/// A field of a request that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InvalidField {
    /// The field's path in the request.
    pub(crate) field: String,
    /// The rule that the field breaks.
    pub(crate) problem: String,
}

/// The kind of a resource that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResourceKind {
    Key,
    Account,
    Role,
    Member,
    /// A revision of the audit log.
    Revision,
}

/// Why a use case failed.
#[derive(Debug)]
pub(crate) enum ServiceError {
    /// The request is invalid; lists every violation.
    Invalid(Vec<InvalidField>),
    /// The resource does not exist, or the caller may not know of it.
    NotFound(ResourceKind),
    /// Another key of the owner has this name.
    KeyNameTaken,
    /// An account with this id exists.
    AccountExists(AccountId),
    /// An account with this id exists, and the requested id differs from it only in case.
    AccountIdDiffersInCase(AccountId),
    /// The digest belongs to another secret, of any owner.
    DigestTaken,
    /// Another request used this idempotency key.
    IdempotencyKeyReused,
    /// The account or user has reached a limit.
    AccountLimitReached(AccountLimitReached),
    /// The change has a value that registered replicas of an older release cannot read.
    ReplicaTooOld {
        /// The value: `scope "repo/write"`.
        value: String,
        /// Names of these replicas.
        replicas: Vec<String>,
    },
    /// The caller lacks a right: a stable reason, and what to do.
    Forbidden(&'static str, String),
    /// The state of the resource does not allow the call: a stable reason, and what to do.
    FailedPrecondition(&'static str, String),
    /// The credential is missing or not valid.
    Unauthenticated,
    /// The caller was revoked or restricted during its call.
    CallerRevoked,
    /// The caller lacks this permission, a reserved scope.
    MissingPermission(&'static str),
    /// A limit of the caller's own key is used up; holds the time until a retry can succeed.
    CallerRateLimited(Option<std::time::Duration>),
    /// The engine cannot decide: its state is too old, or not loaded yet.
    CheckFailed(CheckError),
    /// The change is certainly not recorded.
    NotRecorded {
        /// The disk or the database is full.
        is_database_full: bool,
    },
    /// Whether the change is recorded is unknown.
    OutcomeUnknown,
    /// For some changes of a bulk call, it is unknown whether they are recorded.
    SomeOutcomesUnknown {
        /// Number of changes with an unknown outcome.
        unknown: usize,
        /// Number of changes in the call.
        changes: usize,
    },
    /// The database or the operating system failed; the log has the cause.
    Unavailable,
    Stopping,
    /// Concurrent changes of the same records won every attempt.
    Contended,
    /// The change is recorded, but not confirmed to be in force on every replica.
    PropagationIncomplete(PropagationError),
}

impl ServiceError {
    /// The role of the acting user lacks a permission.
    #[must_use]
    pub(crate) fn role_lacks_permission(permission: &str) -> ServiceError {
        let message =
            format!("the acting user has no role in the account that holds {permission}, which this needs");
        ServiceError::Forbidden("ROLE_LACKS_PERMISSION", message)
    }

    /// An error with one invalid field.
    #[must_use]
    pub(crate) fn invalid_field(field: impl Into<String>, problem: impl Into<String>) -> ServiceError {
        ServiceError::Invalid(vec![InvalidField { field: field.into(), problem: problem.into() }])
    }
}

/// Fails a bulk call if the outcome of any change is unknown: the response of such a call must hold for all of them.
pub(crate) fn require_known_outcomes<'r>(
    outcomes: impl ExactSizeIterator<Item = Option<&'r ServiceError>>,
) -> Result<(), ServiceError> {
    let changes = outcomes.len();
    // A stopping server may have recorded a change that it no longer confirms.
    let is_unknown =
        |error: &&ServiceError| matches!(error, ServiceError::OutcomeUnknown | ServiceError::Stopping);
    match outcomes.flatten().filter(is_unknown).count() {
        0 => Ok(()),
        unknown => Err(ServiceError::SomeOutcomesUnknown { unknown, changes }),
    }
}

impl From<CheckError> for ServiceError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::RequesterRevoked => ServiceError::Unauthenticated,
            error => ServiceError::CheckFailed(error),
        }
    }
}

/// The cause goes to the log; the caller only learns that it can retry.
impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
        ServiceError::Unavailable
    }
}

impl From<PropagationError> for ServiceError {
    fn from(incomplete: PropagationError) -> Self {
        ServiceError::PropagationIncomplete(incomplete)
    }
}

impl From<EntropyError> for ServiceError {
    fn from(error: EntropyError) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "no secret can be generated");
        ServiceError::Unavailable
    }
}

/// The writer has logged the cause. The use case retries a conflict.
impl From<WriteError> for ServiceError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Rejected(WriteRejection::NameTaken) => ServiceError::KeyNameTaken,
            WriteError::Rejected(WriteRejection::AccountIdDiffersInCase(id)) => {
                ServiceError::AccountIdDiffersInCase(id)
            }
            WriteError::Rejected(WriteRejection::IdempotencyReused) => ServiceError::IdempotencyKeyReused,
            WriteError::Rejected(WriteRejection::Conflict | WriteRejection::AuthorizationChanged) => {
                ServiceError::Contended
            }
            WriteError::Rejected(WriteRejection::DigestTaken) => ServiceError::DigestTaken,
            WriteError::Rejected(WriteRejection::AccountLimitReached(reached)) => {
                ServiceError::AccountLimitReached(reached)
            }
            WriteError::Rejected(WriteRejection::ReplicaTooOld { value, replicas }) => {
                ServiceError::ReplicaTooOld { value, replicas }
            }
            WriteError::Rejected(WriteRejection::RoleNotFound) => ServiceError::invalid_field(
                "role",
                "there is no such role in the account; ListRoles returns the existing ones",
            ),
            WriteError::Rejected(WriteRejection::RoleInUse { keys, members }) => {
                ServiceError::FailedPrecondition(
                    "ROLE_IN_USE",
                    format!(
                        "the role is used by {keys} keys and {members} members; give them another one first"
                    ),
                )
            }
            WriteError::NotRecorded(cause) => {
                ServiceError::NotRecorded { is_database_full: matches!(*cause, StoreError::Full(_)) }
            }
            WriteError::Unknown(_) => ServiceError::OutcomeUnknown,
            WriteError::Stopping => ServiceError::Stopping,
        }
    }
}

/// Collects the violations of a request, so that one error reports all of them.
#[derive(Debug, Default)]
pub(crate) struct InvalidFields(Vec<InvalidField>);

impl InvalidFields {
    /// Records a violation.
    pub(crate) fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.0.push(InvalidField { field: field.into(), problem: problem.into() });
    }

    /// Records a violation if `wrong`. The texts are formatted only then, so a valid request allocates none.
    pub(crate) fn add_if(&mut self, wrong: bool, field: impl Display, problem: impl Display) {
        if wrong {
            self.add(field.to_string(), problem.to_string());
        }
    }

    /// Returns the value, or records the error as a violation.
    pub(crate) fn ok_or_add<T, E: Display>(
        &mut self,
        field: impl Display,
        result: Result<T, E>,
    ) -> Option<T> {
        result.map_err(|error| self.add(field.to_string(), error.to_string())).ok()
    }

    /// Parses each value of a list. A violation names the index of its value.
    pub(crate) fn parse_list<'a, T, E: Display>(
        &mut self,
        field: impl Display,
        list: &'a [impl AsRef<str>],
        max: usize,
        parse: impl Fn(&'a str) -> Result<T, E>,
    ) -> Vec<T> {
        if list.len() > max {
            self.add(field.to_string(), format!("has {} entries; at most {max} are allowed", list.len()));
            return Vec::new();
        }
        let each = list.iter().enumerate();
        each.filter_map(|(at, text)| self.ok_or_add(format_args!("{field}[{at}]"), parse(text.as_ref())))
            .collect()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns an error if any violation was recorded.
    pub(crate) fn into_result(self) -> Result<(), ServiceError> {
        if self.0.is_empty() { Ok(()) } else { Err(ServiceError::Invalid(self.0)) }
    }
}
