//! The clients of a round. What each of them sends follows from the seed; what it was told goes into its ledger. A client knows all hosts, as
//! libpq does with several in its connection string, and after each connection it looks whether its acknowledged writes are there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use pgtandem::sandbox::compare;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::error::DbError;
use tokio_postgres::{Client, Statement};
use tokio_util::sync::CancellationToken;

use crate::judge::{Entry, Told};
use crate::schedule::Round;

/// A client gives up a write, or a connection, after this.
const ANSWER_MAX: Duration = Duration::from_secs(20);
const CONNECT_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

pub const SETUP: &str = "create schema soak;
    create table soak.written (round bigint, client int, n int, part int, pad text);
    create table soak.counter (round bigint, client int, value bigint, primary key (round, client))";

/// How a write is sent. The table has no key, so that a write which is done twice is there twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Single,
    SinglePrepared,
    Block,
    BlockPrepared,
    /// BEGIN to COMMIT in one message.
    OneMessage,
    Serializable,
    RolledBack,
}

const STYLES: [Style; 9] = [
    Style::Single,
    Style::Single,
    Style::SinglePrepared,
    Style::SinglePrepared,
    Style::Block,
    Style::BlockPrepared,
    Style::OneMessage,
    Style::Serializable,
    Style::RolledBack,
];

#[derive(Clone, Debug, PartialEq)]
struct Write {
    n: i32,
    style: Style,
    rows: i32,
    counters: i32,
    pad: usize,
}

/// The `n`th write of a client. Pure.
fn write(round: &Round, client: i32, n: i32) -> Write {
    let seed = [round.seed, round.number, u64::from(client.unsigned_abs()), u64::from(n.unsigned_abs())];
    let mixed = seed.into_iter().fold(0_u64, |mixed, part| mixed.wrapping_mul(1_000_003).wrapping_add(part));
    let mut rng = StdRng::seed_from_u64(mixed);
    let style = STYLES[rng.random_range(0..STYLES.len())];
    let is_single = matches!(style, Style::Single | Style::SinglePrepared);
    Write {
        n,
        style,
        rows: if is_single { 1 } else { rng.random_range(1..=4) },
        counters: if is_single { 0 } else { rng.random_range(0..=2) },
        pad: rng.random_range(0..=round.row_bytes_max),
    }
}

#[test]
fn a_write_follows_from_the_seed() {
    let round = crate::schedule::round(3, 4);
    assert_eq!(write(&round, 1, 2), write(&round, 1, 2));
    let of_client = |client| (1..50).map(|n| write(&round, client, n)).collect::<Vec<_>>();
    assert_ne!(of_client(1), of_client(2));
}

/// The clients of one round, at work.
pub struct Load {
    clients: JoinSet<(Vec<Entry>, Vec<String>)>,
    acknowledged: Arc<AtomicUsize>,
    given_up: Arc<AtomicU16>,
    stop: CancellationToken,
}

impl Load {
    /// `ports`: of every host's proxy.
    pub fn start(round: &Round, ports: &[u16]) -> Self {
        let (acknowledged, given_up, stop) = (Arc::default(), Arc::default(), CancellationToken::new());
        let mut clients = JoinSet::new();
        for id in 1..=round.clients {
            let worker = Worker {
                round: round.clone(),
                id,
                ports: ports.to_vec(),
                session: None,
                ledger: Vec::new(),
                wrong: Vec::new(),
                acknowledged: Arc::clone(&acknowledged),
                given_up: Arc::clone(&given_up),
                stop: stop.clone(),
            };
            clients.spawn(worker.run());
        }
        Self { clients, acknowledged, given_up, stop }
    }

    pub fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// A person states wrongly that the host whose proxy is behind this port is dead: what it acknowledges from now on may be lost.
    pub fn give_up(&self, port: u16) {
        self.given_up.store(port, Ordering::SeqCst);
    }

    /// Everybody's ledger, when each has finished what it had begun, and what a client saw that it must not see.
    pub async fn finish(mut self) -> (Vec<Entry>, Vec<String>) {
        self.stop.cancel();
        let (mut ledger, mut wrong) = (Vec::new(), Vec::new());
        while let Some(client) = self.clients.join_next().await {
            let (entries, saw) = client.expect("a client that does not panic");
            ledger.extend(entries);
            wrong.extend(saw);
        }
        (ledger, wrong)
    }
}

struct Session {
    client: Client,
    port: u16,
    insert: Statement,
    raise: Statement,
}

struct Worker {
    round: Round,
    id: i32,
    ports: Vec<u16>,
    session: Option<Session>,
    ledger: Vec<Entry>,
    wrong: Vec<String>,
    acknowledged: Arc<AtomicUsize>,
    given_up: Arc<AtomicU16>,
    stop: CancellationToken,
}

