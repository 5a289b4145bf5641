//! HTTP requests that a proxy asks about: what a route needs, what the request shows, what becomes of it. One flow
//! for Envoy's gRPC and for the HTTP endpoint of other proxies; the decision itself is the engine's, and no second
//! policy stands here.
//!
//! `target and normalize_host in one spelling → route → find_credential → the engine → reply`. How a reply looks in a protocol
//! is `grpc::ext_authz`' and `forward`'s business. Nothing here awaits but the engine.

mod logged_path;
mod metrics;
mod ratelimit_headers;
mod request;
mod reserved_headers;
mod response;
mod route_overrides;
mod settings;

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::{
    decision_log::{DecisionInput, DecisionLog, DecisionSource},
    domain::{
        account::EnvironmentSet,
        header_name,
        name::{AccountId, CustomerId, EnvironmentName, NameError},
        route::{
            EnforcementMode, NameSource, RouteRequirement, RouteSpec, RuleBook,
            path::{self, CanonicalPath},
            pattern::MethodSet,
        },
    },
    engine::{CheckInput, Engine, limiter::RequestDedupId},
    log_throttle::LogThrottle,
    trace,
};

pub use crate::engine::Requester;
pub use metrics::GatewayMetrics;
pub use request::{ClientSource, ProxyProtocol, ProxyRequest, parse_form as read_form};
pub use response::{GatewayOutcome, ProxyMetadataValue, ProxyResponse};
pub use route_overrides::{RouteOverrides, parse_route_overrides as read_extensions};
pub use settings::GatewaySettings;

use logged_path::LoggedPath;
use request::RequestCredential;
use reserved_headers::ReservedHeaders;
use response::EvaluationContext;

/// Judges requests.
pub struct Gateway {
    engine: Arc<Engine>,
    environments: Arc<EnvironmentSet>,
    settings: GatewaySettings,
    rule_book: ArcSwap<RuleBook>,
    /// How many requests were judged how.
    pub metrics: GatewayMetrics,
    /// Misconfigured routes, for the log.
    misconfiguration_throttle: LogThrottle,
    /// Denials in shadow mode, for the log.
    shadow_denial_throttle: LogThrottle,
    decisions: DecisionLog,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Why a route cannot be asked about.
enum RouteError {
    NoRule,
    BadRequest(String),
    Misconfigured(String),
}

impl From<RouteError> for GatewayOutcome {
    fn from(unready: RouteError) -> GatewayOutcome {
        match unready {
            RouteError::NoRule => GatewayOutcome::NoRule,
            RouteError::BadRequest(problem) => GatewayOutcome::BadRequest(problem),
            RouteError::Misconfigured(problem) => GatewayOutcome::Misconfigured(problem),
        }
    }
}

/// A route that can be asked about, with all that the request says for it.
struct ResolvedRoute {
    requirement: RouteRequirement,
    environment: Option<EnvironmentName>,
    account: Option<AccountId>,
    customer: Option<CustomerId>,
    cost: u64,
}

impl Gateway {
    /// A gateway without rules.
    #[must_use]
    pub fn new(
        engine: Arc<Engine>,
        environments: Arc<EnvironmentSet>,
        settings: GatewaySettings,
        decisions: DecisionLog,
    ) -> Gateway {
        let book = ArcSwap::from_pointee(RuleBook::default());
        Gateway {
            engine,
            environments,
            settings,
            rule_book: book,
            metrics: GatewayMetrics::default(),
            misconfiguration_throttle: LogThrottle::per_second(5),
            shadow_denial_throttle: LogThrottle::per_second(20),
            decisions,
        }
    }

    /// How it judges.
    #[must_use]
    pub fn settings(&self) -> &GatewaySettings {
        &self.settings
    }

    /// What answers.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The environments there are.
    #[must_use]
    pub fn environments(&self) -> &EnvironmentSet {
        &self.environments
    }

    /// Takes other rules. Requests that are being judged end under the old ones.
    pub fn set_rules(&self, book: RuleBook) {
        self.rule_book.store(Arc::new(book));
    }

    /// Reads rules that have changed; wrong ones leave the old in force.
    pub fn reload_rules<E: std::fmt::Display>(&self, rules: Result<RuleBook, E>) {
        self.metrics.record_reload(rules.is_ok());
        match rules {
            Ok(book) => {
                tracing::info!(rules = book.rules.len(), "the rules have changed");
                self.set_rules(book);
            }
            Err(error) => tracing::error!(%error, "the changed rules are wrong; the old ones stay in force"),
        }
    }

    /// How many rules there are.
    #[must_use]
    pub fn rule_count(&self) -> usize {
        self.rule_book.load().rules.len()
    }

