//! A fault proxy: sits on a server's unix socket, where the proxy or an agent connects, and holds, delays, watches or cuts single protocol
//! messages. Put in place by renaming the server's socket, so nothing else needs to know.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Cluster, LIMIT};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    Server,
    Client,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing has come that matches.
    Waiting,
    /// A message is held.
    Held,
    Released,
    /// The connection ends instead.
    Cut,
}

struct Rule {
    towards: Towards,
    tag: u8,
    part: String,
    /// Goes on by itself after this time; none: when the test says so.
    passes_after: Option<Duration>,
    state: watch::Sender<State>,
}

/// One message that is waited for.
pub struct Held(Arc<Rule>);

type Rules = Arc<Mutex<Vec<Arc<Rule>>>>;

pub struct Fault {
    rules: Rules,
    path: PathBuf,
    real: PathBuf,
    task: JoinHandle<()>,
}

impl Fault {
    /// Stands between node `index`'s PostgreSQL and whoever connects to its socket from now on.
    pub async fn interpose(cluster: &Cluster, index: usize) -> Self {
        // Whoever connects through this process is, for `peer`, this process's user.
        let user = pgtandem::sandbox::user::current().expect("a user");
        let ident = cluster.layout.pgdata(index).join("pg_ident.conf");
        let text = std::fs::read_to_string(&ident).expect("pg_ident.conf");
        std::fs::write(&ident, format!("{text}pgtandem {user} pgtandem\n")).expect("pg_ident.conf");
        let client = cluster.connect_node(index, "postgres").await;
        client.batch_execute("select pg_reload_conf()").await.expect("a reload");
        super::wait_for("the server knows who this process is", async || {
            let sql = "select count(*) from pg_ident_file_mappings where sys_name = $1";
            client.query_one(sql, &[&user]).await.expect("mappings").get::<_, i64>(0) > 0
        })
        .await;

        let port = cluster.layout.postgres_port(index);
        let path = cluster.layout.socket_dir(index).join(format!(".s.PGSQL.{port}"));
        let real = cluster.layout.socket_dir(index).join("real");
        std::fs::rename(&path, &real).expect("a socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        open_to_all(&path);
        let rules = Rules::default();
        let (to, with) = (real.clone(), Arc::clone(&rules));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if let Ok(server) = UnixStream::connect(&to).await {
                    tokio::spawn(pass_both(client, server, Arc::clone(&with)));
                }
            }
        });
        Self { rules, path, real, task }
    }

    fn rule(&self, towards: Towards, tag: u8, part: &str, passes_after: Option<Duration>) -> Held {
        let state = watch::Sender::new(State::Waiting);
        let rule = Arc::new(Rule { towards, tag, part: part.to_owned(), passes_after, state });
        self.rules.lock().expect("no panic").push(Arc::clone(&rule));
        Held(rule)
    }

    /// Holds the next message with this tag that contains `part`, and what comes after it on that connection.
    pub fn hold(&self, towards: Towards, tag: u8, part: &str) -> Held {
        self.rule(towards, tag, part, None)
    }

    /// Lets the next such message pass, after a while.
    pub fn delay(&self, towards: Towards, tag: u8, part: &str, time: Duration) -> Held {
        self.rule(towards, tag, part, Some(time))
    }

    /// Only tells that such a message has come.
    pub fn watch(&self, towards: Towards, tag: u8, part: &str) -> Held {
        self.rule(towards, tag, part, Some(Duration::ZERO))
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        self.task.abort();
        // A server that was started again has made its own socket there.
        if self.real.exists() {
            let _ = std::fs::rename(&self.real, &self.path);
        }
    }
}

impl Held {
    /// Waits until such a message is held, or has passed.
    pub async fn reached(&self) {
        let mut state = self.0.state.subscribe();
        let came = tokio::time::timeout(LIMIT, state.wait_for(|state| *state != State::Waiting)).await;
        assert!(came.is_ok(), "no message {:?} with {}", char::from(self.0.tag), self.0.part);
    }

    pub fn release(&self) {
        self.0.state.send_replace(State::Released);
    }

    /// Ends the connection: the message is lost.
    pub fn cut(&self) {
        self.0.state.send_replace(State::Cut);
    }
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("a socket");
}

async fn pass_both(client: UnixStream, server: UnixStream, rules: Rules) {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let end = CancellationToken::new();
    let there = tokio::spawn(pass(from_client, to_server, Towards::Server, Arc::clone(&rules), end.clone()));
    let back = tokio::spawn(pass(from_server, to_client, Towards::Client, rules, end));
    let _ = tokio::join!(there, back);
}

/// Passes message by message until one side ends or a rule cuts.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, towards: Towards, rules: Rules, end: CancellationToken) {
    let guard = end.clone().drop_guard();
    let work = async {
        if towards == Towards::Server {
            // The first packet has no tag.
            let length = from.read_u32().await?;
            let mut body = vec![0; usize::try_from(length).expect("a length") - 4];
            from.read_exact(&mut body).await?;
            to.write_all(&[&length.to_be_bytes()[..], &body].concat()).await?;
        }
        loop {
            let tag = from.read_u8().await?;
            let length = from.read_u32().await?;
            let mut body = vec![0; usize::try_from(length).expect("a length") - 4];
            from.read_exact(&mut body).await?;
            if !allowed(&rules, towards, tag, &body).await {
                return std::io::Result::Ok(());
            }
            to.write_all(&[&[tag][..], &length.to_be_bytes(), &body].concat()).await?;
        }
    };
    tokio::select! {
        _ = work => {}
        () = end.cancelled() => {}
    }
    drop(guard);
}

/// Waits as the rules say. False: the connection ends.
async fn allowed(rules: &Rules, towards: Towards, tag: u8, body: &[u8]) -> bool {
    let rule = {
        let mut rules = rules.lock().expect("no panic");
        let matches = |rule: &Arc<Rule>| {
            let part = rule.part.as_bytes();
            let found = part.is_empty() || body.windows(part.len()).any(|window| window == part);
            rule.towards == towards && rule.tag == tag && found
        };
        let at = rules.iter().position(matches);
        at.map(|at| rules.remove(at))
    };
    let Some(rule) = rule else { return true };
    let mut state = rule.state.subscribe();
    if *state.borrow() == State::Waiting {
        rule.state.send_replace(State::Held);
    }
    if let Some(time) = rule.passes_after {
        tokio::time::sleep(time).await;
        rule.state.send_replace(State::Released);
    }
    let decided = state.wait_for(|state| matches!(state, State::Released | State::Cut)).await;
    decided.is_ok_and(|state| *state == State::Released)
}
