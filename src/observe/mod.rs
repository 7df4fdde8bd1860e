//! Metrics, status, progress.
