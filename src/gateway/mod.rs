//! Decides whether a proxy may pass an HTTP request on: it finds the route, reads the credential, and asks the engine.
//! Envoy's gRPC and the HTTP endpoint of other proxies share this one flow.
//!
//! `normalize_target → route → find_credential → engine → build_response`. The decision itself belongs to the engine.
//! `grpc::ext_authz` and `forward_auth` encode the response. Only the engine's Check awaits.

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
pub(crate) use metrics::GatewayMetrics;
pub(crate) use request::{ClientSource, ProxyProtocol, ProxyRequest, parse_form};
pub(crate) use response::{GatewayOutcome, ProxyMetadataValue, ProxyResponse};
pub(crate) use route_overrides::{RouteOverrides, parse_route_overrides};
pub use settings::GatewaySettings;

use logged_path::LoggedPath;
use request::RequestCredential;
use reserved_headers::ReservedHeaders;
use response::EvaluationContext;

/// Authorizes the requests that proxies send.
pub struct Gateway {
    engine: Arc<Engine>,
    environments: Arc<EnvironmentSet>,
    settings: GatewaySettings,
    rule_book: ArcSwap<RuleBook>,
    /// Counters of outcomes, by protocol, mode and reason.
    pub(crate) metrics: GatewayMetrics,
    /// Limits the log lines about misconfigured routes.
    misconfiguration_throttle: LogThrottle,
    /// Limits the log lines about denials in shadow mode.
    shadow_denial_throttle: LogThrottle,
    decisions: DecisionLog,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Why no Check can be made for a route.
enum RouteError {
    NoRule,
    BadRequest(String),
    Misconfigured(String),
}

impl From<RouteError> for GatewayOutcome {
    fn from(error: RouteError) -> GatewayOutcome {
        match error {
            RouteError::NoRule => GatewayOutcome::NoRule,
            RouteError::BadRequest(problem) => GatewayOutcome::BadRequest(problem),
            RouteError::Misconfigured(problem) => GatewayOutcome::Misconfigured(problem),
        }
    }
}

/// A route with the identifiers that the request supplies for it: complete input for a Check.
struct ResolvedRoute {
    requirement: RouteRequirement,
    environment: Option<EnvironmentName>,
    account: Option<AccountId>,
    customer: Option<CustomerId>,
    cost: u64,
}

impl Gateway {
    /// Creates a gateway without rules; see [`Gateway::set_rules`].
    #[must_use]
    pub(crate) fn new(
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

    /// The settings that apply to every route.
    #[must_use]
    pub(crate) fn settings(&self) -> &GatewaySettings {
        &self.settings
    }

    /// The engine that makes the Checks.
    #[must_use]
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The environments that the configuration lists.
    #[must_use]
    pub(crate) fn environments(&self) -> &EnvironmentSet {
        &self.environments
    }

    /// Replaces the rules. A request in flight finishes under the old rules.
    pub(crate) fn set_rules(&self, book: RuleBook) {
        self.rule_book.store(Arc::new(book));
    }

    /// Installs changed rules. If they are invalid, the old rules stay in force.
    pub(crate) fn reload_rules<E: std::fmt::Display>(&self, rules: Result<RuleBook, E>) {
        self.metrics.record_reload(rules.is_ok());
        match rules {
            Ok(book) => {
                tracing::info!(rules = book.rules.len(), "gateway rules reloaded");
                self.set_rules(book);
            }
            Err(error) => {
                tracing::error!(%error, "gateway rules not reloaded: the file is invalid; the old rules stay in force")
            }
        }
    }

    /// The number of rules in force.
    #[must_use]
    pub(crate) fn rule_count(&self) -> usize {
        self.rule_book.load().rules.len()
    }

    /// Authorizes a request for a proxy of the requester's account; `overrides` are the route settings that the proxy
    /// sends.
    pub(crate) async fn authorize(
        &self,
        requester: Requester<'_>,
        request: &ProxyRequest<'_>,
        overrides: RouteOverrides,
    ) -> ProxyResponse {
        let book = self.rule_book.load_full();
        let mut context = EvaluationContext::new();
        let mut outcome = self.evaluate(requester, request, overrides, &book, &mut context).await;
        let mut response = response::build_response(&self.settings, request, &context, &outcome);
        if !response.can_list_removals() {
            // The proxy cannot remove all of these headers, so the request must not pass in any mode.
            context.mode = EnforcementMode::Enforce;
            outcome = GatewayOutcome::BadRequest("too many x-keyward- headers to remove".to_owned());
            response = response::build_response(&self.settings, request, &context, &outcome);
        }
        self.record_outcome(request, &context, &outcome, &mut response);
        response
    }

    /// Denies a request whose CheckRequest of `length` bytes exceeds `limit` and was not read.
    ///
    /// The result is a verdict, not a fault: with `failure_mode_allow`, Envoy would let large requests pass on a fault.
    #[must_use]
    pub(crate) fn deny_too_large(&self, length: usize, limit: usize) -> ProxyResponse {
        let request = ProxyRequest {
            protocol: ProxyProtocol::ExtAuthz,
            proxy_removes_headers: true,
            method: b"",
            host: b"",
            target: b"",
            headers: Vec::new(),
            client_source: ClientSource::Peer(None),
            proxy_request_id: b"",
        };
        let (context, outcome) = (EvaluationContext::new(), GatewayOutcome::TooLarge);
        let mut response = response::build_response(&self.settings, &request, &context, &outcome);
        if self.misconfiguration_throttle.allow(self.engine.now()) {
            tracing::warn!(
                length,
                limit,
                "request denied with 413: Envoy's CheckRequest is too large: remove with_request_body from \
                 ext_authz, or lower its max_request_bytes"
            );
        }
        self.record_outcome(&request, &context, &outcome, &mut response);
        response
    }

    /// Counts and logs the outcome, and writes it to the decision log.
    fn record_outcome(
        &self,
        request: &ProxyRequest<'_>,
        context: &EvaluationContext<'_>,
        outcome: &GatewayOutcome,
        response: &mut ProxyResponse,
    ) {
        self.observe_outcome(request, context, outcome);
        let decision = self.log_decision(request, context, outcome);
        // This id links the proxy's log to the decision log.
        response
            .metadata
            .extend(decision.map(|id| ("decision_id".to_owned(), ProxyMetadataValue::Text(id.to_string()))));
    }

    /// Records the decision if it is sampled. A fault is no decision.
    fn log_decision(
        &self,
        request: &ProxyRequest<'_>,
        context: &EvaluationContext<'_>,
        outcome: &GatewayOutcome,
    ) -> Option<uuid::Uuid> {
        if matches!(outcome, GatewayOutcome::Misconfigured(_) | GatewayOutcome::CheckFailed(_)) {
            return None;
        }
        self.decisions.record_if_sampled(outcome.is_allowed(), || DecisionInput {
            source: match request.protocol {
                ProxyProtocol::ExtAuthz => DecisionSource::ExtAuthz,
                ProxyProtocol::ForwardAuth => DecisionSource::ForwardAuth,
            },
            allowed: outcome.is_allowed(),
            reason: outcome.reason_label(),
            check_outcome: match outcome {
                GatewayOutcome::Checked(answer) => Some(answer),
                _ => None,
            },
            environment: context.environment.as_ref(),
            required_scopes: &context.required_scopes,
            customer: context.customer.as_ref(),
            client_ip: request.client_ip(self.settings.trusted_hops),
            proxy_request_id: request.valid_proxy_request_id(),
            is_shadow: context.mode == EnforcementMode::Shadow,
        })
    }

    async fn evaluate<'a>(
        &self,
        requester: Requester<'_>,
        request: &ProxyRequest<'a>,
        overrides: RouteOverrides,
        book: &RuleBook,
        context: &mut EvaluationContext<'a>,
    ) -> GatewayOutcome {
        let RouteOverrides { route: overrides, problem } = overrides;
        context.mode = overrides.mode.or(book.defaults.mode).unwrap_or(self.settings.mode);
        if let Some(refusal) = self.deny_unremovable_header(request, context) {
            return refusal;
        }
        if let Some(problem) = problem {
            return GatewayOutcome::Misconfigured(problem);
        }
        let (target, host, method) = match normalize_target(request) {
            Ok(spelled) => spelled,
            Err(problem) => {
                // The route is unknown. In shadow mode the request could reach a route that is enforced.
                context.mode = EnforcementMode::Enforce;
                return GatewayOutcome::BadRequest(problem);
            }
        };
        let rule = match overrides.requirement {
            Some(_) => None,
            None if book.rules.is_ambiguous(&host, method, &target) => {
                context.mode = EnforcementMode::Enforce;
                return GatewayOutcome::BadRequest(path::PathError::Lookalike.to_string());
            }
            None => book.rules.find_match(&host, method, &target),
        };
        let (route, captures) = match &rule {
            Some((rule, captures)) => (rule.route.clone().or_defaults(&overrides), captures.as_slice()),
            None => (overrides, &[][..]),
        };
        let route = route.or_defaults(&book.defaults);
        context.mode = route.mode.unwrap_or(self.settings.mode);
        context.cost = route.cost.unwrap_or(1);
        context.identifier_headers = identifier_headers(&route);
        if let Some(refusal) = self
            .deny_unremovable_header(request, context)
            .or_else(|| self.deny_conflicting_headers(request, context))
        {
            return refusal;
        }
        // The proxy removes the header, so the client would get another method than it sent. A proxy that removes
        // headers by its own configuration may even pass it on.
        let by_method = rule.as_ref().is_some_and(|(rule, _)| rule.methods != MethodSet::Any);
        if by_method && ReservedHeaders::overrides_method(request) {
            return GatewayOutcome::BadRequest("overriding the method by a header is not allowed".to_owned());
        }
        match self.resolve_route(request, route, captures) {
            Ok(ready) => self.check_credential(requester, request, &ready, context).await,
            Err(error) => error.into(),
        }
    }

