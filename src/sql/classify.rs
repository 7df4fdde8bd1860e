//! Which lane a statement takes: the decision tree over PostgreSQL's parse tree and the leader's catalog.
//!
//! Whatever is not known to be right in a lane is refused. Statements that name something which does not exist go to the
//! leader behind the guard, so that the client gets PostgreSQL's own error.

use pg_query::NodeEnum;
use pg_query::protobuf::{
    CallStmt, CopyStmt, DeclareCursorStmt, ExplainStmt, RangeVar, SelectStmt, TransactionStmt, TransactionStmtKind,
    VacuumStmt, VariableSetKind, VariableSetStmt,
};
use serde_json::Value;

use super::expressions::{Look, OWN_SCHEMA, look};
use super::facts::{Facts, Function, Relation};
use super::functions::{self, Effect};
use super::large_objects;
use super::lex::{Kind, Lexer};
use super::needs::{Name, Needs};
use super::once::once;
use super::parse::{ParseError, Statement, tree};
use super::plan::{Admin, Control, Finish, Lane, Plan};
use super::refuse::{OWN_PREFIX, data_modifying_with, not_yet, own_schema, own_statements, refused};
use super::sequences::{self, SequenceUse};
use super::shape::Shape;
use super::shared::{self, SharedText};
use super::stays::{Stays, stays};
use super::text::Edits;
use super::{carry, copy, ddl, encoding, insert, merge, modify, named};

/// What a statement is classified from.
pub(super) struct Context<'a> {
    pub text: &'a str,
    pub shape: &'a Shape,
    pub facts: &'a Facts,
    /// The whole statement.
    pub tree: Value,
}

impl Context<'_> {
    pub fn look(&self, part: &impl serde::Serialize) -> Look {
        look_through_views(&tree(part), self.facts)
    }
}

/// The plan for a text of which nothing is known: the leader answers, behind the guard.
#[must_use]
pub fn unparsed() -> Plan {
    plan(read(true))
}

/// The plan for a text that can not be parsed: [`unparsed`], but a tree that is too deep to be read is refused with that reason
/// unless it only reads.
#[must_use]
pub fn unparsable(error: &ParseError, text: &str) -> Plan {
    let first = Lexer::new(text).find(|token| token.kind == Kind::Word).and_then(|token| text.get(token.range));
    let reads = first
        .is_some_and(|word| ["select", "values", "table", "with"].iter().any(|known| known.eq_ignore_ascii_case(word)));
    match error {
        ParseError::Tree if !reads => plan(refused(
            "the statement is nested too deeply for pgtandem to see what it does",
            "Split it into several statements, or put long expressions into fewer levels.",
        )),
        _ => Plan { stays: Stays::UNREAD, ..unparsed() },
    }
}

pub(super) fn read(guard: bool) -> Lane {
    Lane::Read { guard, copy_in: false }
}

fn plan(lane: Lane) -> Plan {
    Plan {
        lane,
        changes_settings: false,
        sequences: SequenceUse::None,
        drops_prepared: false,
        one_row: None,
        locks: None,
        stays: Stays::Nothing,
    }
}

