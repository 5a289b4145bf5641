//! Converts errors to gRPC statuses. Only this file builds a `tonic::Status`.
//!
//! Every status carries `google.rpc.ErrorInfo` with a stable reason. An invalid request also carries
//! `google.rpc.BadRequest`. Size limits of the encoded form belong in `status_details.rs`.

#![expect(clippy::disallowed_methods, reason = "only this file builds a status")]

use std::collections::HashMap;

use http::{HeaderMap, HeaderName, HeaderValue, header::RETRY_AFTER};
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::StatusExt as _;

use super::{
    convert,
    status_details::{MAX_MESSAGE_LEN, StatusDetails, join_truncated, truncate_encoded},
};
use crate::{
    domain::{
        account::{AccountLimitKind, AccountLimitReached},
        name::AccountId,
    },
    engine::CheckError,
    replication::propagation::{PropagationError, PropagationReport},
    service_error::{InvalidField, ResourceKind, ServiceError},
};

const RETRY_PUSHBACK_HEADER: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// Retry delay of a call that an overloaded server refused.
const OVERLOAD_RETRY_DELAY: std::time::Duration = std::time::Duration::from_millis(100);

/// Builds every status of this server, within the sizes that clients accept.
fn build_status(code: Code, message: &str, details: StatusDetails) -> Status {
    build_status_with_headers(code, message, details, HeaderMap::new())
}

fn build_status_with_headers(
    code: Code,
    message: &str,
    details: StatusDetails,
    headers: HeaderMap,
) -> Status {
    let message = truncate_encoded(message, MAX_MESSAGE_LEN);
    let details = details.encode(code, &message);
    Status::with_details_and_metadata(code, message, details, MetadataMap::from_headers(headers))
}

fn status_with_reason(code: Code, reason: &str, message: &str) -> Status {
    status_with_metadata(code, reason, message, HashMap::new())
}

fn status_with_metadata(
    code: Code,
    reason: &str,
    message: &str,
    metadata: HashMap<String, String>,
) -> Status {
    build_status(code, message, StatusDetails::new(reason, metadata))
}

fn account_exists(id: &AccountId, message: &str) -> Status {
    let metadata = HashMap::from([("account".to_owned(), id.to_string())]);
    status_with_metadata(Code::AlreadyExists, "ACCOUNT_EXISTS", message, metadata)
}

