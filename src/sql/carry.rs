//! Definitions that give rows values: CREATE TABLE AS, materialized views, ALTER TABLE with values that vary. Followers get the
//! definition without the values, and the rows as the leader made them, so the source may be anything that the leader can read.

use pg_query::NodeEnum;
use pg_query::protobuf::{
    AlterSeqStmt, AlterTableCmd, AlterTableStmt, AlterTableType, ColumnDef, ConstrType, CreateTableAsStmt, IntoClause,
    ObjectType, RefreshMatViewStmt, SelectStmt,
};

use super::classify::{Context, read};
use super::conditional::Depends;
use super::ddl::{fact, is_temporary_name};
use super::expressions::{Look, SessionValue};
use super::facts::Relation;
use super::functions::{self, Effect};
use super::insert::may_write;
use super::needs::Name;
use super::parse::node_names;
use super::plan::{Carried, EffectPlan, Lane, Write};
use super::refuse::{data_modifying_with, not_yet, own_schema, refused};
use super::text::Edits;

/// A definition whose rows are carried. `ddl`: it changes the schema.
fn carried(rows: Carried, ddl: bool, edits: Edits) -> Lane {
    carried_after(rows, Vec::new(), ddl, edits)
}

/// The same, once these sequences are as the leader's.
fn carried_after(rows: Carried, sequences: Vec<u32>, ddl: bool, edits: Edits) -> Lane {
    Lane::Write(Box::new(Write {
        effect: EffectPlan::Carried { rows, sequences },
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl,
        depends: Depends::No,
        barrier: true,
        deferrable_constraints: false,
        edits,
    }))
}

fn functions_write(what: &str) -> Lane {
    refused(
        format!("{what} may write, and what functions write is not replicated by this version of pgtandem"),
        "Call the function in a statement of its own, then use its result.",
    )
}

/// CREATE TABLE AS and CREATE MATERIALIZED VIEW.
pub(super) fn create_table_as(statement: &CreateTableAsStmt, context: &Context<'_>) -> Lane {
    let view = statement.objtype == ObjectType::ObjectMatview as i32;
    if let Some(NodeEnum::ExecuteStmt(execute)) = statement.query.as_ref().and_then(|query| query.node.as_ref()) {
        let mut lane = new_relation(statement.into.as_deref(), view, &context.look(&execute.params));
        if let Lane::Write(write) = &mut lane {
            write.edits.executes = Some(execute.name.clone());
        }
        return lane;
    }
    let found = context.look(&statement.query);
    let temporary = statement.into.as_ref().and_then(|into| into.rel.as_ref()).is_some_and(is_temporary_name);
    match new_relation(statement.into.as_deref(), view, &found) {
        Lane::Write(_) if temporary => read(false),
        lane => lane,
    }
}

/// SELECT ... INTO.
pub(super) fn select_into(statement: &SelectStmt, context: &Context<'_>) -> Lane {
    // the name of what is made is none of those that the query reads
    let query = SelectStmt { into_clause: None, ..statement.clone() };
    new_relation(statement.into_clause.as_deref(), false, &context.look(&query))
}

fn new_relation(into: Option<&IntoClause>, view: bool, found: &Look) -> Lane {
    let Some((into, relation)) = into.and_then(|into| Some((into, into.rel.as_ref()?))) else { return read(true) };
    if found.own_schema {
        return own_schema();
    }
    if let Some(what) = found.writes {
        return data_modifying_with(what);
    }
    if let Some(setting) = &found.refused_setting {
        return refused(format!("set_config() of {setting} is not supported"), "Use SET, which says what is possible.");
    }
    if found.missing {
        return read(true);
    }
    if let Some(what) = may_write(&[found]) {
        return functions_write(&what);
    }
    let tablespace = into.table_space_name.as_str();
    if !tablespace.is_empty() && tablespace != "pg_default" {
        return refused(super::nodewise::TABLESPACES, "Leave out TABLESPACE.");
    }
    let temporary = is_temporary_name(relation);
    if relation.relpersistence == "u" && !into.skip_data {
        return refused(
            "an unlogged table can not be created with rows: a node that is filled gets it empty",
            "Leave out UNLOGGED.",
        );
    }
    // a temporary one is found to be so once it is there, and followers do nothing
    let Name { schema, name } = Name::new(if temporary { "pg_temp" } else { &relation.schemaname }, &relation.relname);
    carried(Carried::New { schema, name, view, no_data: into.skip_data }, true, Edits::default())
}

