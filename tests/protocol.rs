//! The wire protocol, message by message: a client of our own sends the same through the proxy and to a lone server, and gets
//! the same answers; afterwards the servers behind the proxy are identical.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::Cluster;

const CASES: &str = include_str!("protocol/cases.txt");

const TABLES: [&str; 6] = [
    "drop table if exists df",
    "drop table if exists a",
    "drop table if exists s",
    "create table a (i int primary key, b text)",
    "create table s (a serial primary key, b text, c timestamptz default '2020-01-01')",
    "create table df (i int primary key, r int references df deferrable initially deferred)",
];

/// A client that speaks in frames.
struct Raw {
    socket: TcpStream,
}

impl Raw {
    fn connect(port: u16) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", port)).expect("a server listens");
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut raw = Self { socket };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        body.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
        let length = u32::try_from(body.len() + 4).unwrap();
        raw.send(&[&length.to_be_bytes()[..], &body].concat());
        raw.until(b'Z');
        raw
    }

    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server reads");
    }

    fn frame(&mut self) -> Result<(u8, Vec<u8>), std::io::Error> {
        let mut header = [0; 5];
        self.socket.read_exact(&mut header)?;
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        let mut body = vec![0; usize::try_from(length).unwrap() - 4];
        self.socket.read_exact(&mut body)?;
        Ok((header[0], body))
    }

    /// Answers up to this one or `ReadyForQuery`, one per line.
    fn until(&mut self, tag: u8) -> String {
        let mut said = String::new();
        loop {
            match self.frame() {
                // Reported at another moment than by a lone server.
                Ok((b'S', _)) => {}
                Ok((b'A', body)) => {
                    let _ = writeln!(said, "A {}", body[4..].escape_ascii());
                }
                Ok((found, body)) => {
                    said.push_str(&show(found, &body));
                    if found == tag || found == b'Z' {
                        return said;
                    }
                }
                Err(error) => {
                    let _ = writeln!(said, "no answer: {error}");
                    return said;
                }
            }
        }
    }

    fn query(&mut self, text: &str) -> String {
        self.send(&message(b'Q', &zero(text.as_bytes())));
        self.until(b'Z')
    }

    /// Runs one case of the file; gives all answers.
    fn play(&mut self, case: &str) -> String {
        let (mut out, mut said) = (Vec::new(), String::new());
        for line in case.lines().filter(|line| !line.is_empty()) {
            if let Some(answers) = line.strip_prefix("> ") {
                self.send(&std::mem::take(&mut out));
                for answer in answers.bytes() {
                    said.push_str(&self.until(answer));
                }
            } else {
                out.extend(from_line(line));
            }
        }
        said
    }
}

/// An answer as one line; of errors and notices only what a client's user sees.
fn show(tag: u8, body: &[u8]) -> String {
    let mut line = String::from(char::from(tag));
    if matches!(tag, b'E' | b'N') {
        for field in body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
            if b"SCMPDHW".contains(&field[0]) && !field.windows(8).any(|part| part == b"pgtandem") {
                let _ = write!(line, " {}", String::from_utf8_lossy(field));
            }
        }
    } else if tag == b'T' {
        // Tables and columns have other numbers on another server.
        let mut rest = &body[2..];
        while let Some(end) = rest.iter().position(|byte| *byte == 0) {
            let _ = write!(line, " {}{:?}", String::from_utf8_lossy(&rest[..end]), &rest[end + 7..end + 19]);
            rest = &rest[end + 19..];
        }
    } else if body.len() > 1000 {
        let _ = write!(line, " {} bytes", body.len());
    } else {
        let _ = write!(line, " {}", body.escape_ascii());
    }
    line.push('\n');
    line
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag], &length.to_be_bytes()[..], body].concat()
}

fn zero(text: &[u8]) -> Vec<u8> {
    [text, b"\0"].concat()
}

fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match rest.next() {
            Some(b't') => out.push(b'\t'),
            Some(b'n') => out.push(b'\n'),
            Some(b'x') => {
                let digits: String = rest.by_ref().take(2).map(char::from).collect();
                out.push(u8::from_str_radix(&digits, 16).unwrap());
            }
            Some(other) => out.push(other),
            None => panic!("{text}"),
        }
    }
    out
}

/// Numbers with a comma between, after their count.
fn numbers<const WIDTH: usize>(list: &str) -> Vec<u8> {
    let all: Vec<u32> = list.split(',').filter(|n| !n.is_empty()).map(|n| n.parse().unwrap()).collect();
    let mut out = u16::try_from(all.len()).unwrap().to_be_bytes().to_vec();
    for number in all {
        out.extend_from_slice(&number.to_be_bytes()[4 - WIDTH..]);
    }
    out
}

