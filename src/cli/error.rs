//! The error of a command: a message, details, a hint and an exit code.
//!
//! A server's status is shown by its message and its details, never as a debug dump. Nothing here has access to a token.

use std::{borrow::Cow, collections::HashMap, error::Error, fmt, io, time::Duration};

use prost::Message as _;
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
};
use tonic_types::StatusExt as _;

use super::{table::escape_terminal, value_format::format_rfc3339};
use crate::{
    config::{
        client::{ClientSettingsError, ServerUrl},
        duration,
    },
    domain::credential_mask::mask_message,
    pb,
};

/// The server was reached and refused the request.
pub(super) const EXIT_REFUSED: u8 = 1;

/// There is no answer: bad usage, no connection, a timeout or a server failure.
pub(super) const EXIT_UNANSWERED: u8 = 2;

#[derive(Debug)]
pub(super) struct CliError {
    exit_code: u8,
    message: String,
    details: Vec<String>,
    hint: Option<String>,
    is_from_server: bool,
}

impl CliError {
    /// An error of this side, with [`EXIT_UNANSWERED`].
    pub(super) fn new(message: impl Into<String>) -> CliError {
        CliError {
            exit_code: EXIT_UNANSWERED,
            message: message.into(),
            details: Vec::new(),
            hint: None,
            is_from_server: false,
        }
    }

    /// An answer that is a refusal, with [`EXIT_REFUSED`].
    pub(super) fn refused(message: impl Into<String>) -> CliError {
        CliError { exit_code: EXIT_REFUSED, ..CliError::new(message) }
    }

    pub(super) fn not_confirmed() -> CliError {
        CliError::refused("not confirmed: nothing was changed")
    }

    /// A confirmation is needed, and there is no terminal to ask on.
    pub(super) fn no_terminal() -> CliError {
        CliError::new("not confirmed: there is no terminal to ask on, and nothing was changed")
            .with_hint("to confirm, repeat the command with --yes")
    }

    pub(super) fn from_timeout(after: Duration) -> CliError {
        CliError::new(format!("no answer within {}", duration::format_duration(after)))
            .with_hint(hint_for_code(Code::DeadlineExceeded))
    }

    /// Converts the status of a failed call. A status without a server's answer becomes a connection error.
    pub(super) fn from_status(status: &Status, server: &ServerUrl) -> CliError {
        if let Some(cause) = connection_cause(status) {
            return CliError::new(format!("cannot reach {server}: {cause}"))
                .with_hint("is the server running there? --server or KEYWARD_SERVER names another");
        }
        let info = status.get_details_error_info();
        let (reason, metadata) = info.map(|info| (info.reason, info.metadata)).unwrap_or_default();
        let reason = Some(reason).filter(|reason| !reason.is_empty());
        let fields: Vec<(String, String)> = status
            .get_details_bad_request()
            .into_iter()
            .flat_map(|request| request.field_violations)
            .map(|violation| (violation.field, violation.description))
            .collect();
        let message = strip_field_list(status.message(), &fields);
        let mut details: Vec<String> =
            fields.iter().map(|(field, problem)| format!("{field}: {problem}")).collect();
        details.extend(decode_propagation(status).iter().flat_map(describe_unconfirmed));
        details.push(match &reason {
            Some(reason) => format!("reason: {reason} ({})", code_name(status.code())),
            None => format!("code: {}", code_name(status.code())),
        });
        let hint = reason.as_deref().and_then(|reason| hint_for_reason(reason, &metadata));
        CliError {
            exit_code: exit_code_for(status.code(), reason.as_deref()),
            message,
            details,
            hint: Some(hint.unwrap_or_else(|| hint_for_code(status.code()).into()).into_owned()),
            is_from_server: true,
        }
    }

    pub(super) fn with_hint(self, hint: impl Into<String>) -> CliError {
        CliError { hint: Some(hint.into()), ..self }
    }

    /// Replaces the details; each is printed on its own line.
    pub(super) fn with_details(self, details: Vec<String>) -> CliError {
        CliError { details, ..self }
    }

    /// Adds the id under which the server's log has the call.
    pub(super) fn with_request_id(mut self, id: &MetadataValue<Ascii>) -> CliError {
        self.details.extend(id.to_str().ok().map(|id| format!("request id: {id}")));
        self
    }

    /// Prepends the step that failed, for a command with several steps.
    pub(super) fn with_context(self, what: &str) -> CliError {
        CliError { message: format!("{what}: {}", self.message), ..self }
    }

    /// Uses [`EXIT_UNANSWERED`], for commands whose exit code 1 has another meaning.
    pub(super) fn into_unanswered(self) -> CliError {
        CliError { exit_code: EXIT_UNANSWERED, ..self }
    }

