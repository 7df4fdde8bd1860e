//! What is wrong is told clearly, with what to do next, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Cluster, folder, pgtandem, text};
use pgtandem::agent::certificates::{Authority, PROXY};

const GOOD: &str = r#"
[cluster]
name = "shop"

[proxy]
node = "a"
listen = "127.0.0.1:6432"
state_dir = "/nonexistent/proxy"

[[node]]
name = "a"
agent = "127.0.0.1:6433"
state_dir = "/nonexistent/a"
pgdata = "/nonexistent/a/pgdata"
bin_dir = "/usr/lib/postgresql/15/bin"
socket_dir = "/nonexistent/run"
port = 5432
"#;

/// Runs the agent with this configuration; it must fail at once. Returns what it says.
fn refused(configuration: &str, node: &str) -> String {
    let folder = folder();
    let file = folder.path().join("pgtandem.toml");
    std::fs::write(&file, configuration).expect("a file");
    let output = pgtandem().args(["agent", "--node", node, "--config"]).arg(&file).output().expect("pgtandem");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

#[test]
fn unknown_key() {
    let said = refused(&GOOD.replace("listen =", "listn ="), "a");
    assert!(said.contains("line 7: unknown key \"listn\"; the nearest known one is \"listen\""), "{said}");
    assert!(said.contains("next:  write listen, or remove the line"), "{said}");
}

#[test]
fn wrong_meaning() {
    let said = refused(&GOOD.replace("node = \"a\"", "node = \"b\""), "a");
    assert!(said.contains("proxy.node is \"b\", which is no [[node]]; there are: a"), "{said}");
    let said = refused(&GOOD.replace("6433", "6432"), "a");
    assert!(said.contains("proxy.listen and the agent of node \"a\" both listen on 127.0.0.1:6432"), "{said}");
}

#[test]
fn no_configuration() {
    let output = pgtandem().args(["agent", "--node", "a", "--config", "/nonexistent/x.toml"]).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("/nonexistent/x.toml") && said.contains("--config FILE"), "{said}");
}

#[test]
fn unknown_command_is_a_wrong_command_line() {
    let output = pgtandem().arg("recvoer").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn sandbox_on_a_port_in_use() {
    // The first port itself: others beside it may be in use by tests beside this one.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let base = listener.local_addr().unwrap().port();
    let folder = folder();
    let dir = folder.path().join("d");
    let output =
        pgtandem().args(["sandbox", "up", "--base-port", &base.to_string(), "--dir"]).arg(&dir).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("port {base}, needed for the proxy, is in use")), "{said}");
    assert!(said.contains("next:  choose another --base-port"), "{said}");
    assert!(!dir.exists(), "something was left behind");
}

#[test]
fn sandbox_in_a_folder_with_other_things() {
    let folder = folder();
    std::fs::write(folder.path().join("letter.txt"), "mine").unwrap();
    for command in ["up", "down", "status"] {
        let output = pgtandem().args(["sandbox", command, "--dir"]).arg(folder.path()).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("is no sandbox") && said.contains("next:"), "{said}");
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("letter.txt")).unwrap(), "mine");
}

#[test]
fn sandbox_in_a_folder_that_the_user_cannot_reach() {
    use std::os::unix::fs::PermissionsExt;
    if !pgtandem::sandbox::user::is_root() {
        return; // Only root steps down to another user.
    }
    let folder = folder();
    let closed = folder.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();
    let output = pgtandem().args(["sandbox", "up", "--dir"]).arg(closed.join("d")).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = format!("cannot reach the folder {}: {} is not open", closed.join("d").display(), closed.display());
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn sandbox_with_an_impossible_number_of_nodes() {
    let folder = folder();
    let output = pgtandem().args(["sandbox", "up", "--nodes", "99", "--dir"]).arg(folder.path()).output().unwrap();
    assert!(text(&output).contains("99 nodes: a sandbox has 1 to 16"), "{}", text(&output));
}

/// Bytes that no protocol has, the same in every run.
fn noise(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        u8::try_from(state >> 24).unwrap_or_default()
    };
    (0..count).map(|_| next()).collect()
}

