//! The statements that followers run for rows that the leader gave by value: INSERT, UPDATE and DELETE by primary key.
//!
//! What goes to a follower names its table with the schema and compares keys with the operator of the key's own index, so a client's
//! search_path can not put an operator of its own under the table owner's rights.

use std::fmt::Write as _;
use std::sync::Arc;

use super::classify::Context;
use super::facts::{Bulk, Column, Relation, quote_identifier};
use super::plan::Refusal;
use super::refuse::refusal;
use super::text::{asserting, counting};

/// Texts for rows whose values, in text format, are parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowTexts {
    /// For one row. `$1`.. are its values in the order of the hidden RETURNING.
    pub one: Arc<str>,
    pub many: Many,
    /// The rows are as the leader's triggers left them: no trigger fires again.
    pub after_triggers: bool,
}

/// How several rows of one statement go to a follower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Many {
    /// Row after row in the leader's order: it decides whether a unique value is free.
    OneByOne,
    /// By `COPY s.t (a, b) FROM STDIN`.
    Copy(Arc<str>),
    /// `$1`.. are arrays with the values of a column each, the last parameter is the number of rows. `whole`: constraints are
    /// checked at the end of the leader's statement and could fail half way, so all rows go in one statement.
    Arrays { text: Arc<str>, whole: bool },
}

/// Bytes of rows that have to go in one statement.
pub const WHOLE_BYTES_MAX: u64 = 128 << 20;

/// The alias of the table, and of the rows.
const TABLE: &str = "pgtandem_t";
const ROWS: &str = "pgtandem_s";

/// Why rows can not be carried as values; the statement may have another lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NotRows {
    pub why: String,
    pub hint: &'static str,
}

pub(super) fn not_rows(why: impl Into<String>, hint: &'static str) -> NotRows {
    NotRows { why: why.into(), hint }
}

/// The hidden RETURNING: an expression per column. `qualifier` names the table in the statement, or is empty.
pub(super) fn returning(
    columns: &[&Column],
    qualifier: &str,
    relation: &Relation,
    context: &Context<'_>,
) -> Result<Vec<String>, NotRows> {
    columns.iter().map(|column| returned(column, qualifier, relation, context)).collect()
}

fn returned(column: &Column, qualifier: &str, relation: &Relation, context: &Context<'_>) -> Result<String, NotRows> {
    if !column.may_select {
        return Err(not_rows(
            format!("the role may not SELECT {}.{}, to read what the leader chose", relation.qualified(), column.name),
            "GRANT SELECT on the table to the role.",
        ));
    }
    let settings = &context.facts.settings;
    let digits = settings.get("extra_float_digits").and_then(|value| value.parse::<i32>().ok());
    if column.floats && digits.is_some_and(|digits| digits < 1) {
        return Err(not_rows(
            format!("with extra_float_digits below 1 the text of column {} loses digits", column.name),
            "RESET extra_float_digits.",
        ));
    }
    let nulls_are_words = settings.get("array_nulls").is_some_and(|value| value == "off");
    if nulls_are_words && column.bulk != Bulk::Array {
        return Err(not_rows(
            format!("with array_nulls = off the text of column {} is read as another value", column.name),
            "RESET array_nulls.",
        ));
    }
    let name = quote_identifier(&column.name);
    let value = if qualifier.is_empty() { name } else { format!("{qualifier}.{name}") };
    let iso = settings.get("DateStyle").is_none_or(|style| style.to_ascii_uppercase().starts_with("ISO"));
    if iso || !column.zones {
        return Ok(value);
    }
    // Other styles write time zones as abbreviations, which need not be read back as the same zone (IST); JSON has the offset.
    if is_timestamptz(&column.sql_type) {
        return Ok(format!("(pg_catalog.to_json({value}) OPERATOR(pg_catalog.#>>) '{{}}')"));
    }
    Err(not_rows(
        format!("this DateStyle may write the time zones inside column {} ambiguously", column.name),
        "SET DateStyle = ISO.",
    ))
}

/// The type itself, no array of it and no type of a similar name.
fn is_timestamptz(sql_type: &str) -> bool {
    sql_type == "timestamp with time zone"
        || (sql_type.starts_with("timestamp(") && sql_type.ends_with(") with time zone"))
}

/// The refusal of a statement that needs rows and can not have them.
pub(super) fn refuse(statement: &str, not: &NotRows) -> Refusal {
    refusal(format!("{statement} is not replicated by this version of pgtandem: {}", not.why), not.hint)
}

/// INSERT of rows that were inserted: no order among them matters, since nothing is freed by an INSERT.
pub(super) fn insert(relation: &Relation, columns: &[&Column]) -> RowTexts {
    let (table, list) = (relation.qualified(), names(columns));
    RowTexts {
        one: insert_one(&table, columns).into(),
        many: Many::Copy(format!("COPY {table} ({list}) FROM STDIN").into()),
        after_triggers: false,
    }
}

