//! Definitions of every kind are the same on all servers afterwards, with the rows that they made, or are refused with a sentence.
//!
//! The statements are in `definitions/*.sql`; each is sent as a user would type it, in turn by the simple and the extended protocol. After
//! each section the dumps of both servers are compared.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::process::Command;

use common::Cluster;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// One statement of a file.
struct Statement<'f> {
    text: &'f str,
    refused: bool,
    line: usize,
}

/// Sections by name, with their statements. A statement ends with a semicolon at the end of a line.
fn sections(file: &str) -> Vec<(&str, Vec<Statement<'_>>)> {
    let mut sections = vec![("", Vec::new())];
    let (mut refused, mut start) = (false, None);
    let mut at = 0;
    for (number, line) in file.lines().enumerate() {
        let end = at + line.len();
        if let Some(name) = line.strip_prefix("-- section: ") {
            sections.push((name, Vec::new()));
        } else if line.starts_with("-- refused") {
            refused = true;
        } else if !line.starts_with("--") && !line.is_empty() {
            let begin = *start.get_or_insert(at);
            if line.ends_with(';') {
                let statement = Statement { text: &file[begin..end], refused, line: number + 1 };
                sections.last_mut().unwrap().1.push(statement);
                (refused, start) = (false, None);
            }
        }
        at = end + 1;
    }
    sections
}

/// What `pg_dump` says of a server: definitions in their order, or everything with its lines sorted, because the order of rows
/// is free. Positions of sequences are left out.
fn dump(cluster: &Cluster, index: usize, definitions: bool) -> String {
    let mut command = Command::new(cluster.layout.plan.bin_dir.join("pg_dump"));
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-d", "postgres", "-N", "pgtandem", "-p"]);
    command.arg(cluster.layout.postgres_port(index).to_string());
    if definitions {
        command.arg("-s");
    }
    let output = command.output().expect("pg_dump");
    assert!(output.status.success(), "{}", common::text(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let unlike = |line: &&str| !line.contains("pg_catalog.setval(") && !line.contains("restrict ");
    let mut lines: Vec<&str> = text.lines().filter(unlike).collect();
    if !definitions {
        lines.sort_unstable();
    }
    lines.join("\n")
}

/// What differs between the servers, or is wrong with the cluster, a sentence each.
async fn differences(cluster: &Cluster) -> Vec<String> {
    let (status, _) = cluster.status();
    if !status.contains("All is well") {
        return vec![format!("{status}\n{}", cluster.logs())];
    }
    let unfinished = pgtandem::sandbox::demo::wait_finished(&cluster.layout).await.expect("servers answer");
    let mut found: Vec<String> = unfinished.iter().map(|gid| format!("{gid} is not finished")).collect();
    found.extend(pgtandem::sandbox::compare::compare(&cluster.layout).await.expect("servers answer").differences);
    for definitions in [true, false] {
        let (leader, follower) = (dump(cluster, 0, definitions), dump(cluster, 1, definitions));
        let both = leader.lines().zip(follower.lines());
        found.extend(both.filter(|(a, b)| a != b).take(5).map(|(a, b)| format!("dumps: {a:?} and {b:?}")));
        if leader.lines().count() != follower.lines().count() {
            found.push("the dumps have different lengths".to_owned());
        }
    }
    found
}

async fn run(client: &Client, statement: &Statement<'_>, extended: bool) -> Result<(), tokio_postgres::Error> {
    if extended {
        client.execute(statement.text, &[]).await.map(|_| ())
    } else {
        client.simple_query(statement.text).await.map(|_| ())
    }
}

/// What is wrong with the answer to a statement.
fn judge(statement: &Statement<'_>, result: Result<(), tokio_postgres::Error>) -> Option<String> {
    let error = match (result, statement.refused) {
        (Ok(()), false) => return None,
        (Ok(()), true) => return Some("was not refused".to_owned()),
        (Err(error), _) => error,
    };
    let Some(told) = error.as_db_error() else { return Some(format!("ended the session: {error}")) };
    let is_refusal = told.code() == &SqlState::FEATURE_NOT_SUPPORTED && told.hint().is_some();
    (is_refusal != statement.refused).then(|| format!("{told} ({:?}, hint {:?})", told.code(), told.hint()))
}

/// Runs a file: everything in it is accepted, unless it is said to be refused.
async fn play(file: &str) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    // A moment after its start a node has no lease yet.
    common::wait_for("leases", async || cluster.status().0.contains("All is well")).await;
    let mut wrong = Vec::new();
    for (section, statements) in sections(file) {
        for (at, statement) in statements.iter().enumerate() {
            let result = run(&client, statement, at % 2 == 1).await;
            if let Some(why) = judge(statement, result) {
                wrong.push(format!("line {}: {}: {why}", statement.line, statement.text));
            }
        }
        wrong.extend(differences(&cluster).await.into_iter().map(|what| format!("after section {section}: {what}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn rows_that_definitions_make_are_the_leaders() {
    play(include_str!("definitions/rows.sql")).await;
}

#[tokio::test]
async fn definitions_of_every_kind_are_the_same_or_refused() {
    play(include_str!("definitions/kinds.sql")).await;
}

/// An unlogged table with rows of the time before pgtandem arrives empty on a node that is filled. The hint says SET LOGGED.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_becomes_logged_has_the_leaders_rows_everywhere() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client
        .batch_execute("create unlogged table cache (id serial primary key, v text, up int references cache)")
        .await
        .unwrap();
    let leader = cluster.connect_node(0, "postgres").await;
    leader
        .batch_execute(
            "insert into cache (v, up) values ('a', null), ('b', 1), ('c', 2); delete from cache where id = 3",
        )
        .await
        .unwrap();
    let error = client.batch_execute("insert into cache (v) values ('d')").await.unwrap_err();
    let hint = error.as_db_error().unwrap().hint().unwrap().to_owned();
    let statement = hint.split_once("Type: ").unwrap().1;
    client.batch_execute(statement).await.unwrap();
    client.batch_execute("insert into cache (v, up) values ('d', 2)").await.unwrap();
    client
        .batch_execute(
            "create table part (id int primary key, v text) partition by range (id);
             create table part_a partition of part for values from (0) to (10);
             create unlogged table part_b partition of part for values from (10) to (20)",
        )
        .await
        .unwrap();
    leader.batch_execute("insert into part values (11, 'e')").await.unwrap();
    let error = client.batch_execute("insert into part values (1, 'f')").await.unwrap_err();
    let hint = error.as_db_error().unwrap().hint().unwrap().to_owned();
    client.batch_execute(hint.split_once("Type: ").unwrap().1).await.unwrap();
    client.batch_execute("insert into part values (1, 'f'), (12, 'g')").await.unwrap();
    let parts =
        common::ask::same(&cluster, "postgres", "select string_agg(t::text, ' ' order by id) from part t").await;
    assert_eq!(parts, "(1,f) (11,e) (12,g)");
    let found =
        common::ask::same(&cluster, "postgres", "select string_agg(t::text, ' ' order by id) from cache t").await;
    assert_eq!(found, "(1,a,) (2,b,1) (4,d,2)");
    cluster.assert_identical().await;
}
