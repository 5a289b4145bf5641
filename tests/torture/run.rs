//! A run from beginning to end: start everything, let everybody work, judge all along, heal, look once more, report.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    change_driver::ChangeDriver,
    checkers::Checker,
    dice::ScheduleRng,
    faults::{FaultInjector, FaultKind},
    initial_keys,
    judge::{Judge, JudgeRule, Nanos},
    key_lives::KeyOwnerWorker,
    report::FinishedRun,
    shared_state::SharedState,
    test_bed::{TestBed, TestBedConfig},
};

/// How often what was recorded is judged.
const JUDGE_EVERY: Duration = Duration::from_millis(500);
/// Judged when so old: by then what came soon after it is known as well.
const JUDGE_DELAY: Nanos = 1_200_000_000;
/// How soon each replica must answer again when nothing is wrong any more.
const RECOVERY: Duration = Duration::from_secs(30);

/// What a run is to be.
#[derive(Clone, Debug)]
pub(crate) struct TortureRun {
    pub(crate) seed: u64,
    pub(crate) length: Duration,
    pub(crate) squads: usize,
    pub(crate) plan: TestBedConfig,
    /// What may go wrong.
    pub(crate) faults: Vec<FaultKind>,
    /// The one replica that is struck; None = any.
    pub(crate) victim: Option<usize>,
    /// Whether it ends when the first rule is broken: the one that all others are for.
    pub(crate) until_allowed: bool,
}

/// What came of it.
pub(crate) struct RunResult {
    pub(crate) held: bool,
    /// When it was noticed that the first rule was broken.
    pub(crate) noticed: Option<Duration>,
}

impl TortureRun {
    /// Does it all.
    pub(crate) fn run(&self) -> RunResult {
        let mut dice = ScheduleRng::new(self.seed);
        let world = Arc::new(TestBed::start(&self.plan));
        let clients = self.clients(&world, &mut dice);
        let lanes = self.lanes(&world, &mut dice);
        let tender = start_restarter(world.clone());
        let mut judge = Judge::default();
        let began = Instant::now();
        let mut noticed = None;
        while began.elapsed() < self.length && !(self.until_allowed && noticed.is_some()) {
            std::thread::sleep(JUDGE_EVERY);
            self.judge(&world, &mut judge, false);
            if judge.count(JudgeRule::AllowedAfterNarrowing) > 0 {
                noticed.get_or_insert_with(|| began.elapsed());
            }
            assert!(
                !lanes.iter().any(JoinHandle::is_finished) || world.are_faults_stopped(),
                "the faults have ended"
            );
        }
        let length = began.elapsed();
        world.stop_faults();
        for lane in lanes {
            lane.join().unwrap();
        }
        self.recover(&world, &mut judge);
        world.field.stop();
        world.runtime.block_on(async {
            for client in clients {
                client.await.unwrap();
            }
        });
        world.audit_all();
        self.judge(&world, &mut judge, true);
        if judge.count(JudgeRule::AllowedAfterNarrowing) > 0 {
            noticed.get_or_insert(length);
        }
        tender.stop();
        self.end(&world, &mut judge);
        let held = FinishedRun { seed: self.seed, judge: &judge, world: &world, length }.print();
        if !held && !self.until_allowed {
            self.keep_logs(&world);
        }
        RunResult { held, noticed }
    }

    fn clients(&self, world: &TestBed, dice: &mut ScheduleRng) -> Vec<tokio::task::JoinHandle<()>> {
        let field = &world.field;
        let board = Arc::new(world.runtime.block_on(initial_keys::create_targets(field, self.squads, dice)));
        let mut clients = Vec::new();
        let _context = world.runtime.enter();
        let callers = field.operator();
        for number in 0..self.squads {
            for replica in 0..field.replicas.len() {
                let (field, board, dice) = (field.clone(), board.clone(), dice.split());
                let checker = Checker { field, board, squad: number, replica, dice };
                clients.push(tokio::spawn(checker.work()));
            }
            let owner = ChangeDriver { field: field.clone(), callers: callers.clone(), dice: dice.split() };
            clients.push(tokio::spawn(
                KeyOwnerWorker { owner, board: board.clone(), number, lives: 0 }.run_lives(),
            ));
        }
        clients
    }

