//! Prepared transactions of clients: under the client's name on every member, and finished there only after the leader.
//!
//! Each has a mark of its own, whose step is part of what is prepared. Before anything is prepared the name and the mark are noted
//! on every member (`pgtandem.prepared`), followers prepare, then the leader. So: while the leader holds the name, nothing is decided and
//! every member holds it; when the leader does not, its mark says whether it was committed. That is all a new epoch needs.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pg::build;
use crate::replicate::exclusion::Hold;
use crate::replicate::flight;
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::HubError;
use crate::replicate::marks::Mark;
use crate::replicate::nodewise::{HOME, Place, Servers};
use crate::replicate::resolve::{self, Marks, Survivor};
use crate::sql::facts::quote_literal;

/// Prepared transactions of clients that are not finished, by name.
#[derive(Debug, Default)]
pub struct TwoPhase {
    open: Mutex<HashMap<String, Slot>>,
}

/// One of them.
#[derive(Debug)]
pub struct Transaction {
    pub note: Note,
    /// Used by nothing else.
    pub mark: Mark,
    /// No node is between its cut and its join: it could not be told of the end.
    pub hold: Hold,
}

/// What every member keeps about one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub gid: String,
    pub database: String,
    pub mark_id: i32,
    pub mark_n: i64,
    /// It changes the schema.
    pub ddl: bool,
}

#[derive(Debug)]
enum Slot {
    /// A session prepares or finishes it.
    Busy,
    Open(Box<Transaction>),
}

/// What there is under a name.
#[derive(Debug)]
pub enum Found {
    None,
    Busy,
    /// Of another database: the server says so.
    Elsewhere,
    /// Taken: the caller gives it back or forgets it.
    Open(Box<Transaction>),
}

/// What became of one, as the leader has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Open,
    Committed,
    RolledBack,
}

impl TwoPhase {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        // The map is consistent between statements, so a panic elsewhere does not spoil it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for a transaction that is about to be prepared; gives how many there are then. `None`: it is in use.
    pub fn reserve(&self, gid: &str) -> Option<usize> {
        let mut open = self.open();
        if open.contains_key(gid) {
            return None;
        }
        open.insert(gid.to_owned(), Slot::Busy);
        Some(open.len())
    }

    /// It is prepared, or still is.
    pub fn put(&self, transaction: Box<Transaction>) {
        self.open().insert(transaction.note.gid.clone(), Slot::Open(transaction));
    }

    /// It is finished, or was never prepared.
    pub fn forget(&self, gid: &str) {
        self.open().remove(gid);
    }

    /// Takes one to finish it.
    pub fn take(&self, gid: &str, database: &str) -> Found {
        let mut open = self.open();
        match open.insert(gid.to_owned(), Slot::Busy) {
            None => {
                open.remove(gid);
                Found::None
            }
            Some(Slot::Busy) => Found::Busy,
            Some(Slot::Open(transaction)) if transaction.note.database == database => Found::Open(transaction),
            Some(slot @ Slot::Open(_)) => {
                open.insert(gid.to_owned(), slot);
                Found::Elsewhere
            }
        }
    }

    /// A new epoch begins with what it found.
    pub fn reset(&self, found: Vec<Transaction>) {
        let slots = found.into_iter().map(|t| (t.note.gid.clone(), Slot::Open(Box::new(t))));
        *self.open() = slots.collect();
    }
}

const NOTES: &str = "SELECT pg_catalog.json_build_array(gid, database, mark, n, ddl)::text FROM pgtandem.prepared";

async fn query(connection: &mut Connection, text: &str) -> Result<Vec<String>, ServerError> {
    build::query(&mut connection.out, text.as_bytes());
    let answer = connection.exchange().await.and_then(Answer::ok)?;
    Ok(answer.values.into_iter().flatten().map(|v| String::from_utf8_lossy(&v).into_owned()).collect())
}

/// Notes it down on one member, durably.
///
/// # Errors
/// The server's answer; so for all functions here.
pub async fn note(servers: &Servers<'_>, place: Place<'_>, note: &Note) -> Result<(), HubError> {
    let text = format!(
        "INSERT INTO pgtandem.prepared (gid, database, mark, n, ddl) VALUES ({}, {}, {}, {}, {}) ON CONFLICT (gid) DO UPDATE \
         SET database = excluded.database, mark = excluded.mark, n = excluded.n, ddl = excluded.ddl",
        quote_literal(&note.gid),
        quote_literal(&note.database),
        note.mark_id,
        note.mark_n,
        note.ddl
    );
    query(&mut servers.open(place, HOME).await?, &text).await?;
    Ok(())
}

/// Takes the note away on all members, the leader's last: it is finished everywhere.
pub async fn forget(servers: &Servers<'_>, gid: &str) -> Result<(), HubError> {
    let text = format!("DELETE FROM pgtandem.prepared WHERE gid = {}", quote_literal(gid));
    for follower in &servers.hub.view().followers {
        let forget = async {
            query(&mut servers.open(Place::Follower(&follower.node), HOME).await?, &text).await?;
            Ok::<_, HubError>(())
        };
        if let Err(error) = forget.await {
            // Only the leader's notes decide anything; the next epoch takes the others away.
            tracing::info!(node = %follower.node.name, gid, %error, "the note of a prepared transaction was not taken away");
        }
    }
    query(&mut servers.open(Place::Leader, HOME).await?, &text).await?;
    Ok(())
}

