//! Large objects have the same numbers, owners and contents on all servers, whether they are written with SQL functions or by libpq's
//! `lo_*`, which psql uses.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use common::Cluster;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

const STATEMENTS: &[&str] = &[
    "create role keeper",
    "select lo_create(4711)",
    "select lo_creat(-1)",
    "select lo_create(0) as made",
    "select lo_from_bytea(0, '\\x0102'), lo_from_bytea(4712, 'abc')",
    "select lo_put(4711, 0, '\\xdeadbeef')",
    "select lo_put(4711, 5000, 'tail'::bytea)",
    "begin; select lo_open(4711, 393216); select lowrite(0, 'hello'); select lo_lseek(0, 100000, 0); select lowrite(0, 'far'); \
     select lo_truncate(0, 50000); select lo_tell(0); select loread(0, 10); select lo_close(0); commit",
    "begin; savepoint a; select lo_create(4713); select lo_put(4713, 0, 'x'); rollback to a; select lo_create(4713); \
     select lo_put(4713, 0, 'yy'); commit",
    "begin; select lo_create(4714); savepoint a; select lo_put(4714, 0, 'lost'); rollback to a; select lo_create(4715); commit",
    "begin; select lo_unlink(4713); select lo_create(4713); select lo_unlink(4713); select lo_create(4713); commit",
    "begin; select lo_create(4720); rollback",
    "select lo_import('PG_VERSION')",
    "select lo_import('PG_VERSION', 4730)",
    "select lo_unlink(4730)",
    "comment on large object 4711 is 'one'",
    "grant select on large object 4711 to keeper",
    "alter large object 4711 owner to keeper",
    "select lo_unlink(oid) from pg_largeobject_metadata where oid between 4712 and 4713",
    "set role keeper; select lo_create(4740); select lo_put(4740, 3, 'k'); reset role",
    "select lo_get(4711, 0, 10), md5(lo_get(4711))",
    "begin isolation level serializable; select lo_create(4741); select lo_put(4741, 0, 's'); commit",
];

const REFUSED: &[&str] = &[
    "select lo_put(oid, 0, 'x') from pg_largeobject_metadata",
    "insert into t values (lo_create(0))",
    "select lowrite(0, 'x'), lowrite(0, 'y')",
    "explain analyze select lo_create(0)",
];

async fn objects(cluster: &Cluster, index: usize) -> Vec<String> {
    let client = cluster.connect_node(index, "postgres").await;
    let query = "select concat_ws(' ', m.oid, m.lomowner::regrole, m.lomacl, length(lo_get(m.oid)), md5(lo_get(m.oid)),
        obj_description(m.oid, 'pg_largeobject')) from pg_largeobject_metadata m order by m.oid";
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn assert_same(cluster: &Cluster, after: &str) -> usize {
    let unfinished = pgtandem::sandbox::demo::wait_finished(&cluster.layout).await.unwrap();
    assert_eq!(unfinished, Vec::<String>::new(), "after {after}");
    let leader = objects(cluster, 0).await;
    assert_eq!(leader, objects(cluster, 1).await, "after {after}");
    leader.len()
}

