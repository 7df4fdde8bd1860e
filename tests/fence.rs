//! What keeps an old host from serving: the DNS name of the service, and the command that a person has for that.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::{Cluster, text, wait_for};
use pgtandem::config::Config;
use pgtandem::sandbox::compare;

const NAME: &str = "db.example.org";
const HOST_0: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const HOST_1: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// A DNS server that knows one name.
#[derive(Clone)]
struct Dns {
    /// None: it does not answer.
    points_to: Arc<Mutex<Option<Ipv4Addr>>>,
    /// Questions that came.
    asked: Arc<AtomicUsize>,
    address: SocketAddr,
}

impl Dns {
    fn start(points_to: Option<Ipv4Addr>) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // It ends with the test.
        let (points_to, asked) = (Arc::new(Mutex::new(points_to)), Arc::default());
        let dns = Self { points_to, asked, address: socket.local_addr().unwrap() };
        let answering = dns.clone();
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((bytes, from)) = socket.recv_from(&mut question) {
                answering.asked.fetch_add(1, Ordering::Relaxed);
                let points_to = *answering.points_to.lock().unwrap();
                if let Some(answer) = points_to.and_then(|address| answer(&question[..bytes], address)) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        dns
    }

    fn point_to(&self, host: Option<Ipv4Addr>) {
        *self.points_to.lock().unwrap() = host;
    }
}

/// RFC 1035: the question once more, and one A record if it is for one.
fn answer(question: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let name_ends = 12 + question.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
    let asked = question.get(12..name_ends + 4)?;
    let name: String = NAME.split('.').fold(String::new(), |name, label| {
        name + &format!("{}{label}", char::from(u8::try_from(label.len()).expect("short")))
    });
    let is_ours = asked.get(..name_ends - 13)?.eq_ignore_ascii_case(name.as_bytes());
    let is_address = asked.get(name_ends - 12..name_ends - 10)? == [0, 1];
    // Answer, authoritative; NXDOMAIN for other names.
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x84 | (question.get(2)? & 1), if is_ours { 0 } else { 3 }]);
    let answers = u8::from(is_ours && is_address);
    answer.extend([0, 1, 0, answers, 0, 0, 0, 0]);
    answer.extend(asked);
    if answers == 1 {
        // The name is where the question has it; A, IN, 1 s, 4 bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

/// A cluster whose configuration was changed, and whose proxy has not been started with it yet.
fn cluster(change: impl FnOnce(&mut Config)) -> Cluster {
    let cluster = common::cluster();
    cluster.kill_proxy();
    let mut config = cluster.layout.config();
    change(&mut config);
    std::fs::write(cluster.config_path(), toml::to_string(&config).unwrap()).unwrap();
    cluster
}

fn fenced_by(dns: &Dns, is_strict: bool) -> Cluster {
    cluster(|config| {
        config.fence.dns = Some(NAME.into());
        config.fence.dns_servers = vec![dns.address];
        config.fence.dns_strict = is_strict;
        config.fence.dns_ms = 200;
        config.nodes[0].service_addresses = vec![IpAddr::V4(HOST_0)];
        config.nodes[1].service_addresses = vec![IpAddr::V4(HOST_1)];
    })
}

/// The message with which clients are refused.
async fn refusal(port: u16) -> Option<String> {
    let settings = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let error = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.err()?;
    let error = error.as_db_error()?;
    Some(format!("{} {}", error.code().code(), error.message()))
}

async fn is_served(cluster: &Cluster) -> bool {
    compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_stops_when_the_name_goes_elsewhere() {
    let dns = Dns::start(Some(HOST_0));
    let cluster = fenced_by(&dns, false);
    cluster.start_again();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key)").await.unwrap();
    // A server that is gone says nothing.
    dns.point_to(None);
    let before = dns.asked.load(Ordering::Relaxed);
    wait_for("it was asked in vain", async || dns.asked.load(Ordering::Relaxed) > before + 20).await;
    client.batch_execute("insert into t values ('no answer')").await.unwrap();

    dns.point_to(Some(HOST_1));
    wait_for("clients are told", async || {
        let said = refusal(cluster.layout.proxy_port()).await.unwrap_or_default();
        said.starts_with("57P03 ") && said.contains("db.example.org points to 192.0.2.2, not to this host")
    })
    .await;
    assert!(client.batch_execute("insert into t values ('old session')").await.is_err());
    let (status, code) = cluster.status();
    assert!(
        status.contains("points to 192.0.2.2") && status.contains("let db.example.org point to this host"),
        "{status}"
    );
    assert_eq!(code, Some(3));

    dns.point_to(Some(HOST_0));
    wait_for("it serves again", async || is_served(&cluster).await).await;
    let client = cluster.connect("postgres").await;
    client.batch_execute("insert into t values ('back')").await.unwrap();
    let found: String = client.query_one("select string_agg(v, ',' order by v) from t", &[]).await.unwrap().get(0);
    assert_eq!(found, "back,no answer");
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strict_proxy_begins_when_the_name_points_to_its_host() {
    let dns = Dns::start(None);
    let cluster = fenced_by(&dns, true);
    cluster.start_proxy(0);
    let said = || text(&cluster.command(&["status"]));
    wait_for("it does not know", async || said().contains("it is not known where db.example.org points")).await;
    dns.point_to(Some(HOST_1));
    wait_for("it knows better", async || said().contains("points to 192.0.2.2, not to this host")).await;
    assert!(!is_served(&cluster).await);
    dns.point_to(Some(HOST_0));
    wait_for("it serves", async || is_served(&cluster).await).await;
    // Whoever can not ask does not know that nobody else serves.
    dns.point_to(None);
    wait_for("it has stopped", async || said().contains("it is not known where db.example.org points")).await;
    assert!(!is_served(&cluster).await);
}

/// A program that notes its arguments and ends with what a file says.
fn fence_agent(cluster: &Cluster) -> String {
    let path = cluster.dir().join("fence-agent");
    let dir = cluster.dir().display();
    let script = format!(
        "#!/bin/sh\necho \"$PGTANDEM_NODE: $*\" >> {dir}/fenced\necho 'no such plug' >&2\nexit $(cat {dir}/ends-with)\n"
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(cluster.dir().join("fenced"), "").unwrap();
    std::fs::set_permissions(cluster.dir().join("fenced"), std::fs::Permissions::from_mode(0o666)).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_promoted_when_the_fence_command_fails() {
    let cluster = common::cluster();
    let mut config = cluster.layout.config();
    config.fence.command = vec![fence_agent(&cluster), "--off".into()];
    std::fs::write(cluster.config_path(), toml::to_string(&config).unwrap()).unwrap();
    let ends_with = |code: &str| std::fs::write(cluster.dir().join("ends-with"), code).unwrap();
    cluster.lose_host(0);
    ends_with("7");
    let stated = ["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"];
    let refused = cluster.command(&stated);
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("nothing was promoted: fence.command") && said.contains("no such plug"), "{said}");
    assert!(cluster.status().0.contains("leader node0"), "{}", cluster.status().0);

    let dry = text(&cluster.command(&["promote", "--node", "node1", "--dry-run"]));
    assert!(dry.contains("fence.command would be run first, for node0."), "{dry}");
    ends_with("0");
    let promoted = cluster.command(&stated);
    assert!(promoted.status.success(), "{}", text(&promoted));
    let fenced = std::fs::read_to_string(cluster.dir().join("fenced")).unwrap();
    assert_eq!(fenced, "node1: --off node0\nnode1: --off node0\n");
}
