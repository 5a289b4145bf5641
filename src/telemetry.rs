//! Where the log goes: standard error, for people or for machines. Only commands that run a server set it up.

use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::server::LogFormat;

/// Sets up logging for the process.
///
/// # Errors
/// When the filter is malformed, or logging is set up already.
pub fn init(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("the log filter {filter:?} is not understood: {error}"))?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry.with(layer.with_ansi(ansi)).try_init()?;
        }
        LogFormat::Json => registry.with(layer.json()).try_init()?,
    }
    Ok(())
}
