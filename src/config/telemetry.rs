//! Validates the tables `[telemetry]` and `[decision_log]`: the export of spans, sampling, and the decision log.

use std::{fmt, path::Path};

use crate::{
    decision_log::{DecisionLogSettings, DecisionLogTarget},
    trace::SamplingPolicy,
    transport::tls,
};

use super::{
    error::{InvalidSetting, invalid_redacted_setting, invalid_setting},
    problems::ProblemCollector,
    raw::{DEFAULT_DENIALS_PER_SECOND, RawDecisionLogSettings, RawTelemetrySettings},
    server::flags::TelemetryArgs,
};

const DEFAULT_SERVICE_NAME: &str = "keyward";
/// The maximum length of a header value in bytes.
const MAX_HEADER_VALUE_LEN: usize = 4096;

/// A text that is never logged or shown.
#[derive(Clone)]
pub struct SecretString(String);

impl SecretString {
    /// The text, for the request to the collector only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretString")
    }
}

/// The collector that receives spans over OTLP.
#[derive(Clone, Debug)]
pub struct OtlpSettings {
    /// The address: `http://host:port` or `https://host:port`.
    pub endpoint: String,
    /// Headers of every request, with lower-case names.
    pub headers: Vec<(String, SecretString)>,
    /// The authorities of the collector's certificate as PEM; None = the public ones.
    pub ca_pem: Option<Vec<u8>>,
    /// The name of this program in traces.
    pub service_name: String,
}

/// The validated settings of traces and the decision log.
#[derive(Clone, Debug, Default)]
pub struct TelemetrySettings {
    /// The collector; None = no span is created.
    pub otlp: Option<OtlpSettings>,
    /// Which calls are traced without a decision of their caller.
    pub sampling: SamplingPolicy,
    /// Which decisions are logged; None = none.
    pub decision_log: Option<DecisionLogSettings>,
}

impl RawTelemetrySettings {
    /// Removes the files that only a server needs.
    pub(super) fn ignore_server_files(&mut self) {
        self.otlp_headers_file = None;
        self.otlp_ca_file = None;
    }

    /// Validates the settings. The standard variables of OpenTelemetry apply if Keyward's own are not set.
    pub(super) fn validate(
        self,
        decisions: Option<RawDecisionLogSettings>,
        args: &TelemetryArgs,
        problems: &mut ProblemCollector<'_>,
    ) -> TelemetrySettings {
        let share =
            problems.ok_or_add(validate_ratio("telemetry.sample_ratio", self.sample_ratio.unwrap_or(0.0)));
        let present = |text: &String| !text.is_empty();
        let common = args.otel_endpoint.clone().filter(present);
        let is_common = self.otlp_endpoint.is_none();
        let endpoint = self.otlp_endpoint.filter(present).or(common.filter(|_| is_common));
        let service_name = self.service_name.or(args.otel_service_name.clone().filter(present));
        let otlp = endpoint.and_then(|endpoint| {
            if let Err(problem) = check_collector_address(&endpoint) {
                match is_common {
                    true => problems.add_variable("OTEL_EXPORTER_OTLP_ENDPOINT", problem),
                    false => problems.add(invalid_redacted_setting("telemetry.otlp_endpoint", problem)),
                }
            }
            let headers =
                self.otlp_headers_file.as_deref().map(read_headers_file).unwrap_or_else(|| Ok(Vec::new()));
            let ca = self.otlp_ca_file.as_deref().map(read_ca_file).transpose();
            let (headers, ca) = (problems.ok_or_add(headers), problems.ok_or_add(ca));
            let service_name = service_name.unwrap_or_else(|| DEFAULT_SERVICE_NAME.to_owned());
            Some(OtlpSettings { endpoint, headers: headers?, ca_pem: ca?, service_name })
        });
        let sampling = match share {
            Some(share) if otlp.is_some() => SamplingPolicy::with_ratio(share),
            _ => SamplingPolicy::default(),
        };
        TelemetrySettings {
            otlp,
            sampling,
            decision_log: decisions.map(|decisions| decisions.validate(problems)),
        }
    }
}

impl RawDecisionLogSettings {
    fn validate(self, problems: &mut ProblemCollector<'_>) -> DecisionLogSettings {
        let per_second = self.denials_per_second.unwrap_or(DEFAULT_DENIALS_PER_SECOND);
        if !(1..=100_000).contains(&per_second) {
            let problem = "must be 1 to 100000; to log no denial set denials = 0";
            problems.add(invalid_setting(
                "decision_log.denials_per_second",
                &per_second.to_string(),
                problem,
            ));
        }
        let mut share = |setting, value: Option<f64>, usual: f64| {
            problems.ok_or_add(validate_ratio(setting, value.unwrap_or(usual))).unwrap_or(usual)
        };
        DecisionLogSettings {
            denial_ratio: share("decision_log.denials", self.denials, 1.0),
            denials_per_second: per_second,
            allowed_ratio: share("decision_log.allowed", self.allowed, 0.0),
            log_restricting_changes: self.narrowing_changes.unwrap_or(true),
            target: self.file.map_or(DecisionLogTarget::Log, DecisionLogTarget::File),
        }
    }
}

