//! Definitions, TRUNCATE and the like: the ordered lane. The relation's own lock on the leader gives the order.

use pg_query::NodeEnum;
use pg_query::protobuf::{
    AlterTableCmd, AlterTableStmt, AlterTableType, ClusterStmt, CreateStmt, DefElem, DropBehavior, Node, RangeVar,
    ReindexObjectType, ReindexStmt, TruncateStmt,
};
use serde_json::Value;

use super::carry;
use super::classify::{Context, read, refused_setting};
use super::conditional::{Depends, depends};
use super::dates::looks_like_now;
use super::facts::Relation;
use super::needs::{Name, Needs, type_name};
use super::nodewise::{self, TABLESPACES};
use super::parse::{Statement, walk};
use super::plan::{EffectPlan, Lane, Write};
use super::refuse::{not_yet, refused};
use super::roles;
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
    match lane_of(node, context) {
        Lane::Write(write) => Lane::Write(Box::new(Write { depends: depends(node, &context.tree), ..*write })),
        lane => lane,
    }
}

fn lane_of(node: &NodeEnum, context: &Context<'_>) -> Lane {
    if let Some(lane) = nodewise::lane(node) {
        return match on_temporary(node, context) {
            Temporary::All => read(false),
            _ => lane,
        };
    }
    if let (Some(lane), true) = (roles::refuse_session(context), is_definition(node)) {
        return lane;
    }
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
    if let NodeEnum::AlterTableStmt(statement) = node
        && let Some(lane) = carry::alter_table(statement, fact(statement.relation.as_ref(), context), context)
    {
        return lane;
    }
    if let NodeEnum::AlterSeqStmt(statement) = node
        && let Some(lane) = carry::alter_sequence(statement, context)
    {
        return lane;
    }
    // WITH NO DATA; the others are carried
    let empties = matches!(node, NodeEnum::RefreshMatViewStmt(_));
    if empties || is_definition(node) { ordered(!empties) } else { not_yet("this statement") }
}

fn ordered(ddl: bool) -> Lane {
    Lane::Write(Box::new(Write {
        effect: EffectPlan::Text { owner: None, counted: false, lock_tables: Vec::new(), dates_matter: false },
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl,
        depends: Depends::No,
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
            | NodeEnum::AlterDatabaseStmt(_)
            | NodeEnum::AlterDatabaseRefreshCollStmt(_)
            | NodeEnum::AlterDatabaseSetStmt(_)
            | NodeEnum::CreateConversionStmt(_)
            | NodeEnum::CreateCastStmt(_)
            | NodeEnum::CreateTransformStmt(_)
            | NodeEnum::DropOwnedStmt(_)
            | NodeEnum::ReassignOwnedStmt(_)
            | NodeEnum::AlterTsdictionaryStmt(_)
            | NodeEnum::AlterTsconfigurationStmt(_)
            | NodeEnum::AlterCollationStmt(_)
            | NodeEnum::CreatePublicationStmt(_)
            | NodeEnum::AlterPublicationStmt(_)
            | NodeEnum::CreateFdwStmt(_)
            | NodeEnum::AlterFdwStmt(_)
            | NodeEnum::CreateForeignServerStmt(_)
            | NodeEnum::AlterForeignServerStmt(_)
            | NodeEnum::CreateUserMappingStmt(_)
            | NodeEnum::AlterUserMappingStmt(_)
            | NodeEnum::DropUserMappingStmt(_)
            | NodeEnum::CreateForeignTableStmt(_)
            | NodeEnum::CreateAmStmt(_)
    )
}

/// Kinds with rules of their own.
fn special(node: &NodeEnum, context: &Context<'_>) -> Option<Lane> {
    match node {
        NodeEnum::TruncateStmt(statement) => Some(truncate(statement, context)),
        NodeEnum::ReindexStmt(statement) => Some(reindex(statement, context)),
        NodeEnum::ClusterStmt(statement) => Some(cluster(statement, context)),
        NodeEnum::CreateTableAsStmt(statement) => Some(carry::create_table_as(statement, context)),
        NodeEnum::RefreshMatViewStmt(statement) => carry::refresh(statement, context),
        NodeEnum::AlterDatabaseStmt(statement) => alter_database(&statement.options),
        NodeEnum::CreateTableSpaceStmt(_)
        | NodeEnum::DropTableSpaceStmt(_)
        | NodeEnum::AlterTableSpaceOptionsStmt(_)
        | NodeEnum::AlterTableMoveAllStmt(_) => Some(refused(TABLESPACES, "Leave tables in the default tablespace.")),
        NodeEnum::CreateRoleStmt(statement) => role(&statement.options, Some(&statement.role), context),
        NodeEnum::AlterRoleStmt(statement) => role(&statement.options, roles::name(statement.role.as_ref()), context),
        NodeEnum::AlterRoleSetStmt(statement) => statement.setstmt.as_ref().and_then(refused_setting),
        NodeEnum::AlterDatabaseSetStmt(statement) => statement.setstmt.as_ref().and_then(refused_setting),
        NodeEnum::CreateStmt(statement) => create_table(statement),
        NodeEnum::CreateEventTrigStmt(_) | NodeEnum::AlterEventTrigStmt(_) => Some(refused(
            "event triggers are not supported: their functions would run on every server by themselves",
            "Nothing was changed. Grant the rights to make definitions to fewer roles instead.",
        )),
        NodeEnum::CreateSubscriptionStmt(_) | NodeEnum::AlterSubscriptionStmt(_) => Some(refused(
            "subscriptions are not supported: what they bring would be written on one server only, past pgtandem",
            "Subscribe in another cluster, and write from there through pgtandem.",
        )),
        NodeEnum::ImportForeignSchemaStmt(_) => Some(refused(
            "IMPORT FOREIGN SCHEMA is not supported: every server would ask the foreign one by itself",
            "Use CREATE FOREIGN TABLE for each table.",
        )),
        NodeEnum::AlterTableStmt(statement) => alter_table(statement, context),
        _ => None,
    }
}

/// CREATE and ALTER ROLE: a password becomes the leader's verifier.
fn role(options: &[Node], name: Option<&str>, context: &Context<'_>) -> Option<Lane> {
    if let Some(lane) = roles::refuse_options(options) {
        return Some(lane);
    }
    let password = match roles::password(options, name, context.text) {
        Ok(password) => password?,
        Err(lane) => return Some(lane),
    };
    let Lane::Write(write) = ordered(true) else { return None };
    let edits = Edits { password: Some(password), ..write.edits };
    Some(Lane::Write(Box::new(Write { edits, ..*write })))
}

fn relations(nodes: &[Node]) -> impl Iterator<Item = &RangeVar> {
    nodes.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::RangeVar(relation)) => Some(relation),
        _ => None,
    })
}

