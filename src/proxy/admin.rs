//! What the proxy answers itself: `SHOW pool_nodes`, with the columns of pgpool 4.3.

use std::time::SystemTime;

use bytes::{BufMut, BytesMut};

use crate::pg::build;
use crate::replicate::hub::Hub;

/// Columns, all of type text.
const COLUMNS: [&str; 14] = [
    "node_id",
    "hostname",
    "port",
    "status",
    "pg_status",
    "lb_weight",
    "role",
    "pg_role",
    "select_cnt",
    "load_balance_node",
    "replication_delay",
    "replication_state",
    "replication_sync_state",
    "last_status_change",
];
/// OID of type text.
const TEXT_OID: u32 = 25;

/// The whole answer but for `ReadyForQuery`.
pub fn pool_nodes(hub: &Hub, out: &mut BytesMut) {
    describe_pool_nodes(out, false);
    pool_node_rows(hub, out);
}

/// The answer to a Describe, of a statement (no parameters) or a portal.
pub fn describe_pool_nodes(out: &mut BytesMut, statement: bool) {
    if statement {
        build::frame(out, b't', |b| b.put_u16(0));
    }
    build::frame(out, b'T', |b| {
        b.put_u16(u16::try_from(COLUMNS.len()).unwrap_or(0));
        for name in COLUMNS {
            b.put_slice(name.as_bytes());
            b.put_u8(0);
            // table, attribute, type, size, modifier, format
            b.put_u32(0);
            b.put_u16(0);
            b.put_u32(TEXT_OID);
            b.put_i16(-1);
            b.put_i32(-1);
            b.put_u16(0);
        }
    });
}

/// One row for each configured node, and the command tag.
pub fn pool_node_rows(hub: &Hub, out: &mut BytesMut) {
    let view = hub.view();
    let nodes = &hub.config.nodes;
    for (i, node) in nodes.iter().enumerate() {
        let leads = node.name == view.set.leader;
        let member = view.set.nodes.contains(&node.name);
        let status = match (member, hub.is_joining(&node.name)) {
            (true, _) => "up",
            (false, true) => "waiting",
            (false, false) => "down",
        };
        let role = if leads { "main" } else { "replica" };
        let weight = if leads { "1.000000" } else { "0.000000" };
        let changed = hub.changed_at(&node.name).map_or_else(String::new, seconds_utc);
        let row = [
            i.to_string(),
            node.agent.ip().to_string(),
            node.port.to_string(),
            status.into(),
            status.into(),
            weight.into(),
            role.into(),
            role.into(),
            "0".into(),
            leads.to_string(),
            "0".into(),
            String::new(),
            String::new(),
            changed,
        ];
        build::frame(out, b'D', |b| {
            b.put_u16(u16::try_from(row.len()).unwrap_or(0));
            for value in row {
                b.put_u32(u32::try_from(value.len()).unwrap_or(0));
                b.put_slice(value.as_bytes());
            }
        });
    }
    build::command_complete(out, &format!("SELECT {}", nodes.len()));
}

/// `2026-11-23 09:05:01` in UTC. The civil calendar from days, after Howard Hinnant's `civil_from_days`.
fn seconds_utc(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_people_write_them() {
        let at = |s| seconds_utc(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01 00:00:00");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(at(1_795_424_701), "2026-11-23 09:05:01");
    }
}
