//! Recoveries from end to end with agents and a proxy in memory.

use std::sync::Arc;

use pgtandem_proto::membership::{MemberSet, Record};
use pgtandem_proto::message::{FailureCode, Kept, Lsn, NodeFacts, NodeStatus, OldData, Reply};

use super::super::agents::AgentControl;
use super::super::recoveries::Recoveries;
use super::super::replication::{CutDone, JoinDone, ReplicationError, ReplicationErrorKind};
use super::super::report::Phase;
use super::*;
use crate::cluster::record::{blank, running};

/// A cluster of `a`, which leads, and `b`. Remembers what it was asked for, in order.
#[derive(Default)]
struct World {
    log: Mutex<Vec<String>>,
    /// The request or call that fails.
    broken: Mutex<Option<&'static str>>,
    /// The request that never ends.
    hangs: Mutex<Option<&'static str>>,
    /// How often the gate is busy at the join.
    busy: Mutex<u32>,
    state: Mutex<Option<NodeState>>,
    is_member: Mutex<bool>,
}

impl World {
    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn breaks(&self, what: &str) -> bool {
        *self.broken.lock().unwrap() == Some(what)
    }

    async fn happen(&self, what: &'static str) {
        self.note(what);
        if *self.hangs.lock().unwrap() == Some(what) {
            std::future::pending::<()>().await;
        }
    }

    fn error(&self, what: &str) -> Result<(), ReplicationError> {
        if !self.breaks(what) {
            return Ok(());
        }
        Err(ReplicationError::new(ReplicationErrorKind::Leader, format!("{what} broke"), "mend it"))
    }
}

impl Replication for World {
    fn epoch(&self) -> Epoch {
        3
    }

    fn members(&self) -> MemberSet {
        let alone = members::in_epoch(&members::first("a"), 3, "a").unwrap();
        if *self.is_member.lock().unwrap() { members::with(&alone, "b").unwrap() } else { alone }
    }

    async fn cut(&self, _: &str) -> Result<CutDone, ReplicationError> {
        self.happen("cut").await;
        self.error("cut")?;
        Ok(CutDone { x: Lsn(0x0300_0028), gate_closed_unix_us: 1_000_000, gate_ms: 1.5 })
    }

    async fn drain(&self, _: &str, on_progress: &(dyn Fn(Drained) + Sync)) -> Result<(), ReplicationError> {
        self.happen("drain").await;
        on_progress(Drained { applied: 40, left: 2, peak: 30 });
        self.error("drain")
    }

    async fn join(&self, _: &str, _: &(dyn Fn(&str) + Sync)) -> Result<JoinDone, ReplicationError> {
        self.happen("join").await;
        let mut busy = self.busy.lock().unwrap();
        if *busy > 0 {
            *busy -= 1;
            return Err(ReplicationError::new(ReplicationErrorKind::Gate, "the gate is busy", "try again"));
        }
        // The worst kind of failure: the larger set is in use already.
        *self.is_member.lock().unwrap() = true;
        self.error("join")?;
        Ok(JoinDone { gate_closed_unix_us: 1_000_000, gate_ms: 2.5, version: 2 })
    }

    async fn abandon(&self, _: &str) {
        self.note("abandon");
    }

    async fn switch(&self, _: &str) -> Result<MemberSet, ReplicationError> {
        unreachable!("a recovery changes no leader")
    }

    async fn remove(&self, _: &str, _: &str) -> Result<MemberSet, ReplicationError> {
        self.note("remove");
        *self.is_member.lock().unwrap() = false;
        Ok(self.members())
    }
}

struct Connection {
    world: Arc<World>,
    node: String,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.node == "b" {
            self.world.note("b: end");
        }
    }
}

struct InMemory(Arc<World>);

impl Agents for InMemory {
    type Control = Connection;

    async fn connect(&self, node: &str) -> Result<Connection, Failure> {
        if self.0.breaks("connect") && node == "b" {
            return Err(failure("no connection to agent b"));
        }
        Ok(Connection { world: self.0.clone(), node: node.into() })
    }
}

fn failure(what: &str) -> Failure {
    Failure { code: FailureCode::Peer, what: what.into(), hint: "start it".into() }
}

