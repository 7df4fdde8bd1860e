//! Asks a sandbox's proxy over its `control.sock`, with the client that the commands use.

use std::time::{Duration, Instant};

use super::Layout;
use crate::observe::progress::RecoveryView;
use crate::observe::status::Problem;
use crate::proxy::control::client::{ControlClient, ControlClientError};
use crate::proxy::control::message::{ControlAnswer, ControlFailure, ControlRequest, Outcome};

/// How often a condition is asked for again.
const POLL: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Client(#[from] ControlClientError),
    #[error("{}", .0.what)]
    Refused(ControlFailure),
    #[error("the proxy answered something else than was asked")]
    OtherAnswer,
}

impl ControlError {
    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Client(error) => error.hint(),
            Self::Refused(failure) => failure.hint.clone(),
            Self::OtherAnswer => "look at the versions of the program and of the running proxy".into(),
        }
    }
}

/// A recovery that ended well.
#[derive(Clone, Debug)]
pub struct Recovered {
    pub view: RecoveryView,
    /// When it became known that the gate had opened again after the cut.
    pub cut_at: Option<Instant>,
    /// The same after the join.
    pub joined_at: Instant,
    pub took: Duration,
}

/// Asks, and returns the result; `progress` gets what comes before it.
pub async fn ask(
    layout: &Layout,
    request: &ControlRequest,
    mut progress: impl FnMut(&RecoveryView),
) -> Result<Outcome, ControlError> {
    let mut client = ControlClient::connect(&layout.proxy_dir().join("control.sock")).await?;
    client.send(request).await?;
    loop {
        match client.next().await? {
            ControlAnswer::Progress(view) => progress(&view),
            ControlAnswer::Result { result } => return Ok(result),
            ControlAnswer::Error { error } => return Err(ControlError::Refused(error)),
        }
    }
}

/// Recovers a node and waits for the end. One that is a member is detached first.
pub async fn recover(layout: &Layout, node: &str) -> Result<Recovered, ControlError> {
    let (started, mut cut_at) = (Instant::now(), None);
    let request = ControlRequest::Recover { node: node.to_owned(), yes: true, verify: false, keep_old: false };
    let outcome = ask(layout, &request, |view| {
        if view.cut_gate_ms.is_some() {
            cut_at.get_or_insert_with(Instant::now);
        }
    });
    match outcome.await? {
        Outcome::Recover { recovery } => {
            let took = started.elapsed();
            Ok(Recovered { view: *recovery, cut_at, joined_at: Instant::now(), took })
        }
        _ => Err(ControlError::OtherAnswer),
    }
}

/// Names of the members, as the proxy has them now.
pub async fn members(layout: &Layout) -> Result<Vec<String>, ControlError> {
    match ask(layout, &ControlRequest::Status, |_| {}).await? {
        Outcome::Status { status } => Ok(status.members),
        _ => Err(ControlError::OtherAnswer),
    }
}

/// Returns when the proxy says that it serves nobody and waits, and why.
pub async fn until_waiting(layout: &Layout) -> Problem {
    loop {
        if let Ok(Outcome::Status { status }) = ask(layout, &ControlRequest::Status, |_| {}).await
            && !status.proxy_running
            && let Some(why) = status.problems.into_iter().next()
        {
            return why;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `node` is a member, or is none; false when `limit` is over before.
pub async fn wait_member(layout: &Layout, node: &str, is_member: bool, limit: Duration) -> bool {
    let started = Instant::now();
    loop {
        // A proxy that is being started again answers a little later.
        if members(layout).await.is_ok_and(|members| members.iter().any(|member| member == node) == is_member) {
            return true;
        }
        if started.elapsed() > limit {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
}