/// Classifies the one statement of `text`. `shape` is the text's mask, `facts` the leader's answer to the statement's needs.
#[must_use]
pub fn classify(statement: &Statement, text: &str, shape: &Shape, facts: &Facts) -> Plan {
    let context = Context { text, shape, facts, tree: tree(&statement.node) };
    // names of our schema can be anywhere in a utility statement
    if context.tree == Value::Null {
        return plan(not_yet("this statement"));
    }
    if !is_query(&statement.node) && mentions(&context.tree, OWN_SCHEMA) {
        return plan(own_schema());
    }
    if names_ours(&statement.node) {
        return plan(own_statements());
    }
    match &statement.node {
        node @ NodeEnum::VariableSetStmt(set) => {
            Plan { changes_settings: true, stays: stays(node, &Needs::default()), ..plan(set_variable(set)) }
        }
        node @ NodeEnum::DiscardStmt(_) => {
            let stays = stays(node, &Needs::default());
            let all = stays == Stays::All;
            Plan { changes_settings: all, drops_prepared: all, stays, ..plan(read(false)) }
        }
        NodeEnum::DeallocateStmt(deallocate) if deallocate.isall => Plan { drops_prepared: true, ..plan(read(false)) },
        node => {
            let mut lane = lane(node, &context);
            let needs = Needs::of(statement);
            // set_config() and functions with SET-like effects run behind no guard
            let changes_settings = matches!(lane, Lane::Read { guard: true, .. } | Lane::Once(_))
                || needs.functions.iter().any(|name| name.name == "set_config")
                || matches!(node, NodeEnum::AlterRoleSetStmt(_) | NodeEnum::AlterDatabaseSetStmt(_));
            let sequences = sequences::of(node, &needs, &lane, facts);
            if let Lane::Once(once) = &mut lane
                && let Some(rows) = &mut once.rows
            {
                rows.sequences = sequences::of_rows(node, &needs, &rows.write, facts);
            }
            let one_row = match (node, &lane) {
                (NodeEnum::SelectStmt(select), Lane::Read { guard: false, .. }) => one_row(select, &context),
                _ => None,
            };
            let stays = if defines_by_code(&lane, facts) { Stays::CODE } else { stays(node, &needs) };
            Plan { changes_settings, sequences, one_row, locks: locks(node, &context), stays, ..plan(lane) }
        }
    }
}

/// The plan of a query of whose tables and functions nothing can be known: behind the guard. `None`: it is no mere query.
#[must_use]
pub fn unknown_query(statement: &Statement, text: &str, shape: &Shape) -> Option<Plan> {
    let is_mere = matches!(statement.node, NodeEnum::SelectStmt(_) | NodeEnum::CopyStmt(_) | NodeEnum::ExplainStmt(_));
    let plan = classify(statement, text, shape, &Facts::default());
    let reads = matches!(plan.lane, Lane::Read { copy_in: false, .. });
    let is_guarded = !Needs::of(statement).functions.iter().any(|name| functions::passes_the_guard(&name.name));
    let plan = Plan { lane: read(true), changes_settings: true, one_row: None, stays: Stays::CODE, ..plan };
    (is_mere && reads && is_guarded).then_some(plan)
}

/// Whether SQL names a statement that the proxy has prepared for itself.
fn names_ours(node: &NodeEnum) -> bool {
    let name = match node {
        NodeEnum::PrepareStmt(statement) => &statement.name,
        NodeEnum::ExecuteStmt(statement) => &statement.name,
        NodeEnum::DeallocateStmt(statement) => &statement.name,
        _ => return false,
    };
    name.starts_with(OWN_PREFIX)
}

fn is_query(node: &NodeEnum) -> bool {
    matches!(
        node,
        NodeEnum::SelectStmt(_)
            | NodeEnum::InsertStmt(_)
            | NodeEnum::UpdateStmt(_)
            | NodeEnum::DeleteStmt(_)
            | NodeEnum::MergeStmt(_)
    )
}

fn mentions(value: &Value, name: &str) -> bool {
    match value {
        Value::String(text) => text == name,
        Value::Array(items) => items.iter().any(|item| mentions(item, name)),
        Value::Object(fields) => fields.values().any(|field| mentions(field, name)),
        _ => false,
    }
}

