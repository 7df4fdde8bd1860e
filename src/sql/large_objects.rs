//! Large objects: which function is called, and what has to be known of its arguments to carry what it did.
//!
//! Whatever makes or removes large objects may stand anywhere in a SELECT: the leader tells afterwards which they are. Functions that
//! work on a descriptor, and lo_put, are carried only as the one call of a SELECT, or as a FunctionCall.

use pg_query::NodeEnum;
use pg_query::protobuf::SelectStmt;
use pg_query::protobuf::a_const::Val;

use super::classify::Context;
use super::conditional::Depends;
use super::facts::Facts;
use super::functions::{self, Effect};
use super::needs::Needs;
use super::parse::{node_names, parse_one};
use super::plan::{EffectPlan, Lane, Write};
use super::refuse::refused;
use super::text::Edits;

/// What a function does, as far as followers are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Open,
    Close,
    Write,
    Truncate,
    Put,
    /// Makes or removes objects; the leader tells which.
    Makes,
    /// Nothing, or something outside the database.
    Reads,
}

/// PostgreSQL's functions by name and object identifier (`pg_proc.dat`).
const FUNCTIONS: &[(&str, u32, Call)] = &[
    ("lo_create", 715, Call::Makes),
    ("lo_import", 764, Call::Makes),
    ("lo_export", 765, Call::Reads),
    ("lo_import", 767, Call::Makes),
    ("lo_open", 952, Call::Open),
    ("lo_close", 953, Call::Close),
    ("loread", 954, Call::Reads),
    ("lowrite", 955, Call::Write),
    ("lo_lseek", 956, Call::Reads),
    ("lo_creat", 957, Call::Makes),
    ("lo_tell", 958, Call::Reads),
    ("lo_unlink", 964, Call::Makes),
    ("lo_truncate", 1004, Call::Truncate),
    ("lo_lseek64", 3170, Call::Reads),
    ("lo_tell64", 3171, Call::Reads),
    ("lo_truncate64", 3172, Call::Truncate),
    ("lo_from_bytea", 3457, Call::Makes),
    ("lo_get", 3458, Call::Reads),
    ("lo_get", 3459, Call::Reads),
    ("lo_put", 3460, Call::Put),
];

/// The function with this object identifier.
#[must_use]
pub fn call_of_oid(oid: u32) -> Option<Call> {
    FUNCTIONS.iter().find(|(_, known, _)| *known == oid).map(|(_, _, call)| *call)
}

fn call_of_name(name: &str) -> Option<Call> {
    FUNCTIONS.iter().find(|(known, ..)| *known == name).map(|(_, _, call)| *call)
}

/// An argument that is known before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    Number(i64),
    /// `$n`, from 1
    Parameter(i32),
}

/// The lane of a SELECT that calls functions of large objects which write. None: it calls others that write, too.
pub(super) fn lane(statement: &SelectStmt, needs: &Needs, context: &Context<'_>) -> Option<Lane> {
    let calls: Vec<Call> = needs.functions.iter().filter_map(|name| call_of_name(&name.name)).collect();
    if calls.is_empty() || !others_only_read(needs, context.facts) {
        return None;
    }
    let alone = |call: &Call| matches!(call, Call::Open | Call::Close | Call::Write | Call::Truncate | Call::Put);
    let call = match calls.iter().find(|call| alone(call)) {
        None => Call::Makes,
        Some(call) if calls.len() == 1 && first_argument(statement).is_some() => *call,
        Some(_) => {
            return Some(refused(
                "this use of large objects is not supported: what it writes is not known from its result",
                "Call lo_open, lowrite, lo_truncate or lo_put alone, as SELECT lo_put(oid, offset, data) with constants or parameters.",
            ));
        }
    };
    let effect = match call {
        // the same object everywhere, so the text does
        Call::Put => EffectPlan::Text { owner: None, counted: false, lock_tables: Vec::new(), dates_matter: false },
        call => EffectPlan::LargeObject(call),
    };
    Some(Lane::Write(Box::new(Write {
        effect,
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl: false,
        depends: Depends::No,
        barrier: true,
        deferrable_constraints: false,
        edits: Edits::default(),
    })))
}

