//! The recovery state machine: pure core, runner.
