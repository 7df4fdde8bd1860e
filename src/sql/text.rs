//! The texts that leader and followers get, spliced out of the client's text. Positions are kept relative to the masked
//! literals, so that one plan serves every text of its shape.

use std::fmt::Write as _;

use super::expressions::{Look, SessionValue};
use super::facts::quote_literal;
use super::lex::{Kind, Lexer, Token};
use super::plan::{CopyText, EffectPlan, Once, Password, Write};
use super::shape::{Shape, Spot};
use super::shared::{self, SharedText};

/// Where the texts for leader and followers differ from the client's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// After the statement's last token: a hidden RETURNING goes here. None: nothing can be added.
    pub end: Option<Spot>,
    /// Where the client's RETURNING begins; it goes to the end.
    pub returning: Option<Spot>,
    /// Values of the session, in the order of [`Write::hidden_returning`]; ascending in the text.
    pub splices: Vec<Splice>,
    /// String literals that go to date and time types, as numbers of [`Shape::literals`].
    pub date_literals: Vec<usize>,
    /// Parameters that may go to date and time types, from 1.
    pub date_parameters: Vec<i32>,
    /// The statement with its literals as parameters: followers' text, for the statements of the shape that changed one row, and
    /// the leader's, with the hidden RETURNING if there is one.
    pub shared: Option<SharedText>,
    /// A password, in whose place followers get the leader's verifier.
    pub password: Option<Password>,
    /// Values of the session for the splices that the leader is asked for after the statement, which can not return them.
    pub asked: Vec<String>,
    /// The number of rows is compared by its command tag.
    pub compare_count: bool,
    /// The leader is asked first whether a row would get its new values from one of several: [`super::matches::question`].
    pub ask_matches: bool,
    /// It executes this prepared statement, of which only the session knows what it does.
    pub executes: Option<String>,
    /// A literal that is not masked, so the same in all texts of the shape, depends on the clock.
    pub clock: bool,
}

/// `CURRENT_TIMESTAMP(3)` becomes `('...'::pg_catalog.timestamptz(3))`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splice {
    pub start: Spot,
    pub end: Spot,
    /// After the precision, if there is one; else the same as `end`.
    pub close: Spot,
    pub sql_type: &'static str,
    /// Number of the value in [`Write::hidden_returning`].
    pub value: usize,
}

impl Edits {
    /// Finds the places in the statement's text. None: the text is not as the parser saw it, which must not happen.
    #[must_use]
    pub fn find(text: &str, shape: &Shape, values: &[SessionValue]) -> Option<(Self, Vec<String>)> {
        let tokens: Vec<Token> = Lexer::new(text).filter(|token| token.kind.is_significant()).collect();
        let last = tokens.iter().rev().find(|token| text.get(token.range.clone()) != Some(";"))?;
        let mut edits = Self { end: Some(Spot::of(shape, last.range.end)?), ..Self::default() };
        let mut depth = 0_i32;
        let mut before = "";
        for token in &tokens {
            match (token.kind, text.get(token.range.clone())?) {
                (Kind::Symbol, "(" | "[") => depth += 1,
                (Kind::Symbol, ")" | "]") => depth -= 1,
                // reserved, but allowed as a label: "SELECT a AS returning"
                (Kind::Word, word)
                    if depth == 0
                        && edits.returning.is_none()
                        && word.eq_ignore_ascii_case("returning")
                        && before != "."
                        && !before.eq_ignore_ascii_case("as") =>
                {
                    edits.returning = Some(Spot::of(shape, token.range.start)?);
                }
                _ => {}
            }
            before = text.get(token.range.clone())?;
        }
        let mut values: Vec<&SessionValue> = values.iter().collect();
        values.sort_by_key(|value| value.location);
        let mut hidden: Vec<String> = Vec::new();
        for value in values {
            // a value in the client's own RETURNING is none of the followers'
            if edits.returning.is_some_and(|returning| returning.at(shape) <= value.location) {
                continue;
            }
            let number = hidden.iter().position(|known| *known == value.hidden).unwrap_or_else(|| {
                hidden.push(value.hidden.clone());
                hidden.len() - 1
            });
            edits.splices.push(splice(text, shape, &tokens, value, number)?);
        }
        Some((edits, hidden))
    }
}