    /// Judges a request for a proxy of `asker`'s account; `said` is what the proxy's own configuration says of
    /// the route.
    pub async fn authorize(
        &self,
        asker: Requester<'_>,
        asked: &ProxyRequest<'_>,
        said: RouteOverrides,
    ) -> ProxyResponse {
        let book = self.rule_book.load_full();
        let mut judged = EvaluationContext::new();
        let mut finding = self.evaluate(asker, asked, said, &book, &mut judged).await;
        let mut reply = response::build_response(&self.settings, asked, &judged, &finding);
        if !reply.can_list_removals() {
            // A header that is not removed must not pass, in no mode.
            judged.mode = EnforcementMode::Enforce;
            finding =
                GatewayOutcome::BadRequest("there are too many x-keyward- headers to remove".to_owned());
            reply = response::build_response(&self.settings, asked, &judged, &finding);
        }
        self.record_outcome(asked, &judged, &finding, &mut reply);
        reply
    }

    /// Refuses a question of Envoy's that was not read, since it has `length` bytes and at most `limit` are read. This is a
    /// verdict: as a fault, it would let requests with large bodies pass where `failure_mode_allow` is set.
    #[must_use]
    pub fn deny_too_large(&self, length: usize, limit: usize) -> ProxyResponse {
        let asked = ProxyRequest {
            protocol: ProxyProtocol::ExtAuthz,
            proxy_removes_headers: true,
            method: b"",
            host: b"",
            target: b"",
            headers: Vec::new(),
            client_source: ClientSource::Peer(None),
            proxy_request_id: b"",
        };
        let (judged, finding) = (EvaluationContext::new(), GatewayOutcome::TooLarge);
        let mut reply = response::build_response(&self.settings, &asked, &judged, &finding);
        if self.misconfiguration_throttle.allow(self.engine.now()) {
            tracing::warn!(
                length,
                limit,
                "a question of Envoy is too large, and its request is refused with 413: remove with_request_body from \
                 ext_authz, or lower its max_request_bytes"
            );
        }
        self.record_outcome(&asked, &judged, &finding, &mut reply);
        reply
    }

    /// Counts and logs what was found, and writes it to the decision log.
    fn record_outcome(
        &self,
        asked: &ProxyRequest<'_>,
        judged: &EvaluationContext<'_>,
        finding: &GatewayOutcome,
        reply: &mut ProxyResponse,
    ) {
        self.observe_outcome(asked, judged, finding);
        let decision = self.log_decision(asked, judged, finding);
        // By it the proxy's own log can be compared with the decision log.
        reply
            .metadata
            .extend(decision.map(|id| ("decision_id".to_owned(), ProxyMetadataValue::Text(id.to_string()))));
    }

    /// Writes the decision down, if it is one of those that are. What cannot be answered is no decision.
    fn log_decision(
        &self,
        asked: &ProxyRequest<'_>,
        judged: &EvaluationContext<'_>,
        finding: &GatewayOutcome,
    ) -> Option<uuid::Uuid> {
        if matches!(finding, GatewayOutcome::Misconfigured(_) | GatewayOutcome::CheckFailed(_)) {
            return None;
        }
        self.decisions.record_if_sampled(finding.is_allowed(), || DecisionInput {
            source: match asked.protocol {
                ProxyProtocol::ExtAuthz => DecisionSource::ExtAuthz,
                ProxyProtocol::ForwardAuth => DecisionSource::ForwardAuth,
            },
            allowed: finding.is_allowed(),
            reason: finding.reason_label(),
            check_outcome: match finding {
                GatewayOutcome::Checked(answer) => Some(answer),
                _ => None,
            },
            environment: judged.environment.as_ref(),
            required_scopes: &judged.required_scopes,
            customer: judged.customer.as_ref(),
            client_ip: asked.client_ip(self.settings.trusted_hops),
            proxy_request_id: asked.valid_proxy_request_id(),
            is_shadow: judged.mode == EnforcementMode::Shadow,
        })
    }

