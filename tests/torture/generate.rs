//! From a seed to a schedule: tables, clients, transactions. The same seed gives the same schedule.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::schedule::{End, Kind, Round, Schedule, Sent, Statement, Transaction};
use crate::statements::{self, Profile};
use crate::tables::{self, Table};

/// Transactions of one round, over all clients: at least, and as a share of all, because comparing takes time, too.
const ROUND_MIN: usize = 60;
const ROUNDS: usize = 40;

const BEGINS: [&str; 12] = [
    "begin",
    "begin",
    "begin",
    "begin",
    "begin isolation level read committed",
    "begin isolation level repeatable read",
    "begin isolation level repeatable read",
    "begin isolation level serializable",
    "begin isolation level serializable",
    "begin isolation level serializable, deferrable",
    "begin isolation level serializable read only deferrable",
    "begin read only",
];

pub fn schedule(seed: u64, transactions: usize) -> Schedule {
    let mut rng = StdRng::seed_from_u64(seed);
    // Every other seed has a schema that stands still, so that each error there must be one that a lone server gives.
    let profile = Profile { changes_schema: seed.is_multiple_of(2), with_once: seed.is_multiple_of(2) };
    let with_triggers = profile.with_once && rng.random_bool(0.3);
    let (tables, mut setup) = tables::make(&mut rng, with_triggers);
    setup.extend([
        "create sequence counter cache 5".to_owned(),
        "create table numbered (n bigserial primary key, v int)".to_owned(),
        // Each explicit transaction that writes leaves its number here first.
        "create table ledger (client int, n int, primary key (client, n))".to_owned(),
        "create function opaque() returns bigint language sql volatile as 'select count(*) from ledger'".to_owned(),
        "create function bump(t text, g int) returns void language plpgsql as \
         $$ begin execute format('update %I set v = v + 1 where grp = %s', t, g); end $$"
            .to_owned(),
        "create procedure bump_all(t text, g int) language plpgsql as \
         $$ begin execute format('update %I set v = v + 1 where grp = %s', t, g); end $$"
            .to_owned(),
    ]);
    let clients = rng.random_range(4..=8);
    let mut numbers = vec![0; clients];
    let mut rounds = Vec::new();
    let mut left = transactions;
    while left > 0 {
        let now = left.min(ROUND_MIN.max(transactions / ROUNDS));
        left -= now;
        let mut round = Round { clients: vec![Vec::new(); clients] };
        for i in 0..now {
            let client = i % clients;
            numbers[client] += 1;
            round.clients[client].push(transaction(&mut rng, &tables, profile, client, numbers[client]));
        }
        rounds.push(round);
    }
    Schedule { seed, setup, rounds, changes_schema: profile.changes_schema }
}

fn transaction(rng: &mut StdRng, tables: &[Table], profile: Profile, client: usize, number: i32) -> Transaction {
    if rng.random_bool(0.25) {
        let statements = (0..rng.random_range(1..=2)).map(|_| single(rng, tables, profile)).collect();
        return Transaction { begin: None, statements, end: End::Commit };
    }
    let begin = *BEGINS.choose(rng).expect("not empty");
    let ledger = Statement {
        text: format!("insert into ledger values ({client}, {number})"),
        kind: Kind::Insert,
        sent: Sent::Text,
    };
    let mut statements = Vec::new();
    if !begin.contains("read only") {
        statements.push(ledger);
    }
    let mut savepoints = 0;
    for _ in 0..rng.random_range(1..=5) {
        match rng.random_range(0..12) {
            0 => {
                statements.push(control(format!("savepoint s{savepoints}")));
                savepoints += 1;
            }
            1 if savepoints > 0 => {
                let at = rng.random_range(0..savepoints);
                statements.push(control(format!("rollback to s{at}")));
                savepoints = at + 1;
            }
            2 if savepoints > 0 => {
                savepoints -= 1;
                statements.push(control(format!("release s{savepoints}")));
            }
            3 if rng.random_bool(0.2) => {
                let settings = [
                    "set local work_mem = '1MB'",
                    "set local timezone = 'Asia/Tokyo'",
                    "set local extra_float_digits = 3",
                    "set constraints all deferred",
                ];
                statements.push(control((*settings.choose(rng).expect("not empty")).to_owned()));
            }
            _ => {
                let statement = statements::any(rng, tables, profile, true);
                // The driver does not survive a COPY that fails before its data, on any server.
                if !(begin.contains("read only") && statement.kind == Kind::Copy) {
                    statements.push(statement);
                }
            }
        }
    }
    let end = if rng.random_bool(0.85) { End::Commit } else { End::Rollback };
    Transaction { begin: Some(begin.to_owned()), statements, end }
}

fn control(text: String) -> Statement {
    Statement { text, kind: Kind::Control, sent: Sent::Text }
}

/// A statement outside a block, or several in one message.
fn single(rng: &mut StdRng, tables: &[Table], profile: Profile) -> Statement {
    let mut statement = statements::any(rng, tables, profile, false);
    if rng.random_bool(0.15) && matches!(statement.sent, Sent::Text) {
        let second = statements::any(rng, tables, profile, false);
        if matches!(second.sent, Sent::Text) {
            statement.text = format!("{}; {}", statement.text, second.text);
            statement.kind = statement.kind.max(second.kind);
        }
    }
    statement
}
