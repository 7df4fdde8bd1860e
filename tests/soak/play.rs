//! Plays a round on real hosts: load, fault, repair, quiet, judgement. The thread that does this waits for commands; the clients and the network
//! between the hosts run on others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pgtandem::sandbox::{compare, demo};
use rustix::process::{Pid, Signal};

use crate::common::text;
use crate::hosts::{Site, send};
use crate::judge::{self, Entry, Found, Held, Told};
use crate::links;
use crate::load::{Load, SETUP};
use crate::person::{self, Step};
use crate::schedule::{Fault, Place, Process, Round, Way};

/// Until a number of writes must be acknowledged where somebody serves.
const WRITES_MAX: Duration = Duration::from_secs(60);
/// Until a person must have everything put right.
const REPAIR_MAX: Duration = Duration::from_secs(180);
/// Until nobody's session and nothing prepared is left.
const QUIET_MAX: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// What was seen of a round.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Broken promises; none: the round is green.
    pub wrong: Vec<String>,
    /// Why its fault could not be made here.
    pub skipped: Option<String>,
    /// What a person typed, with its end.
    pub typed: Vec<String>,
    pub ledger: Vec<Entry>,
}

impl Outcome {
    pub fn told(&self, told: Told) -> usize {
        self.ledger.iter().filter(|entry| entry.told == told).count()
    }
}

/// A cluster, and what earlier rounds left on it.
pub struct Stage {
    pub site: Site,
    older: i64,
}

/// Who does what when the fault comes. After an earlier round has cost the leader its PostgreSQL, and not its proxy, these are two hosts.
#[derive(Clone, Copy)]
struct Parts {
    leader: usize,
    /// Where the proxy that serves is.
    proxy: usize,
    hosts: usize,
}

impl Parts {
    fn of(self, place: &Place) -> usize {
        match place {
            Place::Leader => self.leader,
            Place::Follower(number) => (self.leader + 1 + number) % self.hosts,
        }
    }

    /// Where a process is found that belongs to the leader's part: the proxy is the one that serves.
    fn with(self, place: &Place, process: Process) -> usize {
        match (place, process) {
            (Place::Leader, Process::Proxy) => self.proxy,
            _ => self.of(place),
        }
    }

    /// Who takes over from the proxy: whoever comes after its host.
    fn next(self) -> usize {
        (self.proxy + 1) % self.hosts
    }
}

/// What is to be undone when the fault has lasted.
enum Undo {
    Nothing,
    Continue(Vec<Pid>),
    Heal,
    FreeDisk(usize),
}

impl Stage {
    pub async fn new(nodes: usize) -> Self {
        let mut stage = Self { site: Site::up(nodes).await, older: 0 };
        let mut typed = Vec::new();
        let host =
            stage.put_right(&mut typed).await.unwrap_or_else(|why| panic!("no fresh cluster: {why}: {typed:#?}"));
        let client = compare::connect(stage.site.hosts[host].port, "postgres").await.expect("a client");
        client.batch_execute(SETUP).await.expect("tables");
        stage
    }

    /// Never panics for what pgtandem does.
    pub async fn play(&mut self, round: &Round) -> Outcome {
        let mut outcome = Outcome::default();
        if let (Fault::FullDisk { .. }, Err(why)) = (&round.fault, &self.site.disks) {
            outcome.skipped = Some(why.clone());
            return outcome;
        }
        if let Err(why) = self.begin(round).await {
            outcome.wrong.push(format!("before the fault: {why}"));
            return outcome;
        }
        let ports: Vec<u16> = self.site.hosts.iter().map(|host| host.port).collect();
        let load = Load::start(round, &ports);
        let under_load = async {
            writes(&load, round.before).await?;
            self.fault(round, &load, &mut outcome.typed).await?;
            self.put_right(&mut outcome.typed).await?;
            writes(&load, round.after).await
        };
        let played = under_load.await;
        let (ledger, saw) = load.finish().await;
        outcome.ledger = ledger;
        outcome.wrong.extend(saw);
        let found = async {
            played?;
            // What was noticed only at a commit, such as a follower that is lost, is put right, too.
            let host = self.put_right(&mut outcome.typed).await?;
            self.found(round, host).await
        };
        match found.await {
            Ok(nodes) => {
                outcome.wrong.extend(judge::judge(&outcome.ledger, self.older, &nodes));
                self.older += nodes[0].found.iter().map(|found| found.rows).sum::<i64>();
            }
            Err(why) => outcome.wrong.push(why),
        }
        if outcome.wrong.is_empty() {
            outcome.wrong.extend(self.others_refuse().await);
        }
        self.site.forget_forks();
        outcome
    }

    async fn begin(&mut self, round: &Round) -> Result<(), String> {
        let host = self.put_right(&mut Vec::new()).await?;
        let client = compare::connect(self.site.hosts[host].port, "postgres").await.map_err(|e| e.to_string())?;
        let (number, clients) = (round.number, round.clients);
        let counters = format!("insert into soak.counter select {number}, g, 0 from generate_series(0, {clients}) g");
        client.batch_execute(&counters).await.map_err(|error| format!("{error:?}"))
    }

