//! What evaluating a part of a statement depends on: functions, operators, casts, session values, other relations.
//!
//! Works on the complete serialized tree, so nothing that the parser knows of is missed; what it can not judge counts as bad.

use std::collections::BTreeSet;

use pg_query::protobuf::{SetOperation, SubLinkType};
use serde_json::{Map, Value};

use super::facts::{Facts, Function, Relation};
use super::functions::{self, Effect};
use super::needs::{Name, hidden_call, relation_name, type_name};
use super::parse::{names, walk};

/// A value of the session in the text, to be given to followers as a literal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionValue {
    /// Byte position of its name in the text.
    pub location: usize,
    /// An SQL expression whose text form, under any settings, is read back as the same value of `sql_type`.
    pub hidden: String,
    pub sql_type: &'static str,
}

/// The result of [`look`].
#[derive(Clone, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "independent observations")]
pub struct Look {
    /// The worst effect of what is called.
    pub effect: Option<Effect>,
    /// The first thing that is not pure, for a person.
    pub impure: Option<String>,
    /// Names a function or relation that the catalog does not have: the leader will say so.
    pub missing: bool,
    /// Its result may depend on the order of rows or on the choice of rows: LIMIT, DISTINCT ON, window functions.
    pub order: Option<String>,
    pub subqueries: bool,
    pub session_values: Vec<SessionValue>,
    /// A column of a catalog kind: ctid, xmin ...
    pub system_column: Option<String>,
    /// Relations named, without names of WITH queries.
    pub relations: BTreeSet<Name>,
    pub columns: usize,
    /// Byte positions of string literals.
    pub strings: Vec<usize>,
    pub parameters: Vec<i32>,
    /// A cast to a date or time type, or a column of one, is there: strings may be read as dates.
    pub dates: bool,
    /// A value that is no literal or parameter, and may be text, is cast to a date or time type.
    pub text_to_date: bool,
    /// A statement that writes, inside.
    pub writes: Option<&'static str>,
    /// SELECT ... INTO
    pub into: bool,
    pub locks_rows: bool,
    /// Names the schema pgtandem.
    pub own_schema: bool,
    /// A setting that may not be changed, by set_config().
    pub refused_setting: Option<String>,
    float_aggregate: bool,
    /// What takes one of several values that are equal: max(), DISTINCT and the like.
    merges: Option<String>,
    /// Values that are equal and look different may be there.
    loose: bool,
    /// Floating point numbers are there, or may be.
    floats: bool,
    /// Date and time types named anywhere, and those of casts among them.
    date_types: usize,
    date_casts: usize,
}

impl Look {
    #[must_use]
    pub fn is_pure(&self) -> bool {
        self.effect.unwrap_or(Effect::Pure) == Effect::Pure && !self.missing
    }

    #[must_use]
    pub fn needs_guard(&self) -> bool {
        self.effect >= Some(Effect::Unknown) || self.missing
    }

    fn note(&mut self, effect: Effect, what: impl FnOnce() -> String) {
        if effect > Effect::Pure && (self.impure.is_none() || self.effect < Some(effect)) {
            self.impure = Some(what());
        }
        self.effect = self.effect.max(Some(effect));
    }

    /// Adds what checks and views behind a name do.
    pub fn add_functions(&mut self, functions: &[Function], where_from: &str) {
        for function in functions {
            let effect = functions::effect(std::slice::from_ref(function), Some(2)).unwrap_or(Effect::Unknown);
            self.note(effect, || format!("the function {} in {where_from}", function.name));
        }
    }
}

/// Own schema: closed to clients.
pub const OWN_SCHEMA: &str = "pgtandem";

const SYSTEM_COLUMNS: [&str; 6] = ["ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"];

