//! The proxy or an agent ends as by kill -9 at each step of a commit and of each change of the member set (G1, G10, H7, H8 of the
//! catalogue), while clients write. Then whoever was killed is started again, a person types what `pgtandem status` asks for, and
//! every acknowledged write is on every member, none twice, nothing is left prepared, and the cluster is whole.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::writer::Writers;
use common::{Cluster, comes, text};
use pgtandem::agent::record::peek;
use pgtandem::crash::CrashPoint::{self, *};
use pgtandem::sandbox::{compare, control};

/// Clients that write at a time.
const WRITERS: i64 = 3;
/// How many commands a person types at most until all is well.
const TYPED_MAX: usize = 6;

/// What a person does about a step of the change of the member set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Occasion {
    /// PostgreSQL of node2 is killed; its agent answers.
    Lost,
    /// node2's host is lost.
    HostLost,
    /// node2 is filled anew, and is a member then.
    Recover,
    /// The same, and its host is lost at the step.
    RecoverHostLost,
    /// node2 is told that it joins, and does not answer.
    RecoverInVain,
    /// node2 was away, and comes back with what it missed.
    Return,
}

const SHRINKS: &[(Occasion, CrashPoint, &str)] = &[
    (Occasion::Lost, ShrinkBegun, "node2"),
    (Occasion::Lost, ShrinkTold, "node2"),
    (Occasion::Lost, ShrinkStored, "node0"),
    (Occasion::Lost, ShrinkStored, "node1"),
    (Occasion::HostLost, ShrinkLeaseOut, "node2"),
    (Occasion::Lost, ShrinkShown, "node2"),
    (Occasion::Lost, AgentStored, "node0"),
    (Occasion::Lost, AgentStored, "node1"),
    (Occasion::Lost, AgentStores, "node2"),
];

const GROWS: &[(Occasion, CrashPoint, &str)] = &[
    (Occasion::Recover, GrowReady, "node2"),
    (Occasion::Recover, GrowDrained, "node2"),
    (Occasion::Recover, GrowStored, "node0"),
    (Occasion::RecoverHostLost, GrowStored, "node1"),
    (Occasion::Recover, GrowStored, "node2"),
    (Occasion::Recover, GrowShown, "node2"),
    (Occasion::Recover, AgentJoined, "node2"),
    (Occasion::RecoverInVain, ShrinkStored, "node0"),
];

const RETURNS: &[(Occasion, CrashPoint, &str)] = &[
    (Occasion::Return, ReturnMarked, "node2"),
    (Occasion::Return, ReturnSettled, "node2"),
    (Occasion::Return, GrowStored, "node0"),
];

/// The command of a person, and where it ends, or lets its proxy end: it is typed again each time.
const DETACHES: &[(CrashPoint, &str)] = &[(DetachPromised, "node1"), (DetachStored, "node1"), (DetachStored, "node0")];
const SWITCHES: &[(CrashPoint, &str)] = &[(SwitchStored, "node1"), (SwitchStored, "node0")];
const PROMOTIONS: &[(CrashPoint, &str)] =
    &[(PromotePromised, "node1"), (PromotePromised, "node2"), (PromoteStored, "node2"), (PromoteStored, "node1")];

/// With two nodes: the leader of the moment is lost.
const TAKEOVERS: &[(CrashPoint, &str)] = &[(TakeoverStored, "node1"), (TakeoverTold, "node1")];

const REIGNS: &[(CrashPoint, &str)] = &[
    (ReignPromised, "node0"),
    (ReignPromised, "node1"),
    (ReignSettled, "node0"),
    (ReignSettled, "node1"),
    (ReignStored, "node0"),
    (ReignStored, "node1"),
    (AgentPromised, "node1"),
];

const COMMITS: &[(CrashPoint, bool)] = &[(CommitBegun, false), (CommitPrepared, false), (CommitDecided, true)];

#[test]
fn every_point_is_played() {
    let changes = [SHRINKS, GROWS, RETURNS].concat();
    let typed = DETACHES.iter().chain(SWITCHES).chain(PROMOTIONS);
    let played = changes.iter().map(|(_, point, _)| *point);
    let played = played.chain(TAKEOVERS.iter().chain(REIGNS).chain(typed).map(|(point, _)| *point));
    // The last one is that of a recovery in vain.
    let played: Vec<_> = played.chain(COMMITS.iter().map(|(point, _)| *point)).chain([AgentJoins]).collect();
    let missing: Vec<_> = CrashPoint::ALL.into_iter().filter(|point| !played.contains(point)).collect();
    assert_eq!(missing, []);
}

