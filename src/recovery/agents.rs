//! How a recovery reaches the agents: a request and its answer, and nothing about TLS or frames.
//!
//! [`Agents`] is what the proxy implements over the agent protocol and what tests implement in memory.

use std::future::Future;

use pgtandem_proto::membership::Epoch;
use pgtandem_proto::message::{
    Failure, FailureCode, Kept, Lsn, NodeFacts, NodeStatus, OldData, Progress, Reply, Request,
};

/// Connects to agents by the name of their node.
pub trait Agents: Send + Sync + 'static {
    type Control: AgentControl;

    /// A new control connection, with limits of its own on connecting. `Err` names the node and its address.
    fn connect(&self, node: &str) -> impl Future<Output = Result<Self::Control, Failure>> + Send;
}

/// One control connection. What an agent does for a recovery belongs to the connection that asked for it: dropping it
/// ends that work, and so does dropping the future of a request, after which the connection must not be used again.
pub trait AgentControl: Send + 'static {
    /// The one answer that ends `request`; [`Reply::Failed`] comes as `Err`.
    fn request(
        &mut self,
        request: Request,
        on_progress: &mut (dyn FnMut(Progress) + Send),
    ) -> impl Future<Output = Result<Reply, Failure>> + Send;
}

pub(crate) async fn ask<C: AgentControl>(control: &mut C, request: Request) -> Result<Reply, Failure> {
    control.request(request, &mut |_| {}).await
}

pub(crate) async fn status<C: AgentControl>(control: &mut C) -> Result<NodeStatus, Failure> {
    match ask(control, Request::Status).await? {
        Reply::Status(status) => Ok(*status),
        other => Err(unexpected("Status", &other)),
    }
}

pub(crate) async fn facts<C: AgentControl>(control: &mut C) -> Result<NodeFacts, Failure> {
    match ask(control, Request::Facts).await? {
        Reply::Facts(facts) => Ok(*facts),
        other => Err(unexpected("Facts", &other)),
    }
}

pub(crate) async fn hold<C: AgentControl>(control: &mut C) -> Result<Lsn, Failure> {
    match ask(control, Request::HoldRelay).await? {
        Reply::Lsn(lsn) => Ok(lsn),
        other => Err(unexpected("HoldRelay", &other)),
    }
}

pub(crate) async fn old_data<C: AgentControl>(control: &mut C) -> Result<OldData, Failure> {
    match ask(control, Request::OldData).await? {
        Reply::OldData(old) => Ok(*old),
        other => Err(unexpected("OldData", &other)),
    }
}

pub(crate) async fn keep_old<C: AgentControl>(
    control: &mut C,
    epoch: Epoch,
    source: String,
    on_progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Kept, Failure> {
    match control.request(Request::KeepOld { epoch, source }, on_progress).await? {
        Reply::Kept(kept) => Ok(*kept),
        other => Err(unexpected("KeepOld", &other)),
    }
}

/// A request whose answer is Done or a record.
pub(crate) async fn order<C: AgentControl>(
    control: &mut C,
    request: Request,
    on_progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), Failure> {
    match control.request(request, on_progress).await? {
        Reply::Done | Reply::Record(_) => Ok(()),
        other => Err(unexpected("the request", &other)),
    }
}

fn unexpected(request: &str, reply: &Reply) -> Failure {
    let kind = match reply {
        Reply::Status(_) => "Status",
        Reply::Record(_) => "Record",
        Reply::Facts(_) => "Facts",
        Reply::Lsn(_) => "Lsn",
        Reply::Done => "Done",
        Reply::Progress(_) => "Progress",
        Reply::Failed(_) => "Failed",
        Reply::BaseCopy(_) => "BaseCopy",
        Reply::OldData(_) => "OldData",
        Reply::Kept(_) => "Kept",
    };
    Failure {
        code: FailureCode::Peer,
        what: format!("the agent answered {request} with {kind}"),
        hint: "run the same version of pgtandem on all hosts".into(),
    }
}
