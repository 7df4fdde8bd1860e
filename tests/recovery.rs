//! A recovery from Preflight to member on two real servers: runner, agents, files, WAL, exactly X. The gate and the
//! backlog are not in it: nothing is written between the cut and the join.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod pair;

use std::sync::{Arc, Mutex};

use pair::{Site, is_postgres_user, record, runtime, status, store, until};
use pgtandem::agent::client::{self, Control};
use pgtandem::agent::postgres::Postgres;
use pgtandem::agent::tls::Identity;
use pgtandem::cluster::members;
use pgtandem::config::NodeConfig;
use pgtandem::recovery::client::AgentClients;
use pgtandem::recovery::core::Wishes;
use pgtandem::recovery::recoveries::Recoveries;
use pgtandem::recovery::replication::{
    CutDone, Drained, JoinDone, Replication, ReplicationError, ReplicationErrorKind,
};
use pgtandem::recovery::report::{Phase, Report};
use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{Lsn, PostgresState, Request};
use tokio_util::sync::CancellationToken;

/// A proxy without clients: the cut is a marker record, the backlog is empty.
struct Quiet {
    set: Mutex<MemberSet>,
    leader: Postgres,
    identity: Identity,
    nodes: Vec<NodeConfig>,
}

fn broken(error: impl std::fmt::Display) -> ReplicationError {
    ReplicationError::new(ReplicationErrorKind::Node, error.to_string(), "look at the test")
}

impl Quiet {
    async fn store(&self, index: usize, set: &MemberSet, state: NodeState) -> Result<(), ReplicationError> {
        let mut control = Control::connect(&self.identity, &self.nodes[index]).await.map_err(broken)?;
        let request =
            Request::Store { members: set.clone(), state, uncertain: false, new_generation: None, note: None };
        control.request(&request).await.map_err(broken)?;
        Ok(())
    }
}

impl Replication for Quiet {
    fn epoch(&self) -> u64 {
        1
    }

    fn members(&self) -> MemberSet {
        self.set.lock().unwrap().clone()
    }

    async fn cut(&self, _: &str) -> Result<CutDone, ReplicationError> {
        let marker = "select pg_logical_emit_message(true, 'pgtandem', 'cut')";
        Ok(CutDone { x: lsn(&sql(&self.leader, marker).await), gate_closed_unix_us: 1_000_000, gate_ms: 1.0 })
    }

    async fn drain(&self, _: &str, on_progress: &(dyn Fn(Drained) + Sync)) -> Result<(), ReplicationError> {
        drop(client::tunnel(&self.identity, &self.nodes[1], 1).await.map_err(broken)?);
        on_progress(Drained::default());
        Ok(())
    }

    async fn join(&self, node: &str, _: &(dyn Fn(&str) + Sync)) -> Result<JoinDone, ReplicationError> {
        let larger = members::with(&self.members(), node).map_err(broken)?;
        self.store(0, &larger, NodeState::InSync).await?;
        self.store(1, &larger, NodeState::InSync).await?;
        let version = larger.version;
        *self.set.lock().unwrap() = larger;
        Ok(JoinDone { gate_closed_unix_us: 1_000_000, gate_ms: 1.0, version })
    }

    async fn abandon(&self, _: &str) {}

    async fn switch(&self, _: &str) -> Result<MemberSet, ReplicationError> {
        unreachable!("a recovery changes no leader")
    }

    async fn remove(&self, node: &str, _: &str) -> Result<MemberSet, ReplicationError> {
        let smaller = members::without(&self.members(), node).map_err(broken)?;
        self.store(1, &smaller, NodeState::Stale).await?;
        self.store(0, &smaller, NodeState::InSync).await?;
        *self.set.lock().unwrap() = smaller.clone();
        Ok(smaller)
    }
}

async fn sql(postgres: &Postgres, text: &str) -> String {
    let client = postgres.connect("postgres").await.unwrap();
    let mut out = String::new();
    for row in client.simple_query(text).await.unwrap() {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = row {
            out.push_str(row.get(0).unwrap_or("NULL"));
        }
    }
    out
}