fn validate_ratio(setting: &'static str, value: f64) -> Result<f64, InvalidSetting> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(invalid_setting(setting, &value.to_string(), "must be 0 to 1, such as 0.01 for one in a hundred"))
    }
}

/// Accepts only a scheme, a host and a port. The message does not show the address, which may hold a password.
fn check_collector_address(endpoint: &str) -> Result<(), &'static str> {
    let uri: Option<http::Uri> = endpoint.parse().ok();
    let good = uri.is_some_and(|uri| {
        let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        matches!(uri.scheme_str(), Some("http" | "https"))
            && !authority.is_empty()
            && !authority.contains('@')
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
    });
    // The URI parser silently drops a fragment.
    if good && !endpoint.contains('#') {
        Ok(())
    } else {
        Err(
            "must be http://host:port or https://host:port of a collector for OTLP over gRPC, without a user, a \
             password or a path",
        )
    }
}

/// Reads the certificates of a PEM file.
fn read_ca_file(path: &Path) -> Result<Vec<u8>, InvalidSetting> {
    let shown = path.display().to_string();
    let wrong = |problem: String| invalid_setting("telemetry.otlp_ca_file", &shown, problem);
    let pem = std::fs::read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    tls::check_authorities(path, &pem).map_err(|error| wrong(format!("cannot be used: {error}")))?;
    Ok(pem)
}

/// Reads headers, one per line. Empty lines and lines that begin with `#` are ignored.
fn read_headers_file(path: &Path) -> Result<Vec<(String, SecretString)>, InvalidSetting> {
    let shown = path.display().to_string();
    let wrong = |problem: String| invalid_setting("telemetry.otlp_headers_file", &shown, problem);
    let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            let problem = || format!("has a line {number} that is not 'name: value' in visible ASCII");
            parse_header(line).ok_or_else(|| wrong(problem()))
        })
        .collect()
}

fn parse_header(line: &str) -> Option<(String, SecretString)> {
    let (name, value) = line.split_once(':')?;
    let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
    let name_is_good = http::HeaderName::from_bytes(name.as_bytes()).is_ok() && !name.ends_with("-bin");
    let visible = value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    let value_is_good = (1..=MAX_HEADER_VALUE_LEN).contains(&value.len()) && visible;
    (name_is_good && value_is_good).then(|| (name, SecretString(value.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, args: &TelemetryArgs) -> Result<TelemetrySettings, String> {
        let file: RawTelemetrySettings = toml::from_str(text).map_err(|error| error.to_string())?;
        let read = ProblemCollector::collect(None, |problems| Some(file.validate(None, args, problems)));
        read.map_err(|error| error.to_string())
    }

    fn decisions(text: &str) -> Result<DecisionLogSettings, String> {
        let file: RawDecisionLogSettings = toml::from_str(text).map_err(|error| error.to_string())?;
        ProblemCollector::collect(None, |problems| Some(file.validate(problems)))
            .map_err(|error| error.to_string())
    }

    fn endpoint(text: &str, otel: Option<&str>) -> Option<String> {
        let args = TelemetryArgs { otel_endpoint: otel.map(str::to_owned), ..TelemetryArgs::default() };
        read(text, &args).unwrap().otlp.map(|otlp| otlp.endpoint)
    }

    #[test]
    fn our_own_setting_beats_the_one_that_all_programs_share() {
        let file = "otlp_endpoint = 'http://file:4317'";
        assert_eq!(endpoint(file, Some("http://all:1")).unwrap(), "http://file:4317");
        assert_eq!(endpoint("", Some("http://all:1")).unwrap(), "http://all:1");
        assert_eq!(endpoint("sample_ratio = 1.0", None), None);
    }

    #[test]
    fn nothing_is_recorded_without_a_collector() {
        let settings = read("sample_ratio = 1.0", &TelemetryArgs::default()).unwrap();
        assert_eq!(settings.sampling, SamplingPolicy::default());
    }

    #[test]
    fn wrong_values_say_which_and_what_would_be_right() {
        for (text, said) in [
            ("sample_ratio = 1.5", "0 to 1"),
            ("sample_ratio = -0.1", "telemetry.sample_ratio"),
            ("otlp_endpoint = 'collector:4317'", "http://host:port"),
            ("otlp_endpoint = 'http://u:sesame@h:1'", "telemetry.otlp_endpoint"),
            ("otlp_endpoint = 'http://h:1/v1/traces'", "over gRPC"),
            ("otlp_endpoint = 'http://h:1#sesame'", "http://host:port"),
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
        assert_eq!(
            (settings.denial_ratio, settings.allowed_ratio, settings.log_restricting_changes),
            (1.0, 0.0, true)
        );
        assert!(matches!(settings.target, DecisionLogTarget::Log));
    }
}
