//! What Checks leave behind: last uses, counts, what is spent.

use std::time::Duration;

use keyward::{
    domain::{
        limit::{PendingQuotaUnits, QuotaUsage},
        name::KeyId,
        policy_decision::Reason,
    },
    engine::usage::{FlushMode, UsageRecorder, buffer::UsageEvent},
    store::{SecretUse, UsageBatch, UsageCount, UsageHour, WriteOutcome},
};

use super::*;

pub(super) async fn the_latest_use_of_a_secret_is_kept_and_unknown_ones_are_skipped(store: SharedStore) {
    with_accounts(&store).await;
    let mut made = commit_key(&store, create(&key())).await;
    made.rotate(new_digest(), String::new(), Duration::from_secs(60), timestamp(0));
    let made = commit_key(&store, update(&made)).await;
    let used = |version, seconds| SecretUse { key_id: made.id, version, at: timestamp(seconds) };
    let stranger = SecretUse { key_id: new_key_id(timestamp(0)), version: 1, at: timestamp(1) };
    write_used_secrets(&store, &[used(1, 5), stranger, used(3, 9), used(2, 7)]).await.unwrap();
    write_used_secrets(&store, &[used(1, 4), used(2, 8)]).await.unwrap();
    write_used_secrets(&store, &[]).await.unwrap();
    let stored = store.get_key(made.id).await.unwrap().unwrap();
    let mut last_used = stored.last_used;
    last_used.sort();
    assert_eq!(last_used, [(1, timestamp(5)), (2, timestamp(8))]);
    assert_eq!(stored.key, made, "a use is no change");
    assert_eq!(store.log_head().await.unwrap().revision, made.revision);
}

pub(super) async fn a_use_outlives_a_change_of_its_key(store: SharedStore) {
    with_accounts(&store).await;
    let made = commit_key(&store, create(&key())).await;
    write_used_secrets(&store, &[SecretUse { key_id: made.id, version: 1, at: timestamp(3) }]).await.unwrap();
    let made = commit_key(&store, update(&made)).await;
    assert_eq!(store.get_key(made.id).await.unwrap().unwrap().last_used, [(1, timestamp(3))]);
}

fn count(key_id: KeyId, hour: i64, reason: Reason, count: u64) -> UsageCount {
    UsageCount { key_id, hour: UsageHour(hour), reason, count }
}

async fn note_counts(store: &SharedStore, counts: &[UsageCount]) {
    store.record_usage(&UsageBatch { counts: counts.to_vec(), ..UsageBatch::default() }).await.unwrap();
}

pub(super) async fn counts_of_an_hour_add_up(store: SharedStore) {
    let (one, other) = (new_key_id(timestamp(0)), new_key_id(timestamp(0)));
    note_counts(
        &store,
        &[
            count(one, 5, Reason::Ok, 3),
            count(other, 5, Reason::Ok, 100),
            count(one, 5, Reason::MissingScope, 1),
            count(one, 5, Reason::Ok, 4),
        ],
    )
    .await;
    note_counts(&store, &[count(one, 5, Reason::Ok, 10), count(one, 6, Reason::Ok, 1)]).await;
    let mut found = store.list_usage(one, UsageHour(5), UsageHour(6)).await.unwrap();
    found.sort_by_key(|count| count.count);
    assert_eq!(found, [count(one, 5, Reason::MissingScope, 1), count(one, 5, Reason::Ok, 17)]);
}

pub(super) async fn counts_come_in_the_order_of_hours_within_their_range(store: SharedStore) {
    let id = new_key_id(timestamp(0));
    let hours = [7, -3, 9, 8, 12];
    let counts: Vec<_> = hours.iter().map(|hour| count(id, *hour, Reason::Ok, 1)).collect();
    note_counts(&store, &counts).await;
    let found = store.list_usage(id, UsageHour(-3), UsageHour(9)).await.unwrap();
    let found: Vec<_> = found.into_iter().map(|count| count.hour.0).collect();
    assert_eq!(found, [-3, 7, 8], "from the first hour on, and before the last");
}

pub(super) async fn old_counts_are_dropped_and_newer_ones_stay(store: SharedStore) {
    let id = new_key_id(timestamp(0));
    note_counts(&store, &[count(id, 4, Reason::Ok, 1), count(id, 5, Reason::Ok, 1)]).await;
    store.prune_usage(UsageHour(5)).await.unwrap();
    let found = store.list_usage(id, UsageHour(0), UsageHour(100)).await.unwrap();
    assert_eq!(found, [count(id, 5, Reason::Ok, 1)]);
}

/// Units of a period of so many seconds.
fn drawn(start: i64, length: i64, units: u64) -> PendingQuotaUnits {
    PendingQuotaUnits { period_start: timestamp(start), period_end: Some(timestamp(start + length)), units }
}

async fn draw(store: &SharedStore, spent: &[(KeyId, PendingQuotaUnits)]) -> Vec<(KeyId, QuotaUsage)> {
    let batch = UsageBatch { quota_units: spent.to_vec(), ..UsageBatch::default() };
    let mut told = store.record_usage(&batch).await.unwrap();
    told.sort_by_key(|(key, _)| *key);
    told
}