/// What the leader has noted, and what became of each. Asked when no session can change it.
pub(crate) async fn fates(
    servers: &Servers<'_>,
    marks: &HashMap<String, Marks>,
) -> Result<Vec<(Note, Fate)>, HubError> {
    let mut connection = servers.open(Place::Leader, HOME).await?;
    let rows = query(&mut connection, NOTES).await?;
    let held = query(&mut connection, "SELECT gid FROM pg_catalog.pg_prepared_xacts").await?;
    let notes = rows.iter().filter_map(|row| Note::parse(row));
    Ok(notes.map(|note| (fate(&note, &held, marks), note)).map(|(fate, note)| (note, fate)).collect())
}

fn fate(note: &Note, held: &[String], marks: &HashMap<String, Marks>) -> Fate {
    let decided = marks.get(&note.database).and_then(|marks| marks.get(&note.mark_id)).copied().unwrap_or(0);
    if held.contains(&note.gid) {
        Fate::Open
    } else if decided >= note.mark_n {
        Fate::Committed
    } else {
        Fate::RolledBack
    }
}

/// On a new leader whose old one is gone: what clients have prepared stays open where every member holds it, because the old leader
/// may have told the client so; what some member has finished is finished here. Before [`fates`], which then finds it settled.
pub async fn take_over(servers: &Servers<'_>, others: &[Survivor]) -> Result<(), HubError> {
    let mut connection = servers.open(Place::Leader, HOME).await?;
    let notes = query(&mut connection, NOTES).await?;
    let held = resolve::held(&mut connection).await?;
    for note in notes.iter().filter_map(|row| Note::parse(row)).filter(|note| held.contains(&note.gid)) {
        let fate = resolve::without_leader(&note.database, &note.gid, note.mark_id, note.mark_n, others);
        if fate != resolve::Fate::AllHold {
            let mut connection = servers.open(Place::Leader, &note.database).await?;
            flight::finish(&mut connection, &note.gid, fate == resolve::Fate::Decided).await?;
        }
    }
    Ok(())
}

/// Brings a follower to what the leader has. `connection`: to one of its databases.
pub async fn follow(connection: &mut Connection, database: &str, fates: &[(Note, Fate)]) -> Result<(), HubError> {
    let held = query(
        connection,
        "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()",
    )
    .await?;
    for (note, fate) in fates.iter().filter(|(note, _)| note.database == database) {
        match (held.contains(&note.gid), fate) {
            (true, Fate::Committed | Fate::RolledBack) => {
                flight::finish(connection, &note.gid, *fate == Fate::Committed).await?;
            }
            (false, Fate::Open) => {
                let what = format!("it does not hold the prepared transaction {}, which the leader holds", note.gid);
                return Err(HubError::Other(what));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Takes away the notes of what is decided, on one member.
pub async fn forget_decided(servers: &Servers<'_>, place: Place<'_>, fates: &[(Note, Fate)]) -> Result<(), HubError> {
    let open: Vec<String> =
        fates.iter().filter(|(_, fate)| *fate == Fate::Open).map(|(note, _)| quote_literal(&note.gid)).collect();
    let text = format!("DELETE FROM pgtandem.prepared WHERE gid <> ALL (ARRAY[{}]::text[])", open.join(", "));
    query(&mut servers.open(place, HOME).await?, &text).await?;
    Ok(())
}

/// Looks once more at one of which the session does not know what became of it: its backend is gone.
pub async fn look(servers: &Servers<'_>, note: &Note) -> Result<Fate, HubError> {
    let mut connection = servers.open(Place::Leader, &note.database).await?;
    let held = query(&mut connection, "SELECT gid FROM pg_catalog.pg_prepared_xacts").await?;
    let n = resolve::mark(&mut connection, note.mark_id).await?;
    let marks = HashMap::from([(note.database.clone(), Marks::from([(note.mark_id, n)]))]);
    Ok(fate(note, &held, &marks))
}

impl Note {
    fn parse(row: &str) -> Option<Self> {
        let (gid, database, mark_id, mark_n, ddl) = serde_json::from_str(row).ok()?;
        Some(Self { gid, database, mark_id, mark_n, ddl })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaders_name_and_mark_say_what_became_of_it() {
        let note = Note { gid: "g".into(), database: "shop".into(), mark_id: 5, mark_n: 3, ddl: false };
        let marks = |n| HashMap::from([("shop".to_owned(), Marks::from([(5, n)]))]);
        assert_eq!(fate(&note, &["g".into()], &marks(2)), Fate::Open);
        assert_eq!(fate(&note, &[], &marks(3)), Fate::Committed);
        assert_eq!(fate(&note, &[], &marks(2)), Fate::RolledBack);
        assert_eq!(fate(&note, &[], &HashMap::new()), Fate::RolledBack);
    }
}