impl AgentControl for Connection {
    async fn request(
        &mut self,
        request: Request,
        on_progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Reply, Failure> {
        let name = match &request {
            Request::Status => return Ok(Reply::Status(Box::new(self.status()))),
            Request::Facts => return Ok(Reply::Facts(Box::new(facts()))),
            Request::Promise { .. } => "promise",
            Request::Store { state: NodeState::Joining, .. } => "store joining",
            Request::Store { state: NodeState::Stale, .. } => "store stale",
            Request::OldData => {
                let old = OldData { bytes: 1 << 20, free_bytes: 1 << 40, link: String::new() };
                return Ok(Reply::OldData(Box::new(old)));
            }
            Request::KeepOld { .. } => "keep",
            Request::Fill { .. } => "fill",
            Request::VerifyFill => "verify",
            Request::CatchUp { .. } => "catch up",
            Request::HoldRelay => "hold",
            Request::LeaveRecovery { x } => {
                assert_eq!(*x, Lsn(0x0300_0028));
                "leave recovery"
            }
            Request::DropSlot { .. } => "drop slot",
            other => panic!("{other:?}"),
        };
        self.world.note(format!("{}: {name}", self.node));
        on_progress(Progress { bytes_compared: 100, bytes_sent: 40, ..Progress::default() });
        if *self.world.hangs.lock().unwrap() == Some(name) {
            std::future::pending::<()>().await;
        }
        if self.world.breaks(name) {
            return Err(failure(&format!("{name} broke")));
        }
        Ok(match name {
            "hold" => Reply::Lsn(Lsn(0x0300_0000)),
            "keep" => Reply::Kept(Box::new(Kept { path: "/data.old-1".into(), bytes: 3 << 20, ..Kept::default() })),
            _ => Reply::Done,
        })
    }
}

impl Connection {
    fn status(&self) -> NodeStatus {
        let state = if self.node == "a" { NodeState::InSync } else { NodeState::Stale };
        let state = self.world.state.lock().unwrap().filter(|_| self.node == "b").unwrap_or(state);
        running(Record { promised: 3, state, uncertain: false, ..blank("shop", &self.node) })
    }
}

fn facts() -> NodeFacts {
    NodeFacts {
        binaries_version_num: 150_018,
        data_major: Some(15),
        system_identifier: Some(7),
        architecture: "x86_64".into(),
        libc_version: "2.36".into(),
        free_bytes: 1 << 40,
        data_bytes: Some(1 << 20),
        ..NodeFacts::default()
    }
}

async fn recover(world: &Arc<World>, consent: bool) -> Report {
    recover_as(world, Wishes { consent, ..Wishes::default() }).await
}

async fn recover_as(world: &Arc<World>, wishes: Wishes) -> Report {
    let published = watch::Sender::new(Report::new());
    let report = run(&**world, &InMemory(world.clone()), "b", wishes, &published, &Stop::default()).await;
    assert_eq!(*published.borrow(), report);
    report
}

#[tokio::test]
async fn a_stale_node_becomes_a_member() {
    let world = Arc::new(World::default());
    let report = recover(&world, false).await;
    assert_eq!(report.phase, Phase::Member, "{:?}", report.failed);
    assert_eq!(
        world.log(),
        [
            "abandon",
            "b: promise",
            "b: fill",
            "b: catch up",
            "b: hold",
            "cut",
            "b: leave recovery",
            "drain",
            "b: store joining",
            "join",
            "a: drop slot",
            "b: end"
        ]
    );
    assert_eq!((report.cut_gate_ms, report.join_gate_ms), (Some(1.5), Some(2.5)));
    assert_eq!((report.progress.bytes_compared, report.drained.peak), (100, 30));
}

#[tokio::test]
async fn every_failure_ends_the_work_on_the_node_and_leaves_the_members() {
    let steps = [
        ("connect", Phase::Preflight),
        ("promise", Phase::Preflight),
        ("fill", Phase::Seeding),
        ("catch up", Phase::CatchingUp),
        ("hold", Phase::Cut),
        ("cut", Phase::Cut),
        ("leave recovery", Phase::LeavingRecovery),
        ("drain", Phase::Draining),
        ("store joining", Phase::Joining),
        ("join", Phase::Joining),
    ];
    for (broken, phase) in steps {
        let world = Arc::new(World::default());
        *world.broken.lock().unwrap() = Some(broken);
        let report = recover(&world, false).await;
        let failed = report.failed.unwrap();
        assert_eq!(failed.phase, phase, "{broken}");
        assert!(failed.cause.what.contains("broke") || broken == "connect", "{failed}");
        assert!(!*world.is_member.lock().unwrap(), "{broken}");
        let log = world.log();
        assert_eq!(log.iter().any(|what| what == "b: end"), broken != "connect", "{broken}");
        let filled = phase >= Phase::Seeding;
        assert_eq!(log.iter().any(|what| what == "a: drop slot"), filled, "{broken}: {log:?}");
        if broken == "join" {
            let join = log.iter().position(|what| what == "join").unwrap();
            assert_eq!(log[join + 1], "remove", "{log:?}");
        }
    }
}

#[tokio::test]
async fn a_busy_gate_is_waited_for() {
    let world = Arc::new(World::default());
    *world.busy.lock().unwrap() = 3;
    let report = recover(&world, false).await;
    assert_eq!(report.phase, Phase::Member);
    assert_eq!(report.join_attempts, 4);
    assert_eq!(world.log().iter().filter(|what| *what == "drain").count(), 4);
}

#[tokio::test]
async fn a_member_needs_consent_and_one_that_was_left_behind_is_told_first() {
    let world = Arc::new(World::default());
    *world.is_member.lock().unwrap() = true;
    *world.state.lock().unwrap() = Some(NodeState::InSync);
    let failed = recover(&world, false).await.failed.unwrap();
    assert_eq!(failed.cause.kind, CauseKind::NeedsConsent);
    assert!(*world.is_member.lock().unwrap());
    assert_eq!(recover(&world, true).await.phase, Phase::Member);
    assert!(world.log().contains(&"remove".to_owned()));

    let world = Arc::new(World::default());
    *world.state.lock().unwrap() = Some(NodeState::InSync);
    assert_eq!(recover(&world, false).await.phase, Phase::Member);
    assert_eq!(world.log()[..4], ["abandon", "b: promise", "b: store stale", "b: fill"]);
}

#[tokio::test]
async fn what_is_kept_is_told_although_the_recovery_fails() {
    let keep = Wishes { keep_old: true, ..Wishes::default() };
    let world = Arc::new(World::default());
    let report = recover_as(&world, keep).await;
    assert_eq!(report.phase, Phase::Member);
    assert_eq!(world.log()[..4], ["abandon", "b: promise", "b: keep", "b: fill"]);
    assert!(report.warnings[0].contains("needs up to 1 MiB"), "{:?}", report.warnings);

    for broken in ["keep", "fill"] {
        let world = Arc::new(World::default());
        *world.broken.lock().unwrap() = Some(broken);
        let report = recover_as(&world, keep).await;
        assert_eq!(report.failed.unwrap().phase, Phase::Seeding);
        assert_eq!(report.kept.is_some(), broken == "fill");
        let said = report
            .warnings
            .iter()
            .any(|warning| warning.ends_with("/data.old-1, 3 MiB. To remove it there: rm -r /data.old-1"));
        assert_eq!(said, broken == "fill", "{:?}", report.warnings);
        assert!(world.log().contains(&"b: end".to_owned()));
    }
}

#[tokio::test]
async fn files_that_are_looked_at_are_not_started_before() {
    let world = Arc::new(World::default());
    let report = recover_as(&world, Wishes { verify: true, ..Wishes::default() }).await;
    assert!(report.verified && report.phase == Phase::Member);
    assert_eq!(world.log()[..5], ["abandon", "b: promise", "b: fill", "b: verify", "b: catch up"]);

    let world = Arc::new(World::default());
    *world.broken.lock().unwrap() = Some("verify");
    let report = recover_as(&world, Wishes { verify: true, ..Wishes::default() }).await;
    assert_eq!(report.failed.unwrap().phase, Phase::Seeding);
    assert!(!report.verified && !world.log().contains(&"b: catch up".to_owned()));
}

#[tokio::test]
async fn a_second_command_looks_on_and_an_abort_ends_it() {
    let world = Arc::new(World::default());
    *world.hangs.lock().unwrap() = Some("catch up");
    let nodes = vec!["a".to_owned(), "b".to_owned()];
    let proxy = CancellationToken::new();
    let recoveries = Recoveries::new(world.clone(), Arc::new(InMemory(world.clone())), nodes, proxy.clone());
    assert!(recoveries.start("z", Wishes::default()).is_none());
    assert!(recoveries.abort("b").is_none());
    let mut first = recoveries.start("b", Wishes::default()).unwrap();
    assert!(!first.was_running);
    first.report.wait_for(|report| report.phase == Phase::CatchingUp).await.unwrap();
    let second = recoveries.start("b", Wishes::default()).unwrap();
    assert!(second.was_running);
    drop(first);
    let mut ends = recoveries.abort("b").unwrap();
    let failed = ends.wait_for(|report| report.ended).await.unwrap().failed.clone().unwrap();
    assert_eq!(failed.cause.kind, CauseKind::Stopping);
    assert_eq!(recoveries.report("b").unwrap().phase, Phase::Failed);

    // And again, this time ended by the proxy that stops.
    let mut third = recoveries.start("b", Wishes::default()).unwrap();
    assert!(!third.was_running);
    third.report.wait_for(|report| report.phase == Phase::CatchingUp).await.unwrap();
    proxy.cancel();
    recoveries.ended().await;
    assert!(recoveries.report("b").unwrap().failed.is_some());
}
