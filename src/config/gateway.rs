//! Validates the table `[gateway]`: how HTTP requests are checked for proxies.

use crate::{
    domain::{
        account::EnvironmentSet,
        route::{EnforcementMode, parse_header_name},
    },
    gateway::GatewaySettings,
};

use super::{
    error::{InvalidSetting, invalid_redacted_setting, invalid_setting},
    problems::ProblemCollector,
    raw::RawGatewaySettings,
};

const MAX_TRUSTED_HOPS: usize = 16;

impl RawGatewaySettings {
    pub(super) fn validate(
        self,
        environments: &EnvironmentSet,
        problems: &mut ProblemCollector<'_>,
    ) -> GatewaySettings {
        let default = GatewaySettings::default();
        let environment = self.environment.filter(|_| problems.is_valid("environments")).and_then(|name| {
            let found = environments.get(&name).map(|environment| environment.name.clone());
            problems.ok_or_add(found.ok_or_else(|| {
                invalid_setting(
                    "gateway.environment",
                    &name,
                    format!("must be one of {}", environments.names()),
                )
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

/// Checks the name of a query parameter or of a metadata entry.
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
