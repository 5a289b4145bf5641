//! A server under load, measured in rounds.

use std::{sync::Arc, time::Duration};

use super::{
    child_process::{self, ChildProcess},
    load_generator::LoadGenerator,
    report::{RoundResult, ServerMeasurement},
};
use crate::cli::error::CliError;

/// A server under load.
pub(super) struct LoadSubject {
    pub(super) measurement: ServerMeasurement,
    pub(super) load: LoadGenerator,
    pub(super) server: Option<Arc<ChildProcess>>,
}

impl LoadSubject {
    pub(super) async fn run_round(&mut self, duration: Duration) -> Result<RoundResult, CliError> {
        let server = || self.server.as_ref().map(|server| server.cpu_time());
        let (before, own) = (server(), child_process::own_cpu_time());
        let tally = self.load.run_round(duration).await?;
        let server = server().zip(before).map(|(after, before)| after.saturating_sub(before));
        Ok(RoundResult {
            tally,
            server_cpu: server,
            client_cpu: child_process::own_cpu_time().saturating_sub(own),
        })
    }

    /// The same server in an open loop.
    pub(super) fn with_rate(&self, rate: f64, spins: bool) -> LoadSubject {
        let measured = ServerMeasurement {
            name: self.measurement.name.clone(),
            items_per_answer: 1,
            rounds: Vec::new(),
        };
        LoadSubject {
            measurement: measured,
            load: self.load.with_rate(rate, spins),
            server: self.server.clone(),
        }
    }
}
