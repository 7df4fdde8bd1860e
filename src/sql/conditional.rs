//! Definitions whose work depends on what is there: IF EXISTS, IF NOT EXISTS, ALL TABLES IN SCHEMA.
//!
//! Where there is nothing to do, a definition locks nothing, so what the leader found may be otherwise when followers run the text:
//! a table that was not there to be dropped has been made by somebody who committed first. One that did nothing on the leader is
//! therefore no effect. One about several objects may have done a part; it holds only while no other definition is committed.

use pg_query::NodeEnum;
use pg_query::protobuf::{DefElem, GrantTargetType, Node};
use serde_json::Value;

use super::ddl::is_on;
use super::parse::walk;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depends {
    /// It does what it says, or fails.
    #[default]
    No,
    /// It does what it says, or nothing.
    OnOne,
    /// On more than one object: it may do a part.
    OnMany,
}

pub(super) fn depends(node: &NodeEnum, tree: &Value) -> Depends {
    match node {
        NodeEnum::DropStmt(drop) if drop.missing_ok && drop.objects.len() > 1 => Depends::OnMany,
        NodeEnum::DropRoleStmt(drop) if drop.missing_ok && drop.roles.len() > 1 => Depends::OnMany,
        NodeEnum::CreateExtensionStmt(create) if has_cascade(&create.options) => Depends::OnMany,
        NodeEnum::GrantStmt(grant) if grant.targtype == GrantTargetType::AclTargetAllInSchema as i32 => Depends::OnMany,
        NodeEnum::DropOwnedStmt(_) | NodeEnum::ReassignOwnedStmt(_) => Depends::OnMany,
        _ => {
            let mut found = false;
            walk(tree, &mut |_, fields| {
                let is_set = |name: &str| fields.get(name).and_then(Value::as_bool) == Some(true);
                found |= ["missing_ok", "if_not_exists", "skip_if_new_val_exists"].iter().any(|name| is_set(name));
            });
            if found { Depends::OnOne } else { Depends::No }
        }
    }
}

fn has_cascade(options: &[Node]) -> bool {
    let is = |option: &DefElem| option.defname == "cascade" && is_on(option);
    options.iter().any(|option| matches!(&option.node, Some(NodeEnum::DefElem(option)) if is(option)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::parse;

    #[test]
    fn what_may_find_nothing_to_do_is_known() {
        for (text, expected) in [
            ("drop table a, b", Depends::No),
            ("drop table if exists a", Depends::OnOne),
            ("drop table if exists a, b", Depends::OnMany),
            ("drop index if exists a cascade", Depends::OnOne),
            ("drop role if exists a", Depends::OnOne),
            ("drop role if exists a, b", Depends::OnMany),
            ("create table a (id int)", Depends::No),
            ("create table if not exists a (id int)", Depends::OnOne),
            ("create table if not exists a as select 1", Depends::OnOne),
            ("create index if not exists i on a (id)", Depends::OnOne),
            ("create schema if not exists s", Depends::OnOne),
            ("create sequence if not exists s", Depends::OnOne),
            ("create extension if not exists hstore", Depends::OnOne),
            ("create extension earthdistance cascade", Depends::OnMany),
            ("alter table if exists a add column b int", Depends::OnOne),
            ("alter table a add column if not exists b int", Depends::OnOne),
            ("alter table a drop constraint if exists b", Depends::OnOne),
            ("alter table if exists a rename to b", Depends::OnOne),
            ("alter type t add value if not exists 'x'", Depends::OnOne),
            ("grant select on a to b", Depends::No),
            ("grant select on all tables in schema s to b", Depends::OnMany),
            ("reassign owned by a to b", Depends::OnMany),
            ("drop owned by a", Depends::OnMany),
        ] {
            let statement = parse::parse_one(text).unwrap();
            assert_eq!(depends(&statement.node, &parse::tree(&statement.node)), expected, "{text}");
        }
    }
}