fn from_line(line: &str) -> Vec<u8> {
    let tag = line.as_bytes()[0];
    let rest = line.get(2..).unwrap_or_default();
    let parts: Vec<&str> = rest.split('|').collect();
    let body = match tag {
        b'Q' | b'f' => zero(&unescape(rest)),
        b'd' => unescape(rest),
        b'P' => [zero(&unescape(parts[0])), zero(&unescape(parts[2])), numbers::<4>(parts[1])].concat(),
        b'B' => {
            let mut body = [zero(parts[0].as_bytes()), zero(parts[1].as_bytes()), numbers::<2>(parts[2])].concat();
            body.extend(u16::try_from(parts.len() - 4).unwrap().to_be_bytes());
            for value in &parts[4..] {
                if *value == "\\N" {
                    body.extend((-1_i32).to_be_bytes());
                } else {
                    let value = unescape(value);
                    body.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
                    body.extend(value);
                }
            }
            body.extend(numbers::<2>(parts[3]));
            body
        }
        b'D' | b'C' => [&rest.as_bytes()[..1], &zero(rest.get(2..).unwrap_or_default().as_bytes())].concat(),
        b'E' => [zero(parts[0].as_bytes()), parts[1].parse::<u32>().unwrap().to_be_bytes().to_vec()].concat(),
        _ => Vec::new(),
    };
    message(tag, &body)
}

