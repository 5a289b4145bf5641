//! HTTP requests that a proxy asks about: what a route needs, what the request shows, what becomes of it. One flow
//! for Envoy's gRPC and for the HTTP endpoint of other proxies; the decision itself is the engine's, and no second
//! policy stands here.
//!
//! `target and host in one spelling → route → credential → the engine → reply`. How a reply looks in a protocol
//! is `grpc::ext_authz`' and `forward`'s business. Nothing here awaits but the engine.

mod asked;
mod counts;
mod extensions;
mod logged_path;
mod ratelimit;
mod reply;
mod reserved;

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::{
    decisions::{Decisions, Facts, Kind},
    domain::{
        account::Environments,
        header_name,
        name::{AccountId, CustomerId, EnvironmentName, NameError},
        route::{
            Demand, Mode, Named, Route, RuleBook,
            path::{self, Path},
            pattern::Methods,
        },
    },
    engine::{Engine, Question, limiter::Charge},
    quiet::Quiet,
    trace,
};

pub use crate::engine::Asker;
pub use asked::{Asked, Client, Via, form as read_form};
pub use counts::Counts;
pub use extensions::{Said, read as read_extensions};
pub use reply::{Finding, Reply, Value};

use asked::Credential;
use logged_path::LoggedPath;
use reply::Judged;
use reserved::ReservedNames;

/// How requests that a proxy asks about are judged.
#[derive(Clone, Debug)]
pub struct GatewaySettings {
    /// Where calls are made whose route does not say.
    pub environment: Option<EnvironmentName>,
    /// The headers that a credential may stand in, in lower case. `authorization` takes `Bearer <token>`, any other
    /// the token alone.
    pub credential_headers: Vec<Box<str>>,
    /// The query parameter that a credential may stand in. `None` = the query is not looked at.
    pub credential_query: Option<Box<str>>,
    /// Whether the service behind the proxy sees the credential.
    pub forward_credential: bool,
    /// Whether keys that may call Keyward itself pass.
    pub management_keys: bool,
    /// How many proxies stand in front of the one that asks.
    pub trusted_hops: usize,
    /// Whether a denied client is told the reason in `x-keyward-reason`.
    pub reason_header: bool,
    /// Whether a proxy must show a key with `keyward:check`, and hears of that key's accounts alone.
    pub require_caller: bool,
    /// What holds where neither a route nor a rule says it.
    pub mode: Mode,
    /// The entries of a key's metadata that go into the proxy's dynamic metadata.
    pub publish_metadata: Vec<String>,
}

impl Default for GatewaySettings {
    fn default() -> Self {
        GatewaySettings {
            environment: None,
            credential_headers: vec!["authorization".into(), "x-api-key".into()],
            credential_query: None,
            forward_credential: false,
            management_keys: false,
            trusted_hops: 0,
            reason_header: false,
            require_caller: false,
            mode: Mode::Enforce,
            publish_metadata: Vec::new(),
        }
    }
}

