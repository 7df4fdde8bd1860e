//! Cancels at every moment: a statement that is sent after a cancel has been taken is never hit by it, and one that was hit has
//! left nothing on any server.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::Cluster;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::Client;

/// Cancels of each kind.
const ROUNDS: usize = 120;
/// Statements that are hit for certain.
const HITS: usize = 400;
const CANCELLED: &str = "57014";

/// A session that shows its key, which tokio-postgres keeps to itself.
struct Session {
    socket: TcpStream,
    key: Vec<u8>,
}

impl Session {
    fn connect(port: u16) -> Self {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the proxy listens");
        socket.set_read_timeout(Some(common::LIMIT)).unwrap();
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        body.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
        let length = u32::try_from(body.len() + 4).unwrap();
        socket.write_all(&[&length.to_be_bytes()[..], &body].concat()).unwrap();
        let mut session = Self { socket, key: Vec::new() };
        loop {
            match session.frame() {
                (b'K', body) => session.key = body,
                (b'Z', _) => return session,
                _ => {}
            }
        }
    }

    fn pid(&self) -> i32 {
        i32::from_be_bytes(self.key[..4].try_into().unwrap())
    }

    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut header = [0; 5];
        self.socket.read_exact(&mut header).expect("the session goes on");
        let length = u32::from_be_bytes(header[1..].try_into().unwrap());
        let mut body = vec![0; usize::try_from(length).unwrap() - 4];
        self.socket.read_exact(&mut body).expect("a whole message");
        (header[0], body)
    }

    /// `Ok`: the last command tag; `Err`: the SQLSTATE. Both must not come for one statement, in whatever order.
    fn run(&mut self, text: &str) -> Result<String, String> {
        let length = u32::try_from(text.len() + 5).unwrap();
        self.socket.write_all(&[b"Q", &length.to_be_bytes()[..], text.as_bytes(), &[0]].concat()).unwrap();
        let mut outcome = None;
        loop {
            let (tag, body) = self.frame();
            let found = match tag {
                b'C' => Ok(String::from_utf8_lossy(&body[..body.len() - 1]).into_owned()),
                b'E' => {
                    let mut fields = body.split(|byte| *byte == 0);
                    let code = fields.find_map(|field| field.strip_prefix(b"C")).unwrap_or_default();
                    Err(String::from_utf8_lossy(code).into_owned())
                }
                b'Z' => return outcome.expect("an answer"),
                _ => continue,
            };
            assert!(outcome.is_none() || text.contains(';'), "{text}: a second answer, {found:?} after {outcome:?}");
            outcome = Some(found);
        }
    }
}

/// Sends a cancel and does not wait until it has been taken, as drivers other than libpq do.
fn send_cancel(port: u16, key: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the proxy listens");
    socket.set_read_timeout(Some(common::LIMIT)).unwrap();
    let length = u32::try_from(8 + key.len()).unwrap();
    socket.write_all(&[&length.to_be_bytes()[..], &80_877_102_u32.to_be_bytes(), key].concat()).unwrap();
    socket
}

/// Sends a cancel and returns when the server has taken it, as libpq does.
fn cancel(port: u16, key: &[u8]) {
    let mut socket = send_cancel(port, key);
    let mut rest = Vec::new();
    assert_eq!(socket.read_to_end(&mut rest).expect("the proxy closes the connection"), 0, "{rest:?}");
}

/// Statements that are done in different ways, so that hidden ones stand before, between and after them.
fn statement(round: usize, i: usize) -> String {
    match round % 6 {
        0 => format!("insert into hit values ({i}, 'point')"),
        1 => format!("insert into hit (i) select {i} from pg_sleep(0.002)"),
        2 => {
            format!("set application_name = 'a{i}'; insert into hit values ({i}, current_setting('application_name'))")
        }
        3 => format!("insert into hit values ({i}, 'x'); update hit set t = 'y' where i = {i}"),
        4 => format!("select f({i}) from pg_sleep(0.001)"),
        _ => format!("begin; insert into hit values ({i}, 'block'); commit"),
    }
}

async fn exists(client: &Client, i: usize) -> bool {
    !client.query("select 1 from hit where i = $1::int8", &[&i64::try_from(i).unwrap()]).await.unwrap().is_empty()
}

fn writes(text: &str) -> bool {
    text.contains("insert")
}

/// A statement that ran while something could end it: done as a whole, or not at all.
async fn judge(client: &Client, text: &str, i: usize, outcome: &Result<String, String>) {
    match outcome {
        Ok(_) => assert_eq!(exists(client, i).await, writes(text), "{text}: {outcome:?}"),
        Err(code) => {
            assert_eq!(code, CANCELLED, "{text}");
            assert!(!exists(client, i).await, "{text} was cancelled and is there");
        }
    }
}