    async fn evaluate<'a>(
        &self,
        asker: Requester<'_>,
        asked: &ProxyRequest<'a>,
        said: RouteOverrides,
        book: &RuleBook,
        judged: &mut EvaluationContext<'a>,
    ) -> GatewayOutcome {
        let RouteOverrides { route: said, problem } = said;
        judged.mode = said.mode.or(book.defaults.mode).unwrap_or(self.settings.mode);
        if let Some(refusal) = self.deny_unremovable_header(asked, judged) {
            return refusal;
        }
        if let Some(problem) = problem {
            return GatewayOutcome::Misconfigured(problem);
        }
        let (target, host, method) = match normalize_target(asked) {
            Ok(spelled) => spelled,
            Err(problem) => {
                // Whose request it is cannot be known: let through, it might reach a route that is enforced.
                judged.mode = EnforcementMode::Enforce;
                return GatewayOutcome::BadRequest(problem);
            }
        };
        let rule = match said.requirement {
            Some(_) => None,
            None if book.rules.is_ambiguous(&host, method, &target) => {
                judged.mode = EnforcementMode::Enforce;
                return GatewayOutcome::BadRequest(path::PathError::Lookalike.to_string());
            }
            None => book.rules.find_match(&host, method, &target),
        };
        let (route, captures) = match &rule {
            Some((rule, captures)) => (rule.route.clone().or_defaults(&said), captures.as_slice()),
            None => (said, &[][..]),
        };
        let route = route.or_defaults(&book.defaults);
        judged.mode = route.mode.unwrap_or(self.settings.mode);
        judged.cost = route.cost.unwrap_or(1);
        judged.identifier_headers = identifier_headers(&route);
        if let Some(refusal) = self
            .deny_unremovable_header(asked, judged)
            .or_else(|| self.deny_conflicting_headers(asked, judged))
        {
            return refusal;
        }
        // The proxy removes the header, and the client would get another method than it asks for. A proxy that removes
        // by its own configuration may even send it on.
        let by_method = rule.as_ref().is_some_and(|(rule, _)| rule.methods != MethodSet::Any);
        if by_method && ReservedHeaders::overrides_method(asked) {
            return GatewayOutcome::BadRequest("overriding the method by a header is not allowed".to_owned());
        }
        match self.resolve_route(asked, route, captures) {
            Ok(ready) => self.check_credential(asker, asked, &ready, judged).await,
            Err(unready) => unready.into(),
        }
    }

    /// Refuses a header that would reach the service in a spelling that no proxy was asked to remove.
    fn deny_unremovable_header(
        &self,
        asked: &ProxyRequest<'_>,
        judged: &mut EvaluationContext<'_>,
    ) -> Option<GatewayOutcome> {
        let name =
            ReservedHeaders::new(&self.settings, &judged.identifier_headers).find_unremovable(asked)?;
        let problem = if name == header_name::KEYWARD_PREFIX {
            "headers that begin with x-keyward- are not a client's to send".to_owned()
        } else {
            format!("the name of a header differs from {name} in its punctuation alone; rename or remove it")
        };
        // Let through, it would reach the service.
        judged.mode = EnforcementMode::Enforce;
        Some(GatewayOutcome::BadRequest(problem))
    }

    fn deny_conflicting_headers(
        &self,
        asked: &ProxyRequest<'_>,
        judged: &EvaluationContext<'_>,
    ) -> Option<GatewayOutcome> {
        let name = ReservedHeaders::new(&self.settings, &judged.identifier_headers).find_conflict(asked)?;
        let problem = format!("{name} comes in several spellings with different values; send it once");
        Some(GatewayOutcome::BadRequest(problem))
    }

    /// What a route needs, with the names that the request gives.
    fn resolve_route(
        &self,
        asked: &ProxyRequest<'_>,
        route: RouteSpec,
        captures: &[(&str, &str)],
    ) -> Result<ResolvedRoute, RouteError> {
        let demand = route.requirement.ok_or(RouteError::NoRule)?;
        Ok(ResolvedRoute {
            requirement: demand,
            environment: route.environment.or_else(|| self.settings.environment.clone()),
            account: resolve_identifier("account", route.account, asked, captures, AccountId::parse)?,
            customer: resolve_identifier("customer", route.customer, asked, captures, CustomerId::parse)?,
            cost: route.cost.unwrap_or(1),
        })
    }

