//! The disk of the proxy's `state_dir` is full: a node is recovered under load and no client notices; only a transaction whose own
//! effects need a file is refused, with a sentence, and works when there is room.
//!
//! The disk is a tmpfs, which only root can mount.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;
#[path = "soak/disk.rs"]
mod disk;

use common::{load, pgtandem, text};
use disk::Disk;

const DISK_MIB: u32 = 64;
/// More than stays in memory.
const LARGE_BYTES: usize = 17 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_recovered_and_only_a_transaction_that_needs_the_disk_is_refused() {
    let cluster = common::Cluster::up(&[]);
    let down = pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().unwrap();
    assert!(down.status.success(), "{}", text(&down));
    let disk = match Disk::below(&cluster.layout.proxy_dir(), DISK_MIB) {
        Ok(disk) => disk,
        Err(why) => {
            eprintln!("{why}: not run");
            return;
        }
    };
    cluster.start_again();
    cluster.wait_well().await;
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table large (id int primary key, t text)").await.unwrap();
    let probe = load::start(&cluster).await;
    disk.fill();
    cluster.recover(1);
    load::wait_writes(&cluster, &probe, 100).await;

    let large = "x".repeat(LARGE_BYTES);
    let insert = "insert into large values (1, $1)";
    let refused = client.execute(insert, &[&large]).await.unwrap_err();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(refused.code().code(), "53400", "{refused:?}");
    let place = cluster.layout.proxy_dir().display().to_string();
    assert!(refused.message().contains(&place) && refused.message().contains("No space left"), "{refused:?}");
    assert_eq!(refused.hint(), Some("Make room in the proxy's state_dir."));
    disk.free();
    assert_eq!(client.execute(insert, &[&large]).await.unwrap(), 1);
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    drop(client);
    drop(disk);
}
