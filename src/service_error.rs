//! Why a call was not done, in the words of the product. `grpc/status.rs` turns it into a status; nothing here
//! knows gRPC, and no text here repeats a token or a database's message.

use std::fmt::Display;

use crate::{
    clock::EntropyError,
    domain::{account::AccountLimitReached, name::AccountId},
    engine::CheckError,
    replication::propagation::PropagationError,
    store::{StoreError, WriteRejection, group_commit::WriteError},
};

/// One field that is wrong, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InvalidField {
    /// The field's path in the request.
    pub(crate) field: String,
    /// The rule that it breaks.
    pub(crate) problem: String,
}

/// A thing that is looked for by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResourceKind {
    /// A key.
    Key,
    /// An account.
    Account,
    /// A role.
    Role,
    /// A member.
    Member,
    /// A change of the log.
    Revision,
}

/// Why a call was not done.
#[derive(Debug)]
pub(crate) enum ServiceError {
    /// The request breaks rules: all of them.
    Invalid(Vec<InvalidField>),
    /// There is no such thing, or none that the caller may know of.
    NotFound(ResourceKind),
    /// Another key of the owner has the name.
    KeyNameTaken,
    /// The account exists.
    AccountExists(AccountId),
    /// This account exists, whose id differs from the one asked for only in case.
    AccountIdDiffersInCase(AccountId),
    /// The digest belongs to another secret, whoever owns it.
    DigestTaken,
    /// Another request was made under this idempotency key.
    IdempotencyKeyReused,
    /// The account concerned, or the user, has reached a limit.
    AccountLimitReached(AccountLimitReached),
    /// Replicas of an older release could not read the change in the log.
    ReplicaTooOld {
        /// What they cannot read: `scope "repo/write"`.
        value: String,
        /// Their names.
        replicas: Vec<String>,
    },
    /// The caller lacks a right: a stable reason, and what to do.
    Forbidden(&'static str, String),
    /// The thing is in no state for this: a stable reason, and what to do.
    FailedPrecondition(&'static str, String),
    /// The caller is not known.
    Unauthenticated,
    /// The caller was known when its call began, and may not call any more.
    CallerRevoked,
    /// The caller is not granted the permission that its call needs: a reserved scope.
    MissingPermission(&'static str),
    /// A limit of the caller's own key is used up; when to try again.
    CallerRateLimited(Option<std::time::Duration>),
    /// Too old a state, or none yet.
    CheckFailed(CheckError),
    /// A change is certainly not recorded.
    NotRecorded {
        /// The database has no room left.
        is_database_full: bool,
    },
    /// Whether a change is recorded is unknown.
    OutcomeUnknown,
    /// Of a call that makes many changes: of some of them it is unknown whether they are recorded.
    SomeOutcomesUnknown {
        /// How many are unknown.
        unknown: usize,
        /// How many the call makes.
        changes: usize,
    },
    /// The database or the operating system failed.
    Unavailable,
    /// The server is stopping.
    Stopping,
    /// The record changed again and again while it was being changed.
    Contended,
    /// A change is recorded, and not known to be in force everywhere.
    PropagationIncomplete(PropagationError),
}

impl ServiceError {
    /// The role of the person that the caller acts for lacks a permission.
    #[must_use]
    pub(crate) fn role_lacks_permission(permission: &str) -> ServiceError {
        let message =
            format!("the acting user has no role in the account that holds {permission}, which this needs");
        ServiceError::Forbidden("ROLE_LACKS_PERMISSION", message)
    }

    /// One wrong field.
    #[must_use]
    pub(crate) fn invalid_field(field: impl Into<String>, problem: impl Into<String>) -> ServiceError {
        ServiceError::Invalid(vec![InvalidField { field: field.into(), problem: problem.into() }])
    }
}

/// Fails a call that makes many changes if the outcome of any is unknown. What such a call answers holds for all of it.
///
/// # Errors
/// When it is unknown whether a change is recorded.
pub(crate) fn require_known_outcomes<'r>(
    outcomes: impl ExactSizeIterator<Item = Option<&'r ServiceError>>,
) -> Result<(), ServiceError> {
    let changes = outcomes.len();
    // A server that stops may have recorded what it does not answer any more.
    let open =
        |refusal: &&ServiceError| matches!(refusal, ServiceError::OutcomeUnknown | ServiceError::Stopping);
    match outcomes.flatten().filter(open).count() {
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

/// The cause goes to the log, whole; the caller hears that it can try again.
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
        tracing::error!(error = &error as &dyn std::error::Error, "no secret can be made");
        ServiceError::Unavailable
    }
}

/// The writer has logged the cause already. A conflict is the use case's to try again.
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
                "there is no such role in the account; ListRoles shows those there are",
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

/// Collects every violation of a request, so that they are answered together.
#[derive(Debug, Default)]
pub(crate) struct InvalidFields(Vec<InvalidField>);

impl InvalidFields {
    /// Notes a violation.
    pub(crate) fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.0.push(InvalidField { field: field.into(), problem: problem.into() });
    }

    /// Notes a violation when `wrong`. Only then is anything written: a good request pays for no text.
    pub(crate) fn add_if(&mut self, wrong: bool, field: impl Display, problem: impl Display) {
        if wrong {
            self.add(field.to_string(), problem.to_string());
        }
    }

    /// The value, or a violation noted.
    pub(crate) fn ok_or_add<T, E: Display>(
        &mut self,
        field: impl Display,
        result: Result<T, E>,
    ) -> Option<T> {
        result.map_err(|error| self.add(field.to_string(), error.to_string())).ok()
    }

    /// Each value of a list; a violation names its place.
    pub(crate) fn parse_list<'a, T, E: Display>(
        &mut self,
        field: impl Display,
        list: &'a [impl AsRef<str>],
        most: usize,
        parse: impl Fn(&'a str) -> Result<T, E>,
    ) -> Vec<T> {
        if list.len() > most {
            self.add(field.to_string(), format!("has {} entries; at most {most} are allowed", list.len()));
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

    /// Ends the collection.
    ///
    /// # Errors
    /// When anything was noted.
    pub(crate) fn into_result(self) -> Result<(), ServiceError> {
        if self.0.is_empty() { Ok(()) } else { Err(ServiceError::Invalid(self.0)) }
    }
}