impl Once {
    /// The followers' text, with the session's values as the leader gave them.
    #[must_use]
    pub fn follower_text(&self, text: &str, shape: &Shape, values: &[Option<String>]) -> String {
        let end = self.edits.end.map_or(text.len(), |spot| spot.at(shape));
        self.edits.spliced(text, shape, values, end)
    }
}

impl Edits {
    /// The text up to `end`, with literals in place of what yields the session's values.
    fn spliced(&self, text: &str, shape: &Shape, values: &[Option<String>], end: usize) -> String {
        let mut edited = String::with_capacity(text.len() + 128);
        let mut copied = 0;
        for splice in &self.splices {
            let (from, to, close) = (splice.start.at(shape), splice.end.at(shape), splice.close.at(shape));
            edited.push_str(text.get(copied..from).unwrap_or_default());
            let value = values.get(splice.value).and_then(Option::as_deref).map_or("NULL".to_owned(), quote_literal);
            let _ = write!(edited, "({value}::{}", splice.sql_type);
            edited.push_str(text.get(to..close).unwrap_or_default());
            edited.push(')');
            copied = close;
        }
        edited.push_str(text.get(copied..end).unwrap_or_default());
        edited
    }

    /// Notes the strings and parameters of a part of the statement, to be looked at on every execution.
    pub(super) fn remember_dates(&mut self, look: &Look, text: &str, shape: &Shape) {
        for location in &look.strings {
            // N'..' has its location before the literal
            let at = shape.literals.partition_point(|literal| literal.end <= *location);
            let masked = shape.literals.get(at).is_some_and(|literal| literal.start <= location + 1);
            if masked {
                self.date_literals.push(at);
            } else {
                let token = Lexer::new(text).find(|token| token.kind == Kind::String && token.range.end > *location);
                let literal = token.and_then(|token| text.get(token.range));
                self.clock |= literal.is_none_or(super::dates::looks_like_now);
            }
        }
        self.date_parameters.extend(&look.parameters);
        self.date_literals.sort_unstable();
        self.date_literals.dedup();
        self.date_parameters.sort_unstable();
        self.date_parameters.dedup();
    }

    /// Makes the text that followers share, if the literals may become parameters. `counted`: one row is asserted.
    pub(super) fn share(&mut self, text: &str, shape: &Shape, counted: bool) {
        let Some(end) = self.end.filter(|_| self.returning.is_none() && self.splices.is_empty()) else { return };
        self.shared = shared::share(text, shape, 0..end.at(shape)).map(|shared| {
            let text = if counted { asserting(&shared.text, 1).into() } else { shared.text };
            SharedText { text, ..shared }
        });
    }

    /// Makes the text that an INSERT of one row shares on the leader with others of its shape. `hidden`: what it returns; followers
    /// get the row.
    pub(super) fn share_returning(&mut self, text: &str, shape: &Shape, hidden: &[String]) {
        let Some(end) = self.end.filter(|_| self.returning.is_none()) else { return };
        self.shared = shared::share(text, shape, 0..end.at(shape)).map(|shared| {
            let plain = format!("{} RETURNING {}", shared.plain, hidden.join(", ")).into();
            SharedText { plain, ..shared }
        });
    }

    pub(super) fn has_dates(&self) -> bool {
        self.clock || !self.date_literals.is_empty() || !self.date_parameters.is_empty()
    }
}

fn splice(text: &str, shape: &Shape, tokens: &[Token], value: &SessionValue, number: usize) -> Option<Splice> {
    let first = tokens.iter().position(|token| token.range.start == value.location)?;
    let symbol = |at: usize| tokens.get(at).and_then(|token| text.get(token.range.clone()));
    let mut name_end = first;
    while symbol(name_end + 1) == Some(".") {
        name_end += 2;
    }
    let mut close = name_end;
    if symbol(name_end + 1) == Some("(") {
        // the values here take nothing, or a number
        close = (name_end + 2..name_end + 4).find(|at| symbol(*at) == Some(")"))?;
    }
    // `now()` goes with its parentheses; `CURRENT_TIME(3)` keeps the precision for the cast
    let end = if close == name_end + 2 { close } else { name_end };
    Some(Splice {
        start: Spot::of(shape, value.location)?,
        end: Spot::of(shape, tokens.get(end)?.range.end)?,
        close: Spot::of(shape, tokens.get(close)?.range.end)?,
        sql_type: value.sql_type,
        value: number,
    })
}

