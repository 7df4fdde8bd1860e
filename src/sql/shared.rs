//! One text for all statements of a shape: the literals become parameters, so that followers parse and plan it once.
//!
//! Whether a literal may become a parameter without another meaning is not guessed: both texts are parsed, and the trees must
//! be the same but for constants that became parameters of the same type. Where they are not (type modifiers, INTERVAL '..',
//! ordinals), the statement goes as text.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::lex::{Kind, Lexer};
use super::parse;
use super::shape::Shape;

/// Literals that one text may have; `Bind` counts parameters in 16 bits.
const LITERALS_MAX: usize = 1000;

/// Words after which a literal is a value of its own.
const BEFORE_A_VALUE: [&str; 14] = [
    "and", "or", "not", "like", "ilike", "to", "between", "when", "then", "else", "case", "values", "zone", "distinct",
];

/// Types of parameters as in `Parse`: `pg_type.oid` of int4, int8 and numeric.
const INT4: u32 = 23;
const INT8: u32 = 20;
const NUMERIC: u32 = 1700;

/// The digits of the least int8.
const LEAST_INT8: &str = "9223372036854775808";

/// A text with parameters in the places of literals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedText {
    /// What followers get: it may assert its count.
    pub text: Arc<str>,
    /// The statement alone, or what the leader gets of it.
    pub plain: Arc<str>,
    /// Number and types of the parameters, as in `Parse`.
    pub types: Arc<[u8]>,
}

/// Makes the text that all statements of this shape share, out of one of them. `cut` is the part that followers get.
/// `None`: a literal can not become a parameter, or there are parameters of the client's already.
#[must_use]
pub fn share(text: &str, shape: &Shape, cut: Range<usize>) -> Option<SharedText> {
    let text = text.get(cut.clone())?;
    let literals: Vec<Range<usize>> = shape
        .literals
        .iter()
        .filter(|l| l.end <= cut.end && l.start >= cut.start)
        .map(|l| l.start - cut.start..l.end - cut.start)
        .collect();
    if literals.is_empty() || literals.len() > LITERALS_MAX || literals.len() != shape.literals.len() {
        return None;
    }
    let mut kinds = Vec::with_capacity(literals.len());
    let mut before = None;
    for token in Lexer::new(text).filter(|token| token.kind.is_significant()) {
        let word = text.get(token.range.clone())?;
        match token.kind {
            Kind::Parameter => return None,
            kind if kind.is_literal() && literals.contains(&token.range) => {
                // DATE '2020-01-01' is one constant with a type, which the parser at hand also takes with a parameter.
                if before.is_some_and(|word: &str| !BEFORE_A_VALUE.iter().any(|known| known.eq_ignore_ascii_case(word)))
                {
                    return None;
                }
                kinds.push(kind);
            }
            _ => {}
        }
        before = matches!(token.kind, Kind::Word | Kind::QuotedIdentifier).then_some(word);
    }
    let mut shared = String::with_capacity(text.len());
    let mut types = u16::try_from(kinds.len()).ok()?.to_be_bytes().to_vec();
    let mut copied = 0;
    for (i, (literal, kind)) in literals.iter().zip(&kinds).enumerate() {
        shared.push_str(text.get(copied..literal.start)?);
        let _ = write!(shared, "${}", i + 1);
        copied = literal.end;
        let oid = match kind {
            Kind::Integer => INT4,
            Kind::BigInteger => INT8,
            Kind::Decimal => NUMERIC,
            // A string has no type until PostgreSQL finds one, and it does so for a parameter by other rules: INTERVAL reads its
            // fields, domains their lengths, and `$1 IS NULL` finds none at all.
            _ => return None,
        };
        types.extend_from_slice(&oid.to_be_bytes());
    }
    shared.push_str(text.get(copied..)?);
    let (before, after) = (parse::parse_one(text).ok()?, parse::parse_one(&shared).ok()?);
    let (before, after) = (parse::tree(&before.node), parse::tree(&after.node));
    // PostgreSQL computes it when it plans, with an error of its own, also where no row comes to it.
    if has_constant_expression(&before) {
        return None;
    }
    let mut found = 0;
    let same = same(&before, &after, &kinds, &mut found);
    let shared: Arc<str> = shared.into();
    (same && found == kinds.len()).then(|| SharedText { text: Arc::clone(&shared), plain: shared, types: types.into() })
}

