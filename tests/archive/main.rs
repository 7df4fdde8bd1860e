//! The archive as its users meet it: WAL and base copies come into it by themselves, a server of any moment can be made from it, and what is
//! damaged, missing or in the wrong place is said.

mod busy;
#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

use busy::{Busy, Moment, now_us};
use common::{Cluster, text, wait_for};
use pgtandem::archive::inventory::{self, StreamFound};
use pgtandem::archive::moment;
use pgtandem::archive::names::WalName;
use pgtandem::sandbox::{self, Layout};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::Client;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The archive of `node` that node `keeper` keeps.
fn folder(cluster: &Cluster, keeper: usize, node: usize) -> PathBuf {
    cluster.layout.node_dir(keeper).join("archive").join(Layout::node_name(node))
}

fn streams(cluster: &Cluster, keeper: usize, node: usize) -> Vec<StreamFound> {
    inventory::streams(&folder(cluster, keeper, node)).expect("an archive")
}

/// All files of an archive but those that are being written, with their content's hash.
fn files(folder: &Path) -> Vec<(PathBuf, blake3::Hash)> {
    let walk = walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().flatten();
    let files = walk
        .filter(|entry| entry.file_type().is_file() && entry.path().extension().is_some_and(|ending| ending == "zst"));
    files
        .map(|entry| {
            let name = entry.path().strip_prefix(folder).expect("below").to_owned();
            (name, blake3::hash(&std::fs::read(entry.path()).expect("a file")))
        })
        .collect()
}

fn succeeded(output: &Output, cluster: &Cluster) -> String {
    assert!(output.status.success(), "{}\n{}", text(output), cluster.logs());
    text(output)
}

/// A program as the user that everything runs as.
fn as_user(program: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    if sandbox::user::is_root() {
        let user = sandbox::user::find("postgres").expect("user postgres");
        command.uid(user.uid).gid(user.gid).current_dir("/").env("HOME", user.home);
    }
    command
}

/// A restored server that runs. It ends, and its directory goes, with the value.
struct Restored {
    folder: PathBuf,
    pg_ctl: PathBuf,
    client: Client,
}

impl Restored {
    /// `pgtandem restore` with these arguments, and then what it says to type.
    async fn start(cluster: &Cluster, name: &str, arguments: &[&str]) -> Restored {
        Restored::start_with(cluster, name, arguments, "postgres").await
    }

    /// The same, and its client is in that database.
    async fn start_with(cluster: &Cluster, name: &str, arguments: &[&str], database: &str) -> Restored {
        let folder = cluster.dir().join(name);
        let to = folder.to_str().expect("a path");
        let mut all = vec!["restore", "--to", to, "--json"];
        all.extend(arguments);
        let output = cluster.command(&all);
        succeeded(&output, cluster);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        let start: Vec<&str> = report["start"].as_str().expect("a command").split(' ').collect();
        let pg_ctl = PathBuf::from(start[0]);
        let mut pg_ctl_start = as_user(&pg_ctl);
        pg_ctl_start.args(&start[1..]).stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        let status = pg_ctl_start.status().expect("pg_ctl");
        let log = std::fs::read_to_string(folder.with_extension("log")).unwrap_or_default();
        assert!(status.success(), "the restored server does not start ({arguments:?}):\n{log}\n{}", cluster.logs());
        let mut settings = tokio_postgres::Config::new();
        settings.host_path(report["socket_dir"].as_str().expect("a folder")).user("postgres").dbname(database);
        settings.port(u16::try_from(report["port"].as_u64().expect("a port")).expect("a port"));
        let (client, connection) = settings.connect(tokio_postgres::NoTls).await.expect("a connection");
        tokio::spawn(connection);
        let restored = Restored { folder, pg_ctl, client };
        // pg_ctl returns when it can be read; the target comes a moment later, and then it is a server of its own.
        wait_for("the restored server has left recovery", async || {
            !restored.value::<bool>("select pg_is_in_recovery()").await
        })
        .await;
        restored
    }

