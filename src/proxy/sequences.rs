//! Followers' sequences are kept at or ahead of the leader's, off the commit path.
//!
//! Values of sequences reach followers as literals, so their own sequences stand still. Should one of them become the leader,
//! no value may be given twice: once a second, sequences that moved on the leader are set a thousand steps ahead there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::pg::build;
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::{Hub, HubError, within};

/// Time between two looks at the leader's sequences.
const LOOK_MS: u64 = 1000;

/// How long a server may take for one statement.
const ANSWER_MS_MAX: u64 = 10_000;

/// One line a sequence: its quoted name, then where it stands. Then the statement that moves a follower's ahead of it: never
/// back, and never past the sequence's own limits.
const MOVED: &str = "SELECT pg_catalog.format('%I.%I', schemaname, sequencename) || E'\\x1f' || last_value || E'\\x1f' || \
     pg_catalog.format('SELECT CASE WHEN %s THEN pg_catalog.setval(%L, %s) END FROM %I.%I q', \
         CASE WHEN increment_by > 0 THEN 'q.last_value <= ' || last_value ELSE 'q.last_value >= ' || last_value END, \
         pg_catalog.format('%I.%I', schemaname, sequencename), \
         CASE WHEN increment_by > 0 THEN LEAST(last_value::numeric + 1000 * increment_by::numeric, max_value) \
              ELSE GREATEST(last_value::numeric + 1000 * increment_by::numeric, min_value) END, \
         schemaname, sequencename) \
     FROM pg_catalog.pg_sequences WHERE last_value IS NOT NULL AND NOT cycle AND schemaname !~ '^pg_temp'";

/// Keeps them ahead until it is dropped.
pub async fn keep(hub: &Hub) {
    let mut seen: HashMap<(Arc<str>, String), String> = HashMap::new();
    let mut known: Vec<u64> = Vec::new();
    loop {
        tokio::time::sleep(Duration::from_millis(LOOK_MS)).await;
        let followers: Vec<u64> = hub.view().followers.iter().map(|f| f.id).collect();
        if followers != known {
            seen.clear();
            known = followers;
        }
        for database in hub.take_written() {
            let kept = keep_database(hub, &database, &mut seen).await;
            // Dropped or renamed meanwhile.
            let gone = matches!(&kept, Err(HubError::Server(e)) if e.sqlstate() == Some("3D000"));
            if let Err(e) = kept
                && !gone
            {
                tracing::info!(database = &*database, error = %e, "sequences of followers were not moved ahead; tried again");
                hub.note_write(&database);
            }
        }
    }
}

async fn keep_database(
    hub: &Hub,
    database: &Arc<str>,
    seen: &mut HashMap<(Arc<str>, String), String>,
) -> Result<(), HubError> {
    let view = hub.view();
    let Some((epoch, secret)) = hub.epoch_and_secret() else { return Ok(()) };
    if view.followers.is_empty() {
        return Ok(());
    }
    let mut moved = Vec::new();
    for line in rows(&mut hub.leader_connection(database).await?, MOVED).await? {
        let mut parts = line.splitn(3, '\x1f');
        let (Some(name), Some(at), Some(statement)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let key = (Arc::clone(database), name.to_owned());
        if seen.get(&key).is_none_or(|before| before != at) {
            moved.push((key, at.to_owned(), statement.to_owned()));
        }
    }
    if moved.is_empty() {
        return Ok(());
    }
    for follower in view.followers.iter().filter(|f| !f.gone.is_cancelled()) {
        let mut connection = hub.tunnel_connection(&follower.node, database, epoch, Some(&secret)).await?;
        for (_, _, statement) in &moved {
            match rows(&mut connection, statement).await {
                // Created a moment ago, and not yet finished there.
                Err(ServerError::Answer { sqlstate, .. }) if sqlstate == "42P01" => {}
                result => drop(result?),
            }
        }
    }
    seen.extend(moved.into_iter().map(|(key, at, _)| (key, at)));
    Ok(())
}

async fn rows(connection: &mut Connection, text: &str) -> Result<Vec<String>, ServerError> {
    build::query(&mut connection.out, text.as_bytes());
    let answer = within(ANSWER_MS_MAX, connection.exchange()).await.and_then(Answer::ok)?;
    Ok(answer.values.into_iter().flatten().map(|v| String::from_utf8_lossy(&v).into_owned()).collect())
}