fn lsn(text: &str) -> Lsn {
    let (high, low) = text.split_once('/').unwrap();
    Lsn((u64::from_str_radix(high, 16).unwrap() << 32) | u64::from_str_radix(low, 16).unwrap())
}

const CONTENT: &str = "select count(*) || ':' || coalesce(sum(n), 0) from t";

#[test]
fn a_node_is_recovered_again_and_again() {
    if !is_postgres_user("a_node_is_recovered_again_and_again") {
        return;
    }
    runtime().block_on(async {
        let mut site = Site::new();
        site.initdb();
        let (agent_a, agent_b) = (site.start(0).await, site.start(1).await);
        let (a, b) = (Postgres::new(site.node(0).clone()), Postgres::new(site.node(1).clone()));
        let mut on_a = site.control(0).await;
        on_a.request(&Request::StartPostgres).await.unwrap();
        record(&mut on_a, Request::Promise { epoch: 1 }).await.unwrap();
        record(&mut on_a, store(1, 1, &["a"], NodeState::InSync)).await.unwrap();
        sql(&a, "create table t(n bigint); insert into t select generate_series(1, 200000)").await;
        sql(&a, "create unlogged table gone(n int)").await;

        let set = status(&mut on_a).await.record.members.unwrap();
        let nodes = site.config.nodes.clone();
        let hub = Quiet { set: Mutex::new(set), leader: a.clone(), identity: site.proxy(), nodes: nodes.clone() };
        let agents = AgentClients::new(Arc::new(site.proxy()), nodes);
        let names = vec!["a".to_owned(), "b".to_owned()];
        let recoveries = Recoveries::new(Arc::new(hub), Arc::new(agents), names, CancellationToken::new());
        let recover = async || -> Report {
            let mut started = recoveries.start("b", Wishes { consent: true, ..Wishes::default() }).unwrap();
            started.report.wait_for(|report| report.ended).await.unwrap().clone()
        };

        let first = recover().await;
        assert_eq!(first.phase, Phase::Member, "{:?}", first.failed);
        assert!(first.warnings.iter().any(|warning| warning.contains("gone")), "{:?}", first.warnings);
        assert!(first.progress.bytes_sent > 1 << 20, "{:?}", first.progress);
        assert_eq!(sql(&b, CONTENT).await, sql(&a, CONTENT).await);
        assert_eq!(sql(&a, "select count(*) from pg_replication_slots").await, "0", "the slot is gone");
        let now = status(&mut site.control(1).await).await;
        assert_eq!((now.record.state, now.postgres), (NodeState::InSync, PostgresState::Running));

        // A member is detached and filled with what differs.
        sql(&a, "insert into t values (7)").await;
        let second = recover().await;
        assert_eq!(second.phase, Phase::Member, "{:?}", second.failed);
        assert!(second.progress.bytes_same > second.progress.bytes_sent, "{:?}", second.progress);
        assert_eq!(sql(&b, CONTENT).await, sql(&a, CONTENT).await);

        // Ended by an operator on its way: out, stopped, and the next attempt succeeds.
        let mut third = recoveries.start("b", Wishes { consent: true, ..Wishes::default() }).unwrap().report;
        // Before its agent has begun to compare, its PostgreSQL would simply go on.
        third.wait_for(|report| report.progress.bytes_compared > 0).await.unwrap();
        recoveries.abort("b").unwrap();
        let failed = third.wait_for(|report| report.ended).await.unwrap().failed.clone().unwrap();
        assert_eq!(recoveries.replication().members().nodes, ["a"], "{failed}");
        until("the agent has ended the aborted recovery", async || {
            status(&mut site.control(1).await).await.postgres != PostgresState::Running
        })
        .await;
        let mut last = recover().await;
        if last.phase != Phase::Member {
            // Its agent may still be busy with the end of the aborted one, and says so.
            assert!(last.failed.as_ref().unwrap().cause.what.contains("another recovery"), "{:?}", last.failed);
            last = recover().await;
        }
        assert_eq!(last.phase, Phase::Member, "{:?}", last.failed);
        assert_eq!(sql(&b, CONTENT).await, sql(&a, CONTENT).await);
        agent_b.stop().await.unwrap();
        agent_a.stop().await.unwrap();
    });
}
