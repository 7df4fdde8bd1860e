//! Definitions, TRUNCATE and the like: the ordered lane. The relation's own lock on the leader gives the order.

use pg_query::NodeEnum;
use pg_query::protobuf::{
    AlterTableCmd, AlterTableStmt, AlterTableType, ClusterStmt, ColumnDef, ConstrType, CreateStmt, DefElem, DropStmt,
    Node, ObjectType, RangeVar, ReindexObjectType, ReindexStmt, TruncateStmt,
};
use serde_json::Value;

use super::classify::{Context, read, refused_setting};
use super::dates::looks_like_now;
use super::facts::Relation;
use super::insert::may_write;
use super::needs::{Name, Needs, type_name};
use super::parse::{Statement, node_names, walk};
use super::plan::{EffectPlan, Lane, Write};
use super::refuse::{not_yet, refused};
use super::target::{ON_TRUNCATE, Target, target};
use super::text::Edits;

/// An option's value: on unless it says otherwise.
pub(super) fn is_on(option: &DefElem) -> bool {
    let Some(value) = option.arg.as_ref().and_then(|argument| argument.node.as_ref()) else { return true };
    match value {
        NodeEnum::String(text) => !["off", "false", "0"].iter().any(|no| no.eq_ignore_ascii_case(&text.sval)),
        NodeEnum::Integer(number) => number.ival != 0,
        NodeEnum::Boolean(value) => value.boolval,
        _ => true,
    }
}

pub(super) fn lane(node: &NodeEnum, context: &Context<'_>) -> Lane {
    if let Some(lane) = special(node, context) {
        return lane;
    }
    match on_temporary(node, context) {
        Temporary::All => return read(false),
        Temporary::Some(name) => {
            return refused(
                format!(
                    "a permanent object can not refer to the temporary {name} here: the other servers do not have it"
                ),
                "Use a permanent table.",
            );
        }
        Temporary::None => {}
    }
    if has_clock_literal(node, context) {
        return refused(
            "a date or time constant such as 'now' in a definition would be another one on another server",
            "Use now() or CURRENT_DATE.",
        );
    }
    if is_definition(node) { ordered(true) } else { not_yet("this statement") }
}

fn ordered(ddl: bool) -> Lane {
    Lane::Write(Box::new(Write {
        effect: EffectPlan::Text { owner: None, counted: false, lock_tables: Vec::new(), dates_matter: false },
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl,
        barrier: true,
        deferrable_constraints: false,
        edits: Edits::default(),
    }))
}

/// Kinds that PostgreSQL runs inside a transaction and whose result follows from the text and the catalog.
fn is_definition(node: &NodeEnum) -> bool {
    matches!(
        node,
        NodeEnum::CreateSchemaStmt(_)
            | NodeEnum::CreateStmt(_)
            | NodeEnum::AlterTableStmt(_)
            | NodeEnum::ReplicaIdentityStmt(_)
            | NodeEnum::AlterDomainStmt(_)
            | NodeEnum::GrantStmt(_)
            | NodeEnum::GrantRoleStmt(_)
            | NodeEnum::AlterDefaultPrivilegesStmt(_)
            | NodeEnum::CreateExtensionStmt(_)
            | NodeEnum::AlterExtensionStmt(_)
            | NodeEnum::AlterExtensionContentsStmt(_)
            | NodeEnum::CreatePolicyStmt(_)
            | NodeEnum::AlterPolicyStmt(_)
            | NodeEnum::CreateTrigStmt(_)
            | NodeEnum::CreatePlangStmt(_)
            | NodeEnum::CreateRoleStmt(_)
            | NodeEnum::AlterRoleStmt(_)
            | NodeEnum::AlterRoleSetStmt(_)
            | NodeEnum::DropRoleStmt(_)
            | NodeEnum::CreateSeqStmt(_)
            | NodeEnum::AlterSeqStmt(_)
            | NodeEnum::DefineStmt(_)
            | NodeEnum::CreateDomainStmt(_)
            | NodeEnum::CreateOpClassStmt(_)
            | NodeEnum::CreateOpFamilyStmt(_)
            | NodeEnum::AlterOpFamilyStmt(_)
            | NodeEnum::DropStmt(_)
            | NodeEnum::CommentStmt(_)
            | NodeEnum::SecLabelStmt(_)
            | NodeEnum::IndexStmt(_)
            | NodeEnum::CreateStatsStmt(_)
            | NodeEnum::AlterStatsStmt(_)
            | NodeEnum::CreateFunctionStmt(_)
            | NodeEnum::AlterFunctionStmt(_)
            | NodeEnum::RenameStmt(_)
            | NodeEnum::AlterObjectDependsStmt(_)
            | NodeEnum::AlterObjectSchemaStmt(_)
            | NodeEnum::AlterOwnerStmt(_)
            | NodeEnum::AlterOperatorStmt(_)
            | NodeEnum::AlterTypeStmt(_)
            | NodeEnum::RuleStmt(_)
            | NodeEnum::CompositeTypeStmt(_)
            | NodeEnum::CreateEnumStmt(_)
            | NodeEnum::CreateRangeStmt(_)
            | NodeEnum::AlterEnumStmt(_)
            | NodeEnum::ViewStmt(_)
            | NodeEnum::AlterDatabaseSetStmt(_)
            | NodeEnum::CreateConversionStmt(_)
            | NodeEnum::CreateCastStmt(_)
            | NodeEnum::CreateTransformStmt(_)
            | NodeEnum::DropOwnedStmt(_)
            | NodeEnum::ReassignOwnedStmt(_)
            | NodeEnum::AlterTsdictionaryStmt(_)
            | NodeEnum::AlterTsconfigurationStmt(_)
            | NodeEnum::AlterCollationStmt(_)
    )
}