/// Sends bytes and reads until the other end closes, which it must do by itself unless it waits for more.
fn say(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // The other end may have had enough before all is written.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset,
            "{error} after {:?}",
            &bytes[..bytes.len().min(16)]
        );
    }
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_on_every_port_hurt_nobody() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table kept (i int primary key)").await.unwrap();
    let login = b"\0\0\0\x28\0\x03\0\0user\0postgres\0database\0postgres\0\0".to_vec();
    let ports = [cluster.layout.proxy_port(), cluster.layout.agent_port(0), cluster.layout.agent_port(1)];
    for seed in 0..40 {
        let bytes = noise(seed, usize::try_from(seed).unwrap() * 37 + 1);
        for port in ports {
            say(port, &bytes);
        }
        // Noise after a login.
        say(ports[0], &[&login[..], &bytes].concat());
        // Noise in frames that are known.
        for tag in *b"QPBDECHSdcfFpX" {
            let length = u32::try_from(bytes.len() + 4).unwrap();
            say(ports[0], &[&login[..], &[tag], &length.to_be_bytes(), &bytes].concat());
        }
        client.execute("insert into kept values ($1)", &[&i32::try_from(seed).unwrap()]).await.unwrap();
    }
    let said = String::from_utf8_lossy(&say(ports[0], b"\0\0\0\x08\0\x02\0\0")).into_owned();
    assert!(said.contains("unsupported frontend protocol 2.0"), "{said}");
    let said = String::from_utf8_lossy(&say(ports[0], b"GET / HTTP/1.1\r\n\r\n")).into_owned();
    assert!(said.contains("invalid startup packet") && said.contains("Connect with a PostgreSQL client"), "{said}");
    let said = String::from_utf8_lossy(&say(ports[0], &[&login[..], b"\x01\xff\xff\xff\xff"].concat())).into_owned();
    assert!(said.contains("08P01"), "{said}");
    let rows: i64 = client.query_one("select count(*) from kept", &[]).await.unwrap().get(0);
    assert_eq!(rows, 40);
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}

/// A cluster whose second node was killed and whose data directory is now what `change` makes of it.
async fn with_another_pgdata(change: impl Fn(&Path)) -> (Cluster, String) {
    let cluster = common::cluster();
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    change(&cluster.layout.pgdata(1));
    cluster.start_again();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table kept (i int primary key); insert into kept values (1)").await.unwrap();
    let output = cluster.command(&["recover", "node1", "--yes"]);
    assert!(!output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("next:"), "{}", text(&output));
    let rows: i64 = client.query_one("select count(*) from kept", &[]).await.unwrap().get(0);
    assert_eq!(rows, 1);
    (cluster, text(&output))
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_another_cluster_are_not_overwritten() {
    let (cluster, said) = with_another_pgdata(|pgdata| {
        std::fs::rename(pgdata, pgdata.with_extension("before")).unwrap();
        let root = pgtandem::sandbox::user::is_root();
        let mut initdb = Command::new(if root { "runuser" } else { "env" });
        if pgtandem::sandbox::user::is_root() {
            initdb.args(["-u", "postgres", "--"]);
        }
        initdb.arg("/usr/lib/postgresql/15/bin/initdb").args(["-N", "-A", "trust", "-D"]).arg(pgdata);
        let output = initdb.current_dir("/").output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        std::fs::write(pgdata.join("letter.txt"), "mine").unwrap();
    })
    .await;
    assert!(said.contains("belongs to another cluster") && said.contains("move the directory away"), "{said}");
    assert_eq!(std::fs::read_to_string(cluster.layout.pgdata(1).join("letter.txt")).unwrap(), "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_another_major_version_are_not_overwritten() {
    let (cluster, said) =
        with_another_pgdata(|pgdata| std::fs::write(pgdata.join("PG_VERSION"), "14\n").unwrap()).await;
    assert!(said.contains("data directory is of PostgreSQL 14, the source runs 15"), "{said}");
    assert_eq!(std::fs::read_to_string(cluster.layout.pgdata(1).join("PG_VERSION")).unwrap(), "14\n");
}

/// Runs the proxy with this configuration; it must fail at once. Returns what it says.
fn proxy_refused(cluster: &Cluster, change: impl Fn(&mut pgtandem::config::Config)) -> String {
    let mut config = cluster.layout.config();
    change(&mut config);
    let folder = folder();
    let file = folder.path().join("pgtandem.toml");
    std::fs::write(&file, toml::to_string(&config).unwrap()).unwrap();
    let output = pgtandem().args(["proxy", "--config"]).arg(&file).output().expect("pgtandem");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_proxy_and_a_strange_one_are_turned_away() {
    let cluster = common::cluster();
    let said = proxy_refused(&cluster, |_| {});
    assert!(said.contains("another proxy runs with the folder"), "{said}");
    let strange = folder();
    // Of another authority, with the same names.
    let authority = Authority::create(&cluster.layout.config().cluster.name).unwrap();
    authority.issue(PROXY).unwrap().save(strange.path()).unwrap();
    let said = proxy_refused(&cluster, |config| config.proxy.state_dir = strange.path().to_owned());
    assert!(said.contains(&format!("the proxy can not listen on 127.0.0.1:{}", cluster.layout.proxy_port())), "{said}");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let said = proxy_refused(&cluster, |config| {
        config.proxy.state_dir = strange.path().to_owned();
        config.proxy.listen = free;
    });
    assert!(said.contains("certificate"), "{said}");
    // The one that serves does not notice.
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table kept (i int primary key)").await.unwrap();
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}