    fn parts(&mut self) -> Result<Parts, String> {
        let seen = self.site.look();
        let (proxy, status) = person::serving(&seen).ok_or("nobody served when the fault was to come")?;
        let leader = status.leader.as_deref().ok_or("nobody led when the fault was to come")?;
        Ok(Parts { leader: self.site.index(leader), proxy, hosts: self.site.hosts.len() })
    }

    /// Makes the fault and undoes it; when this returns only a person is missing.
    async fn fault(&mut self, round: &Round, load: &Load, typed: &mut Vec<String>) -> Result<(), String> {
        let parts = self.parts()?;
        let at = |place: &Place| parts.of(place);
        // With the leader's PostgreSQL alone the proxy copes: a person is needed where the proxy is lost.
        let (lost, first) = (parts.proxy, parts.next());
        let (undo, ms) = match &round.fault {
            Fault::Kill(victims) => {
                for (place, process) in victims {
                    self.site.kill(parts.with(place, *process), *process);
                }
                (Undo::Nothing, 0)
            }
            Fault::LoseLeadersHost => {
                self.cut(lost, Way::Both, 0);
                for process in [Process::Proxy, Process::Agent, Process::Postgres] {
                    self.site.kill(lost, process);
                }
                let dead = format!("--peer-is-dead {}", self.site.hosts[lost].name);
                self.take_over(first, &dead, typed).await?;
                (Undo::Heal, 0)
            }
            Fault::Hang { place, process, ms } => {
                (Undo::Continue(self.site.signal(parts.with(place, *process), *process, Signal::STOP)), *ms)
            }
            Fault::HangThroughTakeover => {
                let hung = self.site.signal(lost, Process::Proxy, Signal::STOP);
                let taken = self.take_over(first, "", typed).await;
                send(&hung, Signal::CONT);
                taken?;
                (Undo::Nothing, 0)
            }
            Fault::FalseStatement => {
                load.give_up(self.site.hosts[lost].port);
                self.cut(lost, Way::Both, 0);
                // By then it goes on alone; if another host led, its own PostgreSQL has taken over.
                writes(load, round.before).await?;
                let dead = format!("--peer-is-dead {}", self.site.hosts[lost].name);
                self.take_over(first, &dead, typed).await?;
                (Undo::Heal, 0)
            }
            Fault::RestartPostgres { place, mode } => {
                let output = self.site.restart_postgres(at(place), mode);
                typed.push(format!("pg_ctl restart -m {mode} of {}: {}", at(place), output.status));
                (Undo::Nothing, 0)
            }
            Fault::TornRecord { place, percent } => {
                self.site.kill(at(place), Process::Agent);
                self.site.tear_record(at(place), *percent);
                (Undo::Nothing, 0)
            }
            Fault::Partition { place, way, ms } => {
                self.cut(at(place), *way, 0);
                (Undo::Heal, *ms)
            }
            Fault::SlowLink { place, delay_ms, ms } => {
                self.cut(at(place), Way::Both, *delay_ms);
                (Undo::Heal, *ms)
            }
            Fault::FullDisk { place, ms } => {
                self.site.disks.as_ref().map_err(Clone::clone)?[at(place)].fill();
                (Undo::FreeDisk(at(place)), *ms)
            }
            Fault::Switch { to } => {
                let words = ["switch", &self.site.hosts[at(to)].name].map(str::to_owned);
                self.type_until_done(lost, &words, typed).await?;
                (Undo::Nothing, 0)
            }
        };
        tokio::time::sleep(Duration::from_millis(ms)).await;
        match undo {
            Undo::Nothing => {}
            Undo::Continue(pids) => send(&pids, Signal::CONT),
            Undo::Heal => self.site.links.heal(),
            Undo::FreeDisk(host) => {
                if let Ok(disks) = &self.site.disks {
                    disks[host].free();
                }
            }
        }
        Ok(())
    }

    /// Everything between this host and the others: held up, or delayed.
    fn cut(&self, host: usize, way: Way, delay_ms: u64) {
        let changed = links::Way { is_blocked: delay_ms == 0, delay_ms };
        for other in (0..self.site.hosts.len()).filter(|other| *other != host) {
            if way != Way::ToIt {
                self.site.links.set(host, other, changed);
            }
            if way != Way::FromIt {
                self.site.links.set(other, host, changed);
            }
        }
    }

    /// `pgtandem promote` on a host whose daemons run.
    async fn take_over(&self, host: usize, stated: &str, typed: &mut Vec<String>) -> Result<(), String> {
        let line = format!("promote {stated} --yes");
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        self.type_until_done(host, &words, typed).await
    }