/// Judges requests.
pub struct Gateway {
    engine: Arc<Engine>,
    environments: Arc<Environments>,
    settings: GatewaySettings,
    book: ArcSwap<RuleBook>,
    /// How many requests were judged how.
    pub counts: Counts,
    /// Misconfigured routes, for the log.
    complaints: Quiet,
    /// Denials in shadow mode, for the log.
    shadows: Quiet,
    decisions: Decisions,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Why a route cannot be asked about.
enum Unready {
    NoRule,
    BadRequest(String),
    Misconfigured(String),
}

impl From<Unready> for Finding {
    fn from(unready: Unready) -> Finding {
        match unready {
            Unready::NoRule => Finding::NoRule,
            Unready::BadRequest(problem) => Finding::BadRequest(problem),
            Unready::Misconfigured(problem) => Finding::Misconfigured(problem),
        }
    }
}

/// A route that can be asked about, with all that the request says for it.
struct Ready {
    demand: Demand,
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
        environments: Arc<Environments>,
        settings: GatewaySettings,
        decisions: Decisions,
    ) -> Gateway {
        let book = ArcSwap::from_pointee(RuleBook::default());
        Gateway {
            engine,
            environments,
            settings,
            book,
            counts: Counts::default(),
            complaints: Quiet::new(5),
            shadows: Quiet::new(20),
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
    pub fn environments(&self) -> &Environments {
        &self.environments
    }

    /// Takes other rules. Requests that are being judged end under the old ones.
    pub fn set_rules(&self, book: RuleBook) {
        self.book.store(Arc::new(book));
    }

    /// Reads rules that have changed; wrong ones leave the old in force.
    pub fn reload<E: std::fmt::Display>(&self, rules: Result<RuleBook, E>) {
        self.counts.note_reload(rules.is_ok());
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
    pub fn rules(&self) -> usize {
        self.book.load().rules.len()
    }

    /// Judges a request for a proxy of `asker`'s account; `said` is what the proxy's own configuration says of
    /// the route.
    pub async fn judge(&self, asker: Asker<'_>, asked: &Asked<'_>, said: Said) -> Reply {
        let book = self.book.load_full();
        let mut judged = Judged::new();
        let mut finding = self.find(asker, asked, said, &book, &mut judged).await;
        let mut reply = reply::make(&self.settings, asked, &judged, &finding);
        if !reply.fits() {
            // A header that is not removed must not pass, in no mode.
            judged.mode = Mode::Enforce;
            finding = Finding::BadRequest("there are too many x-keyward- headers to remove".to_owned());
            reply = reply::make(&self.settings, asked, &judged, &finding);
        }
        self.close(asked, &judged, &finding, &mut reply);
        reply
    }

    /// Refuses a question of Envoy's that was not read, since it has `length` bytes and at most `limit` are read. This is a
    /// verdict: as a fault, it would let requests with large bodies pass where `failure_mode_allow` is set.
    #[must_use]
    pub fn refuse_too_large(&self, length: usize, limit: usize) -> Reply {
        let asked = Asked {
            via: Via::ExtAuthz,
            proxy_removes: true,
            method: b"",
            host: b"",
            target: b"",
            headers: Vec::new(),
            client: Client::Peer(None),
            id: b"",
        };
        let (judged, finding) = (Judged::new(), Finding::TooLarge);
        let mut reply = reply::make(&self.settings, &asked, &judged, &finding);
        if self.complaints.may(self.engine.now()) {
            tracing::warn!(
                length,
                limit,
                "a question of Envoy is too large, and its request is refused with 413: remove with_request_body from \
                 ext_authz, or lower its max_request_bytes"
            );
        }
        self.close(&asked, &judged, &finding, &mut reply);
        reply
    }

    /// Counts and logs what was found, and writes it to the decision log.
    fn close(&self, asked: &Asked<'_>, judged: &Judged<'_>, finding: &Finding, reply: &mut Reply) {
        self.note(asked, judged, finding);
        let decision = self.write_down(asked, judged, finding);
        // By it the proxy's own log can be compared with the decision log.
        reply.metadata.extend(decision.map(|id| ("decision_id".to_owned(), Value::Text(id.to_string()))));
    }

    /// Writes the decision down, if it is one of those that are. What cannot be answered is no decision.
    fn write_down(&self, asked: &Asked<'_>, judged: &Judged<'_>, finding: &Finding) -> Option<uuid::Uuid> {
        if matches!(finding, Finding::Misconfigured(_) | Finding::CannotAnswer(_)) {
            return None;
        }
        self.decisions.note_if(finding.passes(), || Facts {
            kind: match asked.via {
                Via::ExtAuthz => Kind::ExtAuthz,
                Via::Forward => Kind::ForwardAuth,
            },
            allowed: finding.passes(),
            reason: finding.label(),
            answer: match finding {
                Finding::Answered(answer) => Some(answer),
                _ => None,
            },
            environment: judged.environment.as_ref(),
            needed: &judged.needed,
            customer: judged.customer.as_ref(),
            client_ip: asked.client_ip(self.settings.trusted_hops),
            http_id: asked.number(),
            shadow: judged.mode == Mode::Shadow,
        })
    }

    async fn find<'a>(
        &self,
        asker: Asker<'_>,
        asked: &Asked<'a>,
        said: Said,
        book: &RuleBook,
        judged: &mut Judged<'a>,
    ) -> Finding {
        let Said { route: said, problem } = said;
        judged.mode = said.mode.or(book.defaults.mode).unwrap_or(self.settings.mode);
        if let Some(refusal) = self.unremovable(asked, judged) {
            return refusal;
        }
        if let Some(problem) = problem {
            return Finding::Misconfigured(problem);
        }
        let (target, host, method) = match spelled(asked) {
            Ok(spelled) => spelled,
            Err(problem) => {
                // Whose request it is cannot be known: let through, it might reach a route that is enforced.
                judged.mode = Mode::Enforce;
                return Finding::BadRequest(problem);
            }
        };
        let rule = match said.demand {
            Some(_) => None,
            None if book.rules.is_ambiguous(&host, method, &target) => {
                judged.mode = Mode::Enforce;
                return Finding::BadRequest(path::Misspelt::Lookalike.to_string());
            }
            None => book.rules.find(&host, method, &target),
        };
        let (route, captures) = match &rule {
            Some((rule, captures)) => (rule.route.clone().or(&said), captures.as_slice()),
            None => (said, &[][..]),
        };
        let route = route.or(&book.defaults);
        judged.mode = route.mode.unwrap_or(self.settings.mode);
        judged.cost = route.cost.unwrap_or(1);
        judged.named_by = named_by(&route);
        if let Some(refusal) = self.unremovable(asked, judged).or_else(|| self.conflict(asked, judged)) {
            return refusal;
        }
        // The proxy removes the header, and the client would get another method than it asks for. A proxy that removes
        // by its own configuration may even send it on.
        let by_method = rule.as_ref().is_some_and(|(rule, _)| rule.methods != Methods::Any);
        if by_method && ReservedNames::overrides_method(asked) {
            return Finding::BadRequest("overriding the method by a header is not allowed".to_owned());
        }
        match self.ready(asked, route, captures) {
            Ok(ready) => self.ask(asker, asked, &ready, judged).await,
            Err(unready) => unready.into(),
        }
    }

    /// Refuses a header that would reach the service in a spelling that no proxy was asked to remove.
    fn unremovable(&self, asked: &Asked<'_>, judged: &mut Judged<'_>) -> Option<Finding> {
        let name = ReservedNames::new(&self.settings, &judged.named_by).unremovable(asked)?;
        let problem = if name == header_name::PREFIX {
            "headers that begin with x-keyward- are not a client's to send".to_owned()
        } else {
            format!("the name of a header differs from {name} in its punctuation alone; rename or remove it")
        };
        // Let through, it would reach the service.
        judged.mode = Mode::Enforce;
        Some(Finding::BadRequest(problem))
    }

    fn conflict(&self, asked: &Asked<'_>, judged: &Judged<'_>) -> Option<Finding> {
        let name = ReservedNames::new(&self.settings, &judged.named_by).conflict(asked)?;
        let problem = format!("{name} comes in several spellings with different values; send it once");
        Some(Finding::BadRequest(problem))
    }

    /// What a route needs, with the names that the request gives.
    fn ready(&self, asked: &Asked<'_>, route: Route, captures: &[(&str, &str)]) -> Result<Ready, Unready> {
        let demand = route.demand.ok_or(Unready::NoRule)?;
        Ok(Ready {
            demand,
            environment: route.environment.or_else(|| self.settings.environment.clone()),
            account: named("account", route.account, asked, captures, AccountId::parse)?,
            customer: named("customer", route.customer, asked, captures, CustomerId::parse)?,
            cost: route.cost.unwrap_or(1),
        })
    }

    /// Puts the question that the route asks.
    async fn ask<'a>(
        &self,
        asker: Asker<'_>,
        asked: &Asked<'a>,
        ready: &Ready,
        judged: &mut Judged<'a>,
    ) -> Finding {
        let scopes = match &ready.demand {
            Demand::Public => return Finding::Public,
            Demand::Authenticated => &[][..],
            Demand::Scopes(scopes) => scopes,
        };
        judged.needed = scopes.to_vec();
        judged.environment.clone_from(&ready.environment);
        judged.customer.clone_from(&ready.customer);
        let Some(environment) = &ready.environment else {
            let problem = "the route names no environment, and [gateway] has none for such routes";
            return Finding::Misconfigured(problem.to_owned());
        };
        judged.credential = asked.credential(&self.settings);
        let token = match &judged.credential {
            Credential::None => return Finding::NoCredential,
            Credential::Many => return Finding::ManyCredentials,
            Credential::One { token, .. } => token,
        };
        let question = Question {
            token,
            environment,
            scopes,
            account: ready.account.as_ref(),
            customer: ready.customer.as_ref(),
            client_ip: asked.client_ip(self.settings.trusted_hops),
            cost: ready.cost,
            dry_run: false,
            min_revision: None,
            charge: (!asked.id.is_empty()).then(|| Charge::of(asked.id)),
            bar_management: !self.settings.management_keys,
        };
        match self.engine.check(asker, &question).await {
            Ok(answer) => Finding::Answered(answer),
            Err(error) => Finding::CannotAnswer(error),
        }
    }

    fn note(&self, asked: &Asked<'_>, judged: &Judged<'_>, finding: &Finding) {
        let reason = finding.label();
        self.counts.note(asked.via, judged.mode, finding);
        if let Some(span) = trace::recording() {
            let answer = match finding {
                Finding::Answered(answer) => Some(answer),
                _ => None,
            };
            answer.inspect(|answer| answer.record(&span));
            span.record("keyward.reason", reason);
        }
        let (key, path) = (finding.key_id(), LoggedPath::new(asked, &self.settings));
        let shadow = judged.mode == Mode::Shadow;
        if let Finding::Misconfigured(problem) = finding {
            if self.complaints.may(self.engine.now()) {
                tracing::error!(
                    problem,
                    %path,
                    shadow,
                    "a route is misconfigured, and is answered with 503 unless it is in shadow mode"
                );
            }
        } else if shadow && !finding.passes() && self.shadows.may(self.engine.now()) {
            tracing::info!(key, reason, %path, "shadow: the request passes and would have been denied");
        }
        tracing::debug!(key, reason, %path, passes = finding.passes(), shadow, "a request was judged");
    }
}

/// Target, host and method in the one spelling that rules see; or what is wrong with them, for the client.
fn spelled<'a>(asked: &Asked<'a>) -> Result<(Path<'a>, String, &'a str), String> {
    let target = asked.target().ok_or(path::Misspelt::Character).and_then(Path::parse);
    let target = target.map_err(|misspelt| misspelt.to_string())?;
    let host = asked.host().and_then(path::host).ok_or("the host is none")?;
    let method = asked.method().ok_or("the method is none")?;
    Ok((target, host, method))
}