fn is_of_agent(point: CrashPoint) -> bool {
    matches!(point, AgentStores | AgentStored | AgentJoins | AgentJoined | AgentPromised)
}

fn index(node: &str) -> usize {
    node.strip_prefix("node").unwrap().parse().unwrap()
}

/// Types what `pgtandem status` asks for until it has nothing to say.
async fn do_what_status_says(cluster: &Cluster, what: &str) {
    let mut typed = Vec::new();
    let well = comes(async || cluster.status().0.contains("All is well") || asked(&cluster.status().0).is_some());
    assert!(well.await, "{what}: {}\n{}", cluster.status().0, cluster.logs());
    while typed.len() < TYPED_MAX {
        let status = cluster.status().0;
        if status.contains("All is well") {
            return;
        }
        match asked(&status) {
            Some(words) => {
                let arguments: Vec<&str> = words.iter().map(String::as_str).collect();
                let output = cluster.command(&arguments);
                eprintln!("    {}", words.join(" "));
                assert!(output.status.success(), "{what}: {words:?}: {}\n{}", text(&output), cluster.logs());
                typed.push(words);
            }
            None => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    }
    panic!("{what}: {typed:?} did not help: {}", cluster.status().0);
}

/// The first command that the status asks for, without what stands behind it.
fn asked(status: &str) -> Option<Vec<String>> {
    let lines = status.lines().filter_map(|line| line.trim().strip_prefix("next: pgtandem "));
    let command = lines.map(|line| line.split(['#', ';']).next().unwrap_or_default()).next()?;
    let mut words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    if words.first().is_some_and(|word| word == "recover") {
        words.push("--yes".to_owned());
    }
    Some(words)
}

/// Waits until the process that came by is gone.
async fn wait_killed(cluster: &Cluster, point: CrashPoint, of: &str) {
    cluster.wait_reached(point, of).await;
    let agent = cluster.layout.agent_pid_file(index(of));
    cluster.wait_dead(&if is_of_agent(point) { agent } else { cluster.layout.proxy_pid_file() }).await;
}

/// One step of a change of the member set.
async fn at(cluster: &Cluster, writers: &Writers, (occasion, point, of): (Occasion, CrashPoint, &str)) {
    let what = format!("{occasion:?}, killed at {point:?} of {of}");
    writers.wait(cluster, 20).await;
    let mut recovering = None;
    match occasion {
        Occasion::Return => {
            cluster.kill_postgres(2);
            cluster.arm(point, of);
        }
        Occasion::Lost => {
            cluster.arm(point, of);
            cluster.kill_postgres(2);
        }
        Occasion::HostLost => {
            cluster.arm(point, of);
            cluster.kill_agent(2);
            cluster.kill_postgres(2);
        }
        Occasion::Recover | Occasion::RecoverHostLost | Occasion::RecoverInVain => {
            let detached = cluster.command(&["detach", "node2"]);
            assert!(detached.status.success(), "{what}: {}", text(&detached));
            cluster.arm(point, of);
            if occasion == Occasion::RecoverInVain {
                cluster.arm(AgentJoins, "node2");
            }
            recovering = Some(cluster.start(&["recover", "node2", "--yes"]));
        }
    }
    wait_killed(cluster, point, of).await;
    if let Some(child) = recovering {
        // It says so, one way or the other, and does not hang.
        child.wait_with_output().unwrap();
    }
    if occasion == Occasion::RecoverHostLost {
        cluster.kill_agent(2);
        cluster.kill_postgres(2);
    }
    if matches!(occasion, Occasion::HostLost | Occasion::RecoverHostLost) {
        alone(cluster, &what, point != ShrinkStored).await;
    }
    cluster.start_again();
    writers.wait(cluster, 20).await;
    do_what_status_says(cluster, &what).await;
    writers.wait(cluster, 20).await;
    writers.check(cluster, 0..3, &what).await;
    eprintln!("{what}");
}

/// Of node2 nothing is there. The proxy serves if the newest set that is stored anywhere is without it, and says otherwise for whom it waits.
async fn alone(cluster: &Cluster, what: &str, is_member: bool) {
    cluster.start_proxy(0);
    if is_member {
        let says = async || {
            let status = cluster.status().0;
            status.contains("node2 is a member, but its agent") && status.contains("pgtandem detach node2 --yes")
        };
        assert!(comes(says).await, "{what}: {}\n{}", cluster.status().0, cluster.logs());
        assert!(!serves(cluster).await, "{what}");
        // A person knows that the host is lost.
        let output = cluster.command(&["detach", "node2", "--yes"]);
        assert!(output.status.success(), "{what}: {}", text(&output));
    }
    let without = async || control::members(&cluster.layout).await.is_ok_and(|members| members.len() == 2);
    assert!(comes(without).await, "{what}: {}\n{}", cluster.status().0, cluster.logs());
}

async fn play(steps: &[(Occasion, CrashPoint, &str)]) {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let mut writers = Writers::start(&cluster, WRITERS).await;
    cluster.wait_well().await;
    for step in steps {
        at(&cluster, &writers, *step).await;
    }
    writers.stop().await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
    writers.check(&cluster, 0..3, "at the end").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_is_lost() {
    play(SHRINKS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins() {
    play(GROWS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_comes_back() {
    play(RETURNS).await;
}

async fn serves(cluster: &Cluster) -> bool {
    compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_is_raised() {
    let cluster = common::cluster();
    let mut writers = Writers::start(&cluster, WRITERS).await;
    for (number, (point, of)) in TAKEOVERS.iter().chain(REIGNS).enumerate() {
        let what = format!("killed at {point:?} of {of}");
        writers.wait(&cluster, 20).await;
        cluster.wait_well().await;
        if number < TAKEOVERS.len() {
            cluster.arm(*point, of);
            cluster.kill_postgres(cluster.leader());
        } else {
            cluster.kill_proxy();
            cluster.arm(*point, of);
            cluster.start_proxy(0);
        }
        wait_killed(&cluster, *point, of).await;
        cluster.start_again();
        writers.wait(&cluster, 20).await;
        do_what_status_says(&cluster, &what).await;
        writers.check(&cluster, 0..2, &what).await;
        eprintln!("{what}");
    }
    writers.stop().await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// The command ends at each of these points, and is typed again.
async fn typed_again(cluster: &Cluster, points: &[(CrashPoint, &str)], words: &[&str]) {
    for (point, of) in points {
        cluster.arm(*point, of);
        let output = cluster.command(words);
        assert!(!output.status.success(), "{point:?} of {of}: {}", text(&output));
        cluster.wait_reached(*point, of).await;
        assert!(!serves(cluster).await, "{point:?} of {of}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_of_a_person_ends_half_way() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let mut writers = Writers::start(&cluster, WRITERS).await;
    writers.wait(&cluster, 20).await;

    // node2 is lost while no proxy runs.
    cluster.kill_proxy();
    cluster.kill_agent(2);
    cluster.kill_postgres(2);
    typed_again(&cluster, DETACHES, &["detach", "node2", "--yes"]).await;
    let output = cluster.command(&["detach", "node2", "--yes"]);
    assert!(output.status.success(), "{}", text(&output));
    cluster.start_proxy(0);
    writers.wait(&cluster, 20).await;
    cluster.start_again();
    do_what_status_says(&cluster, "after a detachment").await;
    writers.check(&cluster, 0..3, "after a detachment").await;

    // The proxy ends while it hands over; that of node1 serves then.
    let other = cluster.other_proxy(1);
    let other_serves = async || compare::connect(other.port, "postgres").await.is_ok();
    for (point, of) in SWITCHES {
        cluster.arm(*point, of);
        let output = cluster.command(&["switch", "node1"]);
        assert!(!output.status.success(), "{point:?} of {of}: {}", text(&output));
        wait_killed(&cluster, *point, of).await;
        assert!(comes(other_serves).await, "{point:?} of {of}: {}", cluster.logs());
        cluster.start_proxy(0);
        let stands_by = async || cluster.status().0.contains("the proxy of this cluster runs on node1");
        assert!(comes(stands_by).await, "{}", cluster.status().0);
        let back = cluster.command_with(&other.config, &["switch", "node0"]);
        assert!(back.status.success(), "{}\n{}", text(&back), cluster.logs());
        writers.wait(&cluster, 20).await;
        cluster.wait_well().await;
        writers.check(&cluster, 0..3, &format!("{point:?} of {of}")).await;
    }
    drop(other);

    cluster.lose_host(0);
    let promote = ["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"];
    typed_again(&cluster, PROMOTIONS, &promote).await;
    cluster.start_proxy(1);
    writers.wait(&cluster, 20).await;
    cluster.start_agent(0);
    do_what_status_says(&cluster, "after a promotion").await;
    writers.stop().await;
    cluster.assert_identical().await;
    writers.check(&cluster, 0..3, "after a promotion").await;
}

/// A table with one row, whose value must be `v`.
async fn assert_value(cluster: &Cluster, what: &str, v: i32) {
    assert!(comes(async || serves(cluster).await).await, "{what}: {}", cluster.logs());
    cluster.wait_well().await;
    cluster.assert_identical().await;
    let client = cluster.connect("postgres").await;
    assert_eq!(client.query_one("select v from t", &[]).await.unwrap().get::<_, i32>(0), v, "{what}");
}

const ONE_ROW: &str = "create table t (id int primary key, v int); insert into t values (1, 0)";

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_committed() {
    let cluster = common::cluster();
    cluster.connect("postgres").await.batch_execute(ONE_ROW).await.unwrap();
    let mut v = 0;
    for (point, is_committed) in COMMITS {
        let client = cluster.connect("postgres").await;
        cluster.arm(*point, "postgres");
        let told = client.execute("update t set v = v + 1 where id = 1", &[]).await;
        // It lost its connection and does not know.
        assert!(told.is_err_and(|error| error.as_db_error().is_none()), "{point:?}");
        cluster.wait_reached(*point, "postgres").await;
        cluster.wait_dead(&cluster.layout.proxy_pid_file()).await;
        cluster.start_again();
        v += i32::from(*is_committed);
        assert_value(&cluster, &format!("{point:?}"), v).await;
    }
}

/// G10: followers have prepared, and the leader forgets in its crash that the transaction has ever been; its id is given to another one, which
/// is committed. What was prepared is rolled back all the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_id_of_a_transaction_that_the_leader_forgot_is_given_to_another() {
    let cluster = common::cluster();
    let node = cluster.connect_node(0, "postgres").await;
    // Nothing is flushed but by commits.
    for sql in ["alter system set wal_writer_delay = '10s'", "select pg_reload_conf()"] {
        node.batch_execute(sql).await.unwrap();
    }
    let client = cluster.connect("postgres").await;
    client.batch_execute(ONE_ROW).await.unwrap();
    cluster.assert_identical().await;
    client.batch_execute("begin; update t set v = 1 where id = 1").await.unwrap();
    let sql = "select pg_current_xact_id()::text::bigint";
    let id: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
    cluster.arm_stop(CommitPrepared, "postgres");
    let told = tokio::spawn(async move { client.batch_execute("commit").await });
    cluster.wait_reached(CommitPrepared, "postgres").await;
    cluster.wait_proxy_stopped().await;
    cluster.kill_postgres(0);
    cluster.kill_proxy();
    assert!(told.await.unwrap().is_err());
    let port = cluster.layout.postgres_port(0);
    assert!(comes(async || compare::connect(port, "postgres").await.is_ok()).await, "{}", cluster.logs());
    let node = cluster.connect_node(0, "postgres").await;
    let mut given: i64 = node.query_one(sql, &[]).await.unwrap().get(0);
    assert!(given <= id, "the leader remembers {id}: {given}");
    while given < id {
        given = node.query_one(sql, &[]).await.unwrap().get(0);
    }
    let became = format!("select pg_xact_status('{id}')");
    assert_eq!(node.query_one(&became, &[]).await.unwrap().get::<_, String>(0), "committed");
    cluster.start_again();
    assert_value(&cluster, "rolled back", 0).await;
}

/// Nothing is acknowledged on node0 alone before it is recorded there that node1 is no member: two agents end while node1 is let in, so that
/// node1 believes that it is one, and node0's record said so, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_failed_is_undone_before_anything_is_acknowledged() {
    let cluster = common::cluster();
    let mut writers = Writers::start(&cluster, WRITERS).await;
    let detached = cluster.command(&["detach", "node1"]);
    assert!(detached.status.success(), "{}", text(&detached));
    cluster.arm_stop(GrowStored, "node0");
    let recovering = cluster.start(&["recover", "node1", "--yes"]);
    cluster.wait_reached(GrowStored, "node0").await;
    cluster.wait_proxy_stopped().await;
    cluster.kill_agent(0);
    cluster.arm(AgentJoined, "node1");
    cluster.signal_proxy(rustix::process::Signal::CONT);
    wait_killed(&cluster, AgentJoined, "node1").await;
    cluster.start_agent(0);
    writers.wait(&cluster, 20).await;
    let members = || peek(&cluster.layout.node_dir(0)).and_then(|record| record.members).map(|set| set.nodes);
    assert_eq!(members(), Some(vec!["node0".to_owned()]), "{}", cluster.logs());
    assert!(!recovering.wait_with_output().unwrap().status.success());
    // Nobody is told meanwhile.
    cluster.kill_proxy();
    writers.stop().await;
    cluster.start_agent(1);
    let asked = cluster.command(&["promote", "--node", "node1", "--dry-run"]);
    assert!(text(&asked).contains("ACKNOWLEDGED WRITES WILL BE LOST"), "{}", text(&asked));
    cluster.start_again();
    do_what_status_says(&cluster, "at the end").await;
    cluster.assert_identical().await;
    writers.check(&cluster, 0..2, "at the end").await;
}