fn lane(node: &NodeEnum, context: &Context<'_>) -> Lane {
    match node {
        NodeEnum::SelectStmt(statement) if statement.into_clause.is_some() => carry::select_into(statement, context),
        NodeEnum::SelectStmt(_) if reloads(&context.tree) => Lane::Maintenance { exclusive: false },
        NodeEnum::SelectStmt(statement) => select_statement(statement, context),
        NodeEnum::InsertStmt(statement) => insert::lane(statement, context),
        NodeEnum::UpdateStmt(statement) => modify::update(statement, context),
        NodeEnum::DeleteStmt(statement) => modify::delete(statement, context),
        NodeEnum::MergeStmt(statement) => merge::lane(statement, context),
        NodeEnum::CallStmt(statement) if calls_no_procedure(statement, context) => read(true),
        NodeEnum::DoStmt(_) | NodeEnum::CallStmt(_) => once(context, true),
        NodeEnum::CopyStmt(statement) => copy_lane(statement, context),
        NodeEnum::TransactionStmt(statement) => transaction(statement),
        NodeEnum::ConstraintsSetStmt(_) => Lane::Control(Control::SetConstraints),
        NodeEnum::VariableShowStmt(show) if show.name == "pool_nodes" => Lane::Admin(Admin::PoolNodes),
        NodeEnum::ExplainStmt(statement) => explain(statement, context),
        NodeEnum::DeclareCursorStmt(statement) => declare(statement, context),
        NodeEnum::PrepareStmt(statement) => named::prepare(statement, context),
        NodeEnum::ExecuteStmt(statement) => named::execute(statement, context),
        NodeEnum::DeallocateStmt(statement) => named::deallocate(statement),
        NodeEnum::VacuumStmt(statement) => vacuum(statement, context),
        NodeEnum::VariableShowStmt(_)
        | NodeEnum::FetchStmt(_)
        | NodeEnum::ClosePortalStmt(_)
        | NodeEnum::ListenStmt(_)
        | NodeEnum::UnlistenStmt(_)
        | NodeEnum::NotifyStmt(_)
        | NodeEnum::LockStmt(_)
        | NodeEnum::CheckPointStmt(_) => read(false),
        NodeEnum::LoadStmt(_) => refused(
            "LOAD is not supported: the library would be there for one server only",
            "Put the library into shared_preload_libraries on every server.",
        ),
        other => ddl::lane(other, context),
    }
}

/// CALL of what is a function: the leader says so.
fn calls_no_procedure(statement: &CallStmt, context: &Context<'_>) -> bool {
    let called = statement.funccall.as_ref().and_then(|call| Name::of_parts(&super::parse::node_names(&call.funcname)));
    let found = called.and_then(|name| context.facts.functions.get(&name));
    found.is_some_and(|candidates| candidates.iter().all(|candidate| candidate.kind != "p"))
}

/// `SELECT pg_reload_conf()`: every server reads its configuration again.
fn reloads(tree: &Value) -> bool {
    let targets = tree.pointer("/SelectStmt/target_list").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let [target] = targets else { return false };
    let name = target.pointer("/node/ResTarget/val/node/FuncCall/funcname");
    matches!(super::parse::names(name)[..], ["pg_reload_conf"] | ["pg_catalog", "pg_reload_conf"])
        && tree.pointer("/SelectStmt/from_clause").and_then(Value::as_array).is_none_or(Vec::is_empty)
        && tree.pointer("/SelectStmt/where_clause").is_none_or(Value::is_null)
}

/// A SELECT as a statement of its own: WITH can hold INSERT, UPDATE and DELETE, and it may write large objects.
fn select_statement(statement: &SelectStmt, context: &Context<'_>) -> Lane {
    let found = context.look(&context.tree);
    if found.writes.is_some() && !found.into {
        return once(context, false);
    }
    let lane = select(&context.tree, context.facts);
    let writes = matches!(lane, Lane::Refused(_)) && context.look(statement).effect == Some(Effect::Writes);
    let needs = || Needs::of_tree(&context.tree);
    let carried = if writes { large_objects::lane(statement, &needs(), context) } else { None };
    carried.unwrap_or(lane)
}