/// Looks at a part of a statement's tree.
#[must_use]
pub fn look(part: &Value, facts: &Facts) -> Look {
    let mut look = Look::default();
    let mut with_names = BTreeSet::new();
    walk(part, &mut |kind, fields| {
        if kind == "CommonTableExpr" {
            with_names.extend(fields.get("ctename").and_then(Value::as_str).map(|name| Name::new("", name)));
        }
    });
    walk(part, &mut |kind, fields| visit(&mut look, kind, fields, facts));
    look.relations.retain(|name| !with_names.contains(name) || facts.relations.contains_key(name));
    if look.relations.iter().any(|name| !facts.relations.contains_key(name)) {
        look.missing = true;
    }
    let relations: Vec<&Relation> = look.relations.iter().filter_map(|name| facts.relations.get(name)).collect();
    let floats = look.floats
        || !look.parameters.is_empty()
        || relations.iter().any(|relation| relation.columns.iter().any(|column| column.floats));
    if look.float_aggregate && floats && look.order.is_none() {
        look.order = Some("an aggregate over numbers that may be floating point".to_owned());
    }
    let loose = look.loose || relations.iter().any(|relation| relation.columns.iter().any(|column| column.loose));
    if let Some(what) = look.merges.take().filter(|_| loose && look.order.is_none()) {
        look.order = Some(format!("{what} of values that may be equal and look different"));
    }
    // a type in JSON_TABLE, XMLTABLE or a column definition list: the texts are in the data
    look.text_to_date |= look.date_types > look.date_casts;
    look
}

fn location(fields: &Map<String, Value>) -> Option<usize> {
    fields.get("location").and_then(Value::as_u64).and_then(|at| usize::try_from(at).ok())
}

fn is_set(fields: &Map<String, Value>, name: &str) -> bool {
    match fields.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    }
}

fn visit(look: &mut Look, kind: &str, fields: &Map<String, Value>, facts: &Facts) {
    if let Some(name) = relation_name(fields) {
        look.own_schema |= name.schema.as_deref() == Some(OWN_SCHEMA);
        look.relations.insert(name);
    } else if let Some(name) = type_name(fields) {
        look.own_schema |= name.schema.as_deref() == Some(OWN_SCHEMA);
        look.date_types += usize::from(facts.types.get(&name).is_some_and(|fact| fact.dates));
    }
    match kind {
        "FuncCall" => call(look, fields, facts),
        "SqlvalueFunction" => session_value(look, fields),
        "AExpr" => operator(look, &names(fields.get("name")), facts),
        "SubLink" => {
            look.subqueries = true;
            if fields.get("sub_link_type").and_then(Value::as_i64) == Some(SubLinkType::ArraySublink as i64) {
                look.order = Some("ARRAY() of a query".to_owned());
            }
            operator(look, &names(fields.get("oper_name")), facts);
        }
        "SortBy" => operator(look, &names(fields.get("use_op")), facts),
        "TypeCast" => cast(look, fields, facts),
        "ColumnRef" => column(look, fields, facts),
        "AIndirection" => {
            for name in names(fields.get("indirection")) {
                call_of_row(look, &Name::new("", name), facts);
            }
        }
        "AConst" if fields.get("val").is_some_and(|value| value.get("Sval").is_some()) => {
            look.strings.extend(location(fields));
        }
        "ParamRef" => {
            let number = fields.get("number").and_then(Value::as_i64).and_then(|number| i32::try_from(number).ok());
            look.parameters.extend(number);
        }
        "SelectStmt" => select(look, fields),
        "" if fields.contains_key("limit_option") => select(look, fields),
        "RangeTableSample" => look.order = Some("TABLESAMPLE".to_owned()),
        "CurrentOfExpr" => look.order = Some("WHERE CURRENT OF".to_owned()),
        "WindowDef" => look.order = Some("a window function".to_owned()),
        // a field of its own kind
        "" if fields.contains_key("skip_data") => look.into = true,
        "LockingClause" => look.locks_rows = true,
        "InsertStmt" => look.writes = Some("INSERT"),
        "UpdateStmt" => look.writes = Some("UPDATE"),
        "DeleteStmt" => look.writes = Some("DELETE"),
        "MergeStmt" => look.writes = Some("MERGE"),
        _ => {}
    }
}

