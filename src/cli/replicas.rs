//! `keyward replicas`: the processes that serve one PostgreSQL database. Like `root-key`, it needs the database at hand
//! and no server, since it is for when they do not answer.

use std::{process::ExitCode, time::Duration};

use clap::Subcommand;

use crate::{
    config::{
        duration,
        replicas::{lease_text, parse_lease},
        server::{DatabaseArgs, Settings},
    },
    domain::{lease::Lease, time::Timestamp},
    server::replicas::{Fleetwide, Operators},
};

use super::{
    console::{Console, say},
    serve::exit,
    table::{Rows, clean, text},
    values,
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
        lease: Option<Lease>,
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

impl ReplicasCommand {
    fn database(&self) -> &DatabaseArgs {
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
    exit(run_on_database(command))
}

fn run_on_database(command: &ReplicasCommand) -> anyhow::Result<()> {
    let settings = Settings::load_database(command.database())?;
    if let ReplicasCommand::AcceptRegression { yes, .. } = command {
        let shown = settings.database.shown();
        let question =
            format!("Accept for ever that {shown} has lost changes? What nobody remembers stays lost.");
        Console::system().confirm(&question, *yes)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let operators = Operators::open(&settings).await?;
        let said = told(command, &operators).await;
        operators.close().await;
        say(&said?)?;
        Ok(())
    })
}

async fn told(command: &ReplicasCommand, operators: &Operators) -> anyhow::Result<String> {
    Ok(match command {
        ReplicasCommand::List { .. } => list(&operators.list().await?),
        ReplicasCommand::AttestDead { replica, .. } => {
            let gone = operators.attest_dead(replica).await?;
            format!("{} ({}) is no longer waited for.\n", clean(&gone.name), gone.id)
        }
        ReplicasCommand::AcceptRegression { .. } => {
            let epoch = operators.accept_regression().await?;
            format!("Accepted: epoch {epoch}. Replicas that know more go on within seconds.\n")
        }
        ReplicasCommand::Lease { lease: None, .. } => {
            let (lease, longest) = operators.list().await?.leases;
            format!("{}; nobody holds one longer than {}.\n", lease_text(lease), lease_text(longest))
        }
        ReplicasCommand::Lease { lease: Some(lease), .. } => {
            operators.set_lease(*lease).await?;
            format!("The lease is {}.\n", lease_text(*lease))
        }
    })
}

fn list(fleet: &Fleetwide) -> String {
    let mut table = Rows::new(&["NAME", "ID", "ACKNOWLEDGED", "LAST SEEN", "SILENT FOR"], false);
    for replica in &fleet.replicas {
        let applied = replica.applied.map_or_else(|| "starting".to_owned(), |revision| revision.to_string());
        let silent = Duration::from_millis(u64::try_from(replica.silent_for.as_millis()).unwrap_or(u64::MAX));
        table.row([
            text(replica.name.as_str()),
            text(replica.id.to_string()),
            text(applied),
            text(instant(replica.last_seen)),
            text(duration::format(silent)),
        ]);
    }
    let table = table.show("No replica serves the database.");
    let (lease, longest) = fleet.leases;
    let whole = if fleet.is_whole {
        ""
    } else {
        "The database may have lost rows: narrowing changes wait for every lease to run out.\n"
    };
    let sync = if fleet.sync_replicated { "a" } else { "no" };
    format!(
        "{table}\nNewest revision {}; lease {}, nobody holds one longer than {}; commits wait for {sync} synchronous \
         standby.\n{whole}",
        fleet.head,
        lease_text(lease),
        lease_text(longest),
    )
}

pub(super) fn instant(at: Timestamp) -> String {
    let micros = at.as_micros();
    let nanos = i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0);
    values::rfc3339(&prost_types::Timestamp { seconds: micros.div_euclid(1_000_000), nanos })
}
