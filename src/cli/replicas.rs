//! `keyward replicas`: lists and manages the server processes that share one PostgreSQL database.
//!
//! It opens the database itself, like `root-key`, so that it works when servers do not answer.

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
    /// Show the replicas of the database, the revision that each has acknowledged, and the lease
    List {
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Declare a replica dead, so that no change waits for it. If it still runs, it may accept revoked keys until its
    /// lease runs out, so verify first that the process is gone
    AttestDead {
        /// The replica's name, or its id
        replica: String,
        /// Confirms that you verified that the process is gone
        #[arg(long, required = true)]
        seen_gone: bool,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Accept that the database lost changes (a restored backup, or a standby that lacked some). Replicas with later
    /// changes repeat the revocations that they know, and continue from the database's state
    AcceptRegression {
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Show or change the lease: how long replicas answer without contact to the database. A shorter lease applies after
    /// the longer ones have run out
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

pub(super) fn run(command: &ReplicasCommand) -> ExitCode {
    to_exit_code(run_on_database(command))
}

fn run_on_database(command: &ReplicasCommand) -> anyhow::Result<()> {
    let settings = ServerSettings::load_for_database(command.database_args())?;
    if let ReplicasCommand::AcceptRegression { yes, .. } = command {
        let shown = settings.database.redacted();
        let question =
            format!("Permanently accept that {shown} lost changes? Changes that no replica has stay lost.");
        Console::with_stdio().confirm(&question, *yes)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let admin = ReplicaAdmin::open(&settings).await?;
        let text = run_command(command, &admin).await;
        admin.close().await;
        print_escaped(&text?)?;
        Ok(())
    })
}

async fn run_command(command: &ReplicasCommand, admin: &ReplicaAdmin) -> anyhow::Result<String> {
    Ok(match command {
        ReplicasCommand::List { .. } => render_replicas(&admin.cluster_status().await?),
        ReplicasCommand::AttestDead { replica, .. } => {
            let gone = admin.attest_dead(replica).await?;
            format!("Changes no longer wait for {} ({}).\n", escape_terminal(&gone.name), gone.id)
        }
        ReplicasCommand::AcceptRegression { .. } => {
            let epoch = admin.accept_regression().await?;
            format!("Accepted: epoch {epoch}. Replicas with later changes continue within seconds.\n")
        }
        ReplicasCommand::Lease { lease: None, .. } => {
            let (lease, longest) = admin.cluster_status().await?.leases;
            format!("{}; no replica holds one longer than {}.\n", format_lease(lease), format_lease(longest))
        }
        ReplicasCommand::Lease { lease: Some(lease), .. } => {
            admin.set_lease(*lease).await?;
            format!("The lease is {}.\n", format_lease(*lease))
        }
    })
}

fn render_replicas(status: &ClusterStatus) -> String {
    let mut table = ListTable::new(&["NAME", "ID", "ACKNOWLEDGED", "LAST SEEN", "SILENT FOR"], false);
    for replica in &status.replicas {
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
    let (lease, longest) = status.leases;
    let warning = if status.is_complete {
        ""
    } else {
        "The database may have lost rows: restricting changes wait for every lease to run out.\n"
    };
    let sync = if status.sync_replicated { "a" } else { "no" };
    format!(
        "{table}\nNewest revision {}; lease {}, no replica holds one longer than {}; commits wait for {sync} synchronous \
         standby.\n{warning}",
        status.head,
        format_lease(lease),
        format_lease(longest),
    )
}

pub(super) fn format_instant(at: Timestamp) -> String {
    let micros = at.as_micros();
    let nanos = i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0);
    value_format::format_rfc3339(&prost_types::Timestamp { seconds: micros.div_euclid(1_000_000), nanos })
}
