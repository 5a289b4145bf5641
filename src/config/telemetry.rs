//! The tables `[telemetry]` and `[decision_log]` of the settings file: where spans go and how many, and which
//! decisions are written down where.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    decisions::{DecisionSettings, Place},
    trace::Sampling,
};

use super::server::{ConfigError, TelemetryArgs, invalid};

const SERVICE_NAME: &str = "keyward";
const DENIALS_PER_SECOND: u32 = 100;
/// The longest value of a header to the collector, in bytes.
const MAX_HEADER: usize = 4096;

/// A value that is never shown.
#[derive(Clone)]
pub struct Hidden(String);

impl Hidden {
    /// The value.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden")
    }
}

/// A collector of spans.
#[derive(Clone, Debug)]
pub struct Otlp {
    /// Where it is: `http://host:port` or `https://host:port`.
    pub endpoint: String,
    /// Headers that go with every request, by lower-case names.
    pub headers: Vec<(String, Hidden)>,
    /// The authority that its certificate is of, as PEM; nothing = those that browsers know.
    pub ca: Option<Vec<u8>>,
    /// What this program is called there.
    pub service_name: String,
}

/// What is told of calls and decisions.
#[derive(Clone, Debug, Default)]
pub struct TelemetrySettings {
    /// Where spans go; nothing = none are made.
    pub otlp: Option<Otlp>,
    /// Which calls are recorded.
    pub sampling: Sampling,
    /// Which decisions are written down; nothing = none.
    pub decisions: Option<DecisionSettings>,
}

/// The table `[telemetry]`: traces.
// Unknown keys are refused: a typo must not be a default.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// Where spans are sent, over OTLP/gRPC: `http://host:4317` or `https://host:4317`. Without it, and without
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` in the environment, no span is made.
    #[schemars(extend("x-flag" = "otlp_endpoint"))]
    otlp_endpoint: Option<String>,
    /// A file with headers for the collector, such as its access token: one `name: value` a line. Without it, none.
    otlp_headers_file: Option<PathBuf>,
    /// A PEM file with the authority that the collector's certificate is of. Without it, the public ones.
    otlp_ca_file: Option<PathBuf>,
    /// The share of calls that are recorded though their caller does not say so: 0 to 1. A caller that sends a
    /// `traceparent` decides for its calls. Default: 0.
    sample_ratio: Option<f64>,
    /// What this program is called in traces. Default: `OTEL_SERVICE_NAME`, else "keyward".
    service_name: Option<String>,
}

/// The table `[decision_log]`: decisions, one line each. An empty table turns it on with the defaults.
// Unknown keys are refused: a typo must not be a default.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DecisionsFile {
    /// The share of denials that are written down: 0 to 1. Default: 1.
    denials: Option<f64>,
    /// How many denials are written down in one second at the most: 1 to 100000. Default: 100.
    denials_per_second: Option<u32>,
    /// The share of allowed requests that are written down: 0 to 1. Default: 0.
    allowed: Option<f64>,
    /// Whether changes that take something away are written down, all of them. Default: true.
    narrowing_changes: Option<bool>,
    /// The file that lines are added to, as JSON (mode 0600; begun anew when it is moved away). Without it they go to
    /// the log, as target `keyward::decision`.
    file: Option<PathBuf>,
}

impl File {
    /// The settings, all valid. A flag or its variable stands in place of the file's.
    pub(super) fn read(
        self,
        decisions: Option<DecisionsFile>,
        args: &TelemetryArgs,
    ) -> Result<TelemetrySettings, ConfigError> {
        let share = self.sample_ratio.unwrap_or(0.0);
        let share = ratio("telemetry.sample_ratio", share)?;
        let TelemetryArgs { otlp_endpoint, otel_endpoint, otel_service_name } = args.clone();
        let endpoint = otlp_endpoint.or(self.otlp_endpoint).or(otel_endpoint);
        let endpoint = endpoint.filter(|endpoint| !endpoint.is_empty());
        let otlp = endpoint.map(|endpoint| {
            let headers = self.otlp_headers_file.as_deref().map(headers).transpose()?.unwrap_or_default();
            let ca = self.otlp_ca_file.as_deref();
            let ca =
                ca.map(|path| std::fs::read(path).map_err(|error| unreadable(path, error))).transpose()?;
            let service_name = self.service_name.or(otel_service_name);
            let service_name = service_name.unwrap_or_else(|| SERVICE_NAME.to_owned());
            Ok(Otlp { endpoint: address(endpoint)?, headers, ca, service_name })
        });
        let otlp = otlp.transpose()?;
        let sampling = if otlp.is_some() { Sampling::share(share) } else { Sampling::default() };
        let decisions = decisions.map(DecisionsFile::read).transpose()?;
        Ok(TelemetrySettings { otlp, sampling, decisions })
    }
}

impl DecisionsFile {
    fn read(self) -> Result<DecisionSettings, ConfigError> {
        let per_second = self.denials_per_second.unwrap_or(DENIALS_PER_SECOND);
        if !(1..=100_000).contains(&per_second) {
            let problem = "must be 1 to 100000; to write down no denial set denials = 0";
            return Err(invalid("decision_log.denials_per_second", &per_second.to_string(), problem));
        }
        Ok(DecisionSettings {
            denials: ratio("decision_log.denials", self.denials.unwrap_or(1.0))?,
            denials_per_second: per_second,
            allowed: ratio("decision_log.allowed", self.allowed.unwrap_or(0.0))?,
            narrowing_changes: self.narrowing_changes.unwrap_or(true),
            place: self.file.map_or(Place::Log, Place::File),
        })
    }
}

fn ratio(setting: &'static str, value: f64) -> Result<f64, ConfigError> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(invalid(setting, &value.to_string(), "must be 0 to 1, such as 0.01 for one in a hundred"))
    }
}

/// An address with nothing in it but scheme, host and port. What else it may hold, such as a password, is not shown.
fn address(endpoint: String) -> Result<String, ConfigError> {
    let uri: Option<http::Uri> = endpoint.parse().ok();
    let good = uri.is_some_and(|uri| {
        let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        matches!(uri.scheme_str(), Some("http" | "https"))
            && !authority.is_empty()
            && !authority.contains('@')
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
    });
    if good {
        Ok(endpoint)
    } else {
        let problem =
            "must be http://host:port or https://host:port of a collector that takes OTLP over gRPC";
        Err(invalid("telemetry.otlp_endpoint", "(not shown)", problem))
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> ConfigError {
    ConfigError::Unreadable { path: path.display().to_string(), source }
}

/// Reads headers, one a line. Empty lines, and those that begin with `#`, are nothing.
fn headers(path: &Path) -> Result<Vec<(String, Hidden)>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| unreadable(path, source))?;
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            header(line).ok_or_else(|| {
                let problem = format!("has a line {number} that is not 'name: value' in visible ASCII");
                invalid("telemetry.otlp_headers_file", &path.display().to_string(), problem)
            })
        })
        .collect()
}

