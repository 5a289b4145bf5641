//! What becomes of a request: whether it passes, what the client hears, what the service behind the proxy learns,
//! what the proxy logs. The bodies and codes are those that our users' clients know.

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

/// What was found out about a request.
#[derive(Clone, Debug)]
pub enum GatewayOutcome {
    /// The route is open to everybody.
    Public,
    /// What the engine says of the credential.
    Checked(CheckOutcome),
    /// The request shows no credential.
    NoCredential,
    /// The request shows several credentials.
    ManyCredentials,
    /// Nothing says what the route needs.
    NoRule,
    /// The request can be read in two ways; the text says why, for the client.
    BadRequest(String),
    /// The proxy's question is larger than is read: it has the body of the request.
    TooLarge,
    /// What the route needs cannot be known; the text says why, for the log.
    Misconfigured(String),
    /// The engine cannot answer.
    CheckFailed(CheckError),
}

impl GatewayOutcome {
    /// Whether the request may pass.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        match self {
            GatewayOutcome::Public => true,
            GatewayOutcome::Checked(answer) => answer.reason() == Reason::Ok,
            _ => false,
        }
    }

    /// One word for it, from a closed set.
    #[must_use]
    pub fn reason_label(&self) -> &'static str {
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
            // A proxy whose own key is gone is told so at its next call.
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

/// What is known besides the finding.
pub(super) struct EvaluationContext<'a> {
    /// Whether a denial stops the request.
    pub mode: EnforcementMode,
    /// The scopes that the route needs.
    pub required_scopes: Vec<Scope>,
    /// What the route costs.
    pub cost: u64,
    /// The headers that the route takes names from.
    pub identifier_headers: Vec<Box<str>>,
    /// What the request showed.
    pub credential: RequestCredential<'a>,
    /// Where the call is made, where the route was asked about.
    pub environment: Option<EnvironmentName>,
    /// Whom it is about.
    pub customer: Option<CustomerId>,
}

impl EvaluationContext<'_> {
    /// Nothing is known yet.
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

/// A value of the proxy's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum ProxyMetadataValue {
    /// Text.
    Text(String),
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
}

