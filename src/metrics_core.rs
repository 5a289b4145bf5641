//! Counters, histograms and the Prometheus text format for the metrics of every module.
//!
//! Which metrics there are, and their names, is not known here: see `metrics`.
//!
//! A counter of the hot path is kept once for each of a few threads, and a reader adds the shards up. Otherwise two cores
//! that count at once would pass one cache line to and fro.

mod counters;
mod histogram;
mod per_thread;
mod prometheus_text;

pub(crate) use counters::ShardedCounters;
pub(crate) use histogram::HistogramSnapshot;
pub(crate) use histogram::ShardedHistograms;
pub(crate) use per_thread::PerThread;
pub(crate) use prometheus_text::{MetricKind, MetricsText};
