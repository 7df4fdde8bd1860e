//! Statements outside transactions, node by node: on the leader as the client sent them, then on each follower.
//!
//! Before the leader gets the text, an [`Intent`] is stored on every member. What is done afterwards follows from what can be seen
//! on the servers, so it can be done again at any moment, by the same proxy or by the next one: the leader's state is *looked
//! at*, each follower's is too, and where they differ the text runs there, under the client's role and settings. A follower that
//! is not as the leader then has to leave the member set.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::config::NodeConfig;
use crate::pg::build;
use crate::replicate::commit::SLOWER_MAX;
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::{Hub, HubError, Reign};
use crate::replicate::resolve::{self, Marks};
use crate::replicate::schema::{Context, MIRRORED};
use crate::sql::facts::{quote_identifier, quote_literal};
pub use crate::sql::nodewise::HOME;
use crate::sql::nodewise::{self, Work};

/// How long a follower may take for one statement, on top of [`SLOWER_MAX`] times what the leader took.
const FOLLOW_MS_MAX: u64 = 3_600_000;
/// How long connections and prepared transactions of ours may take to leave a database.
const LEAVE_MS_MAX: u64 = 10_000;
const LEAVE_POLL_MS: u64 = 10;

/// What is under way, as every member has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    pub id: String,
    pub database: String,
    pub context: Context,
    pub text: String,
    /// What was there before on the leader: databases that the statement names, or invalid indexes.
    pub before: Vec<String>,
}

/// How the leader did it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Leader {
    /// How long it took, milliseconds; 0 if that is not known.
    pub ms: u64,
    /// It did something that can not be seen afterwards: followers do it, too, although nothing differs.
    pub again: bool,
}

/// Where something is done.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    Leader,
    Follower(&'a NodeConfig),
}

/// The way to the servers under one epoch.
#[derive(Clone, Copy, Debug)]
pub struct Servers<'a> {
    pub hub: &'a Hub,
    pub epoch: u64,
    pub secret: &'a str,
}

async fn query(connection: &mut Connection, text: &str) -> Result<Vec<String>, ServerError> {
    build::query(&mut connection.out, text.as_bytes());
    let answer = connection.exchange().await.and_then(Answer::ok)?;
    Ok(answer.values.into_iter().flatten().map(|v| String::from_utf8_lossy(&v).into_owned()).collect())
}

/// Brings a session of ours on a follower into the settings of a client's.
///
/// # Errors
/// The server's answer.
pub async fn enter(connection: &mut Connection, context: &Context) -> Result<(), ServerError> {
    if context.settings.len() == MIRRORED.len() {
        let values: Vec<Option<&[u8]>> = context.settings.iter().map(|s| Some(s.as_bytes())).collect();
        build::bind_text(&mut connection.out, b"", b"pgtandem_apply", &values);
        build::execute(&mut connection.out, b"", 0);
        build::sync(&mut connection.out);
        connection.exchange().await.and_then(Answer::ok)?;
    } else if let Some(path) = context.settings.first() {
        // An intent of another version of pgtandem: names mean the same all the same.
        let text = format!("SELECT pg_catalog.set_config('search_path', {}, false)", quote_literal(path));
        query(connection, &text).await?;
    }
    Ok(())
}

