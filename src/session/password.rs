//! Passwords of roles: every server would make another verifier of the same password, so followers get the leader's.

use std::borrow::Cow;
use std::sync::Arc;

use crate::pg::build::ClientError;
use crate::session::run::Session;
use crate::session::wire::{End, Until};
use crate::sql::facts::quote_literal;
use crate::sql::plan::Write;

impl Session {
    /// The text for followers of a statement that the leader has just run: with the verifier that it stored in the place of the
    /// password, which stays on this host.
    pub async fn with_verifier<'t>(
        &mut self,
        write: &Write,
        text: &'t str,
    ) -> Result<Result<Cow<'t, str>, ClientError>, End> {
        let Some(password) = &write.edits.password else { return Ok(Ok(Cow::Borrowed(text))) };
        let current = self.context.as_ref().map(|context| context.role.clone());
        let role = password.role.clone().or(current).unwrap_or_default();
        let results = std::mem::take(&mut self.wire.results);
        self.wire.hide_errors = true;
        let secret = Arc::clone(&self.secret);
        let role = self.encoded(&role);
        self.hidden("pgtandem_p", "pgtandem_verifier", &[Some(secret.as_bytes()), Some(&role)]);
        self.end_hidden();
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        let found = std::mem::replace(&mut self.wire.results, results);
        done?;
        let (None, Some(verifier)) = (found.error, found.values.into_iter().next()) else {
            let what = "the verifier of the password could not be read on the leader";
            return Ok(Err(ClientError::error("XX000", what, "Report this as a bug of pgtandem.")));
        };
        // No verifier: PostgreSQL takes an empty password for none.
        let verifier = verifier.map_or("NULL".to_owned(), |v| quote_literal(&String::from_utf8_lossy(&v)));
        let (before, after) = (text.get(..password.at.start), text.get(password.at.end..));
        Ok(Ok(Cow::Owned([before.unwrap_or_default(), &verifier, after.unwrap_or_default()].concat())))
    }
}
