//! Builds the response to a proxy: whether the request passes, and the headers, body and metadata for client, service
//! and log.
//!
//! Existing clients depend on the bodies and codes.

use crate::{
    domain::{
        key_attributes::KeyAttributes as _,
        name::{CustomerId, EnvironmentName},
        policy_decision::Reason,
        route::EnforcementMode,
        scope::Scope,
    },
    engine::{CheckError, CheckOutcome, KeyRef},
};

use super::{
    ratelimit_headers::{ceil_seconds, ratelimit_values},
    request::{ProxyRequest, RequestCredential},
    reserved_headers::ReservedHeaders,
    settings::GatewaySettings,
};

/// The outcome of evaluating a request.
#[derive(Clone, Debug)]
pub(crate) enum GatewayOutcome {
    /// The route is open to everybody.
    Public,
    /// The engine evaluated the credential.
    Checked(CheckOutcome),
    /// The request shows no credential.
    NoCredential,
    /// The request shows several credentials.
    ManyCredentials,
    /// No rule, override or default sets a requirement for the route.
    NoRule,
    /// The request is invalid or ambiguous. The text is for the client.
    BadRequest(String),
    /// The proxy's CheckRequest exceeds the limit, because it contains the request's body.
    TooLarge,
    /// The route's configuration is wrong. The text is for the log.
    Misconfigured(String),
    /// The engine returned an error.
    CheckFailed(CheckError),
}

impl GatewayOutcome {
    /// Whether the request may pass in enforce mode.
    #[must_use]
    pub(crate) fn is_allowed(&self) -> bool {
        match self {
            GatewayOutcome::Public => true,
            GatewayOutcome::Checked(answer) => answer.reason() == Reason::Ok,
            _ => false,
        }
    }

    /// The reason, from a closed set, as metrics and logs show it.
    #[must_use]
    pub(crate) fn reason_label(&self) -> &'static str {
        match self {
            GatewayOutcome::Public => "public",
            GatewayOutcome::Checked(answer)
                if answer.is_refused_management_key && answer.reason() == Reason::MissingScope =>
            {
                "management_key"
            }
            GatewayOutcome::Checked(answer) => answer.reason().as_str(),
            GatewayOutcome::NoCredential => "no_credential",
            GatewayOutcome::ManyCredentials => "many_credentials",
            GatewayOutcome::NoRule => "no_rule",
            GatewayOutcome::BadRequest(_) => "bad_request",
            GatewayOutcome::TooLarge => "too_large",
            GatewayOutcome::Misconfigured(_) => "misconfigured",
            GatewayOutcome::CheckFailed(CheckError::LimitsUnavailable | CheckError::QuotaUnavailable) => {
                "limits_unavailable"
            }
            GatewayOutcome::CheckFailed(CheckError::LeaseLost) => "lease_lost",
            // The next call of a proxy whose own key was revoked fails to authenticate.
            GatewayOutcome::CheckFailed(
                CheckError::Starting | CheckError::Stale { .. } | CheckError::RequesterRevoked,
            ) => "not_ready",
        }
    }

    pub(super) fn key_id(&self) -> String {
        self.key().map(|key| key.id().to_string()).unwrap_or_default()
    }

    fn key(&self) -> Option<&KeyRef> {
        match self {
            GatewayOutcome::Checked(answer) => answer.key_match.as_ref().map(|holder| &holder.key),
            _ => None,
        }
    }
}

/// What the evaluation learned about a request besides its outcome.
pub(super) struct EvaluationContext<'a> {
    /// Whether a denial stops the request.
    pub(crate) mode: EnforcementMode,
    /// The scopes that the route needs.
    pub(crate) required_scopes: Vec<Scope>,
    /// The units that the route consumes of limits and quota.
    pub(crate) cost: u64,
    /// The headers that the route reads identifiers from.
    pub(crate) identifier_headers: Vec<Box<str>>,
    /// The credential that the request carries.
    pub(crate) credential: RequestCredential<'a>,
    /// The environment of the Check, if there was one.
    pub(crate) environment: Option<EnvironmentName>,
    /// The customer of the Check, if the route names one.
    pub(crate) customer: Option<CustomerId>,
}