impl Servers<'_> {
    pub(crate) async fn open(&self, place: Place<'_>, database: &str) -> Result<Connection, HubError> {
        match place {
            Place::Leader => self.hub.leader_connection(database).await,
            Place::Follower(node) => Ok(self.hub.tunnel_connection(node, database, self.epoch, None).await?),
        }
    }

    /// Stores the intent on this server, durably.
    ///
    /// # Errors
    /// The server's answer; so for all functions here.
    pub async fn store(&self, place: Place<'_>, intent: &Intent) -> Result<(), HubError> {
        query(&mut self.open(place, HOME).await?, &intent.insert()).await?;
        Ok(())
    }

    /// Takes the intents of this server away; the leader's last, since they are what is gone on with after a crash.
    pub async fn forget(&self, place: Place<'_>) -> Result<(), HubError> {
        query(&mut self.open(place, HOME).await?, "DELETE FROM pgtandem.intent").await?;
        Ok(())
    }

    /// The intents of the leader.
    pub async fn intents(&self) -> Result<Vec<Intent>, HubError> {
        let rows = query(&mut self.open(Place::Leader, HOME).await?, INTENTS).await?;
        let read = |row: &String| {
            Intent::parse(row).ok_or_else(|| HubError::Other(format!("an intent can not be read: {row}")))
        };
        rows.iter().map(read).collect()
    }

    /// What of [`Intent::before`] there is on the leader.
    pub async fn before(&self, database: &str, work: &Work) -> Result<Vec<String>, HubError> {
        let text = match work {
            work if work.is_index() => INVALID.to_owned(),
            Work::Setting { .. } => return Ok(Vec::new()),
            work => format!("SELECT datname FROM pg_catalog.pg_database WHERE datname IN ({})", literals(work)),
        };
        Ok(query(&mut self.open(Place::Leader, database).await?, &text).await?)
    }

    /// What the statement is about, as a text that is the same on servers that are the same.
    async fn look(&self, place: Place<'_>, intent: &Intent, work: &Work) -> Result<String, HubError> {
        let (database, text) = match work {
            Work::Index | Work::Reindex => (intent.database.as_str(), INDEXES.to_owned()),
            Work::Setting { name } => (HOME, settings(name.as_deref())),
            work => (HOME, databases(work)),
        };
        let mut connection = self.open(place, database).await?;
        query(&mut connection, "SET search_path = pg_catalog").await?;
        Ok(query(&mut connection, &text).await?.concat())
    }

    /// The leader's own share, after the text has ended there: what it left half done is ended, and a new database is made fit.
    pub async fn settle_leader(&self, intent: &Intent, work: &Work) -> Result<(), HubError> {
        match work {
            Work::Index | Work::Reindex => self.drop_invalid(Place::Leader, intent).await?,
            Work::DropDatabase { name } => {
                // One whose DROP was interrupted can only be dropped: PostgreSQL marks it so.
                let mut connection = self.open(Place::Leader, HOME).await?;
                let interrupted = format!(
                    "SELECT 1 FROM pg_catalog.pg_database WHERE datname = {} AND datconnlimit = -2",
                    quote_literal(name)
                );
                if !query(&mut connection, &interrupted).await?.is_empty() {
                    query(&mut connection, &format!("DROP DATABASE {}", quote_identifier(name))).await?;
                }
            }
            _ => {}
        }
        self.make_fit(Place::Leader, intent, work).await
    }

    /// Brings a follower to where the leader is. `again`: the text runs there although nothing differs.
    ///
    /// # Errors
    /// Why the follower is not as the leader: it must leave the member set.
    pub async fn follow(&self, node: &NodeConfig, intent: &Intent, work: &Work, again: bool) -> Result<(), HubError> {
        let place = Place::Follower(node);
        let leader = self.look(Place::Leader, intent, work).await?;
        let mut error = None;
        if again || self.look(place, intent, work).await? != leader {
            self.empty(place, work).await?;
            error = self.run(node, intent, work).await.err();
            if let Some(first) = &error {
                tracing::info!(node = %node.name, error = %first, text = intent.text, "tried again on a follower");
                self.drop_leftovers(place, intent, work).await?;
                self.empty(place, work).await?;
                error = self.run(node, intent, work).await.err();
                self.drop_leftovers(place, intent, work).await?;
            }
        }
        if self.look(place, intent, work).await? != leader {
            return Err(error.unwrap_or_else(|| HubError::Other("it had another result there".to_owned())));
        }
        self.make_fit(place, intent, work).await
    }

    /// The client's text on a follower, under the client's role and settings.
    async fn run(&self, node: &NodeConfig, intent: &Intent, work: &Work) -> Result<(), HubError> {
        let database = if work.is_index() { &intent.database } else { HOME };
        let mut connection = self.hub.tunnel_connection(node, database, self.epoch, Some(self.secret)).await?;
        enter(&mut connection, &intent.context).await?;
        query(&mut connection, &format!("SET ROLE {}", quote_identifier(&intent.context.role))).await?;
        query(&mut connection, &intent.text).await?;
        Ok(())
    }

    async fn drop_leftovers(&self, place: Place<'_>, intent: &Intent, work: &Work) -> Result<(), HubError> {
        if work.is_index() { self.drop_invalid(place, intent).await } else { Ok(()) }
    }

    /// Invalid indexes that the statement left: they would be kept up with every write, and on this server alone.
    async fn drop_invalid(&self, place: Place<'_>, intent: &Intent) -> Result<(), HubError> {
        let mut connection = self.open(place, &intent.database).await?;
        let invalid = query(&mut connection, INVALID).await?;
        for name in invalid.iter().filter(|name| !intent.before.contains(name)) {
            tracing::info!(?place, index = name, "an index that was left invalid is dropped");
            query(&mut connection, &format!("DROP INDEX CONCURRENTLY IF EXISTS {name}")).await?;
        }
        Ok(())
    }

    /// Ends connections of ours to the databases that the statement needs for itself, and waits for what is prepared there.
    async fn empty(&self, place: Place<'_>, work: &Work) -> Result<(), HubError> {
        if work.databases().is_empty() {
            return Ok(());
        }
        let mut connection = self.open(place, HOME).await?;
        let text = format!(
            "SELECT pg_catalog.pg_terminate_backend(pid)::text FROM pg_catalog.pg_stat_activity \
                 WHERE datname IN ({names}) AND usename = 'pgtandem' AND pid <> pg_catalog.pg_backend_pid() \
             UNION ALL SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database IN ({names})",
            names = literals(work)
        );
        let deadline = tokio::time::Instant::now() + Duration::from_millis(LEAVE_MS_MAX);
        loop {
            let left = query(&mut connection, &text).await?;
            if left.is_empty() {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                let what = format!("connections or prepared transactions did not leave the database: {left:?}");
                return Err(HubError::Other(what));
            }
            tokio::time::sleep(Duration::from_millis(LEAVE_POLL_MS)).await;
        }
    }

    /// A new database gets what every database has, and no marks of the one that it was copied from.
    async fn make_fit(&self, place: Place<'_>, intent: &Intent, work: &Work) -> Result<(), HubError> {
        let Work::CreateDatabase { name, .. } = work else { return Ok(()) };
        if intent.before.contains(name) || self.look(place, intent, work).await?.is_empty() {
            return Ok(());
        }
        let mut connection = self.open(place, name).await?;
        resolve::install(&mut connection).await?;
        resolve::raise_epoch(&mut connection, self.epoch, self.secret).await?;
        query(&mut connection, "DELETE FROM pgtandem.mark").await?;
        Ok(())
    }
}