fn insert_one(table: &str, columns: &[&Column]) -> String {
    let numbers = (1..=columns.len()).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
    format!("INSERT INTO {table} ({}) OVERRIDING SYSTEM VALUE VALUES ({numbers})", names(columns))
}

/// INSERT ... ON CONFLICT DO UPDATE: `columns` is the whole row as it became, whether it was new or not. The statement changes no
/// key, so the row with this key is the one, and becomes what it is on the leader whatever it was.
pub(super) fn upsert(relation: &Relation, columns: &[&Column], context: &Context<'_>) -> Result<RowTexts, NotRows> {
    let key: Vec<&Column> = key_columns(relation)?;
    // The alias, because the table's own name may be `excluded`.
    let table = format!("{} AS {TABLE}", relation.qualified());
    let sets = columns
        .iter()
        .filter(|column| !relation.key.contains(&column.name) && !column.identity_always)
        .map(|column| format!("{0} = excluded.{0}", quote_identifier(&column.name)))
        .collect::<Vec<_>>()
        .join(", ");
    let conflict = format!("ON CONFLICT ({}) DO UPDATE SET {sets}", names(&key));
    let one = format!("{} {conflict}", insert_one(&table, columns));
    let at_end = relation.self_referencing || !relation.deferrable_unique_columns.is_empty();
    let many = match Arrays::of(columns, context) {
        Some(arrays) if relation.unique_columns.is_empty() => Many::Arrays {
            text: counting(
                &format!(
                    "INSERT INTO {table} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} {conflict}",
                    names(columns),
                    arrays.values.join(", "),
                    arrays.from
                ),
                &format!("${}", columns.len() + 1),
            )
            .into(),
            whole: at_end,
        },
        _ if at_end => return Err(order_and_end(relation)),
        // a row may take a unique value that the row before gave up
        _ => Many::OneByOne,
    };
    Ok(RowTexts { one: one.into(), many, after_triggers: false })
}

/// UPDATE that changes no key: `changed` are the other columns, after those of the key.
pub(super) fn update(relation: &Relation, changed: &[&Column], context: &Context<'_>) -> Result<RowTexts, NotRows> {
    let key = key_columns(relation)?;
    let table = only(relation);
    let numbered =
        |(at, column): (usize, &&Column)| format!("{} = ${}", quote_identifier(&column.name), at + key.len() + 1);
    let sets = changed.iter().enumerate().map(numbered).collect::<Vec<_>>().join(", ");
    let one = asserting(&format!("UPDATE {table} SET {sets} WHERE {}", by_key_of_parameters(relation, &key)), 1);
    let touches = |columns: &[String]| changed.iter().any(|column| columns.contains(&column.name));
    let at_end = touches(&relation.deferrable_unique_columns);
    let columns: Vec<&Column> = key.iter().chain(changed).copied().collect();
    let arrays = Arrays::of(&columns, context);
    let many = match arrays {
        // SET v = v + 1 under UNIQUE (v): the leader's order is one in which no value was taken
        _ if touches(&relation.unique_columns) && at_end => return Err(order_and_end(relation)),
        _ if touches(&relation.unique_columns) => Many::OneByOne,
        Some(arrays) => {
            let set = |(column, value): (&&Column, &String)| format!("{} = {value}", quote_identifier(&column.name));
            let values = arrays.values.get(key.len()..).unwrap_or_default();
            let sets = changed.iter().zip(values).map(set).collect::<Vec<_>>().join(", ");
            let condition = arrays.by_key(relation, &key);
            let text = format!("UPDATE {table} AS {TABLE} SET {sets} FROM {} WHERE {condition}", arrays.from);
            Many::Arrays { text: counting(&text, &format!("${}", columns.len() + 1)).into(), whole: at_end }
        }
        None if at_end => return Err(order_and_end(relation)),
        None => Many::OneByOne,
    };
    Ok(RowTexts { one: one.into(), many, after_triggers: false })
}

/// DELETE. Foreign keys that reference the table are checked, and cascade, when all rows are gone.
pub(super) fn delete(relation: &Relation, context: &Context<'_>) -> Result<RowTexts, NotRows> {
    let key = key_columns(relation)?;
    let table = only(relation);
    let one = asserting(&format!("DELETE FROM {table} WHERE {}", by_key_of_parameters(relation, &key)), 1);
    let whole = !relation.referenced.is_empty();
    let many = match Arrays::of(&key, context) {
        Some(arrays) => {
            let condition = arrays.by_key(relation, &key);
            let text = format!("DELETE FROM {table} AS {TABLE} USING {} WHERE {condition}", arrays.from);
            Many::Arrays { text: counting(&text, &format!("${}", key.len() + 1)).into(), whole }
        }
        None if whole => return Err(order_and_end(relation)),
        None => Many::OneByOne,
    };
    Ok(RowTexts { one: one.into(), many, after_triggers: false })
}

fn order_and_end(relation: &Relation) -> NotRows {
    not_rows(
        format!(
            "rows of {} would have to be changed both one after the other and all at once for its constraints",
            relation.qualified()
        ),
        "Change the rows by primary key, each in a statement of its own.",
    )
}

