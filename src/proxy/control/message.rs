//! What crosses `control.sock`: one JSON object a line, both ways. Field names are stable.

use serde::{Deserialize, Serialize};

use crate::observe::progress::RecoveryView;
use crate::observe::status::ClusterStatus;
use crate::recovery::report::{Cause, CauseKind, Failed, Phase};

/// Longest line either way, bytes.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// What a command asks: `{"command":"recover","node":"b","yes":false}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRequest {
    Status,
    Recover {
        node: String,
        /// The operator agrees that a member is detached first.
        #[serde(default)]
        yes: bool,
        /// Let `pg_verifybackup` look at the files before the node's PostgreSQL is started.
        #[serde(default)]
        verify: bool,
        /// Keep what lies on the node beside it.
        #[serde(default)]
        keep_old: bool,
    },
    Detach {
        node: String,
    },
    Switch {
        node: String,
    },
}

/// What the proxy answers: any number of progress lines, then one `{"result":...}` or `{"error":...}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ControlAnswer {
    Result { result: Outcome },
    Error { error: ControlFailure },
    Progress(Box<RecoveryView>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Outcome {
    Status { status: Box<ClusterStatus> },
    Recover { recovery: Box<RecoveryView> },
    Detach(Detached),
    Switch(Switched),
}

/// Another node leads; its proxy takes over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switched {
    pub node: String,
    pub members: Vec<String>,
    /// The epoch that ended with it.
    pub epoch: u64,
}

/// The end of a detach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    pub node: String,
    /// It was a member; otherwise a recovery of it was ended.
    pub was_member: bool,
    pub members: Vec<String>,
    pub version: u64,
}

/// An error with its parts: what failed (with where and why), in which phase, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlFailure {
    /// `needs_consent`, `refused`, ... for programs.
    pub kind: CauseKind,
    /// Of a recovery: where it was.
    pub phase: Option<Phase>,
    pub what: String,
    pub hint: String,
}

impl From<Failed> for ControlFailure {
    fn from(Failed { phase, cause: Cause { kind, what, hint } }: Failed) -> Self {
        Self { kind, phase: Some(phase), what, hint }
    }
}

impl From<Cause> for ControlFailure {
    fn from(Cause { kind, what, hint }: Cause) -> Self {
        Self { kind, phase: None, what, hint }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::report::Report;

    #[test]
    fn requests_are_what_they_look_like() {
        let parse = |text: &str| serde_json::from_str::<ControlRequest>(text);
        assert_eq!(parse(r#"{"command":"status"}"#).unwrap(), ControlRequest::Status);
        let recover = ControlRequest::Recover { node: "b".into(), yes: false, verify: false, keep_old: false };
        assert_eq!(parse(r#"{"command":"recover","node":"b"}"#).unwrap(), recover);
        assert!(parse(r#"{"command":"recover"}"#).is_err());
        assert!(parse(r#"{"command":"recover","node":"b","force":true}"#).is_err());
        assert!(parse(r#"{"command":"destroy","node":"b"}"#).is_err());
    }

    #[test]
    fn answers_are_told_apart() {
        let failure = ControlFailure {
            kind: CauseKind::NeedsConsent,
            phase: Some(Phase::Preflight),
            what: "b is a member".into(),
            hint: "add --yes".into(),
        };
        let view = Box::new(RecoveryView::new("b", &Report::new()));
        let detached = Detached { node: "b".into(), was_member: true, members: vec!["a".into()], version: 3 };
        for answer in [
            ControlAnswer::Error { error: failure },
            ControlAnswer::Progress(view.clone()),
            ControlAnswer::Result { result: Outcome::Recover { recovery: view } },
            ControlAnswer::Result { result: Outcome::Detach(detached) },
        ] {
            let text = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<ControlAnswer>(&text).unwrap(), answer, "{text}");
        }
    }
}
