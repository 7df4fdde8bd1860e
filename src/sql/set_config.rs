//! A SELECT that is nothing but calls of `set_config()` and `current_setting()` with literals, as drivers send it: what it sets.

use super::scan::{Word, tokens};

/// One call that outlives its transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// In lower case.
    pub name: String,
    /// The statement that sets it again.
    pub text: String,
}

/// What it sets for the session, in order; `None`: that is not known from its text.
#[must_use]
pub fn settings(text: &str) -> Option<Vec<Setting>> {
    let words = tokens(text)?;
    let mut rest = words.strip_suffix(&[Word::Symbol(b';')]).unwrap_or(&words);
    let (select, list) = rest.split_first()?;
    if !select.is(&["select"]) {
        return None;
    }
    rest = list;
    let mut found = Vec::new();
    loop {
        if let [schema, Word::Symbol(b'.'), after @ ..] = rest {
            rest = schema.is(&["pg_catalog"]).then_some(after)?;
        }
        rest = match rest {
            [call, Word::Symbol(b'('), Word::Text(_), Word::Symbol(b')'), after @ ..]
            | [call, Word::Symbol(b'('), Word::Text(_), Word::Symbol(b','), _, Word::Symbol(b')'), after @ ..]
                if call.is(&["current_setting"]) =>
            {
                after
            }
            [
                call,
                Word::Symbol(b'('),
                Word::Text(name),
                Word::Symbol(b','),
                Word::Text(value),
                Word::Symbol(b','),
                local,
                end,
                after @ ..,
            ] if call.is(&["set_config"]) && *end == Word::Symbol(b')') => {
                if local.is(&["false"]) {
                    let text = format!("SELECT pg_catalog.set_config({name}, {value}, false)");
                    found.push(Setting { name: plain(name)?, text });
                } else if !local.is(&["true"]) {
                    return None;
                }
                after
            }
            _ => return None,
        };
        let end = rest.iter().position(|word| *word == Word::Symbol(b',')).unwrap_or(rest.len());
        let (alias, after) = rest.split_at(end);
        let named = match alias {
            [] => true,
            [name] => name.name().is_some(),
            [word, name] => word.is(&["as"]) && name.name().is_some(),
            _ => false,
        };
        if !named {
            return None;
        }
        match after.split_first() {
            None => return Some(found),
            Some((_, next)) => rest = next,
        }
    }
}

/// A name in quotes, without anything that the quotes would hide.
fn plain(literal: &str) -> Option<String> {
    let name = literal.strip_prefix('\'')?.strip_suffix('\'')?;
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'));
    is_plain.then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Option<Vec<String>> {
        settings(text).map(|found| found.into_iter().map(|setting| setting.name).collect())
    }

    #[test]
    fn calls_with_literals_are_known() {
        let one = settings("SELECT set_config('TimeZone', 'Europe/Rome', false);").unwrap();
        assert_eq!(one[0].name, "timezone");
        assert_eq!(one[0].text, "SELECT pg_catalog.set_config('TimeZone', 'Europe/Rome', false)");
        let several = "select current_setting('jit', true) as cur, pg_catalog.set_config('jit', 'off', FALSE) new, set_config('a.b', 'it''s', true)";
        assert_eq!(names(several), Some(vec!["jit".to_owned()]));
    }

    #[test]
    fn whatever_else_there_is_they_are_not() {
        for text in [
            "SELECT set_config('a.b', 'c', false) FROM t",
            "SELECT set_config('a.b', 'c', false) WHERE false",
            "SELECT CASE WHEN f() THEN set_config('a.b', 'c', false) END",
            "SELECT set_config($1, $2, false)",
            "SELECT set_config('a.b', 'c' || 'd', false)",
            "SELECT set_config('a.b', 'c', 1 > 2)",
            "SELECT set_config('a.b', 'c', false) || set_config('d', 'e', false)",
            "SELECT set_config(E'a', 'c', false)",
            "SELECT other.set_config('a.b', 'c', false)",
            "INSERT INTO t SELECT set_config('a.b', 'c', false)",
            "SELECT set_config('a.b', 'c', false) INTO t",
            "SELECT",
            "SELECT set_config('a.b', 'c', false),",
            "",
        ] {
            assert_eq!(names(text), None, "{text}");
        }
    }
}