/// What a proxy does with a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProxyResponse {
    /// Whether the request goes on to the service.
    pub is_allowed: bool,
    /// Whether this is no verdict: nobody knows whether it may pass.
    pub is_error: bool,
    /// The status that the client hears, of a request that does not pass: 4xx, or 503 for a fault.
    pub status: u16,
    /// What the client reads then.
    pub body: String,
    /// Headers to the client: of the refusal, or to be added to the service's answer.
    pub client_headers: Vec<(&'static str, String)>,
    /// Headers to the service, in place of any that the client sent.
    pub upstream_headers: Vec<(&'static str, String)>,
    /// Headers that the service must not see.
    pub remove_headers: Vec<String>,
    /// The query parameter that the service must not see.
    pub remove_query_parameter: Option<String>,
    /// What the proxy may log and limit by.
    pub metadata: Vec<(String, ProxyMetadataValue)>,
}

/// The longest list of scopes that a service gets, in bytes. Proxies and services bound their headers: nginx's usual buffer
/// is 4 KiB. A list is cut between scopes, and `x-keyward-truncated` says so.
const MAX_SCOPES_LEN: usize = 2048;
/// The longest list of scopes in `WWW-Authenticate`, in bytes. A longer one is left out: a part of it would mislead.
const MAX_CHALLENGE_LEN: usize = 1024;
/// The longest list of headers to remove, in bytes with commas. Clients choose how many there are.
const MAX_REMOVE_LEN: usize = 2048;

impl ProxyResponse {
    /// Whether the proxy can be told everything that it must remove.
    pub(super) fn can_list_removals(&self) -> bool {
        self.remove_headers.iter().map(|name| name.len() + 1).sum::<usize>() <= MAX_REMOVE_LEN
    }
}

/// Makes the reply. No header of it is longer than this module's bounds, and all together have at most 8 KiB, if the
/// removals [fit](ProxyResponse::can_list_removals).
pub(super) fn build_response(
    settings: &GatewaySettings,
    asked: &ProxyRequest<'_>,
    judged: &EvaluationContext<'_>,
    finding: &GatewayOutcome,
) -> ProxyResponse {
    let mut reply =
        ProxyResponse { metadata: dynamic_metadata(settings, judged, finding), ..ProxyResponse::default() };
    let shadowed = judged.mode == EnforcementMode::Shadow && !finding.is_allowed();
    if finding.is_allowed() || shadowed {
        reply.is_allowed = true;
        if let GatewayOutcome::Checked(answer) = finding
            && finding.is_allowed()
        {
            reply.upstream_headers = identity_headers(answer);
            reply.client_headers = limit_headers(answer);
        }
        if shadowed {
            reply.upstream_headers.push(("x-keyward-shadow", finding.reason_label().to_owned()));
        }
        set_removals(settings, asked, judged, &mut reply);
    } else {
        set_denial(settings, asked, judged, finding, &mut reply);
    }
    reply
}

/// Who calls, for the service.
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

/// Words with a space between them, as many as fit into `max` bytes; and whether those are all.
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

/// Takes away what the service must not see: the credential, and what passes itself off as ours.
fn set_removals(
    settings: &GatewaySettings,
    asked: &ProxyRequest<'_>,
    judged: &EvaluationContext<'_>,
    reply: &mut ProxyResponse,
) {
    let set = |name: &str| reply.upstream_headers.iter().any(|(known, _)| *known == name);
    let mut remove = ReservedHeaders::new(settings, &judged.identifier_headers).names_to_remove(asked, set);
    // A proxy may keep headers from us: a name that we did not see must not reach the service either.
    let unseen = judged.identifier_headers.iter().filter(|name| asked.single_header(name) == Ok(None));
    remove.extend(unseen.map(ToString::to_string));
    // In shadow mode the service may still judge the credential itself.
    if let RequestCredential::Single { headers, in_query: query, .. } = &judged.credential
        && !settings.forward_credential
        && judged.mode == EnforcementMode::Enforce
    {
        remove.extend(headers.iter().map(ToString::to_string));
        reply.remove_query_parameter =
            settings.credential_query.as_ref().filter(|_| *query).map(ToString::to_string);
    }
    reply.remove_headers = remove;
}

/// What the client hears of a request that does not pass.
fn set_denial(
    settings: &GatewaySettings,
    asked: &ProxyRequest<'_>,
    judged: &EvaluationContext<'_>,
    finding: &GatewayOutcome,
    reply: &mut ProxyResponse,
) {
    const UNAUTHORIZED: (u16, &str, &str) = (401, "UNAUTHORIZED", "Invalid or missing API key");
    const FORBIDDEN: (u16, &str, &str) = (403, "FORBIDDEN", "Insufficient permissions for this action");
    const TOO_LARGE: (u16, &str, &str) = (413, "PAYLOAD_TOO_LARGE", "The body is too large to be checked");
    const LIMITED: (u16, &str, &str) = (429, "RATE_LIMITED", "Too many requests");
    const UNAVAILABLE: (u16, &str, &str) = (503, "UNAVAILABLE", "API keys cannot be checked at the moment");
    let (status, code, message) = match finding {
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
        // What passes is not refused.
        GatewayOutcome::NoRule | GatewayOutcome::Public => FORBIDDEN,
    };
    reply.status = status;
    reply.is_error = status == 503;
    reply.client_headers = vec![("content-type", "application/json".to_owned())];
    if status == 401 || finding.reason_label() == Reason::MissingScope.as_str() {
        reply.client_headers.push(("www-authenticate", www_authenticate(judged, finding, status)));
    }
    if let GatewayOutcome::Checked(answer) = finding {
        reply.client_headers.extend(limit_headers(answer));
        let wait = answer.limits().retry_after().filter(|_| status == 429);
        reply.client_headers.extend(wait.map(|wait| ("retry-after", ceil_seconds(wait).max(1).to_string())));
    }
    if reply.is_error {
        reply.client_headers.push(("retry-after", "1".to_owned()));
    }
    if settings.reason_header {
        reply.client_headers.push(("x-keyward-reason", finding.reason_label().to_owned()));
    }
    let grpc = asked.is_grpc_call();
    // Envoy has no gRPC code for these, or one that clients would send again at once.
    let grpc_status = match status {
        400 => Some("3"),
        429 => Some("8"),
        _ => None,
    };
    reply.client_headers.extend(grpc_status.filter(|_| grpc).map(|code| ("grpc-status", code.to_owned())));
    // Of a gRPC call the body becomes the message.
    reply.body = if grpc {
        message.to_owned()
    } else {
        format!(r#"{{"success":false,"error":{{"code":"{code}","message":"{message}"}}}}"#)
    };
}

/// `WWW-Authenticate` of RFC 6750, section 3: no error where no credential was shown.
fn www_authenticate(judged: &EvaluationContext<'_>, finding: &GatewayOutcome, status: u16) -> String {
    let realm = r#"Bearer realm="keyward""#;
    match finding {
        GatewayOutcome::NoCredential | GatewayOutcome::ManyCredentials => realm.to_owned(),
        _ if status == 401 => format!(r#"{realm}, error="invalid_token""#),
        _ => {
            let (needed, whole) =
                join_within(judged.required_scopes.iter().map(Scope::as_str), MAX_CHALLENGE_LEN);
            let scope = if whole { format!(r#", scope="{needed}""#) } else { String::new() };
            format!(r#"{realm}, error="insufficient_scope"{scope}"#)
        }
    }
}

/// How the key's limits stand, for the client.
fn limit_headers(answer: &CheckOutcome) -> Vec<(&'static str, String)> {
    let Some(holder) = &answer.key_match else { return Vec::new() };
    let Some((policy, state)) = ratelimit_values(&holder.key, answer.limits()) else { return Vec::new() };
    vec![("ratelimit-policy", policy), ("ratelimit", state)]
}

/// What the proxy may log and limit by: scalars, under names of our own.
fn dynamic_metadata(
    settings: &GatewaySettings,
    judged: &EvaluationContext<'_>,
    finding: &GatewayOutcome,
) -> Vec<(String, ProxyMetadataValue)> {
    let text = |name: &str, value: &str| (name.to_owned(), ProxyMetadataValue::Text(value.to_owned()));
    let shadow = judged.mode == EnforcementMode::Shadow;
    let mut metadata = vec![
        ("allowed".to_owned(), ProxyMetadataValue::Flag(finding.is_allowed())),
        text("reason", finding.reason_label()),
        text("mode", if shadow { "shadow" } else { "enforce" }),
        ("cost".to_owned(), ProxyMetadataValue::Number(judged.cost)),
    ];
    let GatewayOutcome::Checked(answer @ CheckOutcome { key_match: Some(holder), .. }) = finding else {
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
        let reply = |names: usize| ProxyResponse {
            remove_headers: vec!["x-keyward-0123456".to_owned(); names],
            ..ProxyResponse::default()
        };
        assert!(
            reply(MAX_REMOVE_LEN / 18).can_list_removals()
                && !reply(MAX_REMOVE_LEN / 18 + 1).can_list_removals()
        );
    }
}