impl EvaluationContext<'_> {
    /// The context before anything is evaluated.
    pub(super) fn new() -> Self {
        EvaluationContext {
            mode: EnforcementMode::Enforce,
            required_scopes: Vec::new(),
            cost: 1,
            identifier_headers: Vec::new(),
            credential: RequestCredential::None,
            environment: None,
            customer: None,
        }
    }
}

/// A scalar of the proxy's dynamic metadata.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ProxyMetadataValue {
    Text(String),
    Number(u64),
    Flag(bool),
}

/// What the proxy does with a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ProxyResponse {
    /// Whether the proxy passes the request on to the service.
    pub(crate) is_allowed: bool,
    /// Whether this is a fault instead of a verdict.
    pub(crate) is_error: bool,
    /// The HTTP status for the client of a request that does not pass: 4xx, or 503 for a fault.
    pub(crate) status: u16,
    /// The body for that client.
    pub(crate) body: String,
    /// Headers for the client: those of the denial, or additions to the service's response.
    pub(crate) client_headers: Vec<(&'static str, String)>,
    /// Headers for the service; they replace those of the client.
    pub(crate) upstream_headers: Vec<(&'static str, String)>,
    /// Headers that the proxy removes before it passes the request on.
    pub(crate) remove_headers: Vec<String>,
    /// The query parameter that the proxy removes.
    pub(crate) remove_query_parameter: Option<String>,
    /// Dynamic metadata for the proxy's logs and limits.
    pub(crate) metadata: Vec<(String, ProxyMetadataValue)>,
}

/// Maximum length of the list of scopes for the service, in bytes. Proxies and services bound their headers; nginx's
/// usual buffer is 4 KiB. A list is cut between scopes, and `x-keyward-truncated` marks the cut.
const MAX_SCOPES_LEN: usize = 2048;
/// Maximum length of the list of scopes in `WWW-Authenticate`, in bytes. A longer list is left out, because a part of
/// it would mislead.
const MAX_CHALLENGE_LEN: usize = 1024;
/// Maximum length of the list of headers to remove, in bytes with commas. Clients control its length.
const MAX_REMOVE_LEN: usize = 2048;

impl ProxyResponse {
    /// Whether the list of headers to remove fits into the response.
    pub(super) fn can_list_removals(&self) -> bool {
        self.remove_headers.iter().map(|name| name.len() + 1).sum::<usize>() <= MAX_REMOVE_LEN
    }
}

/// Builds the response. Each header stays within this module's bounds, and all together within 8 KiB if the removals
/// [fit](ProxyResponse::can_list_removals).
pub(super) fn build_response(
    settings: &GatewaySettings,
    request: &ProxyRequest<'_>,
    context: &EvaluationContext<'_>,
    outcome: &GatewayOutcome,
) -> ProxyResponse {
    let mut response =
        ProxyResponse { metadata: dynamic_metadata(settings, context, outcome), ..ProxyResponse::default() };
    let shadowed = context.mode == EnforcementMode::Shadow && !outcome.is_allowed();
    if outcome.is_allowed() || shadowed {
        response.is_allowed = true;
        if let GatewayOutcome::Checked(answer) = outcome
            && outcome.is_allowed()
        {
            response.upstream_headers = identity_headers(answer);
            response.client_headers = limit_headers(answer);
        }
        if shadowed {
            response.upstream_headers.push(("x-keyward-shadow", outcome.reason_label().to_owned()));
        }
        set_removals(settings, request, context, &mut response);
    } else {
        set_denial(settings, request, context, outcome, &mut response);
    }
    response
}

/// The headers that identify the caller to the service.
fn identity_headers(answer: &CheckOutcome) -> Vec<(&'static str, String)> {
    let Some(holder) = &answer.key_match else { return Vec::new() };
    let key = &holder.key;
    let mut identity = vec![
        ("x-keyward-key-id", key.id().to_string()),
        ("x-keyward-environment", key.environment().to_string()),
    ];
    identity.extend(answer.acting_account_id().map(|account| ("x-keyward-account", account.to_string())));
    identity.extend(key.owner().user().map(|user| ("x-keyward-user", user.to_string())));
    let (scopes, whole) = join_within(answer.granted_scopes().map(Scope::as_str), MAX_SCOPES_LEN);
    identity.push(("x-keyward-scopes", scopes));
    if !whole {
        identity.push(("x-keyward-truncated", "scopes".to_owned()));
    }
    identity
}

/// Joins words with spaces up to `max` bytes. The flag is false if words were left out.
fn join_within<'a>(words: impl Iterator<Item = &'a str>, max: usize) -> (String, bool) {
    let mut list = String::new();
    for word in words {
        let space = usize::from(!list.is_empty());
        if list.len() + space + word.len() > max {
            return (list, false);
        }
        list.extend([&" "[..space], word]);
    }
    (list, true)
}

