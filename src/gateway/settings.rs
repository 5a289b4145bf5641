//! The validated settings of the gateway. `config::gateway` reads them from a file.

use crate::domain::{name::EnvironmentName, route::EnforcementMode};

/// Settings that apply to every request that a proxy sends.
#[derive(Clone, Debug)]
pub struct GatewaySettings {
    /// The environment of a route that names none.
    pub environment: Option<EnvironmentName>,
    /// The lower-case names of the headers that may carry a credential. `authorization` takes `Bearer <token>`; any
    /// other header takes the bare token.
    pub credential_headers: Vec<Box<str>>,
    /// The query parameter that may carry a credential. `None` = the query is ignored.
    pub credential_query: Option<Box<str>>,
    /// Whether the proxy passes the credential on to the service.
    pub forward_credential: bool,
    /// Whether keys with Keyward's own scopes may pass.
    pub management_keys: bool,
    /// The number of proxies in front of the one that calls.
    pub trusted_hops: usize,
    /// Whether a denied client gets the reason in `x-keyward-reason`.
    pub reason_header: bool,
    /// Whether a proxy must present a key with `keyward:check`, which then limits it to that key's accounts.
    pub require_caller: bool,
    /// The mode of a route for which neither the rule nor the proxy sets one.
    pub mode: EnforcementMode,
    /// The entries of a key's metadata that the proxy gets as dynamic metadata.
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