    fn lanes(&self, world: &Arc<TestBed>, dice: &mut ScheduleRng) -> Vec<JoinHandle<()>> {
        let of =
            |kinds: &[FaultKind]| self.faults.iter().copied().filter(|fault| kinds.contains(fault)).collect();
        [of(&FaultKind::AT_REPLICAS), of(&FaultKind::AT_DATABASE)]
            .into_iter()
            .filter(|faults: &Vec<_>| !faults.is_empty())
            .map(|faults| {
                let lane =
                    FaultInjector { world: world.clone(), dice: dice.split(), faults, victim: self.victim };
                std::thread::spawn(move || lane.inject_until_stopped())
            })
            .collect()
    }

    /// Judges what has settled by now, or all there is.
    fn judge(&self, world: &TestBed, judge: &mut Judge, all: bool) {
        let now = world.field.now();
        let until = if all { Nanos::MAX } else { now.saturating_sub(JUDGE_DELAY) };
        let mut checks = world.field.take_checks(until);
        judge.judge_checks(&world.field.history(), &mut checks);
        for violation in world.take_found() {
            judge.report_violation(violation.rule, violation.at, || violation.story);
        }
        for (at, story) in std::mem::take(&mut world.field.records().refusals) {
            judge.report_violation(JudgeRule::WrongDenial, at, || story);
        }
        for (at, story) in std::mem::take(&mut world.field.records().false_reports) {
            judge.report_violation(JudgeRule::FalseReport, at, || story);
        }
    }

    /// Waits until each replica allows again.
    fn recover(&self, world: &TestBed, judge: &mut Judge) {
        let healed = world.field.now();
        let end = Instant::now() + RECOVERY;
        for at in 0..world.field.replicas.len() {
            let replica = u8::try_from(at).unwrap();
            while judge.gaps.last(replica).is_none_or(|last| last < healed) && Instant::now() < end {
                std::thread::sleep(JUDGE_EVERY);
                self.judge(world, judge, false);
            }
            if judge.gaps.last(replica).is_none_or(|last| last < healed) {
                judge.report_violation(JudgeRule::NoAnswer, world.field.now(), || {
                    format!("replica {at} has allowed nothing for {RECOVERY:?}")
                });
            }
        }
    }

    /// Ends the replicas in order, and reads what they have to say.
    fn end(&self, world: &TestBed, judge: &mut Judge) {
        for replica in &world.field.replicas {
            let code = replica.stop();
            if code != 0 {
                judge.report_violation(JudgeRule::NoAnswer, world.field.now(), || {
                    format!("{} was told to end, and ended with {code}", replica.name)
                });
            }
            for bug in replica.find_log_errors() {
                judge.report_violation(JudgeRule::NoAnswer, world.field.now(), || {
                    format!("{}: {bug}", replica.name)
                });
            }
        }
    }

    /// The logs of a run that did not hold stay, for whoever wants to know why.
    fn keep_logs(&self, world: &TestBed) {
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("torture-{}", self.seed));
        std::fs::create_dir_all(&folder).unwrap();
        for replica in &world.field.replicas {
            let _ = std::fs::copy(replica.log(), folder.join(&replica.name));
        }
        for (at, log) in world.cluster().logs().into_iter().enumerate() {
            let _ = std::fs::copy(log, folder.join(format!("postgres-{at}")));
        }
        println!("the logs are in {}", folder.display());
    }
}

/// A thread that starts replicas again that have ended.
struct ReplicaRestarter {
    thread: JoinHandle<()>,
    world: Arc<TestBed>,
    stop: Arc<std::sync::atomic::AtomicBool>,
}

fn start_restarter(world: Arc<TestBed>) -> ReplicaRestarter {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (world, stop) = (world.clone(), stop.clone());
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let field: &SharedState = &world.field;
                field.replicas.iter().for_each(crate::replicas::ReplicaProcess::restart_if_ended);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    ReplicaRestarter { thread, world, stop }
}

impl ReplicaRestarter {
    fn stop(self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap();
        drop(self.world);
    }
}