fn others_only_read(needs: &Needs, facts: &Facts) -> bool {
    let functions = needs.functions.iter().filter(|name| call_of_name(&name.name).is_none());
    let known = functions.filter_map(|name| facts.functions.get(name));
    let mut effects = known.filter_map(|candidates| functions::effect(candidates, Some(2)));
    let plain = facts.relations.values().all(|relation| {
        !relation.rls && !relation.view_opaque && relation.kind != "f" && relation.view_functions.is_empty()
    });
    plain && effects.all(|effect| effect < Effect::Unknown)
}

/// The first argument of the one call of a SELECT without FROM, all of whose arguments are constants and parameters.
fn first_argument(statement: &SelectStmt) -> Option<Argument> {
    let [target] = statement.target_list.as_slice() else { return None };
    let plain = statement.from_clause.is_empty()
        && statement.where_clause.is_none()
        && statement.group_clause.is_empty()
        && statement.sort_clause.is_empty()
        && statement.limit_count.is_none()
        && statement.limit_offset.is_none()
        && statement.larg.is_none()
        && statement.with_clause.is_none();
    let Some(NodeEnum::ResTarget(target)) = target.node.as_ref().filter(|_| plain) else { return None };
    let Some(NodeEnum::FuncCall(call)) = target.val.as_ref()?.node.as_ref() else { return None };
    call_of_name(node_names(&call.funcname).last()?)?;
    let arguments: Option<Vec<Argument>> =
        call.args.iter().map(|argument| argument_of(argument.node.as_ref()?)).collect();
    arguments?.first().copied()
}

fn argument_of(node: &NodeEnum) -> Option<Argument> {
    match node {
        NodeEnum::ParamRef(parameter) => Some(Argument::Parameter(parameter.number)),
        NodeEnum::TypeCast(cast) => argument_of(cast.arg.as_ref()?.node.as_ref()?),
        NodeEnum::AExpr(negative) if negative.lexpr.is_none() => {
            match argument_of(negative.rexpr.as_ref()?.node.as_ref()?)? {
                Argument::Number(number) => Some(Argument::Number(number.checked_neg()?)),
                Argument::Parameter(_) => None,
            }
        }
        NodeEnum::AConst(constant) => match constant.val.as_ref()? {
            Val::Ival(number) => Some(Argument::Number(number.ival.into())),
            Val::Fval(number) => number.fval.parse().ok().map(Argument::Number),
            // the data of a write: their value does not matter here
            Val::Sval(text) => Some(Argument::Number(text.sval.parse().unwrap_or(-1))),
            _ => None,
        },
        _ => None,
    }
}

/// The first argument of such a SELECT, which is no part of its shape.
#[must_use]
pub fn argument(text: &str) -> Option<Argument> {
    match parse_one(text).ok()?.node {
        NodeEnum::SelectStmt(statement) => first_argument(&statement),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_argument_is_read_from_the_text() {
        for (text, expected) in [
            ("SELECT lo_open(16401, 131072)", Some(Argument::Number(16401))),
            ("select pg_catalog.lowrite($2, $1) as n;", Some(Argument::Parameter(2))),
            ("SELECT lo_open('16401'::oid, x'20000'::int)", None),
            ("SELECT lo_open(4000000000, -1)", Some(Argument::Number(4_000_000_000))),
            ("SELECT lowrite(0, '\\x00')", Some(Argument::Number(0))),
            ("SELECT lowrite(0, data) FROM t", None),
            ("SELECT lowrite(0, 'x'), lowrite(0, 'y')", None),
            ("SELECT 1 + lowrite(0, 'x')", None),
        ] {
            assert_eq!(argument(text), expected, "{text}");
        }
    }

    #[test]
    fn functions_are_known_by_their_numbers() {
        assert_eq!(call_of_oid(955), Some(Call::Write));
        assert_eq!(call_of_oid(1574), None);
    }
}