fn psql(cluster: &Cluster, script: &str) -> String {
    let mut command = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    command.args(["-X", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-d", "postgres", "-p"]);
    command.arg(cluster.layout.proxy_port().to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{script}: {}\n{}", common::text(&output), cluster.logs());
    common::text(&output)
}

async fn sql(client: &Client, text: &str, extended: bool) -> Result<(), tokio_postgres::Error> {
    if extended && !text.contains(';') {
        client.query(text, &[]).await.map(|_| ())
    } else {
        client.simple_query(text).await.map(|_| ())
    }
}

/// What the proxy answers to a FunctionCall of `version()`.
fn call_version(cluster: &Cluster) -> String {
    let mut socket = TcpStream::connect(("127.0.0.1", cluster.layout.proxy_port())).unwrap();
    socket.set_read_timeout(Some(common::LIMIT)).unwrap();
    let mut startup = 196_608_u32.to_be_bytes().to_vec();
    startup.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
    let length = u32::try_from(startup.len() + 4).unwrap().to_be_bytes();
    socket.write_all(&[&length[..], &startup].concat()).unwrap();
    let mut said = Vec::new();
    let mut until_ready = |socket: &mut TcpStream| loop {
        let mut header = [0; 5];
        socket.read_exact(&mut header).unwrap();
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(header[1..].try_into().unwrap())).unwrap() - 4];
        socket.read_exact(&mut body).unwrap();
        said.push(format!("{} {}", char::from(header[0]), String::from_utf8_lossy(&body)));
        if header[0] == b'Z' {
            return said.join("\n");
        }
    };
    until_ready(&mut socket);
    // FunctionCall: version() is number 89; no formats, no arguments, text result.
    socket.write_all(&[b'F', 0, 0, 0, 14, 0, 0, 0, 89, 0, 0, 0, 0, 0, 0]).unwrap();
    until_ready(&mut socket)
}

#[tokio::test]
async fn objects_are_the_same_on_all_servers() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (image oid)").await.unwrap();
    for extended in [false, true] {
        for text in STATEMENTS {
            let skip = extended && text.starts_with("create role");
            if !skip && let Err(error) = sql(&client, text, extended).await {
                panic!("{text}: {error:?}\n{}", cluster.logs());
            }
            assert_same(&cluster, text).await;
        }
        client.batch_execute("select lo_unlink(oid) from pg_largeobject_metadata").await.unwrap();
        assert_eq!(assert_same(&cluster, "the end").await, 0);
    }
    for text in REFUSED {
        let error = sql(&client, text, false).await.unwrap_err();
        let told = error.as_db_error().unwrap();
        assert!(told.code() == &SqlState::FEATURE_NOT_SUPPORTED && told.hint().is_some(), "{text}: {told:?}");
    }
    cluster.wait_well().await;
}

#[tokio::test]
async fn libpq_and_psql_work_as_with_one_server() {
    let cluster = common::cluster();
    let folder = common::folder();
    let (file, copy) = (folder.path().join("data"), folder.path().join("copy"));
    let data: Vec<u8> = (0..300_000_u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    std::fs::write(&file, &data).unwrap();
    let script = format!(
        "\\lo_import '{}' 'a comment'\n\\set first :LASTOID\nbegin;\n\\lo_import '{}'\n\\set second :LASTOID\ncommit;\n\
         begin;\n\\lo_import '{}'\nrollback;\n\\lo_export :first '{}'\n\\lo_unlink :second\n",
        file.display(),
        file.display(),
        file.display(),
        copy.display()
    );
    psql(&cluster, &script);
    assert_eq!(std::fs::read(&copy).unwrap(), data);
    assert_eq!(assert_same(&cluster, "psql").await, 1);
    let said = call_version(&cluster);
    assert!(said.contains("C0A000") && said.contains("SELECT") && said.ends_with('I'), "{said}");
    cluster.wait_well().await;
}

#[tokio::test]
async fn writers_of_one_page_do_not_make_a_follower_fail() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("select lo_create(1)").await.unwrap();
    let writers: Vec<_> = (0..3)
        .map(|writer| {
            let port = cluster.layout.proxy_port();
            tokio::spawn(async move {
                let client = pgtandem::sandbox::compare::connect(port, "postgres").await.unwrap();
                let mut written = 0;
                while written < 20 {
                    // A lone server fails a writer that meets another on one page, too.
                    let text = format!("select lo_put(1, {}, '{writer}{written}')", writer * 10 + written % 3);
                    match client.simple_query(&text).await {
                        Ok(_) => written += 1,
                        Err(error) => assert!(error.to_string().contains("db error"), "{error:?}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_same(&cluster, "the writers").await;
    cluster.wait_well().await;
}
