//! What becomes of a request: whether it passes, what the client hears, what the service behind the proxy learns,
//! what the proxy logs. The bodies and codes are those that our users' clients know.

use crate::{
    domain::{
        decision::Reason,
        facts::KeyFacts as _,
        name::{CustomerId, EnvironmentName},
        route::Mode,
        scope::Scope,
    },
    engine::{Answer, CannotAnswer, HeldKey},
};

use super::{
    Asked, GatewaySettings,
    asked::Credential,
    ratelimit::{fields, seconds},
    reserved::ReservedNames,
};

/// What was found out about a request.
#[derive(Clone, Debug)]
pub enum Finding {
    /// The route is open to everybody.
    Public,
    /// What the engine says of the credential.
    Answered(Answer),
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
    CannotAnswer(CannotAnswer),
}

impl Finding {
    /// Whether the request may pass.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Finding::Public => true,
            Finding::Answered(answer) => answer.reason() == Reason::Ok,
            _ => false,
        }
    }

    /// One word for it, from a closed set.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Finding::Public => "public",
            Finding::Answered(answer) if answer.barred && answer.reason() == Reason::MissingScope => {
                "management_key"
            }
            Finding::Answered(answer) => answer.reason().as_str(),
            Finding::NoCredential => "no_credential",
            Finding::ManyCredentials => "many_credentials",
            Finding::NoRule => "no_rule",
            Finding::BadRequest(_) => "bad_request",
            Finding::TooLarge => "too_large",
            Finding::Misconfigured(_) => "misconfigured",
            Finding::CannotAnswer(CannotAnswer::LimitsUnavailable | CannotAnswer::QuotaUnavailable) => {
                "limits_unavailable"
            }
            Finding::CannotAnswer(CannotAnswer::LeaseLost) => "lease_lost",
            // A proxy whose own key is gone is told so at its next call.
            Finding::CannotAnswer(
                CannotAnswer::Starting | CannotAnswer::Stale { .. } | CannotAnswer::AskerGone,
            ) => "not_ready",
        }
    }

    pub(super) fn key_id(&self) -> String {
        self.key().map(|key| key.id().to_string()).unwrap_or_default()
    }

    fn key(&self) -> Option<&HeldKey> {
        match self {
            Finding::Answered(answer) => answer.holder.as_ref().map(|holder| &holder.key),
            _ => None,
        }
    }
}

/// What is known besides the finding.
pub(super) struct Judged<'a> {
    /// Whether a denial stops the request.
    pub mode: Mode,
    /// The scopes that the route needs.
    pub needed: Vec<Scope>,
    /// What the route costs.
    pub cost: u64,
    /// The headers that the route takes names from.
    pub named_by: Vec<Box<str>>,
    /// What the request showed.
    pub credential: Credential<'a>,
    /// Where the call is made, where the route was asked about.
    pub environment: Option<EnvironmentName>,
    /// Whom it is about.
    pub customer: Option<CustomerId>,
}

impl Judged<'_> {
    /// Nothing is known yet.
    pub(super) fn new() -> Self {
        Judged {
            mode: Mode::Enforce,
            needed: Vec::new(),
            cost: 1,
            named_by: Vec::new(),
            credential: Credential::None,
            environment: None,
            customer: None,
        }
    }
}

/// A value of the proxy's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Text(String),
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
}