/// REFRESH MATERIALIZED VIEW, also CONCURRENTLY, which is the leader's affair.
pub(super) fn refresh(statement: &RefreshMatViewStmt, context: &Context<'_>) -> Option<Lane> {
    let view = fact(statement.relation.as_ref(), context).filter(|relation| relation.kind == "m")?;
    if statement.skip_data {
        return None;
    }
    let unknown = view
        .view_functions
        .iter()
        .find(|function| functions::effect(std::slice::from_ref(*function), Some(2)) >= Some(Effect::Unknown));
    Some(match unknown {
        Some(function) => functions_write(&format!("the function {} in the materialized view", function.name)),
        None => carried(Carried::Refresh { view: view.oid }, false, Edits::default()),
    })
}

/// How an ALTER TABLE reaches followers.
#[derive(Default)]
struct Alter {
    /// Rows get values that are others on another server.
    rows: bool,
    /// Columns whose type is changed so.
    retyped: Vec<String>,
    /// New columns whose default has values of the session, the same for every row.
    defaults: Vec<String>,
    values: Vec<SessionValue>,
    /// Partitions or children come or go.
    moves_tables: bool,
    /// Sequences that get other limits, within which followers' positions must be, too.
    sequences: Vec<u32>,
}

/// ALTER SEQUENCE: followers may be ahead, past limits that the leader is within. None: the text does.
pub(super) fn alter_sequence(statement: &AlterSeqStmt, context: &Context<'_>) -> Option<Lane> {
    let sequence = fact(statement.sequence.as_ref(), context)?;
    let restarts = statement
        .options
        .iter()
        .any(|option| matches!(option.node.as_ref(), Some(NodeEnum::DefElem(option)) if option.defname == "restart"));
    if sequence.kind != "S" || sequence.is_temporary() || restarts {
        return None;
    }
    let relation = sequence.oid;
    Some(carried_after(Carried::Text { relation }, vec![relation], true, Edits::default()))
}

/// ALTER TABLE that gives rows values which are others on another server. None: the text does.
pub(super) fn alter_table(statement: &AlterTableStmt, table: Option<&Relation>, context: &Context<'_>) -> Option<Lane> {
    let table = table.filter(|table| table.is_table() && !table.is_temporary())?;
    let mut alter = Alter::default();
    for node in &statement.cmds {
        let Some(NodeEnum::AlterTableCmd(command)) = node.node.as_ref() else { continue };
        if let Some(lane) = judge(command, table, context, &mut alter) {
            return Some(lane);
        }
    }
    if !alter.rows && alter.defaults.is_empty() && alter.sequences.is_empty() {
        return None;
    }
    if alter.rows && (alter.moves_tables || table.foreign) {
        return Some(refused(
            "ALTER TABLE that gives rows values which vary, and attaches, detaches or has a child that is elsewhere, is not supported",
            "Use two statements.",
        ));
    }
    if alter.rows {
        let how = Carried::Rows { table: table.oid, retyped: alter.retyped };
        return Some(carried_after(how, alter.sequences, true, Edits::default()));
    }
    if alter.defaults.is_empty() {
        return Some(carried_after(Carried::Text { relation: table.oid }, alter.sequences, true, Edits::default()));
    }
    let Some((edits, values)) = Edits::find(context.text, context.shape, &alter.values) else {
        return Some(not_yet("this ALTER TABLE"));
    };
    let rows = Carried::Defaults { table: table.oid, columns: alter.defaults, values };
    Some(carried_after(rows, alter.sequences, true, edits))
}