fn invalid_request(violations: &[InvalidField]) -> Status {
    let each = violations.iter().map(|violation| format!("{}: {}", violation.field, violation.problem));
    let message = format!("invalid request: {}", join_truncated(each, "; ", "violations"));
    build_status(Code::InvalidArgument, &message, StatusDetails::from_violations(violations))
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Status {
        match error {
            ServiceError::Invalid(violations) => invalid_request(&violations),
            ServiceError::NotFound(ResourceKind::Key) => {
                status_with_reason(Code::NotFound, "KEY_NOT_FOUND", "there is no such key")
            }
            ServiceError::NotFound(ResourceKind::Account) => {
                status_with_reason(Code::NotFound, "ACCOUNT_NOT_FOUND", "there is no such account")
            }
            ServiceError::KeyNameTaken => status_with_reason(
                Code::AlreadyExists,
                "KEY_NAME_TAKEN",
                "An API key with this name already exists",
            ),
            ServiceError::AccountExists(id) => account_exists(&id, "an account with this id already exists"),
            ServiceError::AccountIdDiffersInCase(id) => account_exists(
                &id,
                &format!(
                    "the account {id:?} exists, whose id differs from this one only in case; use that account, or \
                     another id"
                ),
            ),
            ServiceError::NotFound(ResourceKind::Role) => {
                status_with_reason(Code::NotFound, "ROLE_NOT_FOUND", "there is no such role")
            }
            ServiceError::NotFound(ResourceKind::Member) => status_with_reason(
                Code::NotFound,
                "MEMBER_NOT_FOUND",
                "the user is not a member of the account",
            ),
            ServiceError::NotFound(ResourceKind::Revision) => {
                status_with_reason(Code::NotFound, "REVISION_NOT_FOUND", "no change has this revision")
            }
            ServiceError::DigestTaken => status_with_reason(
                Code::AlreadyExists,
                "DIGEST_TAKEN",
                "a key with this digest already exists",
            ),
            ServiceError::AccountLimitReached(reached) => account_limit_reached(reached),
            ServiceError::ReplicaTooOld { value, replicas } => replica_too_old(&value, &replicas),
            ServiceError::CallerRateLimited(retry_after) => caller_limited(retry_after),
            ServiceError::IdempotencyKeyReused => status_with_reason(
                Code::FailedPrecondition,
                "IDEMPOTENCY_KEY_REUSED",
                "another request was made under this idempotency_key within 24 hours; use a new one",
            ),
            ServiceError::Forbidden(reason, message) => {
                status_with_reason(Code::PermissionDenied, reason, &message)
            }
            ServiceError::FailedPrecondition(reason, message) => {
                status_with_reason(Code::FailedPrecondition, reason, &message)
            }
            ServiceError::Unauthenticated => status_with_reason(
                Code::Unauthenticated,
                "UNAUTHENTICATED",
                "missing or invalid credentials; send 'authorization: Bearer <management key>'",
            ),
            ServiceError::CallerRevoked => status_with_reason(
                Code::Unauthenticated,
                "CALLER_REVOKED",
                "the calling key was revoked or restricted during the call; a change that was made before that stays",
            ),
            ServiceError::MissingPermission(scope) => permission_missing(scope),
            ServiceError::CheckFailed(reason) => check_error(reason),
            ServiceError::NotRecorded { is_database_full } => not_recorded(is_database_full),
            ServiceError::OutcomeUnknown => status_with_reason(
                Code::Unavailable,
                "OUTCOME_UNKNOWN",
                "it is unknown whether the change was recorded; until this is settled, this server denies what the change \
                 would deny. Retry: every change can be repeated",
            ),
            ServiceError::SomeOutcomesUnknown { unknown, changes } => some_outcomes_unknown(unknown, changes),
            ServiceError::Unavailable => status_with_reason(
                Code::Unavailable,
                "STORE_UNAVAILABLE",
                "the database did not respond; retry",
            ),
            ServiceError::Stopping => status_with_reason(
                Code::Unavailable,
                "STOPPING",
                "this server is stopping; retry, or use another server",
            ),
            ServiceError::PropagationIncomplete(error) => propagation_incomplete(error),
            ServiceError::Contended => status_with_reason(
                Code::Aborted,
                "CONTENDED",
                "too many concurrent changes to this record; nothing was changed, retry",
            ),
        }
    }
}

/// Reason and message of an error, for an item of a bulk response.
#[must_use]
pub(super) fn reason_and_message(error: ServiceError) -> (String, String) {
    let status = Status::from(error);
    let info = status.get_details_error_info();
    (info.map(|info| info.reason).unwrap_or_default(), status.message().to_owned())
}

fn caller_limited(retry_after: Option<std::time::Duration>) -> Status {
    // For HTTP gateways: whole seconds, rounded up.
    let seconds = retry_after.map(|after| after.as_secs() + u64::from(after.subsec_nanos() > 0));
    let headers = seconds.map(|seconds| (RETRY_AFTER, seconds.into()));
    let details = StatusDetails::new("CALLER_LIMITED", HashMap::new());
    let details = match retry_after {
        Some(after) => details.with_retry(after),
        None => details,
    };
    let message = "a rate limit or the quota of the calling key is exhausted";
    build_status_with_headers(Code::ResourceExhausted, message, details, HeaderMap::from_iter(headers))
}