/// Options of ALTER DATABASE.
fn alter_database(options: &[Node]) -> Option<Lane> {
    options.iter().find_map(|option| match option.node.as_ref() {
        Some(NodeEnum::DefElem(option)) if option.defname == "tablespace" => {
            Some(refused(TABLESPACES, "Leave the database where it is."))
        }
        Some(NodeEnum::DefElem(option)) if option.defname == "allow_connections" => {
            let refusal = nodewise::no_connections();
            Some(refused(refusal.message, refusal.hint))
        }
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
            Target::Once(why) => {
                return refused(
                    format!("TRUNCATE of {} is not replicated by this version of pgtandem: {why}", relation.relname),
                    "Use DELETE.",
                );
            }
            Target::Temporary => temporary = true,
            Target::Table(relation) => {
                let cascades = statement.behavior == DropBehavior::DropCascade as i32;
                if let Some(table) = relation.truncate_trigger.as_ref().filter(|_| cascades) {
                    return refused(
                        format!(
                            "TRUNCATE of {} with CASCADE is not replicated by this version of pgtandem: it reaches {table}, and user triggers \
                             fire there",
                            relation.name
                        ),
                        "Use DELETE.",
                    );
                }
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

pub(super) fn fact<'a>(relation: Option<&RangeVar>, context: &Context<'a>) -> Option<&'a Relation> {
    let relation = relation?;
    context.facts.relations.get(&Name::new(&relation.schemaname, &relation.relname))
}

fn reindex(statement: &ReindexStmt, context: &Context<'_>) -> Lane {
    let one = matches!(
        ReindexObjectType::try_from(statement.kind),
        Ok(ReindexObjectType::ReindexObjectIndex | ReindexObjectType::ReindexObjectTable)
    );
    let table = fact(statement.relation.as_ref(), context);
    if !one || table.is_some_and(|table| matches!(table.kind.as_str(), "p" | "I")) {
        return Lane::Maintenance { exclusive: true };
    }
    if table.is_some_and(Relation::is_temporary) { read(false) } else { ordered(true) }
}

fn cluster(statement: &ClusterStmt, context: &Context<'_>) -> Lane {
    let table = fact(statement.relation.as_ref(), context);
    if statement.relation.is_none() || table.is_some_and(|table| table.kind == "p") {
        return Lane::Maintenance { exclusive: true };
    }
    if table.is_some_and(Relation::is_temporary) { read(false) } else { ordered(true) }
}

pub(super) fn is_temporary_name(relation: &RangeVar) -> bool {
    relation.relpersistence == "t" || relation.schemaname == "pg_temp"
}

fn create_table(statement: &CreateStmt) -> Option<Lane> {
    let tablespace = statement.tablespacename.as_str();
    (!tablespace.is_empty() && tablespace != "pg_default").then(|| refused(TABLESPACES, "Leave out TABLESPACE."))
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
    commands.find_map(alter_command)
}

fn alter_command(command: &AlterTableCmd) -> Option<Lane> {
    let definition = command.def.as_ref().and_then(|definition| definition.node.as_ref());
    match (AlterTableType::try_from(command.subtype).ok()?, definition) {
        (AlterTableType::AtSetTableSpace, _) => Some(refused(TABLESPACES, "Leave the table where it is.")),
        (AlterTableType::AtDetachPartition, Some(NodeEnum::PartitionCmd(partition))) if partition.concurrent => {
            Some(refused(
                "DETACH PARTITION CONCURRENTLY is not supported: until it is done everywhere, statements on the parent would \
                 reach the partition on one server and not on another",
                "Leave out CONCURRENTLY.",
            ))
        }
        _ => None,
    }
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
        // a function that returns a row of a temporary table, a domain over its type
        (false, None) => {
            let types = &mut context.facts.types.values();
            types
                .find(|kind| kind.schema.starts_with("pg_temp"))
                .map_or(Temporary::None, |kind| Temporary::Some(kind.name.clone()))
        }
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