/// What a position in the shared text, from 1, lacks to the same position in the statement's own. Both are ASCII.
#[must_use]
pub fn position_offset(shape: &Shape, position: usize) -> isize {
    let mut offset = 0_isize;
    for (i, literal) in shape.literals.iter().enumerate() {
        let start = isize::try_from(literal.start).unwrap_or(isize::MAX).saturating_sub(offset);
        if isize::try_from(position).unwrap_or(isize::MAX) <= start.saturating_add(1) {
            break;
        }
        let parameter = 1 + (i + 1).to_string().len();
        offset += isize::try_from(literal.len()).unwrap_or(0) - isize::try_from(parameter).unwrap_or(0);
    }
    offset
}

/// The values of a statement's literals, as the parameters of its shared text. `None`: one of them is a number that only newer
/// servers read, and only as a literal (`0x1f`, `1_000`), or the one whose type its sign decides: -9223372036854775808 is an int8, its
/// digits alone are a numeric.
#[must_use]
pub fn values<'t>(text: &'t str, shape: &Shape) -> Option<Vec<&'t str>> {
    let plain = |c: u8| c.is_ascii_digit() || matches!(c, b'.' | b'e' | b'E' | b'+' | b'-');
    let fits = |number: &&str| number.bytes().all(plain) && number.trim_start_matches('0') != LEAST_INT8;
    shape.literals.iter().map(|literal| text.get(literal.clone()).filter(fits)).collect()
}

/// Whether something is computed from constants alone (`10 / 2`, `5::smallint`, `abs(7)`, `CASE 1 WHEN 2`).
fn has_constant_expression(tree: &Value) -> bool {
    let mut has = false;
    parse::walk(tree, &mut |kind, fields| {
        let all = |names: &[&str]| {
            let mut parts = names.iter().filter_map(|name| fields.get(*name)).filter(|part| !part.is_null()).peekable();
            parts.peek().is_some() && parts.all(is_constant)
        };
        has |= match kind {
            "AExpr" => all(&["lexpr", "rexpr"]),
            "FuncCall" | "CoalesceExpr" | "MinMaxExpr" | "BoolExpr" => all(&["args"]),
            "TypeCast" | "CaseExpr" | "NullTest" | "BooleanTest" => all(&["arg"]),
            _ => false,
        };
    });
    has
}

/// Whether this is a constant, or a list of constants.
fn is_constant(part: &Value) -> bool {
    match part {
        Value::Array(parts) => !parts.is_empty() && parts.iter().all(is_constant),
        part => match part.get("node").and_then(Value::as_object).and_then(|node| node.iter().next()) {
            Some((kind, fields)) => match kind.as_str() {
                "AConst" => true,
                "List" => fields.get("items").is_some_and(is_constant),
                _ => false,
            },
            None => false,
        },
    }
}

/// Whether two trees are the same but for constants of the first that are parameters in the second.
fn same(before: &Value, after: &Value, kinds: &[Kind], found: &mut usize) -> bool {
    match (before, after) {
        (Value::Object(a), Value::Object(b)) => {
            if let (Some(Value::Object(_)), Some(Value::Object(parameter))) = (a.get("AConst"), b.get("ParamRef")) {
                return is_next(parameter, found);
            }
            if let (Some(Value::Object(constant)), Some(Value::Object(minus))) = (a.get("AConst"), b.get("AExpr")) {
                return is_minus(constant, minus, kinds, found);
            }
            a.len() == b.len()
                && a.iter().all(|(name, value)| match (name.as_str(), b.get(name)) {
                    (_, None) => false,
                    (name, Some(_)) if name.ends_with("location") || name.starts_with("rexpr_list_") => true,
                    ("typmods", Some(other)) => same(value, other, kinds, &mut usize::MAX.clone()),
                    (_, Some(other)) => same(value, other, kinds, found),
                })
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b, kinds, found))
        }
        _ => before == after,
    }
}