    /// Denies a header that would reach the service in a spelling that the proxy is not asked to remove.
    fn deny_unremovable_header(
        &self,
        request: &ProxyRequest<'_>,
        context: &mut EvaluationContext<'_>,
    ) -> Option<GatewayOutcome> {
        let name =
            ReservedHeaders::new(&self.settings, &context.identifier_headers).find_unremovable(request)?;
        let problem = if name == header_name::KEYWARD_PREFIX {
            "clients must not send headers that begin with x-keyward-".to_owned()
        } else {
            format!("a header's name differs from {name} only in punctuation; rename or remove it")
        };
        // In shadow mode the header would reach the service.
        context.mode = EnforcementMode::Enforce;
        Some(GatewayOutcome::BadRequest(problem))
    }

    fn deny_conflicting_headers(
        &self,
        request: &ProxyRequest<'_>,
        context: &EvaluationContext<'_>,
    ) -> Option<GatewayOutcome> {
        let name =
            ReservedHeaders::new(&self.settings, &context.identifier_headers).find_conflict(request)?;
        let problem = format!("{name} occurs in several spellings with different values; send it once");
        Some(GatewayOutcome::BadRequest(problem))
    }

    /// Resolves a route's requirement and identifiers against the request.
    fn resolve_route(
        &self,
        request: &ProxyRequest<'_>,
        route: RouteSpec,
        captures: &[(&str, &str)],
    ) -> Result<ResolvedRoute, RouteError> {
        let requirement = route.requirement.ok_or(RouteError::NoRule)?;
        Ok(ResolvedRoute {
            requirement,
            environment: route.environment.or_else(|| self.settings.environment.clone()),
            account: resolve_identifier("account", route.account, request, captures, AccountId::parse)?,
            customer: resolve_identifier("customer", route.customer, request, captures, CustomerId::parse)?,
            cost: route.cost.unwrap_or(1),
        })
    }

