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

pub use counters::ShardedCounters;
pub use histogram::{HistogramSnapshot, ShardedHistograms};
pub use per_thread::PerThread;
pub use prometheus_text::{MetricKind, MetricsText};