/// The table that the statement leaves locked, where it names just one.
fn locks(node: &NodeEnum, context: &Context<'_>) -> Option<u32> {
    let named = match node {
        NodeEnum::InsertStmt(insert) => insert.relation.as_ref(),
        NodeEnum::UpdateStmt(update) => update.relation.as_ref(),
        NodeEnum::DeleteStmt(delete) => delete.relation.as_ref(),
        NodeEnum::SelectStmt(select) => the_source(select),
        _ => None,
    }?;
    Some(context.facts.relation(&named.schemaname, &named.relname)?.oid)
}

fn the_source(select: &SelectStmt) -> Option<&RangeVar> {
    let [source] = select.from_clause.as_slice() else { return None };
    if let Some(NodeEnum::RangeVar(named)) = source.node.as_ref() { Some(named) } else { None }
}

/// The text that all queries of this shape share, if they ask one table for the row with a primary key: their plan is the same
/// for every key.
fn one_row(select: &SelectStmt, context: &Context<'_>) -> Option<SharedText> {
    let plain = select.distinct_clause.is_empty()
        && select.group_clause.is_empty()
        && select.having_clause.is_none()
        && select.window_clause.is_empty()
        && select.sort_clause.is_empty()
        && select.limit_count.is_none()
        && select.limit_offset.is_none()
        && select.locking_clause.is_empty()
        && select.with_clause.is_none()
        && select.larg.is_none();
    let named = the_source(select)?;
    let relation = context.facts.relation(&named.schemaname, &named.relname)?;
    let permanent = relation.is_table() && !relation.is_system() && !relation.is_temporary() && !relation.foreign;
    let one = modify::is_one_row(select.where_clause.as_deref(), relation) && !relation.children && !relation.rls;
    if !(plain && permanent && one) || context.look(&context.tree).subqueries {
        return None;
    }
    let end = Edits::find(context.text, context.shape, &[])?.0.end?;
    shared::share(context.text, context.shape, 0..end.at(context.shape))
}

/// The lane of a query that a function of was found to write when it ran behind the guard.
#[must_use]
pub fn writing(statement: &Statement, text: &str, shape: &Shape, facts: &Facts) -> Plan {
    let context = Context { text, shape, facts, tree: tree(&statement.node) };
    let lane = match &statement.node {
        NodeEnum::SelectStmt(select) => once(&context, select.from_clause.is_empty()),
        _ => refused(
            "the statement calls a function that writes, which pgtandem does not replicate in this kind of statement",
            "Call the function by SELECT.",
        ),
    };
    Plan { changes_settings: true, stays: stays(&statement.node, &Needs::of(statement)), ..plan(lane) }
}

/// Whether a definition may run code of which nothing is proven: a default that it gives to rows, a check that they have to pass.
fn defines_by_code(lane: &Lane, facts: &Facts) -> bool {
    let is_unknown = |functions: &[Function]| functions::effect(functions, Some(2)) >= Some(Effect::Unknown);
    matches!(lane, Lane::Write(write) if write.ddl)
        && (facts.functions.values().chain(facts.operators.values()).any(|functions| is_unknown(functions))
            || facts.types.values().any(|known| is_unknown(&known.check_functions))
            || facts.relations.values().any(|relation| is_unknown(&relation.check_functions)))
}

/// Judges a query that only reads: SELECT, VALUES, TABLE, WITH, or what EXPLAIN, DECLARE and PREPARE hold.
fn select(part: &Value, facts: &Facts) -> Lane {
    let found = look_through_views(part, facts);
    if found.own_schema {
        own_schema()
    } else if let Some(what) = found.writes {
        data_modifying_with(what)
    } else if let Some(setting) = &found.refused_setting {
        refused(format!("set_config() of {setting} is not supported"), "Use SET, which says what is possible.")
    } else if found.effect == Some(Effect::Writes) {
        let what = found.impure.unwrap_or_default();
        refused(
            format!("{what} writes, and that is not replicated by this version of pgtandem"),
            "Large objects: call lo_create, lo_put and the like in a SELECT of their own.",
        )
    } else {
        // The leader says that INTO can not be in COPY, a cursor, PREPARE or a part of a query.
        read(found.needs_guard() || found.into)
    }
}

