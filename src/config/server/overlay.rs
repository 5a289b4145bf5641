//! Applies flags and environment variables on top of the file, before validation: each value is validated once, whatever
//! its source.

use std::{ops::Deref, path::PathBuf};

use super::flags::{LifecycleArgs, ServeArgs};
use crate::config::{boolean, error::invalid_setting, problems::ProblemCollector, raw::RawServerSettings};

impl RawServerSettings {
    /// Replaces values of the file by those of flags and environment variables.
    pub(super) fn overlay(&mut self, args: &ServeArgs, problems: &mut ProblemCollector<'_>) {
        overlay_value(&mut self.listen, "listen", args.listen.as_ref(), problems);
        overlay_value(&mut self.admin_listen, "admin_listen", args.admin_listen.as_ref(), problems);
        overlay_value(&mut self.envoy_listen, "envoy_listen", args.envoy_listen.as_ref(), problems);
        overlay_value(
            &mut self.forward_auth_listen,
            "forward_auth_listen",
            args.forward_auth_listen.as_ref(),
            problems,
        );
        overlay_value(&mut self.replica_name, "replica_name", args.replica_name.as_ref(), problems);
        overlay_value(&mut self.lease, "lease", args.lease.as_ref(), problems);
        let LifecycleArgs { shutdown_delay, database_wait, no_migrate, .. } = &args.lifecycle;
        overlay_value(&mut self.shutdown_delay, "shutdown_delay", shutdown_delay.as_ref(), problems);
        overlay_value(&mut self.database_wait, "database_wait", database_wait.as_ref(), problems);
        overlay_path(&mut self.rules, "rules", args.rules.as_ref(), problems);
        overlay_path(&mut self.root_key_file, "root_key_file", args.root_key_file.as_ref(), problems);
        let database = &args.database;
        overlay_path(
            &mut self.database_password_file,
            "database_password_file",
            database.database_password_file.as_ref(),
            problems,
        );
        overlay_value(&mut self.database, "database", database.database.as_ref(), problems);
        overlay_value(&mut self.limits.url, "limits.url", args.limits_url.as_ref(), problems);
        let endpoint = args.telemetry.otlp_endpoint.as_ref();
        overlay_value(&mut self.telemetry.otlp_endpoint, "telemetry.otlp_endpoint", endpoint, problems);
        if let Some(insecure) = overlay_boolean("insecure", args.insecure.as_deref(), problems) {
            self.insecure = Some(insecure);
        }
        // The flag negates the key; `--no-migrate=false` does not override the file.
        if overlay_boolean("migrate", no_migrate.as_deref(), problems) == Some(true) {
            self.migrate = Some(false);
        }
        if let Some(text) = &args.threads {
            problems.set_override("threads", text);
            let problem = "must be a whole number of 1 or more";
            self.threads =
                problems.ok_or_add(text.parse().map_err(|_| invalid_setting("threads", text, problem)));
        }
    }
}

fn overlay_value<T: Clone + Deref<Target = str>>(
    slot: &mut Option<T>,
    setting: &str,
    given: Option<&T>,
    problems: &mut ProblemCollector<'_>,
) {
    if let Some(given) = given {
        problems.set_override(setting, given);
        *slot = Some(given.clone());
    }
}

fn overlay_path(
    slot: &mut Option<PathBuf>,
    setting: &str,
    given: Option<&PathBuf>,
    problems: &mut ProblemCollector<'_>,
) {
    if let Some(given) = given {
        problems.set_override(setting, &given.to_string_lossy());
        *slot = Some(given.clone());
    }
}

fn overlay_boolean(
    setting: &'static str,
    given: Option<&str>,
    problems: &mut ProblemCollector<'_>,
) -> Option<bool> {
    let text = given?;
    problems.set_override(setting, text);
    problems
        .ok_or_add(boolean::parse_boolean(text).map_err(|problem| invalid_setting(setting, text, problem)))
}