/// The batch exceeds a limit of the caller's own key, so no retry can succeed.
#[must_use]
pub(super) fn batch_exceeds_limit(checks: u64, max: u64) -> Status {
    let message = format!(
        "the batch has {checks} checks, but a limit of the calling key allows at most {max} at once; send smaller \
         batches"
    );
    let metadata = HashMap::from([("limit".to_owned(), max.to_string())]);
    status_with_metadata(Code::ResourceExhausted, "CALLER_LIMITED", &message, metadata)
}

/// The account has reached a limit.
fn account_limit_reached(AccountLimitReached { limit, value, retry_after }: AccountLimitReached) -> Status {
    let (name, number) = (limit.as_str(), value.to_string());
    let what_to_do = match limit {
        AccountLimitKind::Keys => "revoke keys that are no longer needed",
        AccountLimitKind::Roles => "delete roles that are no longer needed",
        AccountLimitKind::RotationsPerHour | AccountLimitKind::LogRowsPerHour => "retry in the next hour",
    };
    let message = format!(
        "the account has reached its limit {name} = {value}; {what_to_do}, or raise account_limits.{name} in the \
         server's settings. Calls that restrict rights are never limited"
    );
    let metadata = [("limit", name.to_owned()), ("value", number)];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    let mut details = StatusDetails::new("ACCOUNT_LIMIT", metadata);
    if let Some(after) = retry_after {
        details = details.with_retry(after);
    }
    build_status(Code::ResourceExhausted, &message, details)
}

/// The change must wait for the end of a rolling upgrade.
fn replica_too_old(value: &str, replicas: &[String]) -> Status {
    let names = join_truncated(replicas.iter().map(|name| format!("{name:?}")), ", ", "replicas");
    let message = format!(
        "nothing was changed: replicas of an older release cannot read the {value}; upgrade or stop them, then retry: \
         {names}"
    );
    status_with_reason(Code::FailedPrecondition, "REPLICA_TOO_OLD", &message)
}

fn check_error(reason: CheckError) -> Status {
    match reason {
        CheckError::Starting => status_with_reason(Code::Unavailable, "STARTING", &reason.to_string()),
        CheckError::RequesterRevoked => ServiceError::Unauthenticated.into(),
        CheckError::LeaseLost => status_with_reason(Code::Unavailable, "LEASE_LOST", &reason.to_string()),
        CheckError::LimitsUnavailable => {
            status_with_reason(Code::Unavailable, "LIMITS_UNAVAILABLE", &reason.to_string())
        }
        CheckError::QuotaUnavailable => {
            status_with_reason(Code::Unavailable, "QUOTA_UNAVAILABLE", &reason.to_string())
        }
        CheckError::Stale { have, want } => {
            let numbers = [("revision", have.to_string()), ("min_revision", want.to_string())];
            let metadata = numbers.map(|(name, number)| (name.to_owned(), number)).into();
            status_with_metadata(Code::Unavailable, "STALE", &reason.to_string(), metadata)
        }
    }
}

/// The bytes are not a message `M`. The wording is tonic's.
pub(super) fn malformed_message<M: prost::Message + Default>(bytes: &[u8]) -> Status {
    Status::internal(M::decode(bytes).err().map(|error| error.to_string()).unwrap_or_default())
}

/// The server has too many calls in flight.
#[must_use]
pub(super) fn overloaded() -> Status {
    let details = StatusDetails::new("OVERLOADED", HashMap::new()).with_retry(OVERLOAD_RETRY_DELAY);
    let message = "this server has too many calls in flight; nothing was done, retry or use another server";
    // Clients with a retry policy wait for this long (gRPC proposal A6).
    let pushback = (RETRY_PUSHBACK_HEADER, HeaderValue::from(OVERLOAD_RETRY_DELAY.as_millis() as u64));
    build_status_with_headers(Code::Unavailable, message, details, HeaderMap::from_iter([pushback]))
}

