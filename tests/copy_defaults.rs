//! C14: COPY that leaves columns to defaults that vary. The servers are identical, the sequence goes on, and what the client hears is
//! what a lone server would have said.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use common::{Cluster, cluster};
use futures_util::SinkExt;
use tokio_postgres::Client;

const TABLE: &str = "create table c (a int, b text, id serial primary key, at timestamptz default clock_timestamp(), \
     k varchar(40) default md5(random()::text), n int generated always as identity, w numeric(8,2) default random() * 100, \
     twice int generated always as (a * 2) stored, odd text default 'a\"b\\c' || chr(10) || chr(9) || pg_backend_pid())";

async fn copy_in(client: &Client, text: &str, data: &[u8]) -> Result<u64, tokio_postgres::Error> {
    let sink = client.copy_in(text).await?;
    let mut sink = std::pin::pin!(sink);
    // In pieces that end anywhere.
    for piece in data.chunks(7) {
        sink.send(bytes::Bytes::copy_from_slice(piece)).await?;
    }
    sink.finish().await
}

async fn count(client: &Client, condition: &str) -> i64 {
    client.query_one(&format!("select count(*) from c where {condition}"), &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn left_out_columns_get_the_leaders_values_everywhere() {
    let cluster = cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute(TABLE).await.unwrap();
    let mut lines = String::new();
    for number in 0..3000 {
        let _ = writeln!(lines, "{number}\trow \\N\\t{number}");
    }
    // The extended protocol, as the driver does it: outside a block, inside one, after a savepoint.
    assert_eq!(copy_in(&client, "copy c (a, b) from stdin", lines.as_bytes()).await.unwrap(), 3000);
    client.batch_execute("begin; savepoint s").await.unwrap();
    assert_eq!(copy_in(&client, "copy c (b) from stdin", b"one\n\\N\n\n").await.unwrap(), 3);
    client.batch_execute("rollback to s").await.unwrap();
    assert_eq!(
        copy_in(&client, "copy c (b, a) from stdin (delimiter ',', null 'none')", b"x,none\n").await.unwrap(),
        1
    );
    client.batch_execute("commit").await.unwrap();
    let csv = b"\"a\n,\"\"b\",1\n,2\n";
    assert_eq!(copy_in(&client, "copy c (b, a) from stdin (format csv)", csv).await.unwrap(), 2);
    let csv = b"b;a\r\n'x\\';y';3\r\nnone;4";
    let options = "format csv, header match, delimiter ';', quote '''', escape '\\', null 'none'";
    assert_eq!(copy_in(&client, &format!("copy c (b, a) from stdin with ({options})"), csv).await.unwrap(), 2);
    assert_eq!(copy_in(&client, "copy c (a) from stdin csv header", b"whatever\n5\n").await.unwrap(), 1);
    let mut binary = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec();
    binary.extend_from_slice(b"\0\x02\0\0\0\x04\0\0\0\x07\xff\xff\xff\xff\0\x02\xff\xff\xff\xff\0\0\0\x02hi\xff\xff");
    assert_eq!(copy_in(&client, "copy c (a, b) from stdin (format binary)", &binary).await.unwrap(), 2);
    assert_eq!(copy_in(&client, "copy c (a, b) from stdin", b"").await.unwrap(), 0);
    assert_eq!(
        copy_in(&client, "copy c (a, b) from stdin where a % 2 = 0", b"10\tx\n11\ty\n12\tz\n").await.unwrap(),
        2
    );
    cluster.assert_identical().await;
    assert_eq!(count(&client, "true").await, 3000 + 1 + 2 + 2 + 1 + 2 + 2);
    assert_eq!(count(&client, "b is null").await, 4);
    assert_eq!(
        count(&client, "odd like E'a\"b\\\\\\\\c\\n\\t%' and length(k) = 32 and w between 0 and 100").await,
        3010
    );
    // Each value was given once, by the client's own sequence.
    let row = client.query_one("select count(distinct id) = count(*), max(id) = currval('c_id_seq') from c", &[]).await;
    let row = row.unwrap();
    assert!(row.get::<_, bool>(0) && row.get::<_, bool>(1));
    cluster.wait_well().await;
}

/// What psql says to each text with its data, at this server.
fn psql(cluster: &Cluster, port: u16, input: &str) -> String {
    let mut command = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    command.args([
        "-h",
        "127.0.0.1",
        "-U",
        "postgres",
        "-X",
        "-q",
        "-v",
        "VERBOSITY=verbose",
        "-p",
        &port.to_string(),
        "postgres",
    ]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    common::text(&child.wait_with_output().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_those_of_the_clients_own_copy() {
    let cluster = cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute(&format!("{TABLE}; alter table c drop column odd")).await.unwrap();
    let long = "x".repeat(150);
    let mut wrong = Vec::new();
    for input in [
        "copy c (a, nope) from stdin;\n1\t2\n\\.\n".to_owned(),
        "copy c (a, b) from stdin (format nonsense);\n1\t2\n\\.\n".to_owned(),
        "copy c (a, b) from stdin;\n1\t2\n3\n\\.\n".to_owned(),
        "copy c (a, b) from stdin;\n1\t2\n3\t4\t5\n\\.\n".to_owned(),
        "copy c (a, b) from stdin;\n1\t2\nx\t4\n\\.\n".to_owned(),
        "copy c (b, a) from stdin csv;\n\"a\nb\",1\n\"open,2\n\\.\n".to_owned(),
        "alter table c add check (a < 100);\ncopy c (a, b) from stdin;\n1\t2\n\\N\tx\n100\tline\\tof the client\n\\.\n"
            .to_owned(),
        format!("copy c (b, a) from stdin;\n{long}\t100\n\\.\n"),
        "begin;\ncopy c (a) from stdin;\n1\nnone\n\\.\nselect 1;\ncommit;\n".to_owned(),
    ] {
        let through = psql(&cluster, cluster.layout.proxy_port(), &input);
        // Told past the proxy nothing may stay, or the servers differ: in a block that is rolled back.
        let alone = psql(&cluster, cluster.layout.postgres_port(0), &format!("begin;\nsavepoint s;\n{input}"));
        let shown = |text: &str| {
            let errors = text.lines().filter(|line| !line.contains("LOCATION") && !line.contains("WARNING"));
            errors
                .map(|line| line.split_once("DETAIL:").map_or(line, |(before, _)| before))
                .collect::<Vec<_>>()
                .join("\n")
        };
        if shown(&through) != shown(&alone) {
            wrong.push(format!("{input}\nthrough:\n{through}\nalone:\n{alone}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
    cluster.assert_identical().await;
    assert_eq!(count(&client, "true").await, 0);
}
