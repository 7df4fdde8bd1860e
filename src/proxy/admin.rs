//! What the proxy answers itself: `SHOW pool_nodes`, with the columns of pgpool 4.3.

use std::time::SystemTime;

use bytes::{BufMut, BytesMut};

use crate::observe::time;
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
        let changed = hub.changed_at(&node.name).map_or_else(String::new, |at| {
            time::utc(at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()))
        });
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