fn judge(command: &AlterTableCmd, table: &Relation, context: &Context<'_>, alter: &mut Alter) -> Option<Lane> {
    let definition = command.def.as_ref().and_then(|definition| definition.node.as_ref());
    match (AlterTableType::try_from(command.subtype).ok()?, definition) {
        (AlterTableType::AtAddColumn, Some(NodeEnum::ColumnDef(column))) => {
            // it is there, and the leader leaves it alone
            if command.missing_ok && table.column(&column.colname).is_some() {
                return None;
            }
            return add_column(column, context, alter);
        }
        (AlterTableType::AtAlterColumnType, Some(NodeEnum::ColumnDef(column))) => {
            if let Some(using) = &column.raw_default
                && let Some(what) = may_write(&[&context.look(using)])
            {
                return Some(functions_write(&what));
            }
            alter.sequences.extend(sequences_of(table, &command.name));
            if changes_by_node(&command.name, column, table, context) {
                alter.rows = true;
                alter.retyped.push(command.name.clone());
            }
        }
        (AlterTableType::AtSetIdentity, _) => alter.sequences.extend(sequences_of(table, &command.name)),
        // A node that was filled has it empty.
        (AlterTableType::AtSetLogged, _) if table.persistence == "u" => alter.rows = true,
        (AlterTableType::AtSetUnLogged, _) => {
            return Some(refused(
                "SET UNLOGGED is not supported: a node that is filled gets unlogged tables empty",
                "Leave the table as it is.",
            ));
        }
        (
            AlterTableType::AtAttachPartition
            | AlterTableType::AtDetachPartition
            | AlterTableType::AtAddInherit
            | AlterTableType::AtDropInherit,
            _,
        ) => alter.moves_tables = true,
        _ => {}
    }
    None
}

fn sequences_of<'t>(table: &'t Relation, column: &'t str) -> impl Iterator<Item = u32> + 't {
    table.sequences.iter().filter(move |fact| fact.column == column && fact.oid != 0).map(|fact| fact.oid)
}

/// Existing rows get the default's value.
fn add_column(column: &ColumnDef, context: &Context<'_>, alter: &mut Alter) -> Option<Lane> {
    let type_parts = column.type_name.as_ref().map(|name| node_names(&name.names)).unwrap_or_default();
    let serial = ["serial", "serial4", "bigserial", "serial8", "smallserial", "serial2"];
    alter.rows |= type_parts.last().is_some_and(|name| serial.contains(name));
    let domain = Name::of_parts(&type_parts).and_then(|name| context.facts.types.get(&name));
    alter.rows |= domain.is_some_and(|fact| fact.has_default);
    for node in &column.constraints {
        let Some(NodeEnum::Constraint(constraint)) = node.node.as_ref() else { continue };
        match ConstrType::try_from(constraint.contype) {
            Ok(ConstrType::ConstrIdentity) => alter.rows = true,
            Ok(ConstrType::ConstrDefault) => {
                let found = context.look(&constraint.raw_expr);
                if let Some(what) = may_write(&[&found]) {
                    return Some(functions_write(&what));
                }
                let fixed = found.session_values.iter().all(|value| !value.hidden.contains("statement_timestamp"));
                if !found.is_pure() || found.text_to_date || !fixed {
                    alter.rows = true;
                } else if !found.session_values.is_empty() {
                    alter.defaults.push(column.colname.clone());
                    alter.values.extend(found.session_values);
                }
            }
            _ => {}
        }
    }
    None
}

/// Whether the new type gives rows other values on another server.
fn changes_by_node(name: &str, column: &ColumnDef, table: &Relation, context: &Context<'_>) -> bool {
    let using = column.raw_default.as_ref().map(|using| context.look(using));
    if using.is_some_and(|found| {
        !found.is_pure() || !found.session_values.is_empty() || found.subqueries || found.text_to_date
    }) {
        return true;
    }
    let target = column.type_name.as_ref().and_then(|name| Name::of_parts(&node_names(&name.names)));
    let to_date = target.and_then(|name| context.facts.types.get(&name)).is_some_and(|fact| fact.dates);
    // a text may be 'now'
    to_date && table.column(name).is_some_and(|column| column.text)
}