/// The columns of the primary key, in the key's order.
pub(super) fn key_columns(relation: &Relation) -> Result<Vec<&Column>, NotRows> {
    let columns: Option<Vec<&Column>> = relation.key.iter().map(|name| relation.column(name)).collect();
    match columns {
        Some(columns) if !columns.is_empty() && columns.len() == relation.key_operators.len() => Ok(columns),
        _ => Err(not_rows(
            format!("{} has no primary key by which its rows could be named", relation.qualified()),
            "Give the table a primary key (one that is not deferrable).",
        )),
    }
}

fn names(columns: &[&Column]) -> String {
    columns.iter().map(|column| quote_identifier(&column.name)).collect::<Vec<_>>().join(", ")
}

/// Children by inheritance have rows of their own, partitions have not.
fn only(relation: &Relation) -> String {
    let only = if relation.kind == "p" { "" } else { "ONLY " };
    format!("{only}{}", relation.qualified())
}

fn by_key_of_parameters(relation: &Relation, key: &[&Column]) -> String {
    let equal = |(at, column): (usize, &&Column)| {
        let operator = relation.key_operators.get(at).map(super::facts::Operator::sql).unwrap_or_default();
        format!("{} {operator} ${}::{}", quote_identifier(&column.name), at + 1, column.sql_type)
    };
    key.iter().enumerate().map(equal).collect::<Vec<_>>().join(" AND ")
}

/// Arrays of parameters as rows.
struct Arrays {
    /// What stands in FROM.
    from: String,
    /// The value of each column.
    values: Vec<String>,
}

impl Arrays {
    /// None: there is a column whose values can not be put into an array and come out the same.
    fn of(columns: &[&Column], context: &Context<'_>) -> Option<Self> {
        // without array_nulls a NULL in an array is the word
        if context.facts.settings.get("array_nulls").is_some_and(|value| value == "off") {
            return None;
        }
        let (mut from, mut list) = (String::from("ROWS FROM ("), String::new());
        let mut values = Vec::with_capacity(columns.len());
        for (at, column) in columns.iter().enumerate() {
            let (number, comma) = (at + 1, if at == 0 { "" } else { ", " });
            let element = match column.bulk {
                Bulk::Array => column.sql_type.as_str(),
                Bulk::Text => "pg_catalog.text",
                Bulk::No => return None,
            };
            let _ = write!(from, "{comma}pg_catalog.unnest(${number}::{element}[])");
            let _ = write!(list, "{comma}c{number}");
            values.push(match column.bulk {
                Bulk::Text => format!("{ROWS}.c{number}::{}", column.sql_type),
                _ => format!("{ROWS}.c{number}"),
            });
        }
        let _ = write!(from, ") AS {ROWS} ({list})");
        Some(Self { from, values })
    }

    fn by_key(&self, relation: &Relation, key: &[&Column]) -> String {
        let equal = |((at, column), value): ((usize, &&Column), &String)| {
            let operator = relation.key_operators.get(at).map(super::facts::Operator::sql).unwrap_or_default();
            format!("{TABLE}.{} {operator} {value}", quote_identifier(&column.name))
        };
        key.iter().enumerate().zip(&self.values).map(equal).collect::<Vec<_>>().join(" AND ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::facts::Facts;
    use super::super::shape::mask;
    use super::*;

    fn returned_under(style: &str, sql_type: &str, zones: bool) -> Result<String, NotRows> {
        let column = Column {
            name: "at".to_owned(),
            sql_type: sql_type.to_owned(),
            may_select: true,
            dates: true,
            zones,
            ..Column::default()
        };
        let mut facts = Facts::default();
        facts.settings.insert("DateStyle".to_owned(), style.to_owned());
        let context = Context { text: "", shape: &mask(""), facts: &facts, tree: Value::Null };
        returned(&column, "t", &Relation::default(), &context)
    }

    #[test]
    fn only_values_with_a_time_zone_are_ambiguous_under_a_date_style() {
        let plain = Ok("t.\"at\"".to_owned());
        for sql_type in ["date", "tsrange", "timestamp without time zone[]", "datemultirange", "public.day"] {
            assert_eq!(returned_under("Postgres, MDY", sql_type, false), plain, "{sql_type}");
        }
        for sql_type in ["timestamp with time zone", "timestamp(3) with time zone"] {
            assert!(
                returned_under("SQL, DMY", sql_type, true).is_ok_and(|text| text.contains("to_json")),
                "{sql_type}"
            );
        }
        // to_json of these is no text that their types read
        for sql_type in ["tstzrange", "timestamp with time zone[]", "timestamp(3) with time zone[]", "timestamps"] {
            assert!(returned_under("German, DMY", sql_type, true).is_err(), "{sql_type}");
            assert_eq!(returned_under("ISO, DMY", sql_type, true), plain, "{sql_type}");
        }
    }
}