const OUTSIDE_TRANSACTIONS: &str = "can not run inside a transaction, which this version of pgtandem needs";

fn concurrently(what: &str) -> Lane {
    refused(format!("{what} CONCURRENTLY {OUTSIDE_TRANSACTIONS}"), "Leave out CONCURRENTLY.")
}

/// Kinds with rules of their own.
fn special(node: &NodeEnum, context: &Context<'_>) -> Option<Lane> {
    match node {
        NodeEnum::TruncateStmt(statement) => Some(truncate(statement, context)),
        NodeEnum::IndexStmt(index) if index.concurrent => Some(concurrently("CREATE INDEX")),
        NodeEnum::DropStmt(drop) => drop_statement(drop),
        NodeEnum::ReindexStmt(statement) => Some(reindex(statement, context)),
        NodeEnum::ClusterStmt(statement) => Some(cluster(statement, context)),
        NodeEnum::CreateTableAsStmt(statement) => Some(create_table_as(statement, context)),
        NodeEnum::RefreshMatViewStmt(_) => {
            Some(refused("materialized views are not replicated by this version of pgtandem", "Use a view or a table."))
        }
        NodeEnum::CreatedbStmt(_) | NodeEnum::DropdbStmt(_) => Some(refused(
            format!("CREATE DATABASE and DROP DATABASE {OUTSIDE_TRANSACTIONS}"),
            "Create databases before the first recovery of a follower.",
        )),
        NodeEnum::CreateTableSpaceStmt(_)
        | NodeEnum::DropTableSpaceStmt(_)
        | NodeEnum::AlterTableSpaceOptionsStmt(_)
        | NodeEnum::AlterTableMoveAllStmt(_) => Some(refused(
            "tablespaces are not supported by this version of pgtandem",
            "Leave tables in the default tablespace.",
        )),
        NodeEnum::AlterSystemStmt(_) => Some(refused(
            format!("ALTER SYSTEM {OUTSIDE_TRANSACTIONS}"),
            "Set it in postgresql.conf on every server, or use ALTER ROLE or ALTER DATABASE ... SET.",
        )),
        NodeEnum::CreateRoleStmt(statement) => clear_password(&statement.options),
        NodeEnum::AlterRoleStmt(statement) => clear_password(&statement.options),
        NodeEnum::AlterRoleSetStmt(statement) => statement.setstmt.as_ref().and_then(refused_setting),
        NodeEnum::AlterDatabaseSetStmt(statement) => statement.setstmt.as_ref().and_then(refused_setting),
        NodeEnum::CreateStmt(statement) => create_table(statement),
        NodeEnum::AlterTableStmt(statement) => alter_table(statement, context),
        _ => None,
    }
}

