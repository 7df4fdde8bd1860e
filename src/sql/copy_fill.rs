//! COPY that leaves columns to defaults that vary: the leader computes these values first, as many as there are rows, and both sides
//! get them as further columns of the data.

use pg_query::NodeEnum;
use pg_query::protobuf::DefElem;

use super::copy_rows::CopyFormat;
use super::ddl::is_on;
use super::facts::{Column, Relation, quote_identifier};
use super::lex::{Kind, Lexer};
use super::plan::Refusal;
use super::refuse::refusal;

/// How the data of a COPY are completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyFill {
    /// The client's text with the left-out columns after its own: for the leader.
    pub leader: String,
    /// Gives a row with the values of these columns for each of `$1` rows.
    pub values: String,
    /// How many these are.
    pub filled: usize,
    /// Fields that a row of the client's data must have.
    pub given: usize,
    pub format: CopyFormat,
    pub header: Header,
}

/// What the first line of the data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    Row,
    /// Not looked at by the server.
    Skipped,
    /// Names of the columns, compared by the server: a line with the client's own, and what belongs at the end of the line.
    Matched {
        own: Vec<u8>,
        rest: Vec<u8>,
    },
}

impl CopyFill {
    /// Data without a row.
    #[must_use]
    pub fn no_rows(&self) -> &[u8] {
        match (&self.format, &self.header) {
            // signature, flags, length of the extension, end
            (CopyFormat::Binary, _) => b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\xff\xff",
            (_, Header::Matched { own, .. }) => own,
            _ => b"",
        }
    }
}

/// `text` is the client's.
pub(super) fn fill(
    relation: &Relation,
    left_out: &[&Column],
    given: &[&str],
    options: &[&DefElem],
    text: &str,
) -> Result<CopyFill, Refusal> {
    for column in left_out {
        if !column.may_insert {
            return Err(refusal(
                format!(
                    "COPY that leaves {} to its default needs the INSERT privilege on that column here",
                    column.name
                ),
                "GRANT INSERT on the table to the role.",
            ));
        }
    }
    let expressions: Option<Vec<String>> = left_out.iter().map(|column| expression(column)).collect();
    let Some(expressions) = expressions else {
        return Err(refusal(
            format!(
                "COPY that leaves an identity column of {} to its sequence needs the USAGE privilege on it here",
                relation.qualified()
            ),
            "GRANT USAGE ON SEQUENCE ... to the role.",
        ));
    };
    let names: Vec<String> = left_out.iter().map(|column| quote_identifier(&column.name)).collect();
    let format = format(options).ok_or_else(|| {
        refusal(
            "COPY with the options ENCODING, DEFAULT or FORCE_NULL * that leaves a column to a default that varies is not replicated by this version of pgtandem",
            "Leave the option out, or put the column into the data.",
        )
    })?;
    let leader = with_columns(text, &names).ok_or_else(|| {
        refusal("this COPY is not understood by this version of pgtandem", "Put all columns into the data.")
    })?;
    Ok(CopyFill {
        leader,
        values: format!(
            "SELECT {} FROM pg_catalog.generate_series(1::pg_catalog.int8, $1::pg_catalog.int8)",
            expressions.join(", ")
        ),
        filled: left_out.len(),
        given: given.len(),
        header: header(options, &format, given, left_out),
        format,
    })
}

/// The default as the column's type. Lengths are checked by COPY, since a cast would cut instead.
fn expression(column: &Column) -> Option<String> {
    let default = column.default_sql.as_ref()?;
    let sql_type = match column.sql_type.split('(').next().unwrap_or_default() {
        "character varying" => "pg_catalog.varchar",
        "character" => "pg_catalog.bpchar",
        "bit" | "bit varying" => "pg_catalog.varbit",
        _ => column.sql_type.as_str(),
    };
    Some(format!("({default})::{sql_type}"))
}

fn text_of<'o>(options: &[&'o DefElem], name: &str) -> Option<&'o str> {
    let option = options.iter().find(|option| option.defname == name)?;
    match option.arg.as_ref()?.node.as_ref()? {
        NodeEnum::String(text) => Some(text.sval.as_str()),
        _ => None,
    }
}

/// None: there is an option under which the values could be read as others.
fn format(options: &[&DefElem]) -> Option<CopyFormat> {
    for option in options {
        let star = option.defname == "force_null"
            && !matches!(option.arg.as_ref().and_then(|arg| arg.node.as_ref()), Some(NodeEnum::List(_)));
        if star || matches!(option.defname.as_str(), "encoding" | "default") {
            return None;
        }
    }
    let byte_of =
        |name: &str, default: u8| text_of(options, name).and_then(|text| text.bytes().next()).unwrap_or(default);
    let null_of = |default: &str| text_of(options, "null").unwrap_or(default).as_bytes().to_vec();
    Some(match text_of(options, "format").unwrap_or("text").to_ascii_lowercase().as_str() {
        "binary" => CopyFormat::Binary,
        "csv" => {
            let quote = byte_of("quote", b'"');
            let (delimiter, escape) = (byte_of("delimiter", b','), byte_of("escape", quote));
            CopyFormat::Csv { delimiter, quote, escape, null: null_of("") }
        }
        _ => CopyFormat::Text { delimiter: byte_of("delimiter", b'\t'), null: null_of("\\N") },
    })
}

fn header(options: &[&DefElem], format: &CopyFormat, given: &[&str], left_out: &[&Column]) -> Header {
    let Some(option) = options.iter().find(|option| option.defname == "header") else { return Header::Row };
    if text_of(options, "header").is_some_and(|value| value.eq_ignore_ascii_case("match")) {
        let (mut own, mut rest) = (Vec::new(), Vec::new());
        for name in given {
            format.put_field(Some(name.as_bytes()), &mut own);
        }
        for column in left_out {
            format.put_field(Some(column.name.as_bytes()), &mut rest);
        }
        // no delimiter before the first
        let own = own.get(1..).unwrap_or_default().to_vec();
        return Header::Matched { own, rest };
    }
    if is_on(option) { Header::Skipped } else { Header::Row }
}

/// `COPY t (a, b) FROM` with further names in the list, which there is: without one no column is left out.
pub(super) fn with_columns(text: &str, names: &[String]) -> Option<String> {
    let mut tokens = Lexer::new(text)
        .filter(|token| token.kind.is_significant())
        .skip_while(|token| text.get(token.range.clone()) != Some("("));
    let close = tokens.find(|token| token.kind == Kind::Symbol && text.get(token.range.clone()) == Some(")"))?;
    Some(format!("{}, {}{}", text.get(..close.range.start)?, names.join(", "), text.get(close.range.start..)?))
}