pub(super) async fn units_of_a_period_add_up_whoever_writes_them(store: SharedStore) {
    let ids = [new_key_id(timestamp(0)), new_key_id(timestamp(0)), new_key_id(timestamp(0))];
    let writers = (0..4).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for turn in 0..10 {
                let mut units = ids.map(|id| (id, drawn(0, 60, 1 + turn)));
                units.rotate_left(writer % 3);
                draw(&store, &units).await;
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    for id in ids {
        // Nothing more is spent: it only asks.
        let told = draw(&store, &[(id, drawn(0, 60, 0))]).await;
        assert_eq!(told, [(id, QuotaUsage { period_start: timestamp(0), used_units: 4 * 55 })]);
    }
}

pub(super) async fn what_all_have_spent_is_told_to_who_writes(store: SharedStore) {
    let (one, other) = (new_key_id(timestamp(0)), new_key_id(timestamp(0)));
    let total = |used| QuotaUsage { period_start: timestamp(0), used_units: used };
    assert_eq!(draw(&store, &[(one, drawn(0, 60, 3))]).await, [(one, total(3))]);
    assert_eq!(draw(&store, &[(other, drawn(0, 60, 1))]).await, [(other, total(1))]);
    let twice = [(one, drawn(0, 60, 4)), (one, drawn(0, 60, 5))];
    assert_eq!(draw(&store, &twice).await, [(one, total(12))]);
    assert_eq!(draw(&store, &[]).await, []);
    let credits =
        PendingQuotaUnits { period_start: timestamp(0), period_end: None, units: 1_000_000_000_000 };
    assert_eq!(draw(&store, &[(other, credits)]).await, [(other, total(1_000_000_000_001))]);
}

pub(super) async fn a_later_period_starts_afresh_and_one_that_is_over_changes_nothing(store: SharedStore) {
    let id = new_key_id(timestamp(0));
    let told = async |start, units| draw(&store, &[(id, drawn(start, 60, units))]).await[0].1;
    told(0, 5).await;
    assert_eq!(told(60, 2).await, QuotaUsage { period_start: timestamp(60), used_units: 2 });
    assert_eq!(
        told(0, 7).await,
        QuotaUsage { period_start: timestamp(60), used_units: 2 },
        "what counts now is told"
    );
    assert_eq!(told(60, 1).await, QuotaUsage { period_start: timestamp(60), used_units: 3 });
    assert_eq!(told(180, 4).await, QuotaUsage { period_start: timestamp(180), used_units: 4 });
}

pub(super) async fn a_quota_of_another_kind_of_period_starts_afresh(store: SharedStore) {
    let id = new_key_id(timestamp(0));
    draw(&store, &[(id, drawn(120, 60, 5))]).await;
    let hour = draw(&store, &[(id, drawn(0, 3600, 2))]).await;
    assert_eq!(
        hour,
        [(id, QuotaUsage { period_start: timestamp(0), used_units: 2 })],
        "the minute lies in the hour"
    );
    let minute = draw(&store, &[(id, drawn(180, 60, 1))]).await;
    assert_eq!(minute, [(id, QuotaUsage { period_start: timestamp(180), used_units: 1 })]);
    let credits =
        draw(&store, &[(id, PendingQuotaUnits { period_start: timestamp(0), period_end: None, units: 9 })])
            .await;
    assert_eq!(credits, [(id, QuotaUsage { period_start: timestamp(0), used_units: 9 })]);
}

/// Both change rows of the same secrets, in orders that could wait for each other for ever.
pub(super) async fn uses_are_noted_while_keys_change(store: SharedStore) {
    with_accounts(&store).await;
    let mut keys = Vec::new();
    for _ in 0..20 {
        keys.push(commit_key(&store, create(&key())).await);
    }
    let used: Vec<_> =
        keys.iter().map(|key| SecretUse { key_id: key.id, version: 1, at: timestamp(9) }).collect();
    let noting = store.clone();
    let notes = tokio::spawn(async move {
        for turn in 0..20 {
            let mut used = used.clone();
            used.rotate_left(turn);
            write_used_secrets(&noting, &used).await.unwrap();
        }
    });
    for turn in 1..=20usize {
        keys.rotate_right(turn);
        for key in &mut keys {
            key.rotate(new_digest(), String::new(), Duration::from_secs(50), timestamp(1));
        }
        let batch: Vec<_> = keys.iter().map(update).collect();
        let outcomes = store.commit(&batch).await.unwrap().outcomes;
        for (key, outcome) in keys.iter_mut().zip(outcomes) {
            let Ok(WriteOutcome::Applied(RecordChange::Key(made))) = outcome else { panic!("{outcome:?}") };
            *key = Arc::unwrap_or_clone(made);
        }
    }
    notes.await.unwrap();
    for key in keys {
        assert!(store.get_key(key.id).await.unwrap().unwrap().last_used.contains(&(1, timestamp(9))));
    }
}

pub(super) async fn a_flush_that_somebody_waits_for_hastens_a_gentle_one_and_each_check_counts_once(
    store: SharedStore,
) {
    const KEYS: usize = 3_000;
    let usage = Arc::new(UsageRecorder::default());
    let keys: Vec<_> = (0..KEYS).map(|_| new_key_id(timestamp(0))).collect();
    let note = |key, seconds| {
        usage.record(
            UsageEvent { key_id: key, at: timestamp(seconds), secret_version: 1, reason: Reason::Ok },
            None,
        )
    };
    keys.iter().for_each(|key| note(*key, 1));
    let gentle = usage.flush(&*store, FlushMode::Throttled);
    let urgent = async {
        keys.iter().for_each(|key| note(*key, 2));
        usage.flush(&*store, FlushMode::Immediate).await
    };
    let (gentle, urgent) = tokio::join!(gentle, urgent);
    gentle.and(urgent).unwrap();
    assert_eq!(usage.pending_keys(), 0);
    for key in [keys[0], keys[KEYS / 2], keys[KEYS - 1]] {
        let hour = UsageHour::from_timestamp(timestamp(1));
        let found = store.list_usage(key, hour, UsageHour(hour.0 + 1)).await.unwrap();
        assert_eq!(found, [count(key, hour.0, Reason::Ok, 2)]);
    }
}
