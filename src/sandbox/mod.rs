//! A whole cluster on one machine, for trying out, tests and benchmarks.
