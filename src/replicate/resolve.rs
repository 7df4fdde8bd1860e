//! A new epoch on one node, and the fate of what was prepared under older ones.
//!
//! Order: commit the epoch row in every database, end every session that is not ours until none is left, and only
//! then read marks: no lock is trusted that a client could release. The leader's mark decides: n reached means commit.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::pg::build;
use crate::replicate::flight;
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::schema;

/// How long old sessions may take to end.
const END_MS_MAX: u64 = 30_000;
const END_POLL_MS: u64 = 5;

/// Marks of one database: n by id.
pub type Marks = HashMap<i32, i64>;

/// What a follower is, compared with the leader's marks of one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// It misses a decided transaction: it was left behind.
    Behind {
        mark: i32,
        leader: i64,
        follower: i64,
    },
    /// It holds a finished transaction that the leader does not know: the leader lost acknowledged commits.
    Ahead {
        mark: i32,
        leader: i64,
        follower: i64,
    },
}

/// Compares after everything prepared was resolved. Pure.
#[must_use]
pub fn compare(leader: &Marks, follower: &Marks) -> Verdict {
    let of = |marks: &Marks, id| marks.get(&id).copied().unwrap_or(0);
    let mut ids: Vec<i32> = leader.keys().chain(follower.keys()).copied().collect();
    ids.sort_unstable();
    let mut behind = None;
    for mark in ids {
        let (l, f) = (of(leader, mark), of(follower, mark));
        if f > l {
            return Verdict::Ahead { mark, leader: l, follower: f };
        }
        if f < l {
            behind = Some(Verdict::Behind { mark, leader: l, follower: f });
        }
    }
    behind.unwrap_or(Verdict::Same)
}

/// What another member has when no session of an older epoch is left: names that it holds prepared, and marks, by database.
#[derive(Clone, Debug, Default)]
pub struct Survivor {
    pub held: HashSet<String>,
    pub marks: HashMap<String, Marks>,
}

impl Survivor {
    fn has_finished(&self, database: &str, mark: i32, n: i64) -> bool {
        self.marks.get(database).and_then(|marks| marks.get(&mark)).is_some_and(|reached| *reached >= n)
    }
}

/// What becomes of a transaction that a new leader holds prepared and whose old leader is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A member has finished it, so it was decided.
    Decided,
    /// Every member holds it: it may have been acknowledged, and nobody was told that it failed, because that is told only after
    /// every member has rolled back.
    AllHold,
    /// Some member never prepared it, or has rolled it back: the old leader can not have decided to commit.
    NotEverywhere,
}

/// The fate of what this node holds prepared, by what the other members that take part in the new reign have. Pure.
#[must_use]
pub fn without_leader(database: &str, gid: &str, mark: i32, n: i64, others: &[Survivor]) -> Fate {
    if others.iter().any(|other| other.has_finished(database, mark, n)) {
        Fate::Decided
    } else if others.iter().all(|other| other.held.contains(gid)) {
        Fate::AllHold
    } else {
        Fate::NotEverywhere
    }
}

/// Names of what is prepared on this server, in every database.
pub async fn held(connection: &mut Connection) -> Result<HashSet<String>, ServerError> {
    Ok(query(connection, "SELECT gid FROM pg_catalog.pg_prepared_xacts").await?.into_iter().collect())
}

async fn query(connection: &mut Connection, text: &str) -> Result<Vec<String>, ServerError> {
    build::query(&mut connection.out, text.as_bytes());
    texts(connection.exchange().await?)
}

fn texts(answer: Answer) -> Result<Vec<String>, ServerError> {
    let values = answer.ok()?.values;
    Ok(values.into_iter().flatten().map(|v| String::from_utf8_lossy(&v).into_owned()).collect())
}

/// Databases that allow connections.
///
/// # Errors
/// The server's answer; so for all functions here.
pub async fn databases(connection: &mut Connection) -> Result<Vec<String>, ServerError> {
    query(connection, schema::DATABASES).await
}

/// The same, in this database.
pub async fn held_here(connection: &mut Connection) -> Result<Vec<String>, ServerError> {
    query(connection, "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()")
        .await
}

/// Creates the schema `pgtandem` where it is missing. The leader only: followers have it from their fill.
pub async fn install(connection: &mut Connection) -> Result<(), ServerError> {
    query(connection, "SET client_min_messages = warning").await?;
    query(connection, schema::INSTALL).await?;
    query(connection, schema::INSTALL_DEFINITIONS).await.map(|_| ())
}

/// Writes the epoch and the hash of its secret into this database.
///
/// # Errors
/// If the database has a higher epoch already.
pub async fn raise_epoch(connection: &mut Connection, epoch: u64, secret: &str) -> Result<(), ServerError> {
    build::parse(&mut connection.out, b"", schema::RAISE_EPOCH.as_bytes(), &[]);
    let epoch_text = epoch.to_string();
    build::bind_text(&mut connection.out, b"", b"", &[Some(epoch_text.as_bytes()), Some(secret.as_bytes())]);
    build::execute(&mut connection.out, b"", 0);
    build::sync(&mut connection.out);
    let answer = connection.exchange().await?.ok()?;
    match answer.tags.last().and_then(|t| crate::pg::message::tag_count(t)) {
        Some(1) => Ok(()),
        _ => {
            Err(ServerError::Other(format!("the database has an epoch above {epoch} already: a newer proxy serves it")))
        }
    }
}