/// Adds to the look what reading the named views and tables can call.
fn look_through_views(part: &Value, facts: &Facts) -> Look {
    let mut found = look(part, facts);
    let relations: Vec<&Relation> = found.relations.iter().filter_map(|name| facts.relations.get(name)).collect();
    for relation in relations {
        if !relation.is_system() && relation.kind != "m" {
            found.add_functions(&relation.view_functions, "a view");
            if relation.rls || relation.view_opaque || relation.kind == "f" {
                found.effect = Some(Effect::Unknown);
                let reason = format!("{}, with its row-level security or foreign table,", relation.qualified());
                found.impure.get_or_insert(reason);
            }
        }
    }
    found
}

fn explain(statement: &ExplainStmt, context: &Context<'_>) -> Lane {
    let Some(query) = statement.query.as_ref().and_then(|query| query.node.as_ref()) else { return read(true) };
    let is_query = matches!(query, NodeEnum::SelectStmt(select) if select.into_clause.is_none());
    if is_query {
        return select(&context.tree, context.facts);
    }
    let options = statement.options.iter().filter_map(|option| match option.node.as_ref() {
        Some(NodeEnum::DefElem(option)) => Some(option),
        _ => None,
    });
    let analyze = options.filter(|option| option.defname == "analyze").any(|option| ddl::is_on(option));
    let found = context.look(query);
    if found.own_schema {
        own_schema()
    } else if analyze {
        refused(
            "EXPLAIN ANALYZE of a statement that writes is not supported: it would write on one server only",
            "Use EXPLAIN without ANALYZE.",
        )
    } else {
        read(found.needs_guard())
    }
}

fn declare(statement: &DeclareCursorStmt, context: &Context<'_>) -> Lane {
    let query = statement.query.as_ref().map(tree).unwrap_or_default();
    match select(&query, context.facts) {
        // FETCH runs the query later, without a guard
        Lane::Read { guard: true, .. } => {
            let found = look_through_views(&query, context.facts);
            if found.missing {
                return read(true);
            }
            let what = found.impure.unwrap_or_else(|| "row-level security or a foreign table".to_owned());
            refused(
                format!("a cursor over a query that uses {what} is not supported: it may write"),
                "Run the query without a cursor.",
            )
        }
        lane => lane,
    }
}

fn copy_lane(statement: &CopyStmt, context: &Context<'_>) -> Lane {
    if statement.is_from {
        return copy::from(statement, context);
    }
    select(&context.tree, context.facts)
}

fn vacuum(statement: &VacuumStmt, context: &Context<'_>) -> Lane {
    let exclusive = statement.options.iter().any(|option| match option.node.as_ref() {
        Some(NodeEnum::DefElem(option)) => option.defname == "full" && ddl::is_on(option),
        _ => false,
    });
    let relations = statement.rels.iter().filter_map(|relation| match relation.node.as_ref() {
        Some(NodeEnum::VacuumRelation(relation)) => relation.relation.as_ref(),
        _ => None,
    });
    let temporary = relations
        .filter_map(|name| context.facts.relations.get(&Name::new(&name.schemaname, &name.relname)))
        .any(Relation::is_temporary);
    if temporary { read(false) } else { Lane::Maintenance { exclusive } }
}

/// How the names of the proxy's own prepared transactions begin.
const OWN_GID: &str = "pgtandem:";