impl Intent {
    /// What it is about, read anew from its text.
    ///
    /// # Errors
    /// If the text is none of these statements.
    pub fn work(&self) -> Result<Work, HubError> {
        nodewise::read(&self.text).map_err(|refusal| HubError::Other(refusal.message))
    }

    fn insert(&self) -> String {
        let list = |values: &[String]| {
            let values: Vec<String> = values.iter().map(|value| quote_literal(value)).collect();
            format!("ARRAY[{}]::text[]", values.join(", "))
        };
        format!(
            "INSERT INTO pgtandem.intent (id, database, role, settings, statement, before) VALUES ({}, {}, {}, {}, {}, {})",
            quote_literal(&self.id),
            quote_literal(&self.database),
            quote_literal(&self.context.role),
            list(&self.context.settings),
            quote_literal(&self.text),
            list(&self.before)
        )
    }

    fn parse(row: &str) -> Option<Self> {
        let (id, database, role, settings, text, before): (String, String, String, Vec<String>, String, Vec<String>) =
            serde_json::from_str(row).ok()?;
        Some(Self { id, database, context: Context { role, settings }, text, before })
    }
}

const INTENTS: &str = "SELECT pg_catalog.json_build_array(id, database, role, settings, statement, before)::text \
     FROM pgtandem.intent ORDER BY id";

/// Indexes that a statement which failed has left.
const INVALID: &str = "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_index i \
     JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE NOT i.indisvalid AND c.relkind = 'i' AND c.relpersistence <> 't'";

/// All indexes of a database, but for those of temporary and TOAST tables, whose names are the server's own.
const INDEXES: &str = "SELECT md5(COALESCE(string_agg(concat_ws(' ', pg_get_indexdef(i.indexrelid), i.indisvalid), E'\\n' \
     ORDER BY n.nspname COLLATE \"C\", c.relname COLLATE \"C\"), '')) FROM pg_index i \
     JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relpersistence <> 't' AND n.nspname <> 'pg_toast'";

fn literals(work: &Work) -> String {
    work.databases().into_iter().map(quote_literal).collect::<Vec<_>>().join(", ")
}

fn databases(work: &Work) -> String {
    format!(
        "SELECT COALESCE(string_agg(concat_ws(' ', datname, pg_get_userbyid(datdba), pg_encoding_to_char(encoding), datcollate, \
             datctype, datistemplate, datallowconn, datconnlimit), E'\\n' ORDER BY datname), '') FROM pg_database \
         WHERE datname IN ({})",
        match work {
            // The template stays what it is.
            Work::CreateDatabase { name, .. } => quote_literal(name),
            work => literals(work),
        }
    )
}

fn settings(name: Option<&str>) -> String {
    let one = name.map_or(String::new(), |name| format!(" AND lower(name) = {}", quote_literal(name)));
    format!(
        "SELECT COALESCE(string_agg(lower(name) || '=' || setting, E'\\n' ORDER BY lower(name) COLLATE \"C\"), '') \
         FROM pg_file_settings WHERE sourcefile ~ '/postgresql[.]auto[.]conf$'{one}"
    )
}

