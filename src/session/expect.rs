//! What a session waits for: the answers that the server owes, and what came of the last statement.

use bytes::Bytes;

/// To whom the rows of a statement go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As they are.
    Forward,
    /// All answers are ours: first columns are kept in [`Results::values`].
    Hidden,
    /// As they are, and kept in [`Results::rows`], too.
    Both,
    /// The data of a COPY are ours: kept in [`Results::rows`], a row each.
    Keep,
    /// The last `hidden` columns are ours; without columns of its own the client sees no rows at all.
    Strip { hidden: usize, client_returning: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Parse {
        hidden: bool,
    },
    Bind {
        hidden: bool,
    },
    Close {
        hidden: bool,
    },
    /// Of a statement or portal whose last `hidden` columns are ours.
    Describe {
        mode: Mode,
    },
    Execute {
        mode: Mode,
    },
    Query {
        mode: Mode,
    },
    Function,
    Sync {
        hidden: bool,
    },
}

impl Expect {
    /// The answer is ours alone.
    #[must_use]
    pub fn is_hidden(self) -> bool {
        match self {
            Self::Parse { hidden } | Self::Bind { hidden } | Self::Close { hidden } | Self::Sync { hidden } => hidden,
            Self::Describe { mode } | Self::Execute { mode } | Self::Query { mode } => {
                matches!(mode, Mode::Hidden | Mode::Keep)
            }
            Self::Function => false,
        }
    }
}

/// What the last statement that was not merely forwarded gave.
#[derive(Debug, Default)]
pub struct Results {
    /// Command tag of the last statement that ended, without the zero byte.
    pub tag: Option<Bytes>,
    /// Body of the first error since the last clear.
    pub error: Option<Bytes>,
    /// First columns of hidden rows.
    pub values: Vec<Option<Bytes>>,
    /// Stripped columns: per row the values as in `DataRow`, one after the other. Taken by the session as they come.
    pub rows: Vec<Bytes>,
    pub row_bytes: usize,
    pub suspended: bool,
    /// The server wants the data of a COPY.
    pub copy_in: bool,
    /// The last hidden row description; empty: the statement gives no rows.
    pub description: Bytes,
    /// The last hidden parameter description, as in `Parse`.
    pub parameter_types: Bytes,
}

/// When [`crate::session::wire::Wire::pump`] is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// All expected answers have come.
    Answered,
    /// The same, or the server wants COPY data.
    AnsweredOrCopy,
    /// The same, or enough stripped rows have gathered to be taken.
    Rows,
}