/// Parameters stand in the order of the literals, each once. A counter that is at its end (inside type modifiers) allows none.
fn is_next(parameter: &Map<String, Value>, found: &mut usize) -> bool {
    let Some(next) = found.checked_add(1) else { return false };
    *found = next;
    parameter.get("number").and_then(Value::as_u64) == Some(next as u64)
}

/// `-5` is a constant, `-$1` an operator with the same value and type; but -2147483648 is an int4 whose digits alone are an int8.
fn is_minus(constant: &Map<String, Value>, minus: &Map<String, Value>, kinds: &[Kind], found: &mut usize) -> bool {
    let Some(kind) = kinds.get(*found) else { return false };
    let name = minus.get("name").map(|n| parse::names(Some(n)));
    let operand = minus.get("rexpr").and_then(|r| r.pointer("/node/ParamRef")).and_then(Value::as_object);
    constant.contains_key("val")
        && matches!(kind, Kind::Integer | Kind::Decimal)
        && name.as_deref() == Some(&["-"])
        && minus.get("lexpr").is_none_or(Value::is_null)
        && operand.is_some_and(|parameter| is_next(parameter, found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::shape::mask;

    fn shared(text: &str) -> Option<(String, Vec<&str>)> {
        let shape = mask(text);
        let made = share(text, &shape, 0..text.len())?;
        Some((made.text.to_string(), values(text, &shape)?))
    }

    #[test]
    fn numbers_become_parameters_with_the_same_values() {
        let (text, values) = shared("UPDATE t SET a = a + -45, r = 1.5, b = 3000000000 WHERE id = 7").unwrap();
        assert_eq!(text, "UPDATE t SET a = a + -$1, r = $2, b = $3 WHERE id = $4");
        assert_eq!(values, ["45", "1.5", "3000000000", "7"]);
    }

    #[test]
    fn a_position_in_the_shared_text_is_told_in_the_statements_own() {
        let text = "UPDATE t SET a = 123456 + b, c = 7 - d WHERE id = 99 AND nothing";
        let shape = mask(text);
        let made = share(text, &shape, 0..text.len()).unwrap();
        for word in ["t", "a", "123456", "b", "c", "7", "d", "id", "99", "nothing"] {
            let here = text.find(&format!(" {word}")).unwrap() + 2;
            let word = shape
                .literals
                .iter()
                .position(|l| text.get(l.clone()) == Some(word))
                .map_or(word.to_owned(), |i| format!("${}", i + 1));
            let there = made.plain.find(&format!(" {word}")).unwrap() + 2;
            let offset = position_offset(&shape, there);
            assert_eq!(isize::try_from(there).unwrap() + offset, isize::try_from(here).unwrap(), "{word}");
        }
    }

    #[test]
    fn what_would_mean_something_else_stays_as_it_is() {
        for text in [
            "UPDATE t SET at = at + INTERVAL '1 day' WHERE id = 7",
            "UPDATE t SET iv = '1'::interval day WHERE id = 7",
            "UPDATE t SET note = 'x' WHERE id = 7",
            "UPDATE t SET v = 1 WHERE id = 7 AND ('abc' IS NULL OR name = 'abc')",
            "UPDATE t SET n = x::numeric(10, 2) WHERE id = 7",
            "UPDATE t SET a = -3000000000 WHERE id = 7",
            "UPDATE t SET a = $1 WHERE id = 7",
            "UPDATE t SET b = B'101' WHERE id = 7",
            "UPDATE t SET a = CURRENT_TIMESTAMP(3) WHERE id = 7",
        ] {
            assert_eq!(shared(text), None, "{text}");
        }
    }
}