    /// Checks the request's credential against the route.
    async fn check_credential<'a>(
        &self,
        requester: Requester<'_>,
        request: &ProxyRequest<'a>,
        ready: &ResolvedRoute,
        context: &mut EvaluationContext<'a>,
    ) -> GatewayOutcome {
        let scopes = match &ready.requirement {
            RouteRequirement::Public => return GatewayOutcome::Public,
            RouteRequirement::Authenticated => &[][..],
            RouteRequirement::Scopes(scopes) => scopes,
        };
        context.required_scopes = scopes.to_vec();
        context.environment.clone_from(&ready.environment);
        context.customer.clone_from(&ready.customer);
        let Some(environment) = &ready.environment else {
            let problem = "the route has no environment, and [gateway] sets no default";
            return GatewayOutcome::Misconfigured(problem.to_owned());
        };
        context.credential = request.find_credential(&self.settings);
        let token = match &context.credential {
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
            client_ip: request.client_ip(self.settings.trusted_hops),
            cost: ready.cost,
            dry_run: false,
            min_revision: None,
            dedup_id: (!request.proxy_request_id.is_empty())
                .then(|| RequestDedupId::from_request_id(request.proxy_request_id)),
            refuse_management_keys: !self.settings.management_keys,
        };
        match self.engine.check(requester, &question).await {
            Ok(answer) => GatewayOutcome::Checked(answer),
            Err(error) => GatewayOutcome::CheckFailed(error),
        }
    }

