//! The catalogue of anomalies, a case each, named by its number: A order and snapshots, B evaluation, C definitions and objects. Every case
//! leaves identical servers; what is refused in it is refused with a reason. A5, A8, A9, C1, C7, C8 need a held message: tests/half_committed.rs; the crash
//! points are in tests/crash_points.rs.
//!
//! `CATALOGUE_NODES=3` plays them on three nodes, `CATALOGUE_CASE=a17` one of them (`make catalogue NODES=3 CASE=a17`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod definitions;
mod evaluation;
mod objects;
mod order;
mod races;
mod sequences;
mod stage;

use stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn group_a_order_and_snapshots() {
    let mut stage = Stage::new();
    order::play(&mut stage).await;
    races::play(&mut stage).await;
    stage.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn group_b_evaluation() {
    let mut stage = Stage::new();
    evaluation::play(&mut stage).await;
    sequences::play(&mut stage).await;
    stage.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn group_c_definitions_and_objects() {
    let mut stage = Stage::new();
    definitions::play(&mut stage).await;
    objects::play(&mut stage).await;
    stage.end();
}