/// Everything on the followers that are members now, and the intent forgotten. Followers that can not leave the member set. When
/// this returns the statement is done everywhere, and a new database may be used.
///
/// # Errors
/// If the leader does not answer: the intent stays, and is gone on with before the next statement of this kind.
pub async fn finish(servers: &Servers<'_>, intent: &Intent, work: &Work, leader: Leader) -> Result<(), HubError> {
    let hub = servers.hub;
    servers.settle_leader(intent, work).await?;
    // What followers have not finished yet may hold what the statement needs.
    let earlier = hub.while_serving(servers.epoch, hub.gate.barrier(hub.gate.next_number()));
    earlier.await.ok_or_else(epoch_is_over)?;
    let limit_ms = FOLLOW_MS_MAX + SLOWER_MAX * leader.ms;
    let limit = Duration::from_millis(limit_ms);
    let mut leaving = Vec::new();
    for follower in &hub.view().followers {
        let followed = async {
            let done = servers.follow(&follower.node, intent, work, leader.again).await;
            if done.is_ok() { servers.forget(Place::Follower(&follower.node)).await } else { done }
        };
        let result = tokio::select! {
            result = tokio::time::timeout(limit, followed) => result.unwrap_or(Err(ServerError::Timeout(limit_ms).into())),
            () = follower.gone.cancelled() => continue,
        };
        if let Err(error) = result {
            leaving.push((Arc::clone(follower), error));
        }
    }
    // Whoever was passed over has left by itself, unless the epoch is over and nobody is known any more.
    if hub.reign_epoch() != Some(servers.epoch) {
        return Err(epoch_is_over());
    }
    for (follower, error) in leaving {
        let reason = format!("it could not do what the leader did, {}: {error}", intent.in_short());
        let left = hub.lost(&follower, pgtandem_proto::membership::NodeState::Stale, &reason).await;
        if hub.reign_epoch() != Some(servers.epoch) {
            return Err(epoch_is_over());
        }
        left?;
    }
    // A new database is given out only when no crash can empty its marks again.
    servers.forget(Place::Leader).await?;
    let there = query(&mut servers.open(Place::Leader, HOME).await?, crate::replicate::schema::DATABASES).await?;
    hub.marks.rename(work, &there, &intent.before);
    for database in work.databases() {
        hub.sequences.forget(database);
    }
    Ok(())
}

fn epoch_is_over() -> HubError {
    HubError::Other("the epoch is over".to_owned())
}

/// Whether clients are served before it is done on followers, after a crash.
#[must_use]
pub fn may_take_long(intent: &Intent) -> bool {
    intent.work().is_ok_and(|work| work.is_index())
}

/// The leader's marks for a database of a follower, which may still have the name that a rename has changed on the leader.
#[must_use]
pub(crate) fn renamed<'m>(database: &str, leader: &'m HashMap<String, Marks>, intents: &[Intent]) -> Option<&'m Marks> {
    leader.get(database).or_else(|| {
        intents.iter().find_map(|intent| match intent.work() {
            Ok(Work::RenameDatabase { from, to }) if from == database => leader.get(&to),
            _ => None,
        })
    })
}

/// Goes on with what a crash has left, beside the clients: when this returns, no DDL commit can reach a follower before it.
pub async fn go_on(hub: &Arc<Hub>, epoch: u64, secret: &str, intents: Vec<Intent>) {
    if intents.is_empty() {
        return;
    }
    let statement = hub.nodewise.begin(0, &[]).await;
    statement.begin_to_follow();
    let (hub, secret) = (Arc::clone(hub), secret.to_owned());
    tokio::spawn(async move {
        let mut reign = hub.reign.subscribe();
        if reign.wait_for(|reign| !matches!(reign, Reign::Starting | Reign::Waiting(_))).await.is_err() {
            return;
        }
        drop(reign);
        // Those of the old epoch end by themselves now.
        statement.follow().await;
        let servers = Servers { hub: &hub, epoch, secret: &secret };
        if let Err(error) = finish_all(&servers, &intents).await {
            tracing::error!(%error, "a statement outside transactions is not done everywhere yet");
        }
    });
}

/// Does what is left of earlier statements.
///
/// # Errors
/// As [`finish`].
pub async fn finish_all(servers: &Servers<'_>, intents: &[Intent]) -> Result<(), HubError> {
    for intent in intents {
        finish(servers, intent, &intent.work()?, Leader::default()).await?;
    }
    Ok(())
}

impl Intent {
    /// The beginning of the text, for a sentence.
    #[must_use]
    pub fn in_short(&self) -> String {
        const CHARS_MAX: usize = 80;
        let words = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        match words.char_indices().nth(CHARS_MAX) {
            Some((end, _)) => format!("{} ...", words.get(..end).unwrap_or_default()),
            None => words,
        }
    }
}