/// Ends every client session of this server but the caller's, and waits until none is left.
///
/// # Errors
/// If some do not end within the limit.
pub async fn end_sessions(connection: &mut Connection) -> Result<(), ServerError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(END_MS_MAX);
    loop {
        let left = query(connection, schema::END_SESSIONS).await?;
        if left.first().is_some_and(|n| n == "0") {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(ServerError::Other(format!("{} sessions of an older epoch did not end", left.concat())));
        }
        tokio::time::sleep(Duration::from_millis(END_POLL_MS)).await;
    }
}

/// The marks of this database.
pub async fn marks(connection: &mut Connection) -> Result<Marks, ServerError> {
    let rows = query(connection, "SELECT id || ' ' || n FROM pgtandem.mark").await?;
    Ok(rows
        .iter()
        .filter_map(|row| row.split_once(' ').and_then(|(id, n)| Some((id.parse().ok()?, n.parse().ok()?))))
        .collect())
}

/// The last decided n of one mark; 0 if it was never used.
pub async fn mark(connection: &mut Connection, id: i32) -> Result<i64, ServerError> {
    let rows = query(connection, &format!("SELECT n FROM pgtandem.mark WHERE id = {id}")).await?;
    Ok(rows.first().and_then(|n| n.parse().ok()).unwrap_or(0))
}

/// Finishes what is prepared in this database and ours: by the leader's marks, or all rolled back without them.
pub async fn resolve(connection: &mut Connection, cluster: &str, leader: Option<&Marks>) -> Result<usize, ServerError> {
    let decided = |_: &str, mark: i32, n: i64| leader.is_some_and(|marks| marks.get(&mark).copied().unwrap_or(0) >= n);
    finish_all(connection, cluster, decided).await
}

/// The same on a new leader, whose old one is gone: see [`without_leader`].
pub async fn take_over(
    connection: &mut Connection,
    cluster: &str,
    database: &str,
    others: &[Survivor],
) -> Result<usize, ServerError> {
    let decided = |gid: &str, mark, n| without_leader(database, gid, mark, n, others) != Fate::NotEverywhere;
    finish_all(connection, cluster, decided).await
}

async fn finish_all(
    connection: &mut Connection,
    cluster: &str,
    is_decided: impl Fn(&str, i32, i64) -> bool,
) -> Result<usize, ServerError> {
    let gids = held_here(connection).await?;
    let mut resolved = 0;
    for gid in gids {
        let Some((mark, n)) = flight::parse_gid(&gid, cluster) else { continue };
        flight::finish(connection, &gid, is_decided(&gid, mark, n)).await?;
        resolved += 1;
    }
    Ok(resolved)
}

/// Waits until the backend with this process id is gone, so that its last mark is final.
///
/// # Errors
/// If it does not go within the limit.
pub async fn backend_gone(connection: &mut Connection, pid: i32) -> Result<(), ServerError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(END_MS_MAX);
    let text =
        format!("SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = {pid}");
    while !query(connection, &text).await?.is_empty() {
        if tokio::time::Instant::now() >= deadline {
            return Err(ServerError::Other(format!("backend {pid} does not end")));
        }
        tokio::time::sleep(Duration::from_millis(END_POLL_MS)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_leader_what_may_have_been_acknowledged_is_committed_and_the_same_everywhere() {
        let survivor = |held: &[&str], reached: i64| Survivor {
            held: held.iter().map(ToString::to_string).collect(),
            marks: HashMap::from([("shop".to_owned(), Marks::from([(1, reached)]))]),
        };
        let fate = |others: &[Survivor]| without_leader("shop", "g", 1, 5, others);
        // Alone: whatever it holds may have been acknowledged.
        assert_eq!(fate(&[]), Fate::AllHold);
        assert_eq!(fate(&[survivor(&["g"], 4)]), Fate::AllHold);
        assert_eq!(fate(&[survivor(&["g"], 4), survivor(&[], 4)]), Fate::NotEverywhere);
        assert_eq!(fate(&[survivor(&[], 4), survivor(&[], 5)]), Fate::Decided);
        // A mark of another database says nothing.
        assert_eq!(without_leader("bench", "g", 1, 5, &[survivor(&[], 5)]), Fate::NotEverywhere);
    }

    #[test]
    fn a_follower_that_knows_more_than_the_leader_is_told_apart_from_one_that_was_left_behind() {
        let leader = Marks::from([(1, 5), (2, 3)]);
        assert_eq!(compare(&leader, &leader.clone()), Verdict::Same);
        assert!(matches!(compare(&leader, &Marks::from([(1, 5)])), Verdict::Behind { mark: 2, .. }));
        assert!(matches!(compare(&leader, &Marks::from([(1, 4), (2, 4)])), Verdict::Ahead { mark: 2, .. }));
    }
}