/// Cases with many messages, which are not written out.
fn long_cases() -> Vec<(String, String)> {
    let mut inserts = String::from("P n||insert into s(b,c) values ($1,now())\n");
    let mut syncs = String::new();
    let mut pipeline = String::new();
    for i in 0..200 {
        let _ = writeln!(inserts, "B |n|||{i}\nE |0");
        let _ = writeln!(syncs, "P ||insert into a values ($1,'x')\nB ||||{}\nD P\nE |0\nS", i % 7);
        let _ = writeln!(pipeline, "P ||select repeat('x',100000), $1::int\nB ||||{i}\nD P\nE |0");
    }
    vec![
        ("many executions".to_owned(), inserts + "S\n> Z\nQ select count(*) from s\n> Z\n"),
        ("many batches".to_owned(), format!("{syncs}> {}\nQ select * from a\n> Z\n", "Z".repeat(200))),
        // More than sockets hold, in both directions: neither side may wait for the other.
        ("a large pipeline".to_owned(), pipeline + "S\n> Z\n"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_a_lone_server() {
    let cluster = common::cluster();
    let lone = Cluster::up(&["--nodes", "1"]);
    let ports = [lone.layout.postgres_port(0), cluster.layout.proxy_port()];
    let written = CASES.split("\n== ").skip(1).map(|case| {
        let (name, lines) = case.split_once('\n').unwrap();
        (name.to_owned(), lines.to_owned())
    });
    let mut different = Vec::new();
    for (name, case) in written.chain(long_cases()) {
        let [expected, found] = ports.map(|port| {
            let mut setup = Raw::connect(port);
            setup.query("set client_min_messages = error");
            for text in TABLES {
                let said = setup.query(text);
                assert!(!said.starts_with('E'), "{text}: {said}");
            }
            drop(setup);
            Raw::connect(port).play(&case)
        });
        if expected != found {
            different.push(format!("== {name}\n-- a lone server:\n{expected}-- through the proxy:\n{found}"));
        }
        cluster.assert_identical().await;
    }
    cluster.wait_member(1, true).await;
    assert!(different.is_empty(), "{}\n{}", different.join("\n"), cluster.logs());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_fails_its_block_and_changes_nothing() {
    let cluster = common::cluster();
    let mut client = Raw::connect(cluster.layout.proxy_port());
    for text in ["create table d (i int primary key, at timestamptz)", "insert into d values (1, '2020-01-01')"] {
        assert!(client.query(text).starts_with('C'), "{text}");
    }
    // A refused statement alone leaves the session as it was.
    let said = client.query("load 'plpgsql'");
    assert!(said.contains("C0A000") && said.contains("HPut the library") && said.ends_with("Z I\n"), "{said}");
    // Inside a block it makes the block fail, by both protocols.
    for refused in ["Q load 'plpgsql'\n> Z\n", "P ||load 'plpgsql'\nB |||\nE |0\nS\n> Z\n"] {
        assert!(client.query("begin").ends_with("Z T\n"));
        client.query("insert into d values (2, '2020-01-01')");
        let said = client.play(refused);
        assert!(said.contains("C0A000") && said.ends_with("Z E\n"), "{said}");
        assert!(client.query("select 1").contains("C25P02"));
        assert_eq!(client.query("commit"), "C ROLLBACK\\x00\nZ I\n");
    }
    // In a batch with a write before it, that write is undone.
    let said =
        client.play("P ||insert into d values (3, null)\nB |||\nE |0\nP ||load 'plpgsql'\nB |||\nE |0\nS\n> Z\n");
    assert!(said.contains("C0A000") && said.ends_with("Z I\n"), "{said}");
    // Times of the clock in data.
    for copy in [
        "Q copy d from stdin\n> G\nd 4\\t2020-01-01\\n5\\tno\nd w\\n6\\t2021-01-01\\n\nc\n> Z\n",
        "P ||copy d from stdin\nB |||\nE |0\nS\n> G\nd 4\\tnow\\n\nc\nS\n> Z\n",
    ] {
        let said = client.play(copy);
        assert!(said.contains("C0A000") && said.contains("'now'") && said.ends_with("Z I\n"), "{said}");
    }
    let update =
        "P ||update d set at = $1::text::timestamptz where i = $2\nB ||1,1||now|\\x00\\x00\\x00\\x01\nE |0\nS\n> Z\n";
    let said = client.play(update);
    assert!(said.contains("C0A000"), "{said}");
    assert_eq!(client.query("select i from d").matches("D ").count(), 1);
    assert!(client.query("insert into d values (9, now())").starts_with('C'));
    cluster.assert_identical().await;
}

/// A parameter that only the client's RETURNING uses is no parameter of the follower's text: it must not lose the follower.
#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_only_returning_uses_do_not_cost_a_follower() {
    let cluster = common::cluster();
    let mut client = Raw::connect(cluster.layout.proxy_port());
    client.query("create type mood as enum ('good', 'bad')");
    client.query("create table e (i int primary key, m mood, b text)");
    for case in [
        "P ||insert into e values ($1, 'good', 'x') returning i + $2\nB ||||1|5\nE |0\nS\n> Z\n",
        "P |23,25|insert into e values ($1, 'good', 'x') returning $2\nB ||1,0||\\x00\\x00\\x00\\x02|t\nE |1\nS\n> Z\n",
        "P ||insert into e values ($1, $2, $3) returning $4::text\nB ||||3|bad|y|z\nE |0\nS\n> Z\n",
        "P ||update e set b = $2 where i = $1 returning $3::int\nB ||||3|changed|7\nE |0\nS\n> Z\n",
    ] {
        let said = client.play(case);
        assert!(said.ends_with("Z I\n") && !said.contains("\nE "), "{said}");
    }
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
    let node = cluster.connect_node(1, "postgres").await;
    let rows: i64 = node.query_one("select count(*) from e", &[]).await.unwrap().get(0);
    assert_eq!(rows, 3);
}

/// BEGIN is answered before the server has it; the server must have it soon although the client sends nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_begin_reaches_the_server_although_nothing_follows_it() {
    let cluster = common::cluster();
    let mut client = Raw::connect(cluster.layout.proxy_port());
    assert_eq!(client.query("begin"), "C BEGIN\\x00\nZ T\n");
    let leader = cluster.connect_node(0, "postgres").await;
    let idle = "select count(*) from pg_stat_activity where state = 'idle in transaction' and usename = 'postgres'";
    common::wait_for("a session that is idle in a transaction", async || {
        leader.query_one(idle, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 1)
    })
    .await;
    // A second one only warns, and what comes together with a BEGIN is inside its transaction.
    assert!(client.query("begin").contains("C25001"));
    assert!(client.query("rollback").ends_with("Z I\n"));
    let said = client.play("Q begin\nQ create table begun (i int primary key)\nQ nonsense\nQ commit\n> ZZZZ\n");
    assert!(said.contains("C ROLLBACK") && said.ends_with("Z I\n"), "{said}");
    assert!(client.query("select 'begun'::regclass").contains("C42P01"));
}

/// The leader has the shape of such a write prepared, and looks at its names again when it has waited for a change of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_is_in_the_clients_text_although_the_leader_has_another() {
    let cluster = common::cluster();
    let mut client = Raw::connect(cluster.layout.proxy_port());
    let mut other = Raw::connect(cluster.layout.proxy_port());
    client.query("create table p (i int primary key, a int, b int)");
    client.query("insert into p values (1, 1, 1)");
    for number in [1, 20, 300, 4000] {
        assert!(client.query(&format!("update p set a = {number}, b = b + 1 where i = 1")).starts_with("C UPDATE 1"));
    }
    assert!(other.query("begin").starts_with('C') && other.query("alter table p drop b").starts_with('C'));
    client.send(&message(b'Q', &zero(b"update p set a = 50000, b = b + 1 where i = 1")));
    let leader = cluster.connect_node(0, "postgres").await;
    common::wait_for("a writer that waits for the lock", async || {
        let waits = "select count(*) from pg_locks where relation = 'p'::regclass and not granted";
        leader.query_one(waits, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 1)
    })
    .await;
    assert!(other.query("commit").starts_with('C'));
    let said = client.until(b'Z');
    assert!(said.contains("C42703") && said.contains("P29") && said.ends_with("Z I\n"), "{said}");
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}