fn select(look: &mut Look, fields: &Map<String, Value>) {
    if is_set(fields, "limit_count") || is_set(fields, "limit_offset") {
        look.order = Some("LIMIT or OFFSET".to_owned());
    }
    if is_set(fields, "distinct_clause") || is_set(fields, "group_clause") {
        look.merges = Some("DISTINCT or GROUP BY".to_owned());
    }
    let operation = fields.get("op").and_then(Value::as_i64).unwrap_or_default();
    // UNION ALL gives every row of both.
    let merges = operation != SetOperation::SetopUnion as i64 || !is_set(fields, "all");
    if operation > SetOperation::SetopNone as i64 && merges {
        look.merges = Some("UNION, INTERSECT or EXCEPT".to_owned());
    }
    // DISTINCT is a list with one empty node, DISTINCT ON has expressions
    let distinct_on = fields
        .get("distinct_clause")
        .and_then(Value::as_array)
        .is_some_and(|items| items.iter().any(|item| item.get("node").is_some_and(|node| !node.is_null())));
    if distinct_on {
        look.order = Some("DISTINCT ON".to_owned());
    }
}

fn call(look: &mut Look, fields: &Map<String, Value>, facts: &Facts) {
    let parts = names(fields.get("funcname"));
    let Some(name) = Name::of_parts(&parts) else {
        look.missing = true;
        return;
    };
    look.own_schema |= name.schema.as_deref() == Some(OWN_SCHEMA);
    let arguments = fields.get("args").and_then(Value::as_array).map_or(0, Vec::len);
    if is_set(fields, "over") {
        look.order = Some("a window function".to_owned());
    }
    if functions::is_order_dependent(&name.name) {
        look.order = Some(format!("{}(), whose result depends on the order of rows", name.name));
    }
    if candidates_of(facts, &name).any(|candidate| !candidate.builtin && candidate.kind != "f") {
        look.order = Some(format!("{name}(), an aggregate whose result may depend on the order of rows"));
    }
    look.float_aggregate |= functions::is_float_aggregate(&name.name);
    let Some(candidates) = facts.functions.get(&name) else {
        look.missing = true;
        return;
    };
    let builtin = candidates.iter().all(|candidate| candidate.builtin);
    if matches!(name.name.as_str(), "max" | "min") {
        look.merges = Some(format!("{}()", name.name));
    } else {
        look.loose |= candidates.iter().any(|candidate| candidate.loose);
    }
    look.dates |= candidates.iter().any(|candidate| candidate.dates);
    look.floats |= !functions::is_float_aggregate(&name.name) && candidates.iter().any(|candidate| candidate.floats);
    let first = fields.get("args").and_then(|arguments| arguments.get(0));
    // date(text), a cast in the form of a call
    if arguments == 1 && DATE_CALLS.contains(&name.name.as_str()) {
        look.text_to_date |= first.is_some_and(|argument| may_be_text(argument, facts));
    }
    if name.name == "set_config" {
        let setting = first.and_then(|argument| argument.pointer("/node/AConst/val/Sval/sval")).and_then(Value::as_str);
        let setting = setting.unwrap_or_default().to_ascii_lowercase();
        if REFUSED_SETTINGS.contains(&setting.as_str()) {
            look.refused_setting = Some(setting);
        }
    }
    if let (true, 0, Some(sql_type), Some(location)) =
        (builtin, arguments, functions::session_value(&name.name), location(fields))
    {
        let expression = format!("pg_catalog.{}()", name.name);
        look.dates |= sql_type != "pg_catalog.name";
        look.session_values.push(SessionValue { location, hidden: text_form(&expression, sql_type), sql_type });
        look.note(Effect::Pure, String::new);
        return;
    }
    match functions::effect(candidates, Some(arguments)) {
        Some(effect) => look.note(effect, || format!("the function {name}()")),
        None => look.missing = true,
    }
}

