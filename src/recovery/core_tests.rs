//! The state machine against a runner that does anything: the good way, each failure, and random inputs.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// A runner that remembers what it was asked for.
struct Bench {
    now: Instant,
    recovery: Recovery,
    begun: Vec<Step>,
    under_way: Option<Step>,
    phases: Vec<Phase>,
    /// The member set may contain the node: a join was begun and neither succeeded, nor was shrunk out.
    may_be_in: bool,
}

impl Bench {
    fn new(consent: bool) -> Self {
        Self::with(Wishes { consent, ..Wishes::default() })
    }

    fn with(wishes: Wishes) -> Self {
        let now = Instant::now();
        let mut bench = Self {
            now,
            recovery: Recovery::new(now, wishes),
            begun: Vec::new(),
            under_way: None,
            phases: Vec::new(),
            may_be_in: false,
        };
        bench.take_outputs();
        bench
    }

    fn take_outputs(&mut self) {
        let mut taken = 0;
        while let Some(output) = self.recovery.poll_output() {
            taken += 1;
            assert!(taken <= 2, "outputs pile up");
            match output {
                Output::Cancel => {
                    assert!(self.under_way.is_some(), "a cancel of nothing");
                    self.under_way = None;
                }
                Output::Begin(step) => {
                    assert_eq!(self.under_way, None, "{step:?} was begun beside other work");
                    if self.may_be_in {
                        assert!(
                            matches!(step, Step::ShrinkOut | Step::Drain),
                            "after a failed join came {step:?} and not the shrink"
                        );
                        self.may_be_in = false;
                    }
                    self.begun.push(step);
                    self.under_way = Some(step);
                    if step == Step::Join {
                        self.may_be_in = true;
                    }
                }
            }
        }
        let phase = self.recovery.report().phase;
        if self.phases.last() != Some(&phase) {
            self.phases.push(phase);
        }
    }

    fn input(&mut self, input: Input) {
        let answers = match &input {
            Input::Done(Done::Plain(step)) => {
                let has_its_own =
                    matches!(step, Step::Preflight | Step::KeepOld | Step::HoldRelay | Step::Cut | Step::Join);
                self.under_way == Some(*step) && !has_its_own
            }
            Input::Done(Done::Preflight { .. }) => self.under_way == Some(Step::Preflight),
            Input::Done(Done::Kept(_)) => self.under_way == Some(Step::KeepOld),
            Input::Done(Done::Held(_)) => self.under_way == Some(Step::HoldRelay),
            Input::Done(Done::Cut(_)) => self.under_way == Some(Step::Cut),
            Input::Done(Done::Joined(_)) => self.under_way == Some(Step::Join),
            Input::StepFailed { .. } => self.under_way.is_some(),
            _ => false,
        };
        if answers {
            self.under_way = None;
            // A failure that may be tried again says that nothing was stored.
            if matches!(input, Input::Done(Done::Joined(_)) | Input::StepFailed { retriable: true, .. }) {
                self.may_be_in = false;
            }
        }
        self.recovery.handle(self.now, input);
        self.take_outputs();
    }

    fn succeed(&mut self) {
        let done = match self.under_way.expect("nothing is under way") {
            Step::Preflight => Done::Preflight { is_member: false, warnings: vec!["unlogged tables".into()] },
            Step::KeepOld => Done::Kept(Kept { path: "/data.old-1".into(), bytes: 1, ..Kept::default() }),
            Step::HoldRelay => Done::Held(Lsn(0x0100_0000)),
            Step::Cut => Done::Cut(CutDone { x: Lsn(0x0100_0080), gate_closed_unix_us: 1_000_000, gate_ms: 2.5 }),
            Step::Join => Done::Joined(JoinDone { gate_closed_unix_us: 1_000_000, gate_ms: 3.5, version: 4 }),
            step => Done::Plain(step),
        };
        self.input(Input::Done(done));
    }

    fn fail(&mut self, retriable: bool) {
        self.input(Input::StepFailed { cause: cause(), retriable });
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.recovery.handle_timeout(self.now);
        self.take_outputs();
    }

    fn finish(&mut self) {
        for _ in 0..8 {
            if !self.recovery.is_ended() {
                self.succeed();
            }
        }
        assert!(self.recovery.is_ended());
        assert_eq!(self.recovery.poll_timeout(), None);
    }
}

fn cause() -> Cause {
    Cause::new(CauseKind::Node, "it broke", "mend it")
}

const GOOD_WAY: [Step; 8] = [
    Step::Preflight,
    Step::Fill,
    Step::CatchUp,
    Step::HoldRelay,
    Step::Cut,
    Step::LeaveRecovery { x: Lsn(0x0100_0080) },
    Step::Drain,
    Step::Join,
];

