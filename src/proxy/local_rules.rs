//! Beyond loopback the proxy must not be a door without a lock: clients' sessions reach the leader over its unix socket,
//! so the `local` rules of pg_hba.conf are what asks for a password.

use crate::pg::build;
use crate::proxy::ProxyError;
use crate::proxy::reign::ReignError;
use crate::replicate::follower::Answer;
use crate::replicate::hub::Hub;

/// The first `local` rule without a password that is not role pgtandem's alone.
const OPEN_RULES: &str = "SELECT 'line ' || line_number || ': local ' || array_to_string(database, ',') || ' ' || \
     array_to_string(user_name, ',') || ' ' || auth_method FROM pg_catalog.pg_hba_file_rules \
     WHERE type = 'local' AND auth_method IN ('trust', 'peer', 'ident') AND user_name <> '{pgtandem}' LIMIT 1";

/// # Errors
/// If the proxy listens beyond loopback and such a rule is there, with its line.
pub async fn check(hub: &Hub) -> Result<(), ProxyError> {
    let listen = hub.config.proxy.listen;
    if listen.ip().is_loopback() {
        return Ok(());
    }
    let mut connection = hub.leader_connection("postgres").await.map_err(ReignError::from)?;
    build::query(&mut connection.out, OPEN_RULES.as_bytes());
    let answer = connection.exchange().await.and_then(Answer::ok).map_err(ReignError::from)?;
    match answer.values.into_iter().flatten().next() {
        Some(line) => Err(ProxyError::OpenDoor { listen, line: String::from_utf8_lossy(&line).into_owned() }),
        None => Ok(()),
    }
}
