//! What a test says to a server and what it hears, in one line each.

use tokio_postgres::{Client, SimpleQueryMessage};

use super::Cluster;

pub async fn run(client: &Client, text: &str) {
    client.batch_execute(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
}

/// One after the other, each in a transaction of its own.
pub async fn run_all(client: &Client, texts: &[&str]) {
    for text in texts {
        run(client, text).await;
    }
}

/// First column of the first row; empty if there is none, or if it is null.
pub async fn value(client: &Client, text: &str) -> String {
    let answer = client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    let row = answer.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None });
    row.and_then(|row| row.get(0)).unwrap_or_default().to_owned()
}

/// "ok", or the SQLSTATE.
pub async fn state(client: &Client, text: &str) -> String {
    match client.batch_execute(text).await {
        Ok(()) => "ok".to_owned(),
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}

/// What this query gives on the leader; fails unless it gives the same on every server. Followers finish off the clients' path.
pub async fn same(cluster: &Cluster, database: &str, sql: &str) -> String {
    let leader = value(&cluster.connect_node(0, database).await, sql).await;
    for index in 1..cluster.layout.plan.nodes {
        let client = cluster.connect_node(index, database).await;
        let ours = "select count(*) from pg_prepared_xacts where gid like 'pgtandem:%'";
        super::wait_for("the follower has finished", async || value(&client, ours).await == "0").await;
        let follower = value(&client, sql).await;
        assert_eq!(leader, follower, "on node{index}: {sql}\n{}", cluster.logs());
    }
    leader
}