#[test]
fn the_good_way_passes_every_phase_in_order() {
    let mut bench = Bench::new(false);
    while !bench.recovery.is_ended() {
        bench.succeed();
    }
    assert_eq!(bench.begun[..8], GOOD_WAY);
    assert_eq!(bench.begun[8..], [Step::DropSlot, Step::Release]);
    let phases = [
        Phase::Preflight,
        Phase::Seeding,
        Phase::CatchingUp,
        Phase::Cut,
        Phase::LeavingRecovery,
        Phase::Draining,
        Phase::Joining,
        Phase::Member,
    ];
    assert_eq!(bench.phases, phases);
    let report = bench.recovery.report();
    assert_eq!(report.cut_gate_ms, Some(2.5));
    assert_eq!((report.cut_gate_closed_unix_us, report.join_gate_closed_unix_us), (Some(1_000_000), Some(1_000_000)));
    assert_eq!(report.join_gate_ms, Some(3.5));
    assert_eq!(report.version, Some(4));
    assert_eq!(report.warnings, ["unlogged tables"]);
    assert_eq!(report.failed, None);
}

#[test]
fn a_failure_before_the_join_leaves_the_member_set_alone() {
    for (broken, step) in GOOD_WAY.iter().enumerate().take(7) {
        let mut bench = Bench::new(false);
        for _ in 0..broken {
            bench.succeed();
        }
        let phase = bench.recovery.report().phase;
        bench.fail(false);
        bench.finish();
        assert_eq!(bench.recovery.report().phase, Phase::Failed);
        assert_eq!(bench.recovery.report().failed, Some(Failed { phase, cause: cause() }));
        for unwanted in [Step::ShrinkOut, Step::Join, Step::Detach] {
            assert!(!bench.begun.contains(&unwanted), "{unwanted:?} after a failure of {step:?}");
        }
        assert_eq!(bench.begun.contains(&Step::Abandon), broken >= 4);
        assert_eq!(bench.begun.contains(&Step::DropSlot), broken >= 1);
    }
}

#[test]
fn what_the_join_waits_for_is_told_until_it_is_made() {
    let mut bench = Bench::new(false);
    for _ in 0..7 {
        bench.input(Input::Waits("not joining yet".into()));
        assert_eq!(bench.recovery.report().waits, None);
        bench.succeed();
    }
    bench.input(Input::Waits("c is let in first".into()));
    assert_eq!(bench.recovery.report().waits.as_deref(), Some("c is let in first"));
    // What comes next is why it is tried again.
    bench.fail(true);
    assert_eq!(bench.recovery.report().waits, Some(cause().what));
    bench.wait(RETRY_WAIT);
    bench.finish();
    assert_eq!((bench.recovery.report().phase, bench.recovery.report().waits.clone()), (Phase::Member, None));
}

#[test]
fn a_failed_join_is_shrunk_out_before_anything_else() {
    let mut bench = Bench::new(false);
    for _ in 0..7 {
        bench.succeed();
    }
    bench.fail(false);
    assert_eq!(bench.begun[8], Step::ShrinkOut);
    bench.finish();
    assert_eq!(bench.begun[8..], [Step::ShrinkOut, Step::Abandon, Step::Release, Step::DropSlot]);
    assert_eq!(bench.recovery.report().failed.as_ref().unwrap().phase, Phase::Joining);
}

#[test]
fn a_member_is_detached_only_with_consent() {
    let mut bench = Bench::new(false);
    bench.input(Input::Done(Done::Preflight { is_member: true, warnings: Vec::new() }));
    assert!(bench.recovery.is_ended());
    assert_eq!(bench.recovery.report().failed.as_ref().unwrap().cause.kind, CauseKind::NeedsConsent);
    assert_eq!(bench.begun, [Step::Preflight]);

    let mut bench = Bench::new(true);
    bench.input(Input::Done(Done::Preflight { is_member: true, warnings: Vec::new() }));
    assert_eq!(bench.begun, [Step::Preflight, Step::Detach]);
    bench.succeed();
    assert_eq!(bench.under_way, Some(Step::Fill));
}

#[test]
fn a_busy_gate_is_tried_again_and_not_for_ever() {
    let mut bench = Bench::new(false);
    for _ in 0..4 {
        bench.succeed();
    }
    for attempt in 1..CUT_ATTEMPTS_MAX {
        assert_eq!(bench.recovery.report().cut_attempts, attempt);
        bench.fail(true);
        assert_eq!(bench.under_way, None);
        bench.wait(RETRY_WAIT);
        assert_eq!(bench.under_way, Some(Step::Cut));
    }
    bench.fail(true);
    bench.finish();
    assert_eq!(bench.recovery.report().failed.as_ref().unwrap().phase, Phase::Cut);
}

#[test]
fn a_busy_gate_at_the_join_drains_again() {
    let mut bench = Bench::new(false);
    for _ in 0..7 {
        bench.succeed();
    }
    bench.fail(true);
    assert_eq!(bench.recovery.report().phase, Phase::Draining);
    bench.wait(RETRY_WAIT);
    assert_eq!(bench.under_way, Some(Step::Drain));
    bench.finish();
    assert_eq!(bench.recovery.report().phase, Phase::Member);
    assert_eq!(bench.recovery.report().join_attempts, 2);
}

