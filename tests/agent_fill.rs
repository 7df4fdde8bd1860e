//! Two agents fill a node: files, WAL, exactly X, and the end of recovery, all through control channels.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod pair;

use pair::{Site, is_postgres_user, record, runtime, status, store, until};
use pgtandem::agent::client::{self, ClientError, Control};
use pgtandem::agent::postgres::Postgres;
use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::{FailureCode, Lsn, PostgresState, Progress, Reply, Request};

const LAG_BYTES_MAX: u64 = 1 << 20;

async fn ask(control: &mut Control, request: Request) -> Reply {
    control.request(&request).await.unwrap()
}

async fn sql(postgres: &Postgres, text: &str) -> String {
    let client = postgres.connect("postgres").await.unwrap();
    let rows = client.simple_query(text).await.unwrap();
    let mut out = String::new();
    for row in rows {
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

/// Everything that a test may compare.
const CONTENT: &str = "select count(*) || ':' || coalesce(sum(n), 0) from t";

/// Fills b from a and brings it to the position of a marker written after that; returns its progress at the end.
async fn recover(control: &mut Control, a: &Postgres) -> Progress {
    let mut last = Progress::default();
    let fill = Request::Fill { epoch: 1, source: "a".to_owned() };
    assert_eq!(control.request_with(&fill, |progress| last = progress).await.unwrap(), Reply::Done);
    let last = status(control).await.progress.unwrap_or(last);
    assert_eq!(status(control).await.record.state, NodeState::Seeding);
    sql(a, "insert into t select generate_series(1, 1000)").await;
    let catch_up = Request::CatchUp { epoch: 1, source: "a".to_owned(), lag_bytes_max: LAG_BYTES_MAX };
    assert_eq!(ask(control, catch_up).await, Reply::Done);
    let now = status(control).await;
    assert_eq!((now.record.state, now.postgres), (NodeState::CatchingUp, PostgresState::Standby));
    assert!(matches!(ask(control, Request::HoldRelay).await, Reply::Lsn(_)));
    last
}

#[test]
fn a_blank_node_is_filled_and_again() {
    if !is_postgres_user("a_blank_node_is_filled_and_again") {
        return;
    }
    runtime().block_on(async {
        let mut site = Site::new();
        site.initdb();
        let (agent_a, agent_b) = (site.start(0).await, site.start(1).await);
        let (a, b) = (Postgres::new(site.node(0).clone()), Postgres::new(site.node(1).clone()));
        let mut on_a = site.control(0).await;
        ask(&mut on_a, Request::StartPostgres).await;
        record(&mut on_a, Request::Promise { epoch: 1 }).await.unwrap();
        record(&mut on_a, store(1, 1, &["a"], NodeState::InSync)).await.unwrap();
        sql(&a, "create table t(n bigint); insert into t select generate_series(1, 200000)").await;

        let mut on_b = site.control(1).await;
        record(&mut on_b, Request::Promise { epoch: 1 }).await.unwrap();
        recover(&mut on_b, &a).await;
        // X is the end of a commit; what comes behind it must not be on b.
        let x = lsn(&sql(&a, "insert into t values (7); select pg_current_wal_flush_lsn()").await);
        let x = { let _ = x; lsn(&sql(&a, "select pg_logical_emit_message(true, 'pgtandem', 'cut')").await) };
        let at_x = sql(&a, CONTENT).await;
        sql(&a, "insert into t values (8)").await;
        assert!(matches!(client::tunnel(&site.proxy(), site.node(1), 1).await, Err(ClientError::Refused { .. })));
        assert_eq!(ask(&mut on_b, Request::LeaveRecovery { x }).await, Reply::Done);
        assert_eq!(sql(&b, CONTENT).await, at_x);
        // Now the proxy reaches it.
        drop(client::tunnel(&site.proxy(), site.node(1), 1).await.unwrap());
        sql(&b, "insert into t values (8)").await;
        record(&mut on_a, store(1, 2, &["a", "b"], NodeState::InSync)).await.unwrap();
        record(&mut on_b, store(1, 2, &["a", "b"], NodeState::InSync)).await.unwrap();
        // It is a member: the end of the connection that filled it changes nothing.
        drop(on_b);
        let mut on_b = site.control(1).await;
        assert_eq!(status(&mut on_b).await.postgres, PostgresState::Running);
        assert_eq!(sql(&b, CONTENT).await, sql(&a, CONTENT).await);

        // A member is not filled over; one that was left behind is, and only what differs is sent.
        let fill = Request::Fill { epoch: 1, source: "a".to_owned() };
        assert_eq!(record(&mut on_b, fill.clone()).await, Err(FailureCode::WrongState));
        record(&mut on_a, store(1, 3, &["a"], NodeState::InSync)).await.unwrap();
        record(&mut on_b, store(1, 3, &["a"], NodeState::Stale)).await.unwrap();
        let progress = recover(&mut on_b, &a).await;
        assert!(progress.bytes_same > progress.bytes_sent, "{progress:?}");

        // Its control connection ends in the middle: it is stopped and knows that it is not whole.
        drop(on_b);
        let mut on_b = site.control(1).await;
        until("the aborted recovery is over", async || {
            let now = status(&mut site.control(1).await).await;
            now.postgres == PostgresState::Stopped && now.progress.is_none()
        })
        .await;
        assert_eq!(status(&mut on_b).await.record.state, NodeState::CatchingUp);
        assert_eq!(record(&mut on_b, Request::StartPostgres).await, Err(FailureCode::WrongState));

        // A newer epoch ends a recovery of an older one.
        recover(&mut on_b, &a).await;
        record(&mut site.control(1).await, Request::Promise { epoch: 2 }).await.unwrap();
        let cut_off = on_b.request(&Request::LeaveRecovery { x }).await;
        assert!(cut_off.is_err(), "{cut_off:?}");
        until("the recovery of the older epoch is over", async || {
            let now = status(&mut site.control(1).await).await;
            now.postgres == PostgresState::Stopped && now.progress.is_none()
        })
        .await;
        assert_eq!(ask(&mut on_a, Request::DropSlot { node: "b".to_owned() }).await, Reply::Done);
        agent_b.stop().await.unwrap();
        agent_a.stop().await.unwrap();
    });
}