/// A password in clear text would be hashed with another salt on every server.
fn clear_password(options: &[Node]) -> Option<Lane> {
    let password = options.iter().find_map(|option| match option.node.as_ref() {
        Some(NodeEnum::DefElem(option)) if option.defname == "password" => option.arg.as_ref()?.node.as_ref(),
        _ => None,
    })?;
    let NodeEnum::String(password) = password else { return None };
    let hashed = password.sval.starts_with("SCRAM-SHA-256$")
        || (password.sval.starts_with("md5") && password.sval.len() == MD5_VERIFIER_BYTES);
    (!hashed).then(|| {
        refused(
            "a password in clear text is not replicated: every server would store another verifier of it",
            "Use \\password in psql, or give the SCRAM-SHA-256 verifier as the password.",
        )
    })
}

/// `md5` and 32 hexadecimal digits.
const MD5_VERIFIER_BYTES: usize = 35;

fn relations(nodes: &[Node]) -> impl Iterator<Item = &RangeVar> {
    nodes.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::RangeVar(relation)) => Some(relation),
        _ => None,
    })
}

fn truncate(statement: &TruncateStmt, context: &Context<'_>) -> Lane {
    let (mut temporary, mut permanent) = (false, false);
    let mut deferrable = false;
    for relation in relations(&statement.relations) {
        match target(Some(relation), ON_TRUNCATE, context) {
            // missing: TRUNCATE is not allowed in the guard's read-only transaction, but the name is looked up before
            Target::Decided(lane) => return lane,
            Target::Temporary => temporary = true,
            Target::Table(relation) => {
                permanent = true;
                deferrable |= relation.deferrable;
            }
        }
    }
    match (temporary, permanent) {
        (true, true) => refused(
            "TRUNCATE of temporary and permanent tables in one statement is not supported",
            "Use two statements.",
        ),
        (true, false) => read(false),
        _ => {
            let lane = ordered(false);
            match lane {
                Lane::Write(write) => Lane::Write(Box::new(Write { deferrable_constraints: deferrable, ..*write })),
                lane => lane,
            }
        }
    }
}

fn drop_statement(drop: &DropStmt) -> Option<Lane> {
    match ObjectType::try_from(drop.remove_type) {
        Ok(ObjectType::ObjectIndex) if drop.concurrent => Some(concurrently("DROP INDEX")),
        Ok(
            ObjectType::ObjectForeignServer
            | ObjectType::ObjectFdw
            | ObjectType::ObjectForeignTable
            | ObjectType::ObjectEventTrigger
            | ObjectType::ObjectPublication
            | ObjectType::ObjectSubscription,
        ) => Some(not_yet("this DROP")),
        _ => None,
    }
}

fn has_option(options: &[Node], name: &str) -> bool {
    options.iter().any(|option| matches!(option.node.as_ref(), Some(NodeEnum::DefElem(option)) if option.defname == name && is_on(option)))
}

fn fact<'a>(relation: Option<&RangeVar>, context: &Context<'a>) -> Option<&'a Relation> {
    let relation = relation?;
    context.facts.relations.get(&Name::new(&relation.schemaname, &relation.relname))
}

fn reindex(statement: &ReindexStmt, context: &Context<'_>) -> Lane {
    if has_option(&statement.params, "concurrently") {
        return concurrently("REINDEX");
    }
    let one = matches!(
        ReindexObjectType::try_from(statement.kind),
        Ok(ReindexObjectType::ReindexObjectIndex | ReindexObjectType::ReindexObjectTable)
    );
    let table = fact(statement.relation.as_ref(), context);
    if !one || table.is_some_and(|table| table.kind == "p") {
        return refused(
            format!("REINDEX of more than one table {OUTSIDE_TRANSACTIONS}"),
            "Reindex table by table, partitions one by one.",
        );
    }
    if table.is_some_and(Relation::is_temporary) { read(false) } else { ordered(true) }
}

fn cluster(statement: &ClusterStmt, context: &Context<'_>) -> Lane {
    let table = fact(statement.relation.as_ref(), context);
    if statement.relation.is_none() || table.is_some_and(|table| table.kind == "p") {
        return refused(
            format!("CLUSTER of more than one table {OUTSIDE_TRANSACTIONS}"),
            "Cluster table by table, partitions one by one.",
        );
    }
    if table.is_some_and(Relation::is_temporary) { read(false) } else { ordered(true) }
}

