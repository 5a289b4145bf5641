//! `keyward replicas`: the processes that serve one PostgreSQL database. Like `root-key`, it needs the database at hand
//! and no server, since it is for when they do not answer.

use std::{process::ExitCode, time::Duration};

use clap::Subcommand;

use crate::{
    config::{
        duration,
        replicas::{format_lease, parse_lease},
        server::{DatabaseArgs, ServerSettings},
    },
    domain::{lease::LeaseDuration, time::Timestamp},
    server::replicas::{ClusterStatus, ReplicaAdmin},
};

use super::{
    console::{Console, print_escaped},
    serve::to_exit_code,
    table::{ListTable, escape_terminal, plain_cell},
    value_format,
};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum ReplicasCommand {
    /// Show who serves the database, what each has acknowledged, and the lease
    List {
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Say that a replica is dead, so that nobody waits for it. If it lives, it may allow what was revoked until its
    /// lease runs out: look first, at the process itself
    AttestDead {
        /// Its name or id
        replica: String,
        /// The process has been seen to be gone
        #[arg(long, required = true)]
        seen_gone: bool,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Accept that the database has lost changes (a restored backup, a standby that lacked some). Replicas that know
    /// more revoke again what they know to be revoked, and go on from what the database has
    AcceptRegression {
        /// Do not ask first
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Show or change how long replicas answer without news from the database. A shorter one is waited for
    Lease {
        /// strict (5s), default (60s), static (never runs out), or a duration
        #[arg(value_parser = parse_lease)]
        lease: Option<LeaseDuration>,
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

impl ReplicasCommand {
    fn database_args(&self) -> &DatabaseArgs {
        match self {
            ReplicasCommand::List { database }
            | ReplicasCommand::AttestDead { database, .. }
            | ReplicasCommand::AcceptRegression { database, .. }
            | ReplicasCommand::Lease { database, .. } => database,
        }
    }
}

/// Runs the command.
pub(super) fn run(command: &ReplicasCommand) -> ExitCode {
    to_exit_code(run_on_database(command))
}

fn run_on_database(command: &ReplicasCommand) -> anyhow::Result<()> {
    let settings = ServerSettings::load_for_database(command.database_args())?;
    if let ReplicasCommand::AcceptRegression { yes, .. } = command {
        let shown = settings.database.redacted();
        let question =
            format!("Accept for ever that {shown} has lost changes? What nobody remembers stays lost.");
        Console::with_stdio().confirm(&question, *yes)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let operators = ReplicaAdmin::open(&settings).await?;
        let said = run_command(command, &operators).await;
        operators.close().await;
        print_escaped(&said?)?;
        Ok(())
    })
}

async fn run_command(command: &ReplicasCommand, operators: &ReplicaAdmin) -> anyhow::Result<String> {
    Ok(match command {
        ReplicasCommand::List { .. } => render_replicas(&operators.cluster_status().await?),
        ReplicasCommand::AttestDead { replica, .. } => {
            let gone = operators.attest_dead(replica).await?;
            format!("{} ({}) is no longer waited for.\n", escape_terminal(&gone.name), gone.id)
        }
        ReplicasCommand::AcceptRegression { .. } => {
            let epoch = operators.accept_regression().await?;
            format!("Accepted: epoch {epoch}. Replicas that know more go on within seconds.\n")
        }
        ReplicasCommand::Lease { lease: None, .. } => {
            let (lease, longest) = operators.cluster_status().await?.leases;
            format!("{}; nobody holds one longer than {}.\n", format_lease(lease), format_lease(longest))
        }
        ReplicasCommand::Lease { lease: Some(lease), .. } => {
            operators.set_lease(*lease).await?;
            format!("The lease is {}.\n", format_lease(*lease))
        }
    })
}

fn render_replicas(fleet: &ClusterStatus) -> String {
    let mut table = ListTable::new(&["NAME", "ID", "ACKNOWLEDGED", "LAST SEEN", "SILENT FOR"], false);
    for replica in &fleet.replicas {
        let applied = replica
            .acknowledged_revision
            .map_or_else(|| "starting".to_owned(), |revision| revision.to_string());
        let silent =
            Duration::from_millis(u64::try_from(replica.since_last_renewal.as_millis()).unwrap_or(u64::MAX));
        table.add_row([
            plain_cell(replica.name.as_str()),
            plain_cell(replica.id.to_string()),
            plain_cell(applied),
            plain_cell(format_instant(replica.last_seen)),
            plain_cell(duration::format_duration(silent)),
        ]);
    }
    let table = table.render("No replica serves the database.");
    let (lease, longest) = fleet.leases;
    let whole = if fleet.is_complete {
        ""
    } else {
        "The database may have lost rows: narrowing changes wait for every lease to run out.\n"
    };
    let sync = if fleet.sync_replicated { "a" } else { "no" };
    format!(
        "{table}\nNewest revision {}; lease {}, nobody holds one longer than {}; commits wait for {sync} synchronous \
         standby.\n{whole}",
        fleet.head,
        format_lease(lease),
        format_lease(longest),
    )
}

pub(super) fn format_instant(at: Timestamp) -> String {
    let micros = at.as_micros();
    let nanos = i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0);
    value_format::format_rfc3339(&prost_types::Timestamp { seconds: micros.div_euclid(1_000_000), nanos })
}
