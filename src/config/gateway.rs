//! The table `[gateway]` of the settings file: how HTTP requests that proxies ask about are judged.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    domain::{
        account::EnvironmentSet,
        route::{EnforcementMode, parse_header_name},
    },
    gateway::GatewaySettings,
};

use super::{
    problems::ProblemCollector,
    server::{InvalidSetting, invalid_redacted_setting, invalid_setting},
};

/// The most proxies that may stand in front of the one that asks.
const MAX_TRUSTED_HOPS: usize = 16;

/// How HTTP requests that proxies ask about are judged.
// Unknown keys are refused: a typo must not be a default.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGatewaySettings {
    /// The environment of requests whose route or rule names none.
    #[schemars(extend("x-default" = "none: a route or rule must name one"))]
    environment: Option<String>,
    /// The headers that a token may stand in. `authorization` takes `Bearer TOKEN`, any other the token alone.
    #[schemars(extend("default" = ["authorization", "x-api-key"]))]
    credential_headers: Option<Vec<String>>,
    /// The query parameter that a token may stand in. Not with `forward_auth_listen`.
    #[schemars(extend("x-default" = "the query is not looked at"))]
    credential_query: Option<String>,
    /// Whether the service behind the proxy sees the token.
    #[schemars(extend("default" = false))]
    forward_credential: Option<bool>,
    /// Whether keys that may call Keyward itself pass.
    #[schemars(extend("default" = false))]
    management_keys: Option<bool>,
    /// How many proxies, 0 to 16, stand in front of the one that asks: so many entries of `x-forwarded-for`, from its
    /// end, are theirs.
    #[schemars(extend("default" = 0))]
    trusted_hops: Option<usize>,
    /// Whether a denied client hears the reason in `x-keyward-reason`.
    #[schemars(extend("default" = false))]
    reason_header: Option<bool>,
    /// Whether a proxy must show a key of its own with `keyward:check`; it then hears of that key's accounts alone. Not
    /// with `forward_auth_listen`.
    #[schemars(extend("default" = false))]
    require_caller: Option<bool>,
    /// What holds where neither a route nor a rule says it: `enforce`, or `shadow`, which lets all pass and says what
    /// would have been denied.
    #[schemars(extend("default" = "enforce", "format" = "`enforce`, `shadow`"))]
    mode: Option<String>,
    /// The entries of a key's metadata that go into the proxy's dynamic metadata.
    #[schemars(extend("default" = Vec::<String>::new()))]
    publish_metadata: Option<Vec<String>>,
}

impl RawGatewaySettings {
    /// Judges the settings.
    pub(super) fn validate(
        self,
        environments: &EnvironmentSet,
        problems: &mut ProblemCollector<'_>,
    ) -> GatewaySettings {
        let default = GatewaySettings::default();
        let environment = self.environment.filter(|_| problems.is_valid("environments")).and_then(|name| {
            let found = environments.get(&name).map(|environment| environment.name.clone());
            problems.ok_or_add(found.ok_or_else(|| {
                invalid_setting("gateway.environment", &name, format!("is none of {}", environments.names()))
            }))
        });
        let credential_headers =
            self.credential_headers.and_then(|list| problems.ok_or_add(validate_header_names(&list)));
        let credential_query = self.credential_query.and_then(|name| {
            let name = validate_name("gateway.credential_query", &name).map(|()| name.into_boxed_str());
            problems.ok_or_add(name)
        });
        let trusted_hops = self.trusted_hops.unwrap_or(default.trusted_hops);
        if trusted_hops > MAX_TRUSTED_HOPS {
            let problem = format!("must be 0 to {MAX_TRUSTED_HOPS}");
            problems.add(invalid_setting("gateway.trusted_hops", &trusted_hops.to_string(), problem));
        }
        let mode = self.mode.and_then(|mode| {
            problems.ok_or_add(
                EnforcementMode::parse(&mode).map_err(|error| invalid_setting("gateway.mode", &mode, error)),
            )
        });
        let publish_metadata = self.publish_metadata.unwrap_or(default.publish_metadata);
        for name in &publish_metadata {
            problems.ok_or_add(validate_name("gateway.publish_metadata", name));
        }
        GatewaySettings {
            environment,
            credential_headers: credential_headers.unwrap_or(default.credential_headers),
            credential_query,
            forward_credential: self.forward_credential.unwrap_or(default.forward_credential),
            management_keys: self.management_keys.unwrap_or(default.management_keys),
            trusted_hops,
            reason_header: self.reason_header.unwrap_or(default.reason_header),
            require_caller: self.require_caller.unwrap_or(default.require_caller),
            mode: mode.unwrap_or(default.mode),
            publish_metadata,
        }
    }
}

fn validate_header_names(list: &[String]) -> Result<Vec<Box<str>>, InvalidSetting> {
    if list.is_empty() {
        return Err(invalid_redacted_setting("gateway.credential_headers", "must name at least one header"));
    }
    let read = |name: &String| {
        parse_header_name(name).map_err(|error| invalid_setting("gateway.credential_headers", name, error))
    };
    list.iter().map(read).collect()
}

/// The name of a query parameter, or of an entry of metadata.
fn validate_name(setting: &'static str, name: &str) -> Result<(), InvalidSetting> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(good) {
        Ok(())
    } else {
        Err(invalid_setting(setting, name, "must be 1-64 characters of [A-Za-z0-9_.-]"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GatewaySettings, String> {
        let file: RawGatewaySettings = toml::from_str(text).map_err(|error| error.to_string())?;
        let read = ProblemCollector::collect(None, |problems| {
            Some(file.validate(&EnvironmentSet::default(), problems))
        });
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn the_table_is_read() {
        let settings = read(
            "environment = 'staging'\ncredential_headers = ['X-Key']\ncredential_query = 'key'\n\
             trusted_hops = 2\nmode = 'shadow'\nrequire_caller = true",
        )
        .unwrap();
        assert_eq!(settings.environment.unwrap().as_str(), "staging");
        assert_eq!(settings.credential_headers, [Box::<str>::from("x-key")]);
        assert_eq!((settings.trusted_hops, settings.mode), (2, EnforcementMode::Shadow));
        assert!(settings.require_caller && !settings.management_keys);
    }

    #[test]
    fn wrong_values_say_which_and_what_would_be_right() {
        for (text, said) in [
            ("environment = 'moon'", "production, staging, development"),
            ("credential_headers = []", "at least one"),
            ("credential_headers = ['x key']", "credential_headers"),
            ("credential_query = ''", "credential_query"),
            ("trusted_hops = 17", "0 to 16"),
            ("trusted_hops = -1", "trusted_hops"),
            ("publish_metadata = ['a b']", "publish_metadata"),
            ("mode = 'off'", "enforce or shadow"),
            ("mod = 'off'", "mod"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