/// Ends a long-running call because its connection drains.
#[must_use]
pub(super) fn connection_too_old() -> Status {
    let message = "the connection has reached its maximum age, which ends long-running calls; repeat the call on a new one";
    status_with_reason(Code::Unavailable, "CONNECTION_ENDS", message)
}

/// The connection has reached its limit of long-running calls.
#[must_use]
pub(super) fn too_many_long_calls(max: usize) -> Status {
    let message =
        format!("the connection already has {max} such calls; end one of them, or open another connection");
    status_with_reason(Code::ResourceExhausted, "TOO_MANY_WATCHES", &message)
}

/// Ensures that the trailers of a stream have a reason.
pub(super) fn normalize_trailers(trailers: &mut HeaderMap) {
    let Some(plain) = Status::from_header_map(trailers) else { return };
    if plain.code() != Code::Ok && plain.details().is_empty() {
        // Fails only on an invalid header value, and there is none.
        let _ = add_missing_reason(&plain).add_header(trailers);
    }
}

/// The outcome of some changes of a bulk call is unknown, so the whole call must be repeated.
fn some_outcomes_unknown(unknown: usize, changes: usize) -> Status {
    let numbers = [("unknown", unknown), ("changes", changes)];
    let metadata = numbers.map(|(name, number)| (name.to_owned(), number.to_string())).into();
    let message = format!(
        "it is unknown whether {unknown} of the call's {changes} changes were recorded; until this is settled, this \
         server denies what they would deny. Repeat the call to complete it"
    );
    status_with_metadata(Code::Unavailable, "OUTCOME_UNKNOWN", &message, metadata)
}