    async fn value<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, query: &str) -> T {
        self.client.query_one(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error}")).get(0)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = as_user(&self.pg_ctl).args(["stop", "-s", "-m", "immediate", "-D"]).arg(&self.folder).status();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// `make restore ROUNDS=100 SEED=7` for as long as it takes; three rounds run with every test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_server_is_exactly_as_the_server_was_at_that_moment() {
    let (rounds, seed) = (number("RESTORE_ROUNDS", 3), number("RESTORE_SEED", now_us() / 1_000_000));
    println!("RESTORE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = Cluster::up(&["--archive"]);
    let busy = Busy::start(&cluster, 3).await;
    busy.wait(30).await;
    succeeded(&cluster.command(&["base", "--node", "node0"]), &cluster);
    let leader = cluster.connect_node(0, "postgres").await;
    let mut moments = Vec::new();
    for round in 0..rounds {
        for _ in 0..5 {
            busy.wait(random.random_range(1..40)).await;
            moments.push(Moment::now(&leader, random.random_range(0..2) == 0).await);
        }
        let moment = &moments[random.random_range(0..moments.len())];
        let arguments: Vec<&str> = moment.arguments.iter().map(String::as_str).collect();
        let restored = Restored::start(&cluster, &format!("restored-{round}"), &arguments).await;
        busy.check(&restored, moment).await;
        drop(restored);
        if round % 10 == 9 {
            succeeded(&cluster.command(&["base", "--node", "node0"]), &cluster);
            // In a long run the oldest copies go, and with them what was before the oldest that stays.
            let oldest_s = streams(&cluster, 0, 0)[0].bases[0].ended_s;
            moments.retain(|moment: &Moment| moment.before_us / 1_000_000 > oldest_s);
            println!("{} rounds", round + 1);
        }
    }
    let moment = Moment { arguments: Vec::new(), ..Moment::now(&leader, false).await };
    let restored = Restored::start(&cluster, "restored-latest", &["--latest", "--node", "node0"]).await;
    // As far as there is WAL: what came after the moment may be in it.
    busy.check(&restored, &Moment { after_us: u64::MAX, ..moment }).await;
    busy.end().await;
    // It is on a timeline of its own, archives nothing, and takes writes.
    restored.client.batch_execute("create table later (n int)").await.expect("it takes writes");
    let own: bool = restored
        .value("select current_setting('archive_mode') = 'off' and current_setting('listen_addresses') = ''")
        .await;
    assert!(own);
    assert!(restored.value::<String>("select pg_walfile_name(pg_current_wal_lsn())").await.starts_with("00000002"));
    drop(restored);
    let verified = succeeded(&cluster.command(&["wal", "verify"]), &cluster);
    assert!(verified.contains("All is well"), "{verified}");
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_or_missing_is_said_and_stops_a_recovery() {
    let cluster = Cluster::up(&["--nodes", "1", "--archive", "--scale", "1"]);
    // Without anybody asking: a stream that has no copy gets one.
    wait_for("the first base copy", async || streams(&cluster, 0, 0).iter().any(|stream| !stream.bases.is_empty()))
        .await;
    let client = cluster.connect("bench").await;
    for _ in 0..3 {
        client.batch_execute("update pgbench_accounts set abalance = abalance + 1").await.expect("a change");
        succeeded(&cluster.command(&["base", "--json"]), &cluster);
    }
    // Twice the same server shares what did not change.
    let second = cluster.command(&["base", "--json"]);
    let copy: serde_json::Value =
        serde_json::from_slice(&second.stdout).unwrap_or_else(|_| panic!("{}", text(&second)));
    let (bytes, new) = (copy["bytes"].as_u64().expect("bytes"), copy["bytes_new"].as_u64().expect("bytes"));
    assert!(bytes > 20 << 20 && new < bytes / 10, "{new} of {bytes} bytes were new");
    let listed = succeeded(&cluster.command(&["archive"]), &cluster);
    assert!(listed.contains("of the leader") && listed.contains("which the server writes now"), "{listed}");
    assert!(succeeded(&cluster.command(&["wal", "verify"]), &cluster).contains("All is well"));

    let stream = streams(&cluster, 0, 0).pop().expect("a stream");
    let first = stream.bases[0];
    let segments = stream.segments();
    let middle = segments[segments.iter().position(|segment| *segment > first.start).expect("a segment") + 1];
    let path = stream.folder.join("wal").join(format!("{middle}.zst"));
    let whole = std::fs::read(&path).expect("a segment");
    let to = cluster.dir().join("fetched");
    let archive = stream.folder.to_str().expect("a path");
    let fetch =
        |name: &str| cluster.command(&["wal", "fetch", "--archive", archive, name, to.to_str().expect("a path")]);
    assert_eq!(fetch(&middle.to_string()).status.code(), Some(0));

    let mut changed = whole.clone();
    *changed.last_mut().expect("content") ^= 1;
    std::fs::write(&path, &changed).expect("a segment");
    assert_eq!(fetch(&middle.to_string()).status.code(), Some(200));
    let verified = cluster.command(&["wal", "verify"]);
    assert!(
        verified.status.code() == Some(1) && text(&verified).contains(&format!("{middle}.zst is damaged")),
        "{}",
        text(&verified)
    );

    std::fs::remove_file(&path).expect("a segment");
    assert_eq!(fetch(&middle.to_string()).status.code(), Some(200), "later ones are there");
    assert_eq!(fetch("0000000100000099000000FF").status.code(), Some(1), "the archive ends before it");
    let verified = cluster.command(&["wal", "verify"]);
    assert!(text(&verified).contains(&format!("{middle}")), "{}", text(&verified));
    std::fs::write(&path, &whole).expect("a segment");

    // Nothing is restored over anything, least of all over a node.
    for (to, why) in [
        (cluster.layout.pgdata(0), "data directory of a node"),
        (cluster.layout.node_dir(0), "data directory of a node"),
        (cluster.dir().join("bin"), "is not empty"),
    ] {
        if to.exists() {
            let refused = cluster.command(&["restore", "--latest", "--to", to.to_str().expect("a path")]);
            assert!(!refused.status.success() && text(&refused).contains(why), "{}", text(&refused));
        }
    }
    let unclear = cluster.command(&["restore", "--target-time", "2026-11-27 14:00", "--to", "/nowhere"]);
    assert!(text(&unclear).contains("time zone"), "{}", text(&unclear));
    let early = cluster.command(&["restore", "--target-time", "2020-01-01 00:00Z", "--to", "/nowhere"]);
    assert!(text(&early).contains("ended later"), "{}", text(&early));

    // PostgreSQL hands over a file that is stored already with other content: it is told so, and keeps it.
    let source = cluster.layout.pgdata(0).join("pg_wal").join(segments.last().expect("a segment").to_string());
    let stored = stream.folder.join("wal").join(format!("{}.zst", segments.last().expect("a segment")));
    let push = || cluster.command(&["wal", "push", "--node", "node0", source.to_str().expect("a path")]);
    succeeded(&push(), &cluster);
    let kept = std::fs::read(&stored).expect("a segment");
    let other = std::fs::read(stream.folder.join("wal").join(format!("{}.zst", segments[0]))).expect("a segment");
    std::fs::write(&stored, &other).expect("a segment");
    let refused = push();
    assert!(!refused.status.success() && text(&refused).contains("holds other content"), "{}", text(&refused));
    std::fs::write(&stored, &kept).expect("a segment");
}

/// Stops the sandbox, changes its configuration, and starts it again; followers are recovered.
fn with_settings(cluster: &Cluster, archive: &str) {
    let down = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().expect("pgtandem");
    assert!(down.status.success(), "{}", text(&down));
    let config = std::fs::read_to_string(cluster.config_path()).expect("a configuration");
    let (before, rest) = config.split_once("[archive]").expect("the section");
    let rest = rest.find("[[node]]").map_or("", |at| &rest[at..]);
    std::fs::write(cluster.config_path(), format!("{before}[archive]\n{archive}\n{rest}")).expect("a configuration");
    cluster.start_again();
    for index in 1..cluster.layout.plan.nodes {
        cluster.recover(index);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_is_on_every_member_before_postgresql_lets_it_go_and_old_copies_leave_all_disks() {
    let cluster = Cluster::up(&["--archive"]);
    let lives = || streams(&cluster, 1, 1).into_iter().map(|stream| stream.name).collect::<Vec<_>>();
    wait_for("node1 has a base copy", async || streams(&cluster, 1, 1).iter().any(|stream| !stream.bases.is_empty()))
        .await;
    let first_life = lives();
    with_settings(&cluster, "peers = \"wait\"\nkeep = 1\nevery_s = 0");
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (n int primary key)").await.expect("a table");
    // It was filled again, and is on the timeline of the same number again, with other bytes.
    succeeded(&cluster.command(&["base", "--node", "node1"]), &cluster);
    let second_life = lives();
    assert!(second_life.iter().all(|stream| !first_life.contains(stream)), "the old life went with its only copy");
    assert_eq!(second_life.iter().map(|stream| stream.timeline).collect::<Vec<_>>(), [2]);

    let leader = cluster.connect_node(0, "postgres").await;
    let archived = async || {
        let row =
            leader.query_one("select coalesce(last_archived_wal, '') from pg_stat_archiver", &[]).await.expect("a row");
        row.get::<_, String>(0)
    };
    let next = async |n: i32| {
        client.batch_execute(&format!("insert into t values ({n})")).await.expect("a write");
        let row = leader.query_one("select pg_walfile_name(pg_switch_wal())", &[]).await.expect("a segment's end");
        row.get::<_, String>(0)
    };
    for n in 0..3 {
        let segment = next(n).await;
        wait_for("the segment is archived", async || archived().await >= segment).await;
        let path = streams(&cluster, 0, 0).pop().expect("a stream").folder.join("wal").join(format!("{segment}.zst"));
        let name = path.strip_prefix(folder(&cluster, 0, 0)).expect("below").to_owned();
        assert!(path.exists() && folder(&cluster, 1, 0).join(name).exists(), "{segment} is on both disks");
    }

    // One copy is kept, here and there, and what only older ones needed is gone; also what came to the peer another way, as `wal push`
    // brings it, and was removed here before anybody compared the two.
    let old = streams(&cluster, 1, 0).pop().expect("a stream").folder.join("wal");
    let old = std::fs::read_dir(old).expect("a folder").flatten().map(|entry| entry.path()).min().expect("a segment");
    let unseen = old.with_file_name("000000010000000000000000.zst");
    std::fs::copy(&old, &unseen).expect("a segment");
    for _ in 0..2 {
        succeeded(&cluster.command(&["base", "--node", "node0"]), &cluster);
    }
    let copies = |keeper| streams(&cluster, keeper, 0).iter().map(|stream| stream.bases.len()).sum::<usize>();
    assert_eq!(copies(0), 1);
    wait_for("the peer has the same", async || files(&folder(&cluster, 0, 0)) == files(&folder(&cluster, 1, 0))).await;
    let stream = streams(&cluster, 0, 0).pop().expect("a stream");
    assert_eq!(stream.segments().first(), Some(&stream.bases[0].start), "WAL from the copy on");
    assert!(succeeded(&cluster.command(&["wal", "verify"]), &cluster).contains("All is well"));

    // A node that is lost is not waited for.
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    let segment = next(10).await;
    wait_for("the segment is archived without the lost node", async || archived().await >= segment).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_takes_no_more_wal_is_said_by_status_and_nothing_is_lost() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::up(&["--nodes", "1", "--archive"]);
    wait_for("the first base copy", async || streams(&cluster, 0, 0).iter().any(|stream| !stream.bases.is_empty()))
        .await;
    let wal = streams(&cluster, 0, 0).pop().expect("a stream").folder.join("wal");
    let allow = |mode| std::fs::set_permissions(&wal, std::fs::Permissions::from_mode(mode)).expect("a mode");
    allow(0o500);
    let node = cluster.connect_node(0, "postgres").await;
    let next = async |n: i32| {
        node.batch_execute(&format!("create table t{n} (n int)")).await.expect("a table");
        let row = node.query_one("select pg_walfile_name(pg_switch_wal())", &[]).await.expect("a segment's end");
        row.get::<_, String>(0)
    };
    let first = next(1).await;
    let mark = cluster.layout.pgdata(0).join(format!("pg_wal/archive_status/{first}.ready"));
    wait_for("PostgreSQL tried it", async || {
        let row = node.query_one("select failed_count > 0 from pg_stat_archiver", &[]).await.expect("a row");
        row.get(0)
    })
    .await;
    let hour_ago = SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::options().append(true).open(&mark).expect("it waits").set_modified(hour_ago).expect("a time");
    wait_for("status says so", async || {
        let (status, _) = cluster.status();
        status.contains("the archive of node0 needs a look") && status.contains("wait to be archived")
    })
    .await;
    assert!(cluster.logs().contains("Permission denied"), "{}", cluster.logs());

    allow(0o700);
    // PostgreSQL looks again when there is another one.
    let second = next(2).await;
    wait_for("both are archived", async || {
        [&first, &second].iter().all(|name| wal.join(format!("{name}.zst")).exists())
    })
    .await;
    wait_for("status is content", async || !cluster.status().0.contains("needs a look")).await;
    assert!(succeeded(&cluster.command(&["wal", "verify"]), &cluster).contains("All is well"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_while_it_writes_leaves_nothing_half() {
    let seed = number("RESTORE_SEED", now_us() / 1_000_000);
    println!("RESTORE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = Cluster::up(&["--nodes", "1", "--archive", "--scale", "2"]);
    wait_for("the first base copy", async || streams(&cluster, 0, 0).iter().any(|stream| !stream.bases.is_empty()))
        .await;
    let node = cluster.connect_node(0, "bench").await;
    // Its WAL would fill further segments in the middle of what follows.
    node.batch_execute("alter table pgbench_accounts set (autovacuum_enabled = off)").await.expect("a setting");
    let well = || assert!(succeeded(&cluster.command(&["wal", "verify"]), &cluster).contains("All is well"));
    let mut unfinished = 0;
    for _ in 0..5 {
        node.batch_execute("update pgbench_accounts set abalance = abalance + 1").await.expect("a change");
        let mut copying = cluster.start(&["base", "--json"]);
        tokio::time::sleep(std::time::Duration::from_millis(random.random_range(50..1500))).await;
        cluster.kill_agent(0);
        unfinished += u32::from(!copying.wait().expect("pgtandem").success());
        well();
        cluster.start_agent(0);
    }
    assert!(unfinished > 0, "no copy was under way when its agent was killed");

    // The newest segment, and one that no base copy needs: while it is away, the archive is whole without it.
    node.batch_execute("create table after_copies (n int)").await.expect("a table");
    let row = node.query_one("select pg_walfile_name(pg_switch_wal())", &[]).await.expect("a segment's end");
    let segment: String = row.get(0);
    let stored = streams(&cluster, 0, 0)[0].folder.join("wal").join(format!("{segment}.zst"));
    wait_for("the segment is archived", async || stored.exists()).await;
    // PostgreSQL uses its own file again once it was archived.
    let source = cluster.dir().join(&segment);
    std::fs::write(&source, pgtandem::archive::file::read(&stored, 1 << 30).expect("a segment").1).expect("a copy");
    let source = source.to_str().expect("a path");
    for _ in 0..10 {
        std::fs::remove_file(&stored).expect("a segment");
        let mut pushing = cluster.start(&["wal", "push", "--node", "node0", source]);
        tokio::time::sleep(std::time::Duration::from_millis(random.random_range(0..60))).await;
        pushing.kill().expect("a process");
        pushing.wait().expect("a process");
        well();
        succeeded(&cluster.command(&["wal", "push", "--node", "node0", source]), &cluster);
    }
    succeeded(&cluster.command(&["base"]), &cluster);
    well();
    let sum = "select sum(abalance)::int8 from pgbench_accounts";
    let expected: i64 = node.query_one(sum, &[]).await.expect("a sum").get(0);
    let restored = Restored::start_with(&cluster, "restored", &["--latest"], "bench").await;
    assert_eq!(restored.value::<i64>(sum).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tablespaces_are_restored_beside_and_a_restored_server_is_no_node() {
    let cluster = Cluster::up(&["--nodes", "1", "--archive"]);
    let folders = ["one", "two"].map(|name| cluster.dir().join(name));
    for folder in &folders {
        assert!(as_user(Path::new("/bin/mkdir")).arg(folder).status().expect("mkdir").success());
    }
    let node = cluster.connect_node(0, "postgres").await;
    let create = |index: usize| format!("create tablespace t{index} location '{}'", folders[index].display());
    node.batch_execute(&create(0)).await.expect("a tablespace");
    node.batch_execute("create table kept (n int) tablespace t0; insert into kept select generate_series(1, 1000)")
        .await
        .expect("rows");
    node.batch_execute("create unlogged table lost (n int); insert into lost values (1)").await.expect("rows");
    succeeded(&cluster.command(&["base"]), &cluster);
    node.batch_execute("insert into kept select generate_series(1, 1000)").await.expect("rows");
    let restored = Restored::start(&cluster, "restored", &["--latest"]).await;
    assert_eq!(restored.value::<i64>("select count(*) from kept").await, 2000);
    assert_eq!(restored.value::<i64>("select count(*) from lost").await, 0);
    let place: String =
        restored.value("select pg_tablespace_location(oid) from pg_tablespace where spcname = 't0'").await;
    assert!(place.starts_with(cluster.dir().join("restored.tablespaces").to_str().expect("a path")), "{place}");
    restored.client.batch_execute("insert into kept values (0)").await.expect("a row of its own");
    let count = node.query_one("select count(*) from kept", &[]).await.expect("a count").get::<_, i64>(0);
    assert_eq!(count, 2000, "the living server has files of its own");

    // A tablespace that is younger than the copy would be made at its own path, which is the living server's.
    node.batch_execute(&create(1)).await.expect("a tablespace");
    let to = cluster.dir().join("other");
    let refused = cluster.command(&["restore", "--latest", "--to", to.to_str().expect("a path")]);
    assert!(
        !refused.status.success() && text(&refused).contains("is younger than base copy") && !to.exists(),
        "{}",
        text(&refused)
    );

    // In the place of a node's data it is not started.
    let down = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().expect("pgtandem");
    assert!(down.status.success(), "{}", text(&down));
    let stopped = as_user(&restored.pg_ctl).args(["stop", "-s", "-D"]).arg(&restored.folder).status().expect("pg_ctl");
    assert!(stopped.success());
    let pgdata = cluster.layout.pgdata(0);
    std::fs::rename(&pgdata, cluster.dir().join("aside")).expect("a rename");
    std::fs::rename(&restored.folder, &pgdata).expect("a rename");
    cluster.start_agent(0);
    wait_for("the agent says what lies there", async || {
        cluster.logs().contains("was restored from an archive, which is no node's")
    })
    .await;
    assert!(!cluster.layout.postmaster_pid_file(0).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_archive_goes_on_when_the_leader_changes_and_outlives_its_host() {
    let cluster = Cluster::up(&["--archive"]);
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table told (n int primary key); insert into told values (1)").await.expect("a table");
    succeeded(&cluster.command(&["base", "--node", "node0"]), &cluster);
    succeeded(&cluster.command(&["base", "--node", "node1"]), &cluster);
    // Each node writes WAL of its own, and each has its own archive; the other keeps a copy of it.
    let streams_of = |node| streams(&cluster, node, node).into_iter().map(|stream| stream.name).collect::<Vec<_>>();
    let (zero, one) = (streams_of(0), streams_of(1));
    assert!(zero.len() == 1 && one.len() == 1 && zero != one, "{zero:?} {one:?}");
    assert_eq!((zero[0].timeline, one[0].timeline), (1, 2));
    let same =
        |node: usize, keeper: usize| files(&folder(&cluster, node, node)) == files(&folder(&cluster, keeper, node));
    wait_for("both have both archives", async || same(0, 1) && same(1, 0)).await;

    // node1 leads; its own stream goes on.
    let waiting = cluster.other_proxy(1);
    wait_for("the other proxy stands by", async || {
        text(&cluster.command_with(&waiting.config, &["status"])).contains("the proxy of this cluster runs on node0")
    })
    .await;
    succeeded(&cluster.command(&["switch", "node1"]), &cluster);
    let client = sandbox::compare::connect(waiting.port, "postgres").await.expect("the new leader's proxy");
    client.batch_execute("insert into told values (2)").await.expect("a write");
    succeeded(&cluster.command(&["base", "--node", "node1"]), &cluster);
    let before = now_us();
    client.batch_execute("insert into told values (3)").await.expect("a write");
    assert_eq!(streams_of(1), one, "the same stream as before");
    let history = streams(&cluster, 1, 1)[0].wal.contains(&WalName::History(2));
    assert!(history, "its timeline's history is in its archive");
    let verified = succeeded(&cluster.command(&["wal", "verify"]), &cluster);
    assert!(verified.contains("All is well"), "{verified}");
    let at = moment::for_postgres(before);
    let restored = Restored::start(&cluster, "restored-1", &["--target-time", &at]).await;
    assert_eq!(restored.value::<i64>("select sum(n) from told").await, 3, "of the new leader, without what came later");
    drop(restored);

    // Its host burns down. The other one has all that was archived.
    let leader = cluster.connect_node(1, "postgres").await;
    leader.query_one("select pg_switch_wal()::text", &[]).await.expect("a segment's end");
    wait_for("node0 has the archive of node1", async || same(1, 0)).await;
    drop(waiting);
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    std::fs::remove_dir_all(folder(&cluster, 1, 1)).expect("an archive");
    std::fs::remove_dir_all(cluster.layout.pgdata(1)).expect("a data directory");
    let restored = Restored::start(&cluster, "restored-2", &["--latest", "--node", "node1"]).await;
    assert_eq!(restored.value::<i64>("select sum(n) from told").await, 6);
    drop(restored);
}