fn create_table_as(statement: &pg_query::protobuf::CreateTableAsStmt, context: &Context<'_>) -> Lane {
    let into = statement.into.as_ref().and_then(|into| into.rel.as_ref());
    if into.is_some_and(is_temporary_name) {
        let found = context.look(&statement.query);
        if found.writes.is_none() && !found.own_schema {
            return match may_write(&[&found]) {
                // CREATE TABLE can not run behind the guard
                Some(what) => refused(
                    format!("{what} may write, and what functions write is not replicated by this version of pgtandem"),
                    "Create the table first, then INSERT ... SELECT.",
                ),
                None => read(false),
            };
        }
    }
    if statement.objtype == ObjectType::ObjectMatview as i32 {
        return refused("materialized views are not replicated by this version of pgtandem", "Use a view or a table.");
    }
    refused(
        "CREATE TABLE AS is not replicated by this version of pgtandem",
        "Use CREATE TABLE, then INSERT ... SELECT.",
    )
}

fn is_temporary_name(relation: &RangeVar) -> bool {
    relation.relpersistence == "t" || relation.schemaname == "pg_temp"
}

fn create_table(statement: &CreateStmt) -> Option<Lane> {
    let tablespace = statement.tablespacename.as_str();
    (!tablespace.is_empty() && tablespace != "pg_default")
        .then(|| refused("tablespaces are not supported by this version of pgtandem", "Leave out TABLESPACE."))
}

fn alter_table(statement: &AlterTableStmt, context: &Context<'_>) -> Option<Lane> {
    let table = fact(statement.relation.as_ref(), context);
    if table.is_some_and(Relation::is_temporary) {
        return None;
    }
    let mut commands = statement.cmds.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::AlterTableCmd(command)) => Some(command.as_ref()),
        _ => None,
    });
    commands.find_map(|command| alter_command(command, table, context))
}

fn alter_command(command: &AlterTableCmd, table: Option<&Relation>, context: &Context<'_>) -> Option<Lane> {
    let definition = command.def.as_ref().and_then(|definition| definition.node.as_ref());
    match (AlterTableType::try_from(command.subtype).ok()?, definition) {
        (AlterTableType::AtAddColumn, Some(NodeEnum::ColumnDef(column))) => add_column(column, context),
        (AlterTableType::AtAlterColumnType, Some(NodeEnum::ColumnDef(column))) => {
            change_type(&command.name, column, table, context)
        }
        (AlterTableType::AtSetTableSpace, _) => {
            Some(refused("tablespaces are not supported by this version of pgtandem", "Leave the table where it is."))
        }
        (AlterTableType::AtDetachPartition, Some(NodeEnum::PartitionCmd(partition))) if partition.concurrent => {
            Some(concurrently("DETACH PARTITION"))
        }
        _ => None,
    }
}

const ROW_VALUES: &str = "would give existing rows other values on other servers";

/// Existing rows get the default's value: it must be the same everywhere.
fn add_column(column: &ColumnDef, context: &Context<'_>) -> Option<Lane> {
    let refuse = |what: &str| {
        Some(refused(
            format!("ADD COLUMN with {what} {ROW_VALUES}"),
            "Add the column without a default, fill it with UPDATE, then set the default.",
        ))
    };
    let type_parts = column.type_name.as_ref().map(|name| node_names(&name.names)).unwrap_or_default();
    let type_last = type_parts.last().copied().unwrap_or_default();
    if matches!(type_last, "serial" | "serial4" | "bigserial" | "serial8" | "smallserial" | "serial2") {
        return refuse("a serial type");
    }
    if Name::of_parts(&type_parts).and_then(|name| context.facts.types.get(&name)).is_some_and(|fact| fact.has_default)
    {
        return refuse("a domain that has a default");
    }
    for node in &column.constraints {
        let Some(NodeEnum::Constraint(constraint)) = node.node.as_ref() else { continue };
        match ConstrType::try_from(constraint.contype) {
            Ok(ConstrType::ConstrIdentity) => return refuse("an identity"),
            Ok(ConstrType::ConstrDefault) => {
                let found = context.look(&constraint.raw_expr);
                if !found.is_pure() || !found.session_values.is_empty() || found.text_to_date {
                    return refuse("a default that is not immutable");
                }
            }
            _ => {}
        }
    }
    None
}

