//! The form of the settings file: what serde reads before anything is validated.
//!
//! Each type is a table of the file and each field a key. The doc comment of a field is the text of its key on the
//! reference page, in the JSON Schema and in error messages; `schema.rs` documents the `schemars` attributes. The modules of
//! the tables turn these types into settings; nothing is validated here.
//!
//! Every table rejects unknown keys, so that a typo never becomes a default.

use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::PathBuf,
};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    domain::account::{AccountLimits, EnvironmentSet},
    engine::limiter::RedisKeyPrefix,
    transport::OverloadLimits,
};

use super::secret_url::SecretUrl;

pub(super) const DEFAULT_LISTEN: &str = "127.0.0.1:50051";
pub(super) const DEFAULT_ADMIN_LISTEN: &str = "127.0.0.1:9090";
pub(super) const DEFAULT_DATABASE: &str = "sqlite:keyward.db";
pub(super) const DEFAULT_TOKEN_PREFIX: &str = "kw";
pub(super) const DEFAULT_RETENTION_DAYS: u32 = 90;
pub(super) const DEFAULT_REDIS_TIMEOUT: &str = "20ms";
pub(super) const DEFAULT_DENIALS_PER_SECOND: u32 = 100;

/// The settings of a server.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Keyward server settings")]
pub(super) struct RawServerSettings {
    /// The address that serves gRPC.
    #[schemars(extend("default" = DEFAULT_LISTEN, "format" = "address"))]
    pub(super) listen: Option<String>,
    /// The address that serves `/healthz`, `/readyz` and `/metrics` over HTTP.
    #[schemars(extend("default" = DEFAULT_ADMIN_LISTEN, "format" = "address"))]
    pub(super) admin_listen: Option<String>,
    /// Where keys are stored: `sqlite:PATH`, or `postgres://USER@HOST:5432/DATABASE`. Keep a password in
    /// `database_password_file` or the environment.
    #[schemars(extend("default" = DEFAULT_DATABASE, "format" = "URL", "x-secret" = true))]
    pub(super) database: Option<SecretUrl>,
    /// A file that holds only the password of the PostgreSQL role; a line end after it is ignored.
    #[schemars(extend("x-default" = "none: as in libpq, `PGPASSWORD` or `~/.pgpass`", "format" = "file"))]
    pub(super) database_password_file: Option<PathBuf>,
    /// A new file (mode 0600) that receives the root key of a first start.
    #[schemars(extend("x-default" = "none: the terminal; if standard output is no terminal, `keyward-root.key` next to the SQLite file (PostgreSQL: in the working directory)", "format" = "file"))]
    pub(super) root_key_file: Option<PathBuf>,
    /// The number of threads that serve connections; at most 512.
    #[schemars(extend("x-default" = "one per core"))]
    pub(super) threads: Option<NonZeroUsize>,
    /// The prefix of every token: 1-16 characters of `[a-z0-9_]`, starting with a letter.
    #[schemars(extend("default" = DEFAULT_TOKEN_PREFIX))]
    pub(super) token_prefix: Option<String>,
    /// The environments that keys are created for, with their short names in tokens.
    #[schemars(extend("default" = EnvironmentSet::default().iter().collect::<Vec<_>>()))]
    pub(super) environments: Option<Vec<RawEnvironment>>,
    /// The role of keys that are created without scopes and roles.
    #[schemars(extend("x-default" = "none: such keys are refused"))]
    pub(super) default_role: Option<String>,
    /// How long revoked keys and rotated tokens are distinguished from unknown ones.
    #[schemars(extend("default" = DEFAULT_RETENTION_DAYS, "x-unit" = "days"))]
    pub(super) retention_days: Option<u32>,
    /// The address that serves only Envoy's ext_authz and health, with limits suited to Envoy.
    #[schemars(extend("x-default" = "nowhere", "format" = "address"))]
    pub(super) envoy_listen: Option<String>,
    /// The address that serves nginx, Traefik and other proxies that ask over HTTP.
    #[schemars(extend("x-default" = "nowhere", "format" = "address"))]
    pub(super) forward_auth_listen: Option<String>,
    /// A file with the requirements of HTTP requests; it is reloaded when it changes.
    #[schemars(extend("x-default" = "none: the routes of the proxy carry them", "format" = "file"))]
    pub(super) rules: Option<PathBuf>,
    /// The name of this replica in reports: 1-255 visible characters.
    #[schemars(extend("x-default" = "the machine's name and the port"))]
    pub(super) replica_name: Option<String>,
    /// How long replicas of a new PostgreSQL database answer without contact to it: `strict` (5s), `default` (60s),
    /// `static` (forever), or 1s to 1d.
    #[schemars(extend("default" = "default", "format" = "duration"))]
    pub(super) lease: Option<String>,
    /// How long a server keeps serving after SIGTERM while health reports NOT_SERVING; at most 10m.
    #[schemars(extend("default" = "2s", "format" = "duration"))]
    pub(super) shutdown_delay: Option<String>,
    /// How long a start waits for an unreachable PostgreSQL server; at most 1d.
    #[schemars(extend("default" = "60s", "format" = "duration"))]
    pub(super) database_wait: Option<String>,
    /// Whether a start migrates an older schema; otherwise it refuses to run on one.
    #[schemars(extend("default" = true, "x-flag" = "no_migrate"))]
    pub(super) migrate: Option<bool>,
    /// How HTTP requests are checked for proxies ([gateway.md](gateway.md)).
    #[serde(default)]
    pub(super) gateway: RawGatewaySettings,
    /// How much one account may own and do ([limits.md](limits.md#account-limits)).
    #[serde(default)]
    pub(super) account_limits: RawAccountLimits,
    /// Where rate limits are counted if several processes serve one database ([limits.md](limits.md)).
    #[serde(default)]
    pub(super) limits: RawLimitSettings,
    /// The listeners, each with its own services, limits and TLS ([transport.md](transport.md)).
    #[serde(default, rename = "listener")]
    #[schemars(extend("x-default" = "none: those of `listen` and `envoy_listen`"))]
    pub(super) listeners: Vec<RawListener>,
    /// Whether listeners with management services answer gRPC reflection.
    #[schemars(extend("default" = true))]
    pub(super) reflection: Option<bool>,
    /// Whether plaintext may be served beyond this machine, where others can read tokens in transit.
    #[schemars(extend("default" = false))]
    pub(super) insecure: Option<bool>,
    /// Limits on concurrent work; calls beyond them fail at once with UNAVAILABLE, OVERLOADED
    /// ([transport.md](transport.md)).
    #[serde(default)]
    pub(super) overload: RawOverload,
    /// Where traces are exported, and which calls are traced ([telemetry.md](telemetry.md)).
    #[serde(default)]
    pub(super) telemetry: RawTelemetrySettings,
    /// Which decisions are logged, and where; an empty table enables the log with the defaults
    /// ([telemetry.md](telemetry.md)).
    pub(super) decision_log: Option<RawDecisionLogSettings>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEnvironment {
    /// The name that requests use.
    pub(super) name: String,
    /// The short name in tokens, of `[a-z0-9]`; may be empty.
    pub(super) tag: String,
}

/// `[[listener]]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawListener {
    /// The name in logs and metrics: 1-64 characters of [a-z0-9_-], unique among the listeners. `main` and `envoy` are
    /// the listeners of `listen` and `envoy_listen`.
    pub(super) name: String,
    /// The address: `host:port`, or `unix:/path` for a socket file. Beyond this machine it needs [listener.tls], or
    /// `insecure`.
    pub(super) address: String,
    /// The permissions of a socket file, in octal. A process that may write to the file may connect. Default: "0660".
    pub(super) mode: Option<String>,
    /// The services: `check` (AuthzService), `management` (KeyService, AccountService, AuditService), `ext_authz`
    /// (Envoy's checks), `health`, `reflection` (only with `check` or `management`).
    pub(super) services: Vec<String>,
    /// What callers must present: `token` (a management key), `certificate` (one of the identities), `either` (a token,
    /// or without one a certificate), `both`. Default: `either` if there are identities; otherwise `token`, and nothing
    /// for Envoy's checks.
    pub(super) auth: Option<String>,
    /// The maximum number of concurrent connections; more are closed at once. Default: 2048; in the whole process never
    /// more than file descriptors allow.
    pub(super) max_connections: Option<usize>,
    /// The maximum number of concurrent calls on a connection, 1 to 65535. Default: 256; 1024 if only Envoy is served.
    pub(super) max_streams: Option<u32>,
    /// How many calls a client may cancel before they are processed; beyond that its connection is closed. Default: 20;
    /// 1024 if only Envoy is served, which cancels calls whenever its own clients disconnect.
    pub(super) pending_resets: Option<usize>,
    /// The maximum size of a call's headers in bytes, counting 32 more for each header; 1024 to 65536. Default: 16384.
    pub(super) max_headers: Option<u32>,
    /// The time limit from connecting to the client's first bytes, including the TLS handshake; 100ms to 1m.
    /// Default: "10s".
    pub(super) handshake_timeout: Option<String>,
    /// How long a connection without a call is kept open, at least; 1s to 1d. Default: "5m".
    pub(super) max_connection_idle: Option<String>,
    /// The age at which a client is asked to reconnect, give or take a tenth; 1s to 7d. Calls in flight end first.
    /// Default: "1h".
    pub(super) max_connection_age: Option<String>,
    /// TLS. Without it the listener serves plaintext. The files are reloaded when they change; open connections are not
    /// affected.
    pub(super) tls: Option<RawTlsFiles>,
    /// Callers that a client certificate identifies: an account, scopes, and exactly one of `uri`, `dns` and `email`.
    /// Without it, certificates grant nothing.
    #[serde(default, rename = "identity")]
    pub(super) identities: Vec<RawIdentity>,
}

