//! The client's texts between its encoding and the strings that are parsed; see [`encoding`].

use std::borrow::Cow;
use std::sync::Arc;

use crate::pg::build::ClientError;
use crate::session::planning::Planned;
use crate::session::run::Session;
use crate::sql::encoding;
use crate::sql::lex::{Kind, Lexer};
use crate::sql::plan::{EffectPlan, Lane};

impl Session {
    /// The client's encoding by PostgreSQL's name, as last read or reported.
    #[must_use]
    pub fn encoding(&self) -> &str {
        match (&self.facts, &self.wire.client_encoding, &self.context) {
            (Some(facts), ..) => facts.context.client_encoding(),
            (None, Some(reported), _) => reported,
            (None, None, Some(context)) => context.client_encoding(),
            (None, None, None) => "UTF8",
        }
    }

    /// A text for a server, in the client's encoding.
    #[must_use]
    pub fn encoded<'t>(&self, text: &'t str) -> Cow<'t, [u8]> {
        encoding::encode(text, self.encoding())
    }

    /// How many characters the server counts in a text, for positions in errors.
    pub(super) fn characters(&self, text: &str) -> isize {
        isize::try_from(encoding::characters(&self.encoded(text), self.encoding())).unwrap_or(0)
    }

    pub(super) fn readable(&self, text: &[u8]) -> Option<Arc<str>> {
        let decoded = encoding::decode(text, self.encoding())?;
        if let Cow::Owned(text) = &decoded {
            let name = |kind| matches!(kind, Kind::Word | Kind::QuotedIdentifier);
            let mut names = Lexer::new(text).filter(|token| name(token.kind)).filter_map(|token| text.get(token.range));
            if names.any(encoding::may_be_cut) {
                return None;
            }
        }
        Some(decoded.into())
    }

    /// Whether a text with bytes of another encoding than UTF-8 is one that followers get in that encoding.
    pub(super) fn is_carried_in_bytes(&self, lane: &Lane) -> bool {
        if self.encoding() == "UTF8" {
            return true;
        }
        match lane {
            Lane::Read { .. } | Lane::Control(_) | Lane::Named(_) | Lane::Admin(_) | Lane::Refused(_) => true,
            Lane::Write(write) => matches!(
                write.effect,
                EffectPlan::Text { .. }
                    | EffectPlan::Rows { .. }
                    | EffectPlan::Copy { fill: None, server_file: false, .. }
                    | EffectPlan::CopiedRows(_)
                    | EffectPlan::Carried { .. }
            ),
            _ => false,
        }
    }

    pub(super) fn unreadable(&self) -> Planned {
        let what = format!(
            "the statement can not be read safely under client_encoding {}: it has other bytes than ASCII",
            self.encoding()
        );
        let hint = "SET client_encoding = 'UTF8' and send UTF-8, or send such values as parameters.";
        Planned::Refused(ClientError::error("0A000", what, hint))
    }
}