fn change_type(name: &str, column: &ColumnDef, table: Option<&Relation>, context: &Context<'_>) -> Option<Lane> {
    let refuse = |what: &str| {
        Some(refused(
            format!("ALTER COLUMN ... TYPE with {what} {ROW_VALUES}"),
            "Add a new column and fill it with UPDATE.",
        ))
    };
    if let Some(using) = &column.raw_default {
        let found = context.look(using);
        if !found.is_pure() || !found.session_values.is_empty() || found.subqueries || found.text_to_date {
            return refuse("an expression that is not immutable");
        }
    }
    let target = column.type_name.as_ref().and_then(|name| Name::of_parts(&node_names(&name.names)));
    let to_date = target.and_then(|name| context.facts.types.get(&name)).is_some_and(|fact| fact.dates);
    let from_text = table.and_then(|table| table.column(name)).is_some_and(|column| column.text);
    if to_date && from_text {
        return refuse("a change from text to a date or time type, where a text may be 'now',");
    }
    None
}

enum Temporary {
    None,
    All,
    /// Only some of the relations named are temporary; one of them.
    Some(String),
}

/// Whether the statement is about temporary objects, which are the leader's alone.
fn on_temporary(node: &NodeEnum, context: &Context<'_>) -> Temporary {
    let mut created = false;
    walk(&context.tree, &mut |_, fields| {
        created |= fields.contains_key("relname")
            && (fields.get("relpersistence").and_then(Value::as_str) == Some("t")
                || fields.get("schemaname").and_then(Value::as_str) == Some("pg_temp"));
    });
    // a view over a temporary table is temporary
    let facts = || Needs::of(&Statement { range: 0..0, node: node.clone() }).relations;
    let known: Vec<&Relation> = facts().iter().filter_map(|name| context.facts.relations.get(name)).collect();
    let temporary = known.iter().find(|relation| relation.is_temporary());
    match (created, temporary) {
        (true, _) => Temporary::All,
        (false, None) => Temporary::None,
        (false, Some(_))
            if matches!(node, NodeEnum::ViewStmt(_)) || known.iter().all(|relation| relation.is_temporary()) =>
        {
            // CREATE TABLE x (LIKE temporary) names only the temporary one, and makes a permanent one
            if matches!(node, NodeEnum::CreateStmt(_)) {
                return Temporary::Some(temporary.map(|relation| relation.name.clone()).unwrap_or_default());
            }
            Temporary::All
        }
        (false, Some(relation)) => Temporary::Some(relation.name.clone()),
    }
}

/// A string such as 'now' that becomes a constant of a date or time type while the definition is made.
fn has_clock_literal(node: &NodeEnum, context: &Context<'_>) -> bool {
    if matches!(node, NodeEnum::CommentStmt(_) | NodeEnum::SecLabelStmt(_) | NodeEnum::CreateFunctionStmt(_)) {
        return false;
    }
    let anywhere = matches!(
        node,
        NodeEnum::ViewStmt(_)
            | NodeEnum::IndexStmt(_)
            | NodeEnum::RuleStmt(_)
            | NodeEnum::CreatePolicyStmt(_)
            | NodeEnum::CreateTrigStmt(_)
    );
    let mut found = false;
    walk(&context.tree, &mut |kind, fields| {
        let is_date = || {
            let name = fields.get("type_name").and_then(Value::as_object).and_then(type_name);
            name.and_then(|name| context.facts.types.get(&name)).is_some_and(|fact| fact.dates)
        };
        let relevant = match kind {
            "TypeCast" | "ColumnDef" | "CreateDomainStmt" => is_date(),
            "AlterTableCmd" | "PartitionBoundSpec" => true,
            "ViewStmt" | "IndexStmt" | "RuleStmt" | "CreatePolicyStmt" | "CreateTrigStmt" => anywhere,
            "" => fields.contains_key("partition_bound") || fields.contains_key("lowerdatums"),
            _ => false,
        };
        if relevant {
            walk(&Value::Object(fields.clone()), &mut |kind, constant| {
                if kind == "AConst" {
                    let text =
                        constant.get("val").and_then(|value| value.pointer("/Sval/sval")).and_then(Value::as_str);
                    found |= text.is_some_and(looks_like_now);
                }
            });
        }
    });
    found
}