/// The headers that a route takes names from.
fn named_by(route: &Route) -> Vec<Box<str>> {
    let account = route.account.as_ref().and_then(header_of);
    account.into_iter().chain(route.customer.as_ref().and_then(header_of)).collect()
}

fn header_of<T>(named: &Named<T>) -> Option<Box<str>> {
    match named {
        Named::Header(name) => Some(name.clone()),
        Named::Is(_) | Named::Capture(_) => None,
    }
}

/// A name from where the route says that it stands. One that a header or path leaves out is unsaid.
fn named<T>(
    what: &str,
    from: Option<Named<T>>,
    asked: &Asked<'_>,
    captures: &[(&str, &str)],
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Option<T>, Unready> {
    let text = match &from {
        None => return Ok(None),
        Some(Named::Is(_)) => return Ok(from.and_then(fixed)),
        Some(Named::Header(name)) => match asked.header(name) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => text,
            Err(()) => {
                return Err(Unready::BadRequest(format!("{name} must be given once, in visible ASCII")));
            }
        },
        Some(Named::Capture(name)) => {
            let found = captures.iter().find(|(known, _)| *known == &**name).map(|(_, text)| *text);
            found.ok_or_else(|| Unready::Misconfigured(format!("the path has no segment {{{name}}}")))?
        }
    };
    parse(text).map(Some).map_err(|error| Unready::BadRequest(format!("the {what} named {error}")))
}

fn fixed<T>(named: Named<T>) -> Option<T> {
    match named {
        Named::Is(value) => Some(value),
        Named::Header(_) | Named::Capture(_) => None,
    }
}