fn header(line: &str) -> Option<(String, Hidden)> {
    let (name, value) = line.split_once(':')?;
    let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
    let name_is_good = http::HeaderName::from_bytes(name.as_bytes()).is_ok() && !name.ends_with("-bin");
    let visible = value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    let value_is_good = (1..=MAX_HEADER).contains(&value.len()) && visible;
    (name_is_good && value_is_good).then(|| (name, Hidden(value.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, args: &TelemetryArgs) -> Result<TelemetrySettings, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        file.read(None, args).map_err(|error| error.to_string())
    }

    fn decisions(text: &str) -> Result<DecisionSettings, String> {
        let file: DecisionsFile = toml::from_str(text).map_err(|error| error.to_string())?;
        file.read().map_err(|error| error.to_string())
    }

    fn endpoint(text: &str, flag: Option<&str>, otel: Option<&str>) -> Option<String> {
        let args = TelemetryArgs {
            otlp_endpoint: flag.map(str::to_owned),
            otel_endpoint: otel.map(str::to_owned),
            otel_service_name: None,
        };
        read(text, &args).unwrap().otlp.map(|otlp| otlp.endpoint)
    }

    #[test]
    fn our_own_setting_beats_the_one_that_all_programs_share() {
        let file = "otlp_endpoint = 'http://file:4317'";
        assert_eq!(endpoint(file, Some("http://flag:1"), Some("http://all:1")).unwrap(), "http://flag:1");
        assert_eq!(endpoint(file, None, Some("http://all:1")).unwrap(), "http://file:4317");
        assert_eq!(endpoint("", None, Some("http://all:1")).unwrap(), "http://all:1");
        assert_eq!(endpoint("sample_ratio = 1.0", None, None), None);
    }

    #[test]
    fn nothing_is_recorded_without_a_collector() {
        let settings = read("sample_ratio = 1.0", &TelemetryArgs::default()).unwrap();
        assert_eq!(settings.sampling, Sampling::default());
    }

    #[test]
    fn wrong_values_say_which_and_what_would_be_right() {
        for (text, said) in [
            ("sample_ratio = 1.5", "0 to 1"),
            ("sample_ratio = -0.1", "telemetry.sample_ratio"),
            ("otlp_endpoint = 'collector:4317'", "http://host:port"),
            ("otlp_endpoint = 'http://u:sesame@h:1'", "telemetry.otlp_endpoint"),
            ("otlp_endpoint = 'http://h:1/v1/traces'", "over gRPC"),
            ("endpoint = 'http://h:1'", "endpoint"),
        ] {
            let error = read(text, &TelemetryArgs::default()).unwrap_err();
            assert!(error.contains(said) && !error.contains("sesame"), "{text}: {error}");
        }
        for (text, said) in [
            ("denials = 2.0", "decision_log.denials"),
            ("denials_per_second = 0", "denials = 0"),
            ("allow = 1.0", "allow"),
        ] {
            let error = decisions(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn headers_come_from_a_file_and_are_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("headers");
        std::fs::write(&path, "# the collector's\nAuthorization: Bearer sesame\n\nx-org: 1\n").unwrap();
        let text = format!("otlp_endpoint = 'http://h:1'\notlp_headers_file = '{}'", path.display());
        let settings = read(&text, &TelemetryArgs::default()).unwrap();
        assert!(!format!("{settings:?}").contains("sesame"));
        let headers = settings.otlp.unwrap().headers;
        let headers: Vec<_> = headers.iter().map(|(name, value)| (&**name, value.reveal())).collect();
        assert_eq!(headers, [("authorization", "Bearer sesame"), ("x-org", "1")]);
        std::fs::write(&path, "Bearer sesame").unwrap();
        let error = read(&text, &TelemetryArgs::default()).unwrap_err();
        assert!(error.contains("line 1") && !error.contains("sesame"), "{error}");
    }

    #[test]
    fn an_empty_table_writes_down_denials_and_what_is_taken_away() {
        let settings = decisions("").unwrap();
        assert_eq!((settings.denials, settings.allowed, settings.narrowing_changes), (1.0, 0.0, true));
        assert!(matches!(settings.place, Place::Log));
    }
}