/// Removes the credential and any header that imitates one of Keyward's.
fn set_removals(
    settings: &GatewaySettings,
    request: &ProxyRequest<'_>,
    context: &EvaluationContext<'_>,
    response: &mut ProxyResponse,
) {
    let set = |name: &str| response.upstream_headers.iter().any(|(known, _)| *known == name);
    let mut remove =
        ReservedHeaders::new(settings, &context.identifier_headers).names_to_remove(request, set);
    // A proxy may hide headers from Keyward, so their names must be removed unseen.
    let unseen = context.identifier_headers.iter().filter(|name| request.single_header(name) == Ok(None));
    remove.extend(unseen.map(ToString::to_string));
    // In shadow mode the service may still evaluate the credential itself.
    if let RequestCredential::Single { headers, in_query: query, .. } = &context.credential
        && !settings.forward_credential
        && context.mode == EnforcementMode::Enforce
    {
        remove.extend(headers.iter().map(ToString::to_string));
        response.remove_query_parameter =
            settings.credential_query.as_ref().filter(|_| *query).map(ToString::to_string);
    }
    response.remove_headers = remove;
}

/// Fills in the client's part of a response to a request that does not pass.
fn set_denial(
    settings: &GatewaySettings,
    request: &ProxyRequest<'_>,
    context: &EvaluationContext<'_>,
    outcome: &GatewayOutcome,
    response: &mut ProxyResponse,
) {
    const UNAUTHORIZED: (u16, &str, &str) = (401, "UNAUTHORIZED", "Invalid or missing API key");
    const FORBIDDEN: (u16, &str, &str) = (403, "FORBIDDEN", "Insufficient permissions for this action");
    const TOO_LARGE: (u16, &str, &str) = (413, "PAYLOAD_TOO_LARGE", "The body is too large to be checked");
    const LIMITED: (u16, &str, &str) = (429, "RATE_LIMITED", "Too many requests");
    const UNAVAILABLE: (u16, &str, &str) = (503, "UNAVAILABLE", "API keys cannot be checked at the moment");
    let (status, code, message) = match outcome {
        GatewayOutcome::Checked(answer) => match answer.reason() {
            Reason::AccountSuspended
            | Reason::WrongCustomer
            | Reason::AddressNotAllowed
            | Reason::MissingScope => FORBIDDEN,
            Reason::RateLimited | Reason::QuotaExceeded => LIMITED,
            _ => UNAUTHORIZED,
        },
        GatewayOutcome::NoCredential | GatewayOutcome::ManyCredentials => UNAUTHORIZED,
        GatewayOutcome::BadRequest(problem) => (400, "BAD_REQUEST", problem.as_str()),
        GatewayOutcome::TooLarge => TOO_LARGE,
        GatewayOutcome::Misconfigured(_) | GatewayOutcome::CheckFailed(_) => UNAVAILABLE,
        // A request that passes has no denial.
        GatewayOutcome::NoRule | GatewayOutcome::Public => FORBIDDEN,
    };
    response.status = status;
    response.is_error = status == 503;
    response.client_headers = vec![("content-type", "application/json".to_owned())];
    if status == 401 || outcome.reason_label() == Reason::MissingScope.as_str() {
        response.client_headers.push(("www-authenticate", www_authenticate(context, outcome, status)));
    }
    if let GatewayOutcome::Checked(answer) = outcome {
        response.client_headers.extend(limit_headers(answer));
        let wait = answer.limits().retry_after().filter(|_| status == 429);
        response
            .client_headers
            .extend(wait.map(|wait| ("retry-after", ceil_seconds(wait).max(1).to_string())));
    }
    if response.is_error {
        response.client_headers.push(("retry-after", "1".to_owned()));
    }
    if settings.reason_header {
        response.client_headers.push(("x-keyward-reason", outcome.reason_label().to_owned()));
    }
    let grpc = request.is_grpc_call();
    // For these statuses Envoy sends no gRPC code, or one that clients retry at once.
    let grpc_status = match status {
        400 => Some("3"),
        429 => Some("8"),
        _ => None,
    };
    response.client_headers.extend(grpc_status.filter(|_| grpc).map(|code| ("grpc-status", code.to_owned())));
    // The body becomes the message of a gRPC status.
    response.body = if grpc {
        message.to_owned()
    } else {
        format!(r#"{{"success":false,"error":{{"code":"{code}","message":"{message}"}}}}"#)
    };
}

/// The `WWW-Authenticate` header of RFC 6750, section 3. Without a credential it carries no error.
fn www_authenticate(context: &EvaluationContext<'_>, outcome: &GatewayOutcome, status: u16) -> String {
    let realm = r#"Bearer realm="keyward""#;
    match outcome {
        GatewayOutcome::NoCredential | GatewayOutcome::ManyCredentials => realm.to_owned(),
        _ if status == 401 => format!(r#"{realm}, error="invalid_token""#),
        _ => {
            let (needed, whole) =
                join_within(context.required_scopes.iter().map(Scope::as_str), MAX_CHALLENGE_LEN);
            let scope = if whole { format!(r#", scope="{needed}""#) } else { String::new() };
            format!(r#"{realm}, error="insufficient_scope"{scope}"#)
        }
    }
}

/// The status of the key's limits, for the client.
fn limit_headers(answer: &CheckOutcome) -> Vec<(&'static str, String)> {
    let Some(holder) = &answer.key_match else { return Vec::new() };
    let Some((policy, state)) = ratelimit_values(&holder.key, answer.limits()) else { return Vec::new() };
    vec![("ratelimit-policy", policy), ("ratelimit", state)]
}

/// Dynamic metadata for the proxy's logs and limits: scalars under Keyward's own names.
fn dynamic_metadata(
    settings: &GatewaySettings,
    context: &EvaluationContext<'_>,
    outcome: &GatewayOutcome,
) -> Vec<(String, ProxyMetadataValue)> {
    let text = |name: &str, value: &str| (name.to_owned(), ProxyMetadataValue::Text(value.to_owned()));
    let shadow = context.mode == EnforcementMode::Shadow;
    let mut metadata = vec![
        ("allowed".to_owned(), ProxyMetadataValue::Flag(outcome.is_allowed())),
        text("reason", outcome.reason_label()),
        text("mode", if shadow { "shadow" } else { "enforce" }),
        ("cost".to_owned(), ProxyMetadataValue::Number(context.cost)),
    ];
    let GatewayOutcome::Checked(answer @ CheckOutcome { key_match: Some(holder), .. }) = outcome else {
        return metadata;
    };
    if answer.limits().is_inexact {
        metadata.push(("limits_inexact".to_owned(), ProxyMetadataValue::Flag(true)));
    }
    let key = &holder.key;
    metadata.push(text("key_id", &key.id().to_string()));
    metadata.push(text("environment", key.environment().as_str()));
    metadata.push(("secret_version".to_owned(), ProxyMetadataValue::Number(holder.secret_version.into())));
    metadata.extend(answer.acting_account_id().map(|account| text("account", account.as_str())));
    metadata.extend(key.owner().user().map(|user| text("user", user.as_str())));
    for name in &settings.publish_metadata {
        let value = key.metadata().get(name);
        metadata.extend(value.map(|value| text(&format!("metadata_{name}"), value)));
    }
    metadata
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_list_is_cut_between_words(words in proptest::collection::vec("[a-z:]{1,9}", 0..20), max in 0usize..80) {
            let (list, whole) = join_within(words.iter().map(String::as_str), max);
            // The longest list of the first words that fits.
            let mut lists = (0..=words.len()).map(|count| words[..count].join(" "));
            let longest = lists.rfind(|list| list.len() <= max).unwrap();
            prop_assert_eq!(&list, &longest);
            prop_assert_eq!(whole, list == words.join(" "));
        }
    }

    #[test]
    fn what_is_to_be_removed_fits_or_does_not() {
        let response = |names: usize| ProxyResponse {
            remove_headers: vec!["x-keyward-0123456".to_owned(); names],
            ..ProxyResponse::default()
        };
        assert!(
            response(MAX_REMOVE_LEN / 18).can_list_removals()
                && !response(MAX_REMOVE_LEN / 18 + 1).can_list_removals()
        );
    }
}