/// `[listener.tls]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTlsFiles {
    /// A PEM file with the certificate chain, the server's own certificate first.
    pub(super) certificate: PathBuf,
    /// A PEM file with the private key of the certificate.
    pub(super) key: PathBuf,
    /// A PEM file with the authorities whose client certificates are trusted. Without it no client certificate is
    /// requested.
    pub(super) client_ca: Option<PathBuf>,
    /// Whether clients must present a certificate: `required` or `optional`. Default: `required` if there is a
    /// `client_ca`.
    pub(super) client_auth: Option<String>,
    /// The minimum version of TLS: "1.2" or "1.3". Default: "1.2".
    pub(super) min_version: Option<String>,
}

/// `[[listener.identity]]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIdentity {
    /// A URI among the certificate's alternative names, such as "spiffe://example.org/envoy". Without it, `dns` or
    /// `email` is required.
    pub(super) uri: Option<String>,
    /// A DNS name among the alternative names, such as "envoy.internal"; patterns match nothing. Without it, `uri` or
    /// `email` is required.
    pub(super) dns: Option<String>,
    /// An e-mail address among the alternative names. Without it, `uri` or `dns` is required.
    pub(super) email: Option<String>,
    /// The account that the caller acts in; `keyward` acts on every account.
    pub(super) account: String,
    /// The scopes of the caller, as of a management key: ["keyward:check"]. It cannot grant keys a scope that it lacks.
    pub(super) scopes: Vec<String>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOverload {
    /// The maximum number of calls in the queue of one serving thread; 4096 are about a tenth of a second of work.
    #[schemars(extend("default" = OverloadLimits::default().queued_checks))]
    pub(super) queued_checks: Option<usize>,
    /// The maximum number of management calls in progress in the whole process. A caller or a connection may use a
    /// quarter of them, an account half, a caller of the operator account half. Four times as many may wait for replicas.
    #[schemars(extend("default" = OverloadLimits::default().management_calls))]
    pub(super) management_calls: Option<usize>,
    /// The memory for requests that arrive or are in progress, over all listeners, in bytes; a connection may use a
    /// quarter. At least 33554432, so that every request fits; the default is 64 MiB.
    #[schemars(extend("default" = OverloadLimits::default().request_bytes))]
    pub(super) request_bytes: Option<usize>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGatewaySettings {
    /// The environment of requests whose route or rule names none.
    #[schemars(extend("x-default" = "none: a route or rule must name one"))]
    pub(super) environment: Option<String>,
    /// The headers that may carry a token: `authorization` as `Bearer TOKEN`, any other as the token alone.
    #[schemars(extend("default" = ["authorization", "x-api-key"]))]
    pub(super) credential_headers: Option<Vec<String>>,
    /// The query parameter that may carry a token; not with `forward_auth_listen`.
    #[schemars(extend("x-default" = "none: the query is ignored"))]
    pub(super) credential_query: Option<String>,
    /// Whether the token is forwarded to the service behind the proxy.
    #[schemars(extend("default" = false))]
    pub(super) forward_credential: Option<bool>,
    /// Whether keys that may call Keyward itself are accepted.
    #[schemars(extend("default" = false))]
    pub(super) management_keys: Option<bool>,
    /// The number of proxies in front of the one that asks, 0 to 16: that many entries at the end of `x-forwarded-for`
    /// are theirs.
    #[schemars(extend("default" = 0))]
    pub(super) trusted_hops: Option<usize>,
    /// Whether a denied client receives the reason in `x-keyward-reason`.
    #[schemars(extend("default" = false))]
    pub(super) reason_header: Option<bool>,
    /// Whether a proxy must present its own key with `keyward:check`; it then learns only about that key's accounts. Not
    /// with `forward_auth_listen`.
    #[schemars(extend("default" = false))]
    pub(super) require_caller: Option<bool>,
    /// The mode if neither a route nor a rule sets one: `enforce`, or `shadow`, which allows everything and reports what
    /// would have been denied.
    #[schemars(extend("default" = "enforce", "format" = "`enforce`, `shadow`"))]
    pub(super) mode: Option<String>,
    /// The entries of a key's metadata that are copied to the proxy's dynamic metadata.
    #[schemars(extend("default" = Vec::<String>::new()))]
    pub(super) publish_metadata: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAccountLimits {
    /// The maximum number of keys of an account that are not revoked; the same for a user's own keys.
    #[schemars(extend("default" = AccountLimits::DEFAULT.keys))]
    pub(super) keys: Option<NonZeroU64>,
    /// The maximum number of roles that an account may define.
    #[schemars(extend("default" = AccountLimits::DEFAULT.roles))]
    pub(super) roles: Option<NonZeroU64>,
    /// The maximum number of rotations of an account's keys per hour; the same for a user's own keys.
    #[schemars(extend("default" = AccountLimits::DEFAULT.rotations_per_hour))]
    pub(super) rotations_per_hour: Option<NonZeroU64>,
    /// The maximum number of audit log entries that an account's changes add per hour; the same for a user's own keys.
    #[schemars(extend("default" = AccountLimits::DEFAULT.log_rows_per_hour))]
    pub(super) log_rows_per_hour: Option<NonZeroU64>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLimitSettings {
    /// Where limits are counted: `local` in each process, `redis` in one Redis for all.
    #[schemars(extend("default" = "local", "format" = "`local`, `redis`"))]
    pub(super) backend: Option<String>,
    /// The Redis that counts, such as `redis://127.0.0.1:6379` (`rediss://` with TLS, `unix:///run/redis.sock`). Keep a
    /// password in the environment.
    #[schemars(extend("x-default" = "none; `redis` needs one", "format" = "URL", "x-secret" = true))]
    pub(super) url: Option<SecretUrl>,
    /// What happens while Redis does not respond: `allow` counts in each process, `deny` fails with UNAVAILABLE.
    #[schemars(extend("default" = "allow", "format" = "`allow`, `deny`"))]
    pub(super) on_backend_failure: Option<String>,
    /// How long a Check waits for Redis, 1ms to 1s.
    #[schemars(extend("default" = DEFAULT_REDIS_TIMEOUT, "format" = "duration"))]
    pub(super) timeout: Option<String>,
    /// The prefix of Keyward's entries in Redis.
    #[schemars(extend("default" = RedisKeyPrefix::DEFAULT))]
    pub(super) prefix: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTelemetrySettings {
    /// The collector that receives spans over OTLP/gRPC: `http://host:4317` or `https://host:4317`. Without it, and
    /// without `OTEL_EXPORTER_OTLP_ENDPOINT` in the environment, no span is created.
    #[schemars(extend("x-flag" = "otlp_endpoint"))]
    pub(super) otlp_endpoint: Option<String>,
    /// A file with headers for the collector, such as its access token: one `name: value` a line. Without it, none.
    pub(super) otlp_headers_file: Option<PathBuf>,
    /// A PEM file with the authority of the collector's certificate. Without it, the public authorities.
    pub(super) otlp_ca_file: Option<PathBuf>,
    /// The share of calls without a `traceparent` that are traced: 0 to 1. A caller that sends a `traceparent` decides
    /// for its calls.
    #[schemars(extend("default" = 0.0))]
    pub(super) sample_ratio: Option<f64>,
    /// The name of this program in traces. Default: `OTEL_SERVICE_NAME`, else "keyward".
    pub(super) service_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDecisionLogSettings {
    /// The share of denials that are logged: 0 to 1.
    #[schemars(extend("default" = 1.0))]
    pub(super) denials: Option<f64>,
    /// The maximum number of denials that are logged per second: 1 to 100000.
    #[schemars(extend("default" = DEFAULT_DENIALS_PER_SECOND))]
    pub(super) denials_per_second: Option<u32>,
    /// The share of allowed requests that are logged: 0 to 1.
    #[schemars(extend("default" = 0.0))]
    pub(super) allowed: Option<f64>,
    /// Whether every change that revokes or restricts access is logged.
    #[schemars(extend("default" = true))]
    pub(super) narrowing_changes: Option<bool>,
    /// The file that JSON lines are appended to (mode 0600); it is created again after it is moved away. Without it they
    /// go to the log, as target `keyward::decision`.
    pub(super) file: Option<PathBuf>,
}