    fn observe_outcome(
        &self,
        request: &ProxyRequest<'_>,
        context: &EvaluationContext<'_>,
        outcome: &GatewayOutcome,
    ) {
        let reason = outcome.reason_label();
        self.metrics.record(request.protocol, context.mode, outcome);
        if let Some(span) = trace::recorded_span() {
            let answer = match outcome {
                GatewayOutcome::Checked(answer) => Some(answer),
                _ => None,
            };
            answer.inspect(|answer| answer.record_in_span(&span));
            span.record("keyward.reason", reason);
        }
        let (key, path) = (outcome.key_id(), LoggedPath::new(request, &self.settings));
        let shadow = context.mode == EnforcementMode::Shadow;
        if let GatewayOutcome::Misconfigured(problem) = outcome {
            if self.misconfiguration_throttle.allow(self.engine.now()) {
                tracing::error!(
                    problem,
                    %path,
                    shadow,
                    "route misconfigured: its requests get 503 unless it is in shadow mode"
                );
            }
        } else if shadow && !outcome.is_allowed() && self.shadow_denial_throttle.allow(self.engine.now()) {
            tracing::info!(key, reason, %path, "shadow mode: request passed that enforce mode would deny");
        }
        tracing::debug!(key, reason, %path, passes = outcome.is_allowed(), shadow, "request evaluated");
    }
}

/// The target, host and method in the spelling that rules match. The error is for the client.
fn normalize_target<'a>(request: &ProxyRequest<'a>) -> Result<(CanonicalPath<'a>, String, &'a str), String> {
    let target = request.target().ok_or(path::PathError::Character).and_then(CanonicalPath::parse);
    let target = target.map_err(|error| error.to_string())?;
    let host = request.host().and_then(path::normalize_host).ok_or("the host is not valid")?;
    let method = request.method().ok_or("the method is not valid")?;
    Ok((target, host, method))
}

/// The headers that a route reads identifiers from.
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

/// Resolves an identifier from its source. `None` = the header is absent.
fn resolve_identifier<T>(
    what: &str,
    from: Option<NameSource<T>>,
    request: &ProxyRequest<'_>,
    captures: &[(&str, &str)],
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Option<T>, RouteError> {
    let text = match &from {
        None => return Ok(None),
        Some(NameSource::Fixed(_)) => return Ok(from.and_then(fixed_value)),
        Some(NameSource::Header(name)) => match request.single_header(name) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => text,
            Err(()) => {
                return Err(RouteError::BadRequest(format!("{name} must occur once, in visible ASCII")));
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