    /// Whether the error is a status that a server sent.
    pub(super) fn is_from_server(&self) -> bool {
        self.is_from_server
    }

    pub(super) fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl Error for CliError {}

impl From<ClientSettingsError> for CliError {
    fn from(error: ClientSettingsError) -> CliError {
        CliError::new(error.to_string())
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> CliError {
        CliError::new(error.to_string())
    }
}

/// The lines for stderr. Messages quote text of people and servers, so logins and tokens in them are masked.
impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| escape_terminal(&mask_message(text));
        writeln!(f, "error: {}", shown(&self.message))?;
        for detail in &self.details {
            writeln!(f, "  {}", shown(detail))?;
        }
        match &self.hint {
            Some(hint) if !hint.is_empty() => writeln!(f, "hint: {}", shown(hint)),
            _ => Ok(()),
        }
    }
}

/// Removes from the server's message the field list that is printed as details.
fn strip_field_list(message: &str, fields: &[(String, String)]) -> String {
    let listed = fields.first().and_then(|(field, problem)| message.find(&format!("{field}: {problem}")));
    let headline = message[..listed.unwrap_or(message.len())].trim_end_matches([' ', ':']);
    if headline.is_empty() { "the server gave no reason".to_owned() } else { headline.to_owned() }
}

/// Returns the root cause of a status that the transport made on this side, without a connection.
fn connection_cause(status: &Status) -> Option<String> {
    let error = status.source()?;
    matches!(status.code(), Code::Unavailable | Code::Unknown).then(|| root_cause(error))
}

