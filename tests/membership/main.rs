//! The membership core under every order of crashes, partitions, lost answers, suspicions, recoveries and promotions, as far as a budget
//! goes: two nodes and optionally a third. The functions are the program's own; the properties are the invariants I1 to I12, and
//! every known-bad variant has to be caught.
//!
//! `MODEL_DEEP=1 MODEL_STATES=20000000 cargo test --release --test membership` looks further than CI does.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod model;
mod reign;
mod simulation;
mod steps;
mod transactions;
mod world;