impl Worker {
    async fn run(mut self) -> (Vec<Entry>, Vec<String>) {
        let mut n = 0;
        while !self.stop.is_cancelled() {
            if self.session.is_none() {
                self.session = self.connect().await;
            }
            let Some(session) = &self.session else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            n += 1;
            let write = write(&self.round, self.id, n);
            let told = timeout(ANSWER_MAX, session.write(&self.round, self.id, &write)).await;
            let told = told.unwrap_or(Told::Unknown);
            let mut counts_as = told;
            if told == Told::Committed {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                if self.given_up.load(Ordering::SeqCst) == session.port {
                    counts_as = Told::Unknown;
                }
            }
            let Write { n, rows, counters, .. } = write;
            self.ledger.push(Entry { client: self.id, n, rows, counters, told: counts_as });
            if told != Told::Committed && !session.is_usable().await {
                self.session = None;
            }
        }
        (self.ledger, self.wrong)
    }

    /// A session on the first host that lets this client in.
    async fn connect(&mut self) -> Option<Session> {
        for port in self.ports.clone() {
            let Ok(Ok(client)) = timeout(CONNECT_MAX, compare::connect(port, "postgres")).await else { continue };
            if let Ok(Ok(session)) = timeout(CONNECT_MAX, self.begin(client, port)).await {
                return Some(session);
            }
        }
        None
    }

    async fn begin(&mut self, client: Client, port: u16) -> Result<Session, tokio_postgres::Error> {
        let number = i64::try_from(self.round.number).expect("small");
        let acknowledged = self.ledger.iter().filter(|entry| entry.told == Told::Committed);
        let acknowledged: Vec<i32> = acknowledged.map(|entry| entry.n).collect();
        let sql = "select count(distinct n) from soak.written where round = $1 and client = $2 and n = any($3)";
        let there: i64 = client.query_one(sql, &[&number, &self.id, &acknowledged]).await?.get(0);
        if usize::try_from(there) != Ok(acknowledged.len()) {
            let all = acknowledged.len();
            self.wrong.push(format!(
                "port {port} serves client {} and has {there} of its {all} acknowledged writes",
                self.id
            ));
        }
        let insert = "insert into soak.written values ($1, $2, $3, $4, $5)";
        let raise = "update soak.counter set value = value + 1 where round = $1 and client = $2";
        let (insert, raise) = (client.prepare(insert).await?, client.prepare(raise).await?);
        Ok(Session { client, port, insert, raise })
    }
}

/// Why a write did not succeed.
struct Failed {
    by: Option<DbError>,
}

impl From<tokio_postgres::Error> for Failed {
    fn from(error: tokio_postgres::Error) -> Self {
        Self { by: error.as_db_error().cloned() }
    }
}

impl Session {
    async fn write(&self, round: &Round, client: i32, write: &Write) -> Told {
        // From here on the write may become true without an answer.
        let commits = AtomicBool::new(false);
        match self.send(round, client, write, &commits).await {
            Ok(()) if write.style == Style::RolledBack => Told::Failed,
            Ok(()) => Told::Committed,
            Err(Failed { by: None }) if commits.load(Ordering::Relaxed) => Told::Unknown,
            Err(Failed { .. }) => Told::Failed,
        }
    }

    async fn send(&self, round: &Round, client: i32, write: &Write, commits: &AtomicBool) -> Result<(), Failed> {
        let number = i64::try_from(round.number).expect("small");
        let Write { n, style, rows, counters, pad } = *write;
        let pad = "x".repeat(pad);
        let insert = |part: i32| format!("insert into soak.written values ({number}, {client}, {n}, {part}, '{pad}')");
        let raise =
            |of: i32| format!("update soak.counter set value = value + 1 where round = {number} and client = {of}");
        let raised: Vec<i32> = [client, 0].into_iter().take(usize::try_from(counters).expect("small")).collect();
        let statements = || (1..=rows).map(insert).chain(raised.iter().map(|of| raise(*of)));
        match style {
            Style::Single => {
                commits.store(true, Ordering::Relaxed);
                self.client.batch_execute(&insert(1)).await?;
                return Ok(());
            }
            Style::SinglePrepared => {
                commits.store(true, Ordering::Relaxed);
                self.client.execute(&self.insert, &[&number, &client, &n, &1, &pad]).await?;
                return Ok(());
            }
            Style::OneMessage => {
                commits.store(true, Ordering::Relaxed);
                let text: Vec<String> = statements().collect();
                self.client.batch_execute(&format!("begin; {}; commit", text.join("; "))).await?;
                return Ok(());
            }
            Style::Serializable => self.client.batch_execute("begin isolation level serializable").await?,
            Style::Block | Style::BlockPrepared | Style::RolledBack => self.client.batch_execute("begin").await?,
        }
        if style == Style::BlockPrepared {
            for part in 1..=rows {
                self.client.execute(&self.insert, &[&number, &client, &n, &part, &pad]).await?;
            }
            for of in raised {
                self.client.execute(&self.raise, &[&number, &of]).await?;
            }
        } else {
            for statement in statements() {
                self.client.batch_execute(&statement).await?;
            }
        }
        if style == Style::RolledBack {
            return Ok(self.client.batch_execute("rollback").await?);
        }
        commits.store(true, Ordering::Relaxed);
        Ok(self.client.batch_execute("commit").await?)
    }

    /// Whether it can go on; ends a transaction that is open.
    async fn is_usable(&self) -> bool {
        !self.client.is_closed()
            && matches!(timeout(ANSWER_MAX, self.client.batch_execute("rollback")).await, Ok(Ok(())))
    }
}
