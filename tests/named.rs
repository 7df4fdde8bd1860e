//! PREPARE, EXECUTE and DEALLOCATE, by psql and by a driver that sends them in the extended protocol.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Cluster, text};

fn psql(cluster: &Cluster, port: u16) -> Vec<String> {
    let mut psql = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    psql.args(["-X", "-a", "-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string(), "postgres", "-f"]);
    psql.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers/prepare.sql"));
    let output = psql.output().expect("psql");
    assert!(output.status.success(), "{}", text(&output));
    // Both streams, with the errors beside the statements that they belong to.
    let all = text(&output);
    // Where in PostgreSQL's source an error was raised is the server's build.
    all.lines().filter(|line| !line.starts_with("LOCATION:")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_by_name_are_what_they_are_on_a_lone_server() {
    let cluster = common::cluster();
    let lone = Cluster::up(&["--nodes", "1"]);
    let expected = psql(&lone, lone.layout.postgres_port(0));
    let found = psql(&cluster, cluster.layout.proxy_port());
    for (number, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert_eq!(expected, found, "line {}", number + 1);
    }
    assert_eq!(expected.len(), found.len());
    cluster.assert_identical().await;

    // tokio-postgres sends them as Parse, Bind, Execute.
    let client = cluster.connect("postgres").await;
    client.execute("create table x (i int primary key, t text, at timestamptz)", &[]).await.unwrap();
    client.execute("prepare ins as insert into x values ($1, $2, $3) returning i, t, at is null", &[]).await.unwrap();
    let row = client.query_one("execute ins(1, 'a' || 'b', clock_timestamp())", &[]).await.unwrap();
    assert_eq!(row.columns().len(), 3);
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1), row.get::<_, bool>(2)), (1, "ab", false));
    let error = client.execute("execute ins(1, 'again', null)", &[]).await.expect_err("a duplicate");
    assert_eq!(error.code().unwrap().code(), "23505");
    // A name of the protocol's, used by SQL, and the other way round.
    client.batch_execute("prepare plain (int) as delete from x where i = $1").await.unwrap();
    client.batch_execute("begin; execute ins(2, 'two', null); execute plain(1); commit").await.unwrap();
    let row = client.query_one("execute ins(3, 'three', null)", &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 3);
    client.execute("deallocate ins", &[]).await.unwrap();
    let error = client.execute("execute ins(4, 'gone', null)", &[]).await.expect_err("it is gone");
    assert_eq!(error.code().unwrap().code(), "26000");
    let rows = client.query("select i from x order by i", &[]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>(), [2, 3]);

    // What can not be exact is refused, and says so.
    client.batch_execute("create function f() returns int language sql as 'select 1'").await.unwrap();
    client.batch_execute("prepare ins as insert into x values ($1)").await.unwrap();
    let error = client.batch_execute("execute ins(f())").await.expect_err("it may write");
    assert_eq!(error.code().unwrap().code(), "0A000");
    cluster.assert_identical().await;
}
