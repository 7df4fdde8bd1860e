//! PREPARE, EXECUTE and DEALLOCATE: what they do depends on what the session has prepared, so a plan only says which name it is and
//! where things stand in the text.

use pg_query::NodeEnum;
use pg_query::protobuf::{DeallocateStmt, ExecuteStmt, PrepareStmt};

use super::classify::{Context, read};
use super::lex::{Kind, Lexer, Token};
use super::plan::Lane;
use super::refuse::not_yet;
use super::shape::{Shape, Spot};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// `query`: where the prepared statement's own text begins, bytes. Texts of PREPARE are not masked, so it holds for the shape.
    Prepare {
        name: String,
        query: usize,
    },
    Execute {
        name: String,
        arguments: Arguments,
    },
    Deallocate {
        name: String,
    },
}

/// What stands between the parentheses of EXECUTE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    pub count: usize,
    /// Between the parentheses; `None` without any.
    inside: Option<(Spot, Spot)>,
    /// Literals without a cast, and NULL: to evaluate them twice gives the same.
    pub constant: bool,
    /// Something that may write is called.
    pub guard: bool,
    /// Something is named that the catalog does not have: the leader will say so.
    pub missing: bool,
}

impl Arguments {
    /// The text between the parentheses, in bytes.
    #[must_use]
    pub fn range(&self, shape: &Shape) -> Option<std::ops::Range<usize>> {
        self.inside.map(|(start, end)| start.at(shape)..end.at(shape))
    }
}

fn significant(text: &str) -> impl DoubleEndedIterator<Item = Token> {
    Lexer::new(text).filter(|token| token.kind.is_significant()).collect::<Vec<_>>().into_iter()
}

pub(super) fn prepare(statement: &PrepareStmt, context: &Context<'_>) -> Lane {
    let (mut depth, mut query) = (0_i32, None);
    // PREPARE and the name come first; AS is reserved, so it is no name without quotes.
    for token in significant(context.text).skip(2) {
        match (token.kind, context.text.get(token.range.clone()).unwrap_or_default()) {
            (Kind::Symbol, "(") => depth += 1,
            (Kind::Symbol, ")") => depth -= 1,
            (Kind::Word, word) if depth == 0 && word.eq_ignore_ascii_case("as") => {
                query = Some(token.range.end);
                break;
            }
            _ => {}
        }
    }
    match query {
        Some(query) => Lane::Named(Named::Prepare { name: statement.name.clone(), query }),
        None => not_yet("this PREPARE"),
    }
}

pub(super) fn execute(statement: &ExecuteStmt, context: &Context<'_>) -> Lane {
    let count = statement.params.len();
    let symbol = |token: &Token, which| context.text.get(token.range.clone()) == Some(which);
    let inside = if count == 0 {
        None
    } else {
        let open = significant(context.text).find(|token| symbol(token, "("));
        let close = significant(context.text).rev().find(|token| symbol(token, ")"));
        let found = open.zip(close).and_then(|(open, close)| {
            Some((Spot::of(context.shape, open.range.end)?, Spot::of(context.shape, close.range.start)?))
        });
        if found.is_none() {
            return read(true);
        }
        found
    };
    let constant = statement.params.iter().all(|param| matches!(param.node, Some(NodeEnum::AConst(_))));
    let found = context.look(&statement.params);
    let arguments = Arguments { count, inside, constant, guard: found.needs_guard(), missing: found.missing };
    Lane::Named(Named::Execute { name: statement.name.clone(), arguments })
}

pub(super) fn deallocate(statement: &DeallocateStmt) -> Lane {
    if statement.isall {
        return read(false);
    }
    Lane::Named(Named::Deallocate { name: statement.name.clone() })
}

#[cfg(test)]
mod tests {
    use super::super::{classify, facts::Facts, parse, shape};
    use super::*;

    fn named(text: &str) -> Named {
        let shape = shape::mask(text);
        let plan = classify::classify(&parse::parse_one(text).unwrap(), text, &shape, &Facts::default());
        match plan.lane {
            Lane::Named(named) => named,
            lane => panic!("{lane:?}"),
        }
    }

    #[test]
    fn a_prepared_text_is_found_behind_its_types() {
        for (text, expected) in [
            ("prepare a as select 1", " select 1"),
            ("PREPARE \"as\" (int, numeric(1,2)) As insert into t values ($1)", " insert into t values ($1)"),
            ("prepare /* as */ a(text)as--x\nvalues(1);", "--x\nvalues(1);"),
        ] {
            let Named::Prepare { query, .. } = named(text) else { panic!("{text}") };
            assert_eq!(&text[query..], expected);
        }
    }

    #[test]
    fn arguments_are_found_in_every_text_of_the_shape() {
        let text = "execute ins (1, 'a)', (2)) ;";
        let Named::Execute { name, arguments } = named(text) else { panic!("{text}") };
        assert_eq!((name.as_str(), arguments.count, arguments.constant), ("ins", 3, true));
        let other = "execute ins (10000, 'b', (200)) ;";
        assert_eq!(shape::mask(other).key, shape::mask(text).key);
        assert_eq!(other.get(arguments.range(&shape::mask(other)).unwrap()), Some("10000, 'b', (200)"));
        let Named::Execute { arguments, .. } = named("execute ins(now(), 1)") else { panic!() };
        assert!(!arguments.constant && arguments.guard, "nothing is known without the catalog");
        let Named::Execute { arguments, .. } = named("execute ins") else { panic!() };
        assert!(arguments.range(&shape::mask("execute ins")).is_none());
    }
}