#[test]
fn what_moves_is_never_stuck_and_what_stands_still_is() {
    let mut bench = Bench::new(false);
    bench.succeed();
    let limit = stall_max(Step::Fill);
    for sent in 1..10 {
        bench.wait(limit.mul_f64(0.9));
        bench.input(Input::Progress(Progress { bytes_sent: sent, ..Progress::default() }));
    }
    assert_eq!(bench.under_way, Some(Step::Fill));
    bench.wait(limit.mul_f64(0.9));
    // The same counters again are no progress.
    bench.input(Input::Progress(Progress { bytes_sent: 9, ..Progress::default() }));
    bench.wait(limit.mul_f64(0.2));
    bench.finish();
    assert_eq!(bench.recovery.report().failed.as_ref().unwrap().cause.kind, CauseKind::Stalled);
}

#[test]
fn an_abort_lets_a_join_end() {
    let mut bench = Bench::new(false);
    for _ in 0..7 {
        bench.succeed();
    }
    bench.input(Input::Abort(cause()));
    assert_eq!(bench.under_way, Some(Step::Join));
    bench.finish();
    assert_eq!(bench.recovery.report().phase, Phase::Member);

    let mut bench = Bench::new(false);
    for _ in 0..7 {
        bench.succeed();
    }
    bench.input(Input::Abort(cause()));
    bench.fail(true);
    assert_eq!(bench.under_way, Some(Step::ShrinkOut));
    bench.finish();
    assert_eq!(bench.recovery.report().phase, Phase::Failed);
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Preflight),
        Just(Step::Detach),
        Just(Step::Fill),
        Just(Step::Verify),
        Just(Step::CatchUp),
        Just(Step::HoldRelay),
        Just(Step::Cut),
        (0_u64..3).prop_map(|x| Step::LeaveRecovery { x: Lsn(x) }),
        Just(Step::Drain),
        Just(Step::Join),
        Just(Step::ShrinkOut),
        Just(Step::Abandon),
        Just(Step::Release),
        Just(Step::DropSlot),
    ]
}

#[derive(Clone, Debug)]
enum Move {
    Succeed,
    Input(Input),
    Wait(u64),
}

fn any_move() -> impl Strategy<Value = Move> {
    let input = prop_oneof![
        (any::<bool>()).prop_map(|is_member| Input::Done(Done::Preflight { is_member, warnings: vec!["w".into()] })),
        any_step().prop_map(|step| Input::Done(Done::Plain(step))),
        any::<u64>().prop_map(|lsn| Input::Done(Done::Held(Lsn(lsn)))),
        (0_u64..3).prop_map(|x| Input::Done(Done::Cut(CutDone {
            x: Lsn(x),
            gate_closed_unix_us: 1_000_000,
            gate_ms: 1.0
        }))),
        any::<u64>().prop_map(|version| Input::Done(Done::Joined(JoinDone {
            gate_closed_unix_us: 1_000_000,
            gate_ms: 1.0,
            version
        }))),
        any::<bool>().prop_map(|retriable| Input::StepFailed { cause: cause(), retriable }),
        any::<u64>().prop_map(|bytes_sent| Input::Progress(Progress { bytes_sent, ..Progress::default() })),
        any::<(u64, u64, u64)>().prop_map(|(applied, left, peak)| Input::Drained(Drained { applied, left, peak })),
        Just(Input::Abort(cause())),
    ];
    prop_oneof![
        12 => Just(Move::Succeed),
        4 => input.prop_map(Move::Input),
        1 => (0_u64..400_000).prop_map(Move::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_inputs_never_break_the_rules(consent: bool, verify: bool, keep_old: bool, moves in prop::collection::vec(any_move(), 0..80)) {
        let mut bench = Bench::with(Wishes { consent, verify, keep_old });
        for step in moves {
            match step {
                Move::Succeed if bench.under_way.is_some() => bench.succeed(),
                Move::Succeed => bench.wait(RETRY_WAIT),
                Move::Input(input) => bench.input(input),
                Move::Wait(ms) => bench.wait(Duration::from_millis(ms)),
            }
            let report = bench.recovery.report();
            // Either something is awaited, with a limit, or it is over.
            prop_assert_eq!(bench.recovery.poll_timeout().is_none(), bench.recovery.is_ended());
            if report.phase == Phase::Member {
                let mut expected = GOOD_WAY.iter().map(std::mem::discriminant).peekable();
                for begun in &bench.begun {
                    if expected.peek() == Some(&std::mem::discriminant(begun)) {
                        expected.next();
                    }
                }
                prop_assert!(expected.peek().is_none(), "a member without {:?}", bench.begun);
                prop_assert!(report.failed.is_none());
            }
            if report.phase == Phase::Member || report.verified {
                prop_assert_eq!(report.verified, verify);
                prop_assert_eq!(bench.begun.contains(&Step::Verify), verify);
            }
            if bench.recovery.is_ended() {
                prop_assert!(!bench.may_be_in);
                prop_assert_eq!(report.phase == Phase::Failed, report.failed.is_some());
                prop_assert_eq!(report.phase == Phase::Member, report.failed.is_none());
            }
            if bench.begun.contains(&Step::Detach) {
                prop_assert!(consent);
            }
            if bench.begun.contains(&Step::ShrinkOut) {
                prop_assert!(bench.begun.contains(&Step::Join));
            }
        }
    }
}