    /// Types it again, as a person would, until it has worked.
    async fn type_until_done(&self, host: usize, words: &[String], typed: &mut Vec<String>) -> Result<(), String> {
        let began = Instant::now();
        loop {
            let (worked, said) = self.typed(host, words, typed);
            if worked {
                return Ok(());
            }
            if began.elapsed() > REPAIR_MAX {
                return Err(format!("{} did not work within {} s: {said}", words.join(" "), REPAIR_MAX.as_secs()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn typed(&self, host: usize, words: &[String], typed: &mut Vec<String>) -> (bool, String) {
        let output = self.site.command(host, words);
        let said = text(&output).trim().replace('\n', " | ");
        let name = &self.site.hosts[host].name;
        typed.push(format!("{name}$ pgtandem {}    # {}: {said}", words.join(" "), output.status));
        (output.status.success(), said)
    }

    /// Does what a person would, until all is well. Gives the host whose proxy serves.
    async fn put_right(&mut self, typed: &mut Vec<String>) -> Result<usize, String> {
        let began = Instant::now();
        loop {
            let seen = self.site.look();
            let step = person::next(&seen);
            let late = began.elapsed() > REPAIR_MAX;
            match &step {
                Step::Done(host) => return Ok(*host),
                _ if late => {
                    let seconds = REPAIR_MAX.as_secs();
                    return Err(format!(
                        "not well {seconds} s after the fault; next would be {step:?}; seen: {seen:#?}"
                    ));
                }
                Step::StartAgent(host) => self.site.start(*host, Process::Agent),
                Step::StartProxy(host) => self.site.start(*host, Process::Proxy),
                Step::Type(host, words) => drop(self.typed(*host, words, typed)),
                Step::Wait(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// What each node holds when nobody writes any more.
    async fn found(&mut self, round: &Round, host: usize) -> Result<Vec<Held>, String> {
        let began = Instant::now();
        loop {
            let seen = self.site.look();
            let clients = seen[host].status.as_ref().and_then(|status| Some(status.counters.as_ref()?.clients));
            if clients == Some(0) {
                break;
            }
            if began.elapsed() > QUIET_MAX {
                return Err(format!("{clients:?} sessions are left {} s after the last client", QUIET_MAX.as_secs()));
            }
            tokio::time::sleep(LOOK).await;
        }
        demo::wait_finished(self.site.layout()).await.map_err(|error| error.to_string())?;
        let mut nodes = Vec::new();
        for index in 0..self.site.hosts.len() {
            nodes.push(self.held(round, index).await.map_err(|error| format!("node{index}: {error:?}"))?);
        }
        let comparison = compare::compare(self.site.layout()).await.map_err(|error| error.to_string())?;
        match comparison.differences.first() {
            Some(_) => Err(comparison.differences.join("; ")),
            None => Ok(nodes),
        }
    }

    async fn held(&self, round: &Round, index: usize) -> Result<Held, compare::CompareError> {
        let port = self.site.layout().postgres_port(index);
        let client = compare::connect(port, "postgres").await?;
        let failed = |source| compare::CompareError::Postgres { what: "what a node holds".into(), port, source };
        let number = i64::try_from(round.number).expect("small");
        let found = "select client, n, count(*), count(distinct part) from soak.written where round = $1 group by 1, 2";
        let found = client.query(found, &[&number]).await.map_err(failed)?;
        let counters = "select client, value from soak.counter where round = $1";
        let counters = client.query(counters, &[&number]).await.map_err(failed)?;
        let older = client.query_one("select count(*) from soak.written where round <> $1", &[&number]).await;
        let prepared = client.query("select gid from pg_prepared_xacts", &[]).await.map_err(failed)?;
        let write = |row: &tokio_postgres::Row| Found {
            client: row.get(0),
            n: row.get(1),
            rows: row.get(2),
            parts: row.get(3),
        };
        Ok(Held {
            node: self.site.hosts[index].name.clone(),
            found: found.iter().map(write).collect(),
            counters: counters.iter().map(|row| (row.get(0), row.get(1))).collect::<BTreeMap<i32, i64>>(),
            older: older.map_err(failed)?.get(0),
            prepared: prepared.iter().map(|row| row.get(0)).collect(),
        })
    }

    /// Only one host's proxy lets clients in.
    async fn others_refuse(&self) -> Vec<String> {
        let mut serve = Vec::new();
        for host in &self.site.hosts {
            if compare::connect(host.port, "postgres").await.is_ok() {
                serve.push(host.name.as_str());
            }
        }
        if serve.len() == 1 { Vec::new() } else { vec![format!("clients are let in on: {}", serve.join(", "))] }
    }
}

async fn writes(load: &Load, more: usize) -> Result<(), String> {
    let (target, began) = (load.acknowledged() + more, Instant::now());
    while load.acknowledged() < target {
        if began.elapsed() > WRITES_MAX {
            let (seconds, missing) = (WRITES_MAX.as_secs(), target - load.acknowledged());
            return Err(format!("{missing} of {more} writes were not acknowledged within {seconds} s"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