    /// Puts the question that the route asks.
    async fn check_credential<'a>(
        &self,
        asker: Requester<'_>,
        asked: &ProxyRequest<'a>,
        ready: &ResolvedRoute,
        judged: &mut EvaluationContext<'a>,
    ) -> GatewayOutcome {
        let scopes = match &ready.requirement {
            RouteRequirement::Public => return GatewayOutcome::Public,
            RouteRequirement::Authenticated => &[][..],
            RouteRequirement::Scopes(scopes) => scopes,
        };
        judged.required_scopes = scopes.to_vec();
        judged.environment.clone_from(&ready.environment);
        judged.customer.clone_from(&ready.customer);
        let Some(environment) = &ready.environment else {
            let problem = "the route names no environment, and [gateway] has none for such routes";
            return GatewayOutcome::Misconfigured(problem.to_owned());
        };
        judged.credential = asked.find_credential(&self.settings);
        let token = match &judged.credential {
            RequestCredential::None => return GatewayOutcome::NoCredential,
            RequestCredential::Multiple => return GatewayOutcome::ManyCredentials,
            RequestCredential::Single { token, .. } => token,
        };
        let question = CheckInput {
            token,
            environment,
            scopes,
            account: ready.account.as_ref(),
            customer: ready.customer.as_ref(),
            client_ip: asked.client_ip(self.settings.trusted_hops),
            cost: ready.cost,
            dry_run: false,
            min_revision: None,
            dedup_id: (!asked.proxy_request_id.is_empty())
                .then(|| RequestDedupId::from_request_id(asked.proxy_request_id)),
            refuse_management_keys: !self.settings.management_keys,
        };
        match self.engine.check(asker, &question).await {
            Ok(answer) => GatewayOutcome::Checked(answer),
            Err(error) => GatewayOutcome::CheckFailed(error),
        }
    }

    fn observe_outcome(
        &self,
        asked: &ProxyRequest<'_>,
        judged: &EvaluationContext<'_>,
        finding: &GatewayOutcome,
    ) {
        let reason = finding.reason_label();
        self.metrics.record(asked.protocol, judged.mode, finding);
        if let Some(span) = trace::recorded_span() {
            let answer = match finding {
                GatewayOutcome::Checked(answer) => Some(answer),
                _ => None,
            };
            answer.inspect(|answer| answer.record_in_span(&span));
            span.record("keyward.reason", reason);
        }
        let (key, path) = (finding.key_id(), LoggedPath::new(asked, &self.settings));
        let shadow = judged.mode == EnforcementMode::Shadow;
        if let GatewayOutcome::Misconfigured(problem) = finding {
            if self.misconfiguration_throttle.allow(self.engine.now()) {
                tracing::error!(
                    problem,
                    %path,
                    shadow,
                    "a route is misconfigured, and is answered with 503 unless it is in shadow mode"
                );
            }
        } else if shadow && !finding.is_allowed() && self.shadow_denial_throttle.allow(self.engine.now()) {
            tracing::info!(key, reason, %path, "shadow: the request passes and would have been denied");
        }
        tracing::debug!(key, reason, %path, passes = finding.is_allowed(), shadow, "a request was judged");
    }
}

/// Target, host and method in the one spelling that rules see; or what is wrong with them, for the client.
fn normalize_target<'a>(asked: &ProxyRequest<'a>) -> Result<(CanonicalPath<'a>, String, &'a str), String> {
    let target = asked.target().ok_or(path::PathError::Character).and_then(CanonicalPath::parse);
    let target = target.map_err(|misspelt| misspelt.to_string())?;
    let host = asked.host().and_then(path::normalize_host).ok_or("the host is none")?;
    let method = asked.method().ok_or("the method is none")?;
    Ok((target, host, method))
}

/// The headers that a route takes names from.
fn identifier_headers(route: &RouteSpec) -> Vec<Box<str>> {
    let account = route.account.as_ref().and_then(source_header);
    account.into_iter().chain(route.customer.as_ref().and_then(source_header)).collect()
}

fn source_header<T>(named: &NameSource<T>) -> Option<Box<str>> {
    match named {
        NameSource::Header(name) => Some(name.clone()),
        NameSource::Fixed(_) | NameSource::PathCapture(_) => None,
    }
}

/// A name from where the route says that it stands. One that a header or path leaves out is unsaid.
fn resolve_identifier<T>(
    what: &str,
    from: Option<NameSource<T>>,
    asked: &ProxyRequest<'_>,
    captures: &[(&str, &str)],
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Option<T>, RouteError> {
    let text = match &from {
        None => return Ok(None),
        Some(NameSource::Fixed(_)) => return Ok(from.and_then(fixed_value)),
        Some(NameSource::Header(name)) => match asked.single_header(name) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => text,
            Err(()) => {
                return Err(RouteError::BadRequest(format!("{name} must be given once, in visible ASCII")));
            }
        },
        Some(NameSource::PathCapture(name)) => {
            let found = captures.iter().find(|(known, _)| *known == &**name).map(|(_, text)| *text);
            found.ok_or_else(|| RouteError::Misconfigured(format!("the path has no segment {{{name}}}")))?
        }
    };
    parse(text).map(Some).map_err(|error| RouteError::BadRequest(format!("the {what} named {error}")))
}

fn fixed_value<T>(named: NameSource<T>) -> Option<T> {
    match named {
        NameSource::Fixed(value) => Some(value),
        NameSource::Header(_) | NameSource::PathCapture(_) => None,
    }
}