fn candidates_of<'a>(facts: &'a Facts, name: &Name) -> impl Iterator<Item = &'a Function> {
    facts.functions.get(name).into_iter().flatten()
}

/// `t.f`, where f may be a function of the row.
fn call_of_row(look: &mut Look, name: &Name, facts: &Facts) {
    for function in candidates_of(facts, name) {
        if function.of_row && !function.builtin {
            let effect = functions::effect(std::slice::from_ref(function), Some(1)).unwrap_or(Effect::Unknown);
            look.note(effect, || format!("the function {name}()"));
        }
    }
}

/// PostgreSQL's own operators are immutable or depend on settings that followers share.
fn operator(look: &mut Look, parts: &[&str], facts: &Facts) {
    let Some(name) = Name::of_parts(parts) else { return };
    look.own_schema |= name.schema.as_deref() == Some(OWN_SCHEMA);
    // power and roots of whatever numbers are floating point
    look.floats |= matches!(name.name.as_str(), "^" | "|/" | "||/");
    if let Some(effect) = facts.operators.get(&name).and_then(|candidates| functions::effect(candidates, Some(2))) {
        look.note(effect, || format!("the operator {name}"));
    }
}

fn column(look: &mut Look, fields: &Map<String, Value>, facts: &Facts) {
    look.columns += 1;
    let parts = names(fields.get("fields"));
    if parts.len() > 2 && parts.first() == Some(&OWN_SCHEMA) {
        look.own_schema = true;
    }
    if let Some(name) = hidden_call(fields) {
        call_of_row(look, &name, facts);
    }
    let Some(name) = parts.last() else { return };
    if SYSTEM_COLUMNS.contains(name) {
        look.system_column = Some((*name).to_owned());
    }
    // a string beside a date column may be read as a date
    look.dates |= facts.relations.values().filter_map(|relation| relation.column(name)).any(|column| column.dates);
}

/// Date and time types by the names that statements use; others come from the catalog.
fn cast(look: &mut Look, fields: &Map<String, Value>, facts: &Facts) {
    let target = fields.get("type_name").and_then(Value::as_object).and_then(type_name);
    let Some(target) = target else {
        look.missing = true;
        return;
    };
    let Some(fact) = facts.types.get(&target) else {
        look.missing = true;
        return;
    };
    if fact.reg {
        look.note(Effect::Varies, || format!("the cast to {target}"));
    }
    look.add_functions(&fact.check_functions, "a domain");
    look.floats |= fact.floats;
    look.loose |= fact.loose;
    if fact.dates {
        look.dates = true;
        look.date_casts += 1;
        if fields.get("arg").is_some_and(|argument| may_be_text(argument, facts)) {
            look.text_to_date = true;
        }
    }
}

/// A value that is no literal or parameter (those are looked at on every execution) and that may be a text.
fn may_be_text(node: &Value, facts: &Facts) -> bool {
    let Some((kind, fields)) = node.get("node").and_then(Value::as_object).and_then(|node| node.iter().next()) else {
        return true;
    };
    let of = |name: &str| fields.get(name).is_some_and(|part| may_be_text(part, facts));
    let of_list = |name: &str| {
        fields
            .get(name)
            .and_then(Value::as_array)
            .is_some_and(|parts| parts.iter().any(|part| may_be_text(part, facts)))
    };
    match kind.as_str() {
        "AConst" | "ParamRef" | "SqlvalueFunction" => false,
        "ColumnRef" => {
            let parts = names(fields.get("fields"));
            let mut columns = facts.relations.values().filter_map(|relation| relation.column(parts.last()?)).peekable();
            columns.peek().is_none() || columns.any(|column| column.text || column.sql_type.starts_with("json"))
        }
        "TypeCast" => {
            let target = fields.get("type_name").and_then(Value::as_object).and_then(type_name);
            // a literal that goes through text is still looked at as a literal
            target.and_then(|name| facts.types.get(&name)).is_none_or(|fact| fact.text) && of("arg")
        }
        "AExpr" => {
            let operator = names(fields.get("name"));
            !matches!(operator.last(), Some(&("+" | "-" | "*" | "/" | "%")))
        }
        "FuncCall" => {
            let function = names(fields.get("funcname"));
            !function.last().is_some_and(|name| RETURNS_DATES.contains(name))
        }
        "CoalesceExpr" | "MinMaxExpr" => of_list("args"),
        "CaseExpr" => {
            let results = fields.get("args").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            of("defresult") && fields.get("defresult").is_some_and(|part| !part.is_null())
                || results
                    .iter()
                    .any(|case| case.pointer("/node/CaseWhen/result").is_none_or(|result| may_be_text(result, facts)))
        }
        _ => true,
    }
}