/// The change failed, but this server denies what it restricts until it restarts or the change succeeds.
fn not_recorded(is_database_full: bool) -> Status {
    let metadata = [("durable", "false"), ("denied_here", "true")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    if is_database_full {
        let message = "the database is full, so the change was not recorded. A revocation, disabling or suspension is in \
                       force on this server until it restarts; free space and retry";
        status_with_metadata(Code::ResourceExhausted, "STORE_FULL", message, metadata)
    } else {
        let message = "the database failed, so the change was not recorded. A revocation, disabling or suspension is in \
                       force on this server until it restarts; retry, on another server if there is one";
        status_with_metadata(Code::Unavailable, "NOT_RECORDED", message, metadata)
    }
}

/// The change is recorded, but may not be in force everywhere yet.
fn propagation_incomplete(error: PropagationError) -> Status {
    match error {
        PropagationError::TimedOut(report) => propagation_timed_out(*report),
        PropagationError::Lost(revision) => {
            let metadata = HashMap::from([("revision".to_owned(), revision.to_string())]);
            let message = "the database has lost the change: a backup was restored, or a standby without it took over. Repeat \
                           the change";
            status_with_metadata(Code::Unavailable, "CHANGE_LOST", message, metadata)
        }
        PropagationError::Stopping(revision) => {
            let metadata = HashMap::from([("revision".to_owned(), revision.to_string())]);
            let message = "the change is recorded, but this server stops before it is known to be in force everywhere. Repeat it \
                           on another server, or follow it there with WatchPropagation";
            status_with_metadata(Code::Unavailable, "STOPPING", message, metadata)
        }
        PropagationError::DatabaseUnavailable => status_with_reason(
            Code::Unavailable,
            "PROPAGATION_UNKNOWN",
            "the change is recorded, but it is unknown whether it is in force on every replica, since the database \
             did not respond. Repeat the call to wait again",
        ),
    }
}

/// Attaches the report as `keyward.v1.Propagation`.
fn propagation_timed_out(report: PropagationReport) -> Status {
    let lagging: Vec<_> = report.unconfirmed.iter().map(|lagging| lagging.replica.clone()).collect();
    let lagging = if lagging.is_empty() {
        "the database".to_owned()
    } else {
        join_truncated(lagging.into_iter(), ", ", "replicas")
    };
    let revision = report.revision;
    let message = format!(
        "the change is recorded as revision {revision}, but not known to be in force everywhere yet: no confirmation \
         from {lagging}. Follow it with WatchPropagation, or repeat the call: most then wait again"
    );
    let metadata = HashMap::from([("revision".to_owned(), revision.to_string())]);
    let details =
        StatusDetails::from_propagation("NOT_PROPAGATED", metadata, convert::propagation_to_proto(report));
    build_status(Code::DeadlineExceeded, &message, details)
}

/// The caller lacks the permission that the RPC needs.
#[must_use]
pub(super) fn permission_missing(scope: &str) -> Status {
    let message = format!("the caller is not granted {scope}, which this call needs");
    let metadata = HashMap::from([("scope".to_owned(), scope.to_owned())]);
    status_with_metadata(Code::PermissionDenied, "PERMISSION_MISSING", &message, metadata)
}

/// The path is not an RPC of this listener.
#[must_use]
pub(super) fn unknown_rpc() -> Status {
    status_with_reason(
        Code::Unimplemented,
        "NO_SUCH_RPC",
        "no such method here; 'grpcurl … list' shows the services",
    )
}

/// The request exceeds its size limit.
#[must_use]
pub(super) fn message_too_large(length: usize, limit: usize) -> Status {
    let problem = format!("the message has {length} bytes; at most {limit} are allowed for this call");
    invalid_request(&[InvalidField { field: "(message)".to_owned(), problem }])
}

/// The request exceeds its size limit once it is inflated.
#[must_use]
pub(super) fn inflated_message_too_large(limit: usize) -> Status {
    let problem =
        format!("the message inflates to more than the {limit} bytes that are allowed for this call");
    invalid_request(&[InvalidField { field: "(message)".to_owned(), problem }])
}

/// The request's encoding is not supported.
#[must_use]
pub(super) fn unsupported_encoding(encoding: &str) -> Status {
    let message = format!(
        "grpc-encoding {encoding:?} is not supported; use \"gzip\", or \"identity\" for no compression"
    );
    status_with_reason(Code::Unimplemented, "UNKNOWN_ENCODING", &message)
}

/// The request has more fields than any valid one.
#[must_use]
pub(super) fn too_many_fields(count: usize, limit: usize) -> Status {
    let problem = format!("the message has {count} fields; at most {limit} are allowed");
    invalid_request(&[InvalidField { field: "(message)".to_owned(), problem }])
}

/// The request is malformed or incomplete.
#[must_use]
pub(super) fn unreadable_request() -> Status {
    status_with_reason(
        Code::InvalidArgument,
        "UNREADABLE_REQUEST",
        "the request could not be read: is it a protobuf message of this call's type?",
    )
}

/// The request did not arrive in time.
#[must_use]
pub(super) fn request_too_slow() -> Status {
    status_with_reason(
        Code::DeadlineExceeded,
        "REQUEST_TOO_SLOW",
        "the request did not arrive in time; nothing was done",
    )
}

/// The call exceeded its deadline.
#[must_use]
pub(super) fn deadline_exceeded() -> Status {
    status_with_reason(
        Code::DeadlineExceeded,
        "DEADLINE_EXCEEDED",
        "the call exceeded its deadline; a change may still have been made, and can be repeated",
    )
}

/// Adds a reason to a status that tonic built. `Internal` from tonic means a malformed message.
#[must_use]
pub(super) fn add_missing_reason(plain: &Status) -> Status {
    match plain.code() {
        Code::Internal => unreadable_request(),
        Code::Unimplemented => status_with_reason(Code::Unimplemented, "UNSUPPORTED", plain.message()),
        code => status_with_reason(code, "REFUSED", plain.message()),
    }
}

/// The handler failed, which is a bug.
#[must_use]
pub(super) fn internal_error() -> Status {
    status_with_reason(Code::Internal, "INTERNAL", "the call failed inside the server; see its log")
}