fn transaction(statement: &TransactionStmt) -> Lane {
    use TransactionStmtKind as Kind;
    let name = statement.savepoint_name.clone();
    let chain = statement.chain;
    Lane::Control(match TransactionStmtKind::try_from(statement.kind) {
        Ok(Kind::TransStmtBegin | Kind::TransStmtStart) => Control::Begin { with_modes: !statement.options.is_empty() },
        Ok(Kind::TransStmtCommit) => Control::Commit { chain },
        Ok(Kind::TransStmtRollback) => Control::Rollback { chain },
        Ok(Kind::TransStmtSavepoint) => Control::Savepoint { name },
        Ok(Kind::TransStmtRelease) => Control::Release { name },
        Ok(Kind::TransStmtRollbackTo) => Control::RollbackTo { name },
        Ok(Kind::TransStmtPrepare | Kind::TransStmtCommitPrepared | Kind::TransStmtRollbackPrepared)
            if statement.gid.starts_with(OWN_GID) =>
        {
            return refused(
                format!("names of prepared transactions that begin with {OWN_GID} belong to pgtandem itself"),
                "Use other names.",
            );
        }
        Ok(Kind::TransStmtPrepare) => Control::Prepare { gid: statement.gid.clone() },
        Ok(kind @ (Kind::TransStmtCommitPrepared | Kind::TransStmtRollbackPrepared)) => {
            let commit = kind == Kind::TransStmtCommitPrepared;
            return Lane::Finish(Finish { gid: statement.gid.clone(), commit });
        }
        Ok(Kind::Undefined) | Err(_) => return not_yet("this statement"),
    })
}

/// Values of a SET statement as text, lower case.
fn set_values(set: &VariableSetStmt) -> Vec<String> {
    use pg_query::protobuf::a_const::Val;
    let of_const = |node: &NodeEnum| match node {
        NodeEnum::AConst(constant) => constant.val.as_ref().map(|value| match value {
            Val::Sval(text) => text.sval.to_ascii_lowercase(),
            Val::Ival(number) => number.ival.to_string(),
            Val::Boolval(value) => value.boolval.to_string(),
            Val::Fval(number) => number.fval.clone(),
            Val::Bsval(bits) => bits.bsval.clone(),
        }),
        _ => None,
    };
    set.args.iter().filter_map(|argument| argument.node.as_ref().and_then(of_const)).collect()
}

/// Why a SET is refused, also inside ALTER ROLE and ALTER DATABASE.
pub(super) fn refused_setting(set: &VariableSetStmt) -> Option<Lane> {
    let kind = VariableSetKind::try_from(set.kind).ok()?;
    if !matches!(kind, VariableSetKind::VarSetValue | VariableSetKind::VarSetMulti) {
        return None;
    }
    let values = set_values(set);
    let name = set.name.to_ascii_lowercase();
    match name.as_str() {
        "standard_conforming_strings" => {
            let on = values.iter().any(|value| matches!(value.as_str(), "on" | "true" | "yes" | "1" | "t" | "y"));
            (!on).then(|| {
                refused(
                    "standard_conforming_strings = off is not supported: pgtandem could read a text differently from the server",
                    "Write backslash escapes as E'...'.",
                )
            })
        }
        "session_replication_role" => (!values.iter().any(|value| value == "origin")).then(|| {
            refused(
                "session_replication_role can not be set: triggers and foreign keys would work on one server only",
                "Disable single triggers with ALTER TABLE ... DISABLE TRIGGER.",
            )
        }),
        "client_encoding" => values.iter().find(|value| encoding::is_refused(value)).map(|value| {
            refused(
                format!("the client encoding {value} is not supported: its texts can not be read safely"),
                "Use UTF8.",
            )
        }),
        _ => None,
    }
}

fn set_variable(set: &VariableSetStmt) -> Lane {
    if let Some(lane) = refused_setting(set) {
        return lane;
    }
    if matches!(set.name.as_str(), "TRANSACTION" | "SESSION CHARACTERISTICS" | "TRANSACTION SNAPSHOT") {
        return Lane::Control(Control::Other);
    }
    read(false)
}

#[cfg(test)]
#[path = "classify_tests.rs"]
mod tests;