const DATE_CALLS: [&str; 5] = ["date", "time", "timetz", "timestamp", "timestamptz"];

/// Closed to set_config(); SET of them is judged by value.
const REFUSED_SETTINGS: [&str; 3] = ["standard_conforming_strings", "session_replication_role", "client_encoding"];

const RETURNS_DATES: [&str; 14] = [
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "date_trunc",
    "to_timestamp",
    "to_date",
    "make_date",
    "make_time",
    "make_timestamp",
    "make_timestamptz",
    "timezone",
    "date_bin",
    "age",
    "clock_timestamp",
];

fn session_value(look: &mut Look, fields: &Map<String, Value>) {
    use pg_query::protobuf::SqlValueFunctionOp as Op;
    let op = fields.get("op").and_then(Value::as_i64).and_then(|op| i32::try_from(op).ok());
    let (expression, sql_type) = match op.and_then(|op| Op::try_from(op).ok()) {
        Some(Op::SvfopCurrentDate) => ("CURRENT_DATE", "pg_catalog.date"),
        Some(Op::SvfopCurrentTime | Op::SvfopCurrentTimeN) => ("CURRENT_TIME", "pg_catalog.timetz"),
        Some(Op::SvfopCurrentTimestamp | Op::SvfopCurrentTimestampN) => ("CURRENT_TIMESTAMP", "pg_catalog.timestamptz"),
        Some(Op::SvfopLocaltime | Op::SvfopLocaltimeN) => ("LOCALTIME", "pg_catalog.time"),
        Some(Op::SvfopLocaltimestamp | Op::SvfopLocaltimestampN) => ("LOCALTIMESTAMP", "pg_catalog.timestamp"),
        Some(Op::SvfopCurrentRole | Op::SvfopCurrentUser | Op::SvfopUser) => ("CURRENT_USER", "pg_catalog.name"),
        Some(Op::SvfopSessionUser) => ("SESSION_USER", "pg_catalog.name"),
        Some(Op::SvfopCurrentCatalog) => ("CURRENT_CATALOG", "pg_catalog.name"),
        Some(Op::SvfopCurrentSchema) => ("CURRENT_SCHEMA", "pg_catalog.name"),
        Some(Op::SqlvalueFunctionOpUndefined) | None => {
            look.missing = true;
            return;
        }
    };
    let Some(location) = location(fields) else {
        look.missing = true;
        return;
    };
    look.dates |= sql_type != "pg_catalog.name";
    look.session_values.push(SessionValue { location, hidden: text_form(expression, sql_type), sql_type });
}

/// An expression for the text of a value that is read back exactly under any DateStyle and TimeZone.
fn text_form(expression: &str, sql_type: &str) -> String {
    match sql_type {
        "pg_catalog.timestamptz" => {
            format!("pg_catalog.to_char(pg_catalog.timezone('UTC', {expression}), 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
        }
        "pg_catalog.timestamp" => format!("pg_catalog.to_char({expression}, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"),
        "pg_catalog.date" => {
            format!("pg_catalog.to_char({expression}::pg_catalog.timestamp, 'YYYY-MM-DD')")
        }
        _ => format!("({expression})::pg_catalog.text"),
    }
}