/// The statement, and a division by zero if it does not change that many rows.
pub(super) fn asserting(statement: &str, count: u64) -> String {
    counting(statement, &count.to_string())
}

/// The same with the count as an expression: a number, or a parameter.
pub(super) fn counting(statement: &str, count: &str) -> String {
    format!(
        "WITH pgtandem_u AS ({statement} RETURNING 1) SELECT 1 OPERATOR(pg_catalog./) \
         (pg_catalog.count(*) OPERATOR(pg_catalog.=) {count})::pg_catalog.int4 FROM pgtandem_u"
    )
}

impl Write {
    /// The text that followers share for this shape, with this statement's literals as its parameters. `count`: rows that the leader
    /// changed. `None`: the statement goes as text, by [`Write::follower_text`].
    #[must_use]
    pub fn shared_text<'t>(
        &self,
        text: &'t str,
        shape: &Shape,
        count: Option<u64>,
    ) -> Option<(&SharedText, Vec<&'t str>)> {
        let shared = self.edits.shared.as_ref().filter(|_| count == Some(1))?;
        Some((shared, shared::values(text, shape)?))
    }

    /// The leader's text: the client's with the hidden RETURNING. None: the client's as it is.
    #[must_use]
    pub fn leader_text(&self, text: &str, shape: &Shape) -> Option<String> {
        let end = self.edits.end?.at(shape);
        if self.hidden_returning.is_empty() {
            return None;
        }
        let hidden = self.hidden_returning.join(", ");
        let joint = if self.client_returning { "," } else { " RETURNING" };
        Some(format!("{}{joint} {hidden}{}", text.get(..end)?, text.get(end..)?))
    }

    /// The followers' text for an effect of text or COPY: without the client's RETURNING, with the session's values (in the order of
    /// [`Write::hidden_returning`], as the leader returned them) in place of what yields them. `expect`: the leader's count, asserted
    /// by the server itself where the plan says `counted`. For rows: the INSERT for one row.
    #[must_use]
    pub fn follower_text(&self, text: &str, shape: &Shape, values: &[Option<String>], expect: Option<u64>) -> String {
        let counted = match &self.effect {
            EffectPlan::Rows { texts, .. } => return texts.one.to_string(),
            EffectPlan::Copy { text: CopyText::Instead(instead), .. } => return instead.clone(),
            EffectPlan::Copy { text: CopyText::AsIs, .. } => return text.to_owned(),
            EffectPlan::Text { counted, .. } => *counted,
            EffectPlan::Carried { .. } | EffectPlan::LargeObject(_) | EffectPlan::CopiedRows(_) => false,
        };
        let end = self.edits.returning.or(self.edits.end).map_or(text.len(), |spot| spot.at(shape));
        let edited = self.edits.spliced(text, shape, values, end);
        match expect {
            Some(count) if counted => asserting(&edited, count),
            _ => edited,
        }
    }

    /// True if a literal of this text, or a parameter in text form (index 0 is `$1`), that goes to a date or time type depends on the
    /// clock, such as `'now'`: followers would read another time. Then the statement is refused with [`super::refuse::clock_literal`].
    /// Parameters in binary form are given as None, except those of string types, whose binary form is the text.
    #[must_use]
    pub fn reads_clock(&self, text: &str, shape: &Shape, parameters: &[Option<&str>]) -> bool {
        self.edits.reads_clock(text, shape, parameters)
    }
}

impl Edits {
    /// As [`Write::reads_clock`].
    #[must_use]
    pub fn reads_clock(&self, text: &str, shape: &Shape, parameters: &[Option<&str>]) -> bool {
        let mut literals = self.date_literals.iter().filter_map(|at| text.get(shape.literals.get(*at)?.clone()));
        let mut bound = self.date_parameters.iter().filter_map(|number| {
            let at = usize::try_from(*number).ok()?.checked_sub(1)?;
            *parameters.get(at)?
        });
        self.clock || literals.any(super::dates::looks_like_now) || bound.any(super::dates::looks_like_now)
    }
}
