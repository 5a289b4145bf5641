//! The settings of the gateway, already validated. How they are read from a file is not known here.

use crate::domain::{name::EnvironmentName, route::EnforcementMode};

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
    pub mode: EnforcementMode,
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
            mode: EnforcementMode::Enforce,
            publish_metadata: Vec::new(),
        }
    }
}