pub(super) fn root_cause(mut error: &(dyn Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Decodes the propagation report in the details of a `DEADLINE_EXCEEDED`.
fn decode_propagation(status: &Status) -> Option<pb::Propagation> {
    let details = tonic_types::Status::decode(status.details()).ok()?.details;
    let report = details.iter().find(|any| any.type_url.ends_with("/keyward.v1.Propagation"))?;
    pb::Propagation::decode(report.value.as_slice()).ok()
}

fn describe_unconfirmed(report: &pb::Propagation) -> Vec<String> {
    let mut lines: Vec<String> = report
        .unconfirmed
        .iter()
        .map(|replica| format!("not confirmed yet: replica {}", replica.replica))
        .collect();
    if let Some(instant) = &report.complete_by {
        lines
            .push(format!("the change is committed, and in force everywhere by {}", format_rfc3339(instant)));
    }
    lines
}

/// Errors that repeat on every attempt are refusals; errors that a later attempt may not have are no answer.
fn exit_code_for(code: Code, reason: Option<&str>) -> u8 {
    match code {
        Code::ResourceExhausted if reason == Some("STORE_FULL") => EXIT_UNANSWERED,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange => EXIT_REFUSED,
        _ => EXIT_UNANSWERED,
    }
}

/// `metadata` is the error info's: the names of what the error is about.
fn hint_for_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Cow<'static, str>> {
    let hint = match reason {
        "ACCOUNT_EXISTS" => {
            let id = metadata.get("account").map_or("ID", String::as_str);
            return Some(
                format!("choose another --id, or see the existing account: keyward accounts get {id}").into(),
            );
        }
        "KEY_NAME_TAKEN" => {
            "choose another --name, or revoke the key that has it (keyward keys list --name-prefix ...)"
        }
        "GRANT_BEYOND_CALLER" => {
            "a key can grant only what it has itself: request less, or use a token with more scopes"
        }
        "KEY_NOT_ACTIVE" => "enable the key, or give it a later --expires, first",
        "IDEMPOTENCY_KEY_REUSED" => "use a new --idempotency-key: this one belongs to another request",
        "ROLE_IN_USE" => {
            "keyward members list ACCOUNT shows the members that have it; keyward roles put changes what it grants"
        }
        "REPLICA_TOO_OLD" => {
            "finish the upgrade; keyward replicas list shows every replica, and keyward replicas \
             attest-dead removes one that is gone"
        }
        "PERMISSION_MISSING" => "grant the scope to the caller's key, or name another with --token-file",
        "STORE_FULL" => "free disk space for the database, then repeat the command",
        "OUTCOME_UNKNOWN" => {
            "repeat the command: a change is not made twice (create and rotate need the same --idempotency-key)"
        }
        "ACCOUNT_LIMIT" => {
            "revoke keys or delete roles that are no longer needed, wait for the next hour, or raise \
             [account_limits] in the server's settings"
        }
        _ => return None,
    };
    Some(hint.into())
}

fn hint_for_code(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "see --help for what each flag takes",
        Code::Unauthenticated => "is it the right token? --token-file or KEYWARD_TOKEN_FILE names the file",
        Code::PermissionDenied => "keyward whoami shows what the token may do",
        Code::NotFound => "check for typos; records of other accounts are reported as not found",
        Code::ResourceExhausted | Code::Unavailable | Code::Aborted => "try again in a moment",
        Code::DeadlineExceeded | Code::Cancelled => {
            "the change may have been made: check before you repeat it, or use a longer --timeout"
        }
        Code::Unimplemented => "the server does not know this call: is it Keyward, and of this version?",
        Code::Internal | Code::Unknown | Code::DataLoss => "see the server's log",
        _ => "",
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, pb::Status as RpcStatus};

    use super::*;

    /// A status as a server sends it.
    #[expect(clippy::disallowed_methods, reason = "the test plays the server")]
    fn status(code: Code, message: &str, details: ErrorDetails) -> Status {
        Status::with_error_details(code, message, details)
    }

    fn shown(status: &Status) -> (u8, String) {
        let failure = CliError::from_status(status, &ServerUrl::parse("http://kw:1").unwrap());
        (failure.exit_code(), failure.to_string())
    }

    #[test]
    fn a_bad_request_is_told_field_by_field_with_its_reason() {
        let mut details = ErrorDetails::with_error_info("INVALID_REQUEST", "keyward", []);
        details.add_bad_request_violation("name", "must be 1-255 characters");
        details.add_bad_request_violation("scopes[1]", "must be one to four segments");
        let message =
            "invalid request: name: must be 1-255 characters; scopes[1]: must be one to four segments";
        let (exit, text) = shown(&status(Code::InvalidArgument, message, details));
        assert_eq!(exit, EXIT_REFUSED);
        assert_eq!(
            text,
            "error: invalid request\n  name: must be 1-255 characters\n  \
             scopes[1]: must be one to four segments\n  reason: INVALID_REQUEST (INVALID_ARGUMENT)\n\
             hint: see --help for what each flag takes\n"
        );
    }

    #[test]
    fn a_known_reason_has_its_own_hint() {
        let details = ErrorDetails::with_error_info("KEY_NAME_TAKEN", "keyward", []);
        let (exit, text) = shown(&status(Code::AlreadyExists, "the name is taken", details));
        assert_eq!(exit, EXIT_REFUSED);
        assert!(text.contains("reason: KEY_NAME_TAKEN (ALREADY_EXISTS)"), "{text}");
        assert!(text.contains("hint: choose another --name"), "{text}");
    }

    #[test]
    fn a_server_in_trouble_is_no_refusal() {
        for code in
            [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Internal, Code::Unimplemented]
        {
            let (exit, text) = shown(&status(code, "", ErrorDetails::new()));
            assert_eq!(exit, EXIT_UNANSWERED, "{code:?}");
            assert!(text.contains(code_name(code)) && text.contains("hint: "), "{text}");
        }
        assert_eq!(CliError::from_timeout(Duration::from_secs(10)).exit_code(), EXIT_UNANSWERED);
    }

    #[test]
    fn a_full_database_is_trouble_and_a_used_up_limit_a_refusal() {
        let exit = |reason: &str| {
            let details = ErrorDetails::with_error_info(reason, "keyward", []);
            shown(&status(Code::ResourceExhausted, "no", details)).0
        };
        assert_eq!((exit("STORE_FULL"), exit("RATE_LIMITED")), (EXIT_UNANSWERED, EXIT_REFUSED));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test plays the server")]
    fn a_change_that_has_not_reached_everyone_says_whom() {
        let report = pb::Propagation {
            unconfirmed: vec![pb::UnconfirmedReplica { replica: "eu-2".into(), ..Default::default() }],
            complete_by: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            ..Default::default()
        };
        let any = prost_types::Any {
            type_url: "type.googleapis.com/keyward.v1.Propagation".into(),
            value: report.encode_to_vec(),
        };
        let details = RpcStatus { code: 4, message: String::new(), details: vec![any] }.encode_to_vec();
        let (exit, text) =
            shown(&Status::with_details(Code::DeadlineExceeded, "still waiting", details.into()));
        assert_eq!(exit, EXIT_UNANSWERED);
        assert!(text.contains("not confirmed yet: replica eu-2"), "{text}");
        assert!(text.contains("by 1970-01-01T00:00:00Z"), "{text}");
    }

    #[test]
    fn a_servers_words_cannot_steer_the_terminal() {
        let (_, text) = shown(&status(Code::Internal, "a\u{1b}[2Jb\nc", ErrorDetails::new()));
        assert!(text.starts_with("error: a\\u{1b}[2Jb\\nc\n"), "{text:?}");
    }
}