async fn prepared() -> (Cluster, Client) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client
        .batch_execute(
            "create table hit (i bigint primary key, t text);
             create function f(bigint) returns bigint language plpgsql as 'begin return $1; end'",
        )
        .await
        .unwrap();
    (cluster, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_hits_its_own_statement_or_none() {
    let (cluster, client) = prepared().await;
    let port = cluster.layout.proxy_port();
    let mut session = Session::connect(port);
    let key = session.key.clone();
    let mut random = StdRng::seed_from_u64(4);
    let mut hit = 0;
    for round in 0..ROUNDS {
        let text = statement(round, round);
        let wait = Duration::from_micros(random.random_range(0..6000));
        // The moment of the cancel is the seed's; nothing is concluded from how long anything takes.
        let canceller = std::thread::spawn({
            let key = key.clone();
            move || {
                std::thread::park_timeout(wait);
                cancel(port, &key);
            }
        });
        let outcome = session.run(&text);
        canceller.join().unwrap();
        hit += usize::from(outcome.is_err());
        if text.starts_with("begin") && outcome.is_err() {
            // Its transaction ended with the text or is still open and failed; it is over now.
            session.run("rollback").unwrap();
        }
        // Sent after the cancel was taken: these are another statement's business.
        for after in ["select 1", "select f(1)", "set application_name = 'after'", &statement(0, 1_000_000 + round)] {
            assert!(session.run(after).is_ok(), "round {round}: {after} was hit by the cancel of {text}");
        }
        judge(&client, &text, round, &outcome).await;
    }
    assert!(hit > 0, "no cancel of {ROUNDS} met its statement");
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}

/// PostgreSQL 15's postmaster signals a backend twice for one cancel, itself and its process group: the second signal must not meet
/// what the client sends when it has the error.
#[tokio::test(flavor = "multi_thread")]
async fn one_cancel_hits_one_statement() {
    let (cluster, _client) = prepared().await;
    let port = cluster.layout.proxy_port();
    let mut session = Session::connect(port);
    let (key, pid) = (session.key.clone(), session.pid());
    let watch = cluster.connect_node(0, "postgres").await;
    let sleeps = "select count(*) from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'";
    let sleeps = watch.prepare(sleeps).await.unwrap();
    for round in 0..HITS {
        let sleeper = std::thread::spawn(move || {
            let outcome = session.run("select pg_sleep(60)");
            // At once, as long as a late signal may be under way.
            let after = ["select pg_sleep(0.0005)", "update hit set t = 'x' where i = 1"].map(|text| session.run(text));
            (session, outcome, after)
        });
        common::wait_for("the statement runs", async || {
            watch.query_one(&sleeps, &[&pid]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        let cancel = send_cancel(port, &key);
        let (back, outcome, after) = sleeper.join().unwrap();
        session = back;
        assert_eq!(outcome, Err(CANCELLED.to_owned()));
        assert!(after.iter().all(Result::is_ok), "round {round}: {after:?} behind a statement that was cancelled");
        drop(cancel);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_cancel_backend_and_statement_timeout_leave_nothing_undecided() {
    let (cluster, client) = prepared().await;
    let port = cluster.layout.proxy_port();
    let mut session = Session::connect(port);
    let pid = session.pid();
    let mut random = StdRng::seed_from_u64(24);
    for round in 0..ROUNDS {
        let text = statement([0, 1, 3, 4][round % 4], round);
        let wait = Duration::from_micros(random.random_range(0..6000));
        let handle = std::thread::spawn(move || {
            let outcome = session.run(&text);
            (session, text, outcome)
        });
        tokio::time::sleep(wait).await;
        client.query_one("select pg_cancel_backend($1)", &[&pid]).await.unwrap();
        let (back, text, outcome) = handle.join().unwrap();
        session = back;
        // What came late was for a backend without a statement: this one is not hit.
        assert!(session.run("select 1").is_ok(), "after {text}");
        judge(&client, &text, round, &outcome).await;
    }
    // A24: the timer of a lone server, over everything that the statement does there.
    let mut timeouts = 0;
    for round in ROUNDS..2 * ROUNDS {
        let ms = random.random_range(1..8);
        session.run(&format!("set statement_timeout = {ms}")).unwrap();
        let text = statement([0, 1, 3, 4][round % 4], round);
        let outcome = session.run(&text);
        timeouts += usize::from(outcome.is_err());
        while session.run("reset statement_timeout").is_err() {}
        judge(&client, &text, round, &outcome).await;
    }
    assert!(timeouts > 0, "no statement ran into its timeout");
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}
