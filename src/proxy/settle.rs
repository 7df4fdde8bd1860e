//! The databases of a member at a new epoch: older sessions ended, and the fate of what was under way.

use std::collections::HashMap;

use futures_util::future::try_join_all;

use crate::config::NodeConfig;
use crate::proxy::reign::ReignError;
use crate::replicate::hub::{Hub, HubError};
use crate::replicate::nodewise::{self, Intent, Place, Servers};
use crate::replicate::resolve::{self, Marks, Survivor, Verdict};
use crate::replicate::two_phase::{self, Fate, Note};

/// Databases of one server that are worked on at once: clients wait.
const AT_ONCE: usize = 8;

/// What the leader has when all older sessions have ended.
pub(super) struct Found {
    pub marks: HashMap<String, Marks>,
    /// Statements outside transactions that are not done everywhere.
    pub intents: Vec<Intent>,
    /// Transactions that clients have prepared.
    pub fates: Vec<(Note, Fate)>,
}

/// The epoch in every database of the leader, old sessions ended, its share of what was under way, then its marks. `survivors`: the
/// other members, if this node takes over from a leader that is gone.
pub(super) async fn leader(
    hub: &Hub,
    epoch: u64,
    secret: &str,
    survivors: Option<&[Survivor]>,
) -> Result<Found, ReignError> {
    let mut first = hub.leader_connection("postgres").await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    for some in databases.chunks(AT_ONCE) {
        try_join_all(some.iter().map(|database| async move {
            let mut connection = hub.leader_connection(database).await?;
            resolve::install(&mut connection).await?;
            resolve::raise_epoch(&mut connection, epoch, secret).await?;
            Ok::<_, ReignError>(())
        }))
        .await?;
    }
    resolve::end_sessions(&mut hub.leader_connection("postgres").await?).await?;
    let servers = Servers { hub, epoch, secret };
    for some in databases.chunks(AT_ONCE) {
        try_join_all(some.iter().map(|database| settle_database(hub, database, survivors))).await?;
    }
    if let Some(survivors) = survivors {
        two_phase::take_over(&servers, survivors).await?;
    }
    let intents = servers.intents().await?;
    for intent in intents.iter().filter(|intent| !nodewise::may_take_long(intent)) {
        tracing::info!(text = intent.text, "a statement outside transactions is gone on with");
        servers.settle_leader(intent, &intent.work()?).await?;
    }
    let mut marks = HashMap::new();
    let databases = resolve::databases(&mut hub.leader_connection("postgres").await?).await?;
    for some in databases.chunks(AT_ONCE) {
        let read = some.iter().map(|database| async move {
            let mut connection = hub.leader_connection(database).await?;
            Ok::<_, ReignError>((database.clone(), resolve::marks(&mut connection).await?))
        });
        marks.extend(try_join_all(read).await?);
    }
    let fates = two_phase::fates(&servers, &marks).await?;
    Ok(Found { marks, intents, fates })
}

/// What one database of the leader holds prepared.
async fn settle_database(hub: &Hub, database: &str, survivors: Option<&[Survivor]>) -> Result<(), ReignError> {
    let cluster = &hub.config.cluster.name;
    let mut connection = hub.leader_connection(database).await?;
    if let Some(survivors) = survivors {
        let resolved = resolve::take_over(&mut connection, cluster, database, survivors).await?;
        tracing::info!(database, resolved, "transactions in doubt were resolved without the leader that prepared them");
        return Ok(());
    }
    let marks = resolve::marks(&mut connection).await?;
    // What the leader itself holds prepared was never decided: its mark is inside, so no mark has reached it.
    let undecided = resolve::resolve(&mut connection, cluster, Some(&marks)).await?;
    if undecided > 0 {
        tracing::info!(database, undecided, "transactions that the leader had only prepared were rolled back");
    }
    Ok(())
}

/// The same on a follower, and the fate of what it holds prepared. Gives where it differs from the leader, if it does.
pub(super) async fn follower(
    hub: &Hub,
    node: &NodeConfig,
    epoch: u64,
    secret: &str,
    found: &Found,
) -> Result<Option<(String, Verdict)>, HubError> {
    let Found { marks: leader, intents, fates } = found;
    let databases = end_older(hub, node, epoch, secret).await?;
    let none = Marks::default();
    for database in &databases {
        let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
        let marks = nodewise::renamed(database, leader, intents).unwrap_or(&none);
        let resolved = resolve::resolve(&mut connection, &hub.config.cluster.name, Some(marks)).await?;
        if resolved > 0 {
            tracing::info!(node = %node.name, database, resolved, "transactions in doubt were resolved by the leader's marks");
        }
    }
    for (note, _) in fates.iter().filter(|(note, _)| databases.contains(&note.database)) {
        let mut connection = hub.tunnel_connection(node, &note.database, epoch, None).await?;
        two_phase::follow(&mut connection, &note.database, fates).await?;
    }
    let servers = Servers { hub, epoch, secret };
    for intent in intents.iter().filter(|intent| !nodewise::may_take_long(intent)) {
        servers.follow(node, intent, &intent.work()?, false).await?;
    }
    let mut first = hub.tunnel_connection(node, "postgres", epoch, None).await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    if let Some(missing) = leader.keys().find(|name| !databases.contains(name)) {
        return Err(HubError::Other(format!("it has no database {missing}")));
    }
    for database in &databases {
        let Some(marks) = leader.get(database) else {
            return Err(HubError::Other(format!("it has a database {database} that the leader does not have")));
        };
        let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
        let verdict = resolve::compare(marks, &resolve::marks(&mut connection).await?);
        if verdict != Verdict::Same {
            return Ok(Some((database.clone(), verdict)));
        }
    }
    two_phase::forget_decided(&servers, Place::Follower(node), fates).await?;
    servers.forget(Place::Follower(node)).await?;
    Ok(None)
}

/// The epoch in every database of a follower, and no older session is left. Gives its databases.
async fn end_older(hub: &Hub, node: &NodeConfig, epoch: u64, secret: &str) -> Result<Vec<String>, HubError> {
    let mut first = hub.tunnel_connection(node, "postgres", epoch, None).await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    for some in databases.chunks(AT_ONCE) {
        try_join_all(some.iter().map(|database| async move {
            let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
            resolve::install(&mut connection).await?;
            resolve::raise_epoch(&mut connection, epoch, secret).await?;
            Ok::<_, HubError>(())
        }))
        .await?;
    }
    resolve::end_sessions(&mut hub.tunnel_connection(node, "postgres", epoch, None).await?).await?;
    Ok(databases)
}

/// What another member has, once nothing older can change it.
pub(super) async fn ask_survivor(hub: &Hub, node: &NodeConfig, epoch: u64, secret: &str) -> Result<Survivor, HubError> {
    let mut survivor = Survivor::default();
    for database in end_older(hub, node, epoch, secret).await? {
        let mut connection = hub.tunnel_connection(node, &database, epoch, None).await?;
        survivor.held = resolve::held(&mut connection).await?;
        let marks = resolve::marks(&mut connection).await?;
        survivor.marks.insert(database, marks);
    }
    Ok(survivor)
}