/// What a proxy does with a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// Whether the request goes on to the service.
    pub passes: bool,
    /// Whether this is no verdict: nobody knows whether it may pass.
    pub fault: bool,
    /// The status that the client hears, of a request that does not pass: 4xx, or 503 for a fault.
    pub status: u16,
    /// What the client reads then.
    pub body: String,
    /// Headers to the client: of the refusal, or to be added to the service's answer.
    pub headers: Vec<(&'static str, String)>,
    /// Headers to the service, in place of any that the client sent.
    pub upstream: Vec<(&'static str, String)>,
    /// Headers that the service must not see.
    pub remove: Vec<String>,
    /// The query parameter that the service must not see.
    pub remove_query: Option<String>,
    /// What the proxy may log and limit by.
    pub metadata: Vec<(String, Value)>,
}

/// The longest list of scopes that a service gets, in bytes. Proxies and services bound their headers: nginx's usual buffer
/// is 4 KiB. A list is cut between scopes, and `x-keyward-truncated` says so.
const MAX_SCOPES_LEN: usize = 2048;
/// The longest list of scopes in `WWW-Authenticate`, in bytes. A longer one is left out: a part of it would mislead.
const MAX_CHALLENGE_LEN: usize = 1024;
/// The longest list of headers to remove, in bytes with commas. Clients choose how many there are.
const MAX_REMOVE_LEN: usize = 2048;

impl Reply {
    /// Whether the proxy can be told everything that it must remove.
    pub(super) fn fits(&self) -> bool {
        self.remove.iter().map(|name| name.len() + 1).sum::<usize>() <= MAX_REMOVE_LEN
    }
}

/// Makes the reply. No header of it is longer than this module's bounds, and all together have at most 8 KiB, if the
/// removals [fit](Reply::fits).
pub(super) fn make(
    settings: &GatewaySettings,
    asked: &Asked<'_>,
    judged: &Judged<'_>,
    finding: &Finding,
) -> Reply {
    let mut reply = Reply { metadata: metadata(settings, judged, finding), ..Reply::default() };
    let shadowed = judged.mode == Mode::Shadow && !finding.passes();
    if finding.passes() || shadowed {
        reply.passes = true;
        if let Finding::Answered(answer) = finding
            && finding.passes()
        {
            reply.upstream = identity(answer);
            reply.headers = limits(answer);
        }
        if shadowed {
            reply.upstream.push(("x-keyward-shadow", finding.label().to_owned()));
        }
        hide(settings, asked, judged, &mut reply);
    } else {
        refuse(settings, asked, judged, finding, &mut reply);
    }
    reply
}

/// Who calls, for the service.
fn identity(answer: &Answer) -> Vec<(&'static str, String)> {
    let Some(holder) = &answer.holder else { return Vec::new() };
    let key = &holder.key;
    let mut identity = vec![
        ("x-keyward-key-id", key.id().to_string()),
        ("x-keyward-environment", key.environment().to_string()),
    ];
    identity.extend(answer.account().map(|account| ("x-keyward-account", account.to_string())));
    identity.extend(key.owner().user().map(|user| ("x-keyward-user", user.to_string())));
    let (scopes, whole) = joined(answer.grants().map(Scope::as_str), MAX_SCOPES_LEN);
    identity.push(("x-keyward-scopes", scopes));
    if !whole {
        identity.push(("x-keyward-truncated", "scopes".to_owned()));
    }
    identity
}

/// Words with a space between them, as many as fit into `max` bytes; and whether those are all.
fn joined<'a>(words: impl Iterator<Item = &'a str>, max: usize) -> (String, bool) {
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
fn hide(settings: &GatewaySettings, asked: &Asked<'_>, judged: &Judged<'_>, reply: &mut Reply) {
    let set = |name: &str| reply.upstream.iter().any(|(known, _)| *known == name);
    let mut remove = ReservedNames::new(settings, &judged.named_by).removed(asked, set);
    // A proxy may keep headers from us: a name that we did not see must not reach the service either.
    let unseen = judged.named_by.iter().filter(|name| asked.header(name) == Ok(None));
    remove.extend(unseen.map(ToString::to_string));
    // In shadow mode the service may still judge the credential itself.
    if let Credential::One { headers, query, .. } = &judged.credential
        && !settings.forward_credential
        && judged.mode == Mode::Enforce
    {
        remove.extend(headers.iter().map(ToString::to_string));
        reply.remove_query = settings.credential_query.as_ref().filter(|_| *query).map(ToString::to_string);
    }
    reply.remove = remove;
}

/// What the client hears of a request that does not pass.
fn refuse(
    settings: &GatewaySettings,
    asked: &Asked<'_>,
    judged: &Judged<'_>,
    finding: &Finding,
    reply: &mut Reply,
) {
    const UNAUTHORIZED: (u16, &str, &str) = (401, "UNAUTHORIZED", "Invalid or missing API key");
    const FORBIDDEN: (u16, &str, &str) = (403, "FORBIDDEN", "Insufficient permissions for this action");
    const TOO_LARGE: (u16, &str, &str) = (413, "PAYLOAD_TOO_LARGE", "The body is too large to be checked");
    const LIMITED: (u16, &str, &str) = (429, "RATE_LIMITED", "Too many requests");
    const UNAVAILABLE: (u16, &str, &str) = (503, "UNAVAILABLE", "API keys cannot be checked at the moment");
    let (status, code, message) = match finding {
        Finding::Answered(answer) => match answer.reason() {
            Reason::AccountSuspended
            | Reason::WrongCustomer
            | Reason::AddressNotAllowed
            | Reason::MissingScope => FORBIDDEN,
            Reason::RateLimited | Reason::QuotaExceeded => LIMITED,
            _ => UNAUTHORIZED,
        },
        Finding::NoCredential | Finding::ManyCredentials => UNAUTHORIZED,
        Finding::BadRequest(problem) => (400, "BAD_REQUEST", problem.as_str()),
        Finding::TooLarge => TOO_LARGE,
        Finding::Misconfigured(_) | Finding::CannotAnswer(_) => UNAVAILABLE,
        // What passes is not refused.
        Finding::NoRule | Finding::Public => FORBIDDEN,
    };
    reply.status = status;
    reply.fault = status == 503;
    reply.headers = vec![("content-type", "application/json".to_owned())];
    if status == 401 || finding.label() == Reason::MissingScope.as_str() {
        reply.headers.push(("www-authenticate", challenge(judged, finding, status)));
    }
    if let Finding::Answered(answer) = finding {
        reply.headers.extend(limits(answer));
        let wait = answer.limits().retry_after().filter(|_| status == 429);
        reply.headers.extend(wait.map(|wait| ("retry-after", seconds(wait).max(1).to_string())));
    }
    if reply.fault {
        reply.headers.push(("retry-after", "1".to_owned()));
    }
    if settings.reason_header {
        reply.headers.push(("x-keyward-reason", finding.label().to_owned()));
    }
    let grpc = asked.is_grpc();
    // Envoy has no gRPC code for these, or one that clients would send again at once.
    let grpc_status = match status {
        400 => Some("3"),
        429 => Some("8"),
        _ => None,
    };
    reply.headers.extend(grpc_status.filter(|_| grpc).map(|code| ("grpc-status", code.to_owned())));
    // Of a gRPC call the body becomes the message.
    reply.body = if grpc {
        message.to_owned()
    } else {
        format!(r#"{{"success":false,"error":{{"code":"{code}","message":"{message}"}}}}"#)
    };
}

/// `WWW-Authenticate` of RFC 6750, section 3: no error where no credential was shown.
fn challenge(judged: &Judged<'_>, finding: &Finding, status: u16) -> String {
    let realm = r#"Bearer realm="keyward""#;
    match finding {
        Finding::NoCredential | Finding::ManyCredentials => realm.to_owned(),
        _ if status == 401 => format!(r#"{realm}, error="invalid_token""#),
        _ => {
            let (needed, whole) = joined(judged.needed.iter().map(Scope::as_str), MAX_CHALLENGE_LEN);
            let scope = if whole { format!(r#", scope="{needed}""#) } else { String::new() };
            format!(r#"{realm}, error="insufficient_scope"{scope}"#)
        }
    }
}

/// How the key's limits stand, for the client.
fn limits(answer: &Answer) -> Vec<(&'static str, String)> {
    let Some(holder) = &answer.holder else { return Vec::new() };
    let Some((policy, state)) = fields(&holder.key, answer.limits()) else { return Vec::new() };
    vec![("ratelimit-policy", policy), ("ratelimit", state)]
}

/// What the proxy may log and limit by: scalars, under names of our own.
fn metadata(settings: &GatewaySettings, judged: &Judged<'_>, finding: &Finding) -> Vec<(String, Value)> {
    let text = |name: &str, value: &str| (name.to_owned(), Value::Text(value.to_owned()));
    let shadow = judged.mode == Mode::Shadow;
    let mut metadata = vec![
        ("allowed".to_owned(), Value::Flag(finding.passes())),
        text("reason", finding.label()),
        text("mode", if shadow { "shadow" } else { "enforce" }),
        ("cost".to_owned(), Value::Number(judged.cost)),
    ];
    let Finding::Answered(answer @ Answer { holder: Some(holder), .. }) = finding else {
        return metadata;
    };
    if answer.limits().inexact {
        metadata.push(("limits_inexact".to_owned(), Value::Flag(true)));
    }
    let key = &holder.key;
    metadata.push(text("key_id", &key.id().to_string()));
    metadata.push(text("environment", key.environment().as_str()));
    metadata.push(("secret_version".to_owned(), Value::Number(holder.version.into())));
    metadata.extend(answer.account().map(|account| text("account", account.as_str())));
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
            let (list, whole) = joined(words.iter().map(String::as_str), max);
            // The longest list of the first words that fits.
            let mut lists = (0..=words.len()).map(|count| words[..count].join(" "));
            let longest = lists.rfind(|list| list.len() <= max).unwrap();
            prop_assert_eq!(&list, &longest);
            prop_assert_eq!(whole, list == words.join(" "));
        }
    }

    #[test]
    fn what_is_to_be_removed_fits_or_does_not() {
        let reply =
            |names: usize| Reply { remove: vec!["x-keyward-0123456".to_owned(); names], ..Reply::default() };
        assert!(reply(MAX_REMOVE_LEN / 18).fits() && !reply(MAX_REMOVE_LEN / 18 + 1).fits());
    }
}
