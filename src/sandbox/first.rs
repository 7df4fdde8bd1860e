//! What makes node0 the first member: the cluster's certificates and node0's record.

use pgtandem_proto::membership::{MemberSet, NodeState, Record};

use super::layout::CLUSTER;
use super::{Layout, SandboxError};
use crate::agent::certificates::{Authority, CertificateError, PROXY};
use crate::agent::record::{RecordFileError, RecordStore};

/// The certificate authority in `D/ca`, a certificate for the proxy and for each node, by the code that production uses.
pub fn certificates(layout: &Layout) -> Result<(), SandboxError> {
    let make = || -> Result<(), CertificateError> {
        let authority = Authority::create(CLUSTER)?;
        authority.save(&layout.ca_dir())?;
        authority.issue(PROXY)?.save(&layout.proxy_dir())?;
        if layout.plan.tls {
            authority.issue_for_clients(&["localhost", "127.0.0.1"])?.save(&layout.proxy_dir())?;
        }
        for index in 0..layout.plan.nodes {
            authority.issue(&Layout::node_name(index))?.save(&layout.node_dir(index))?;
        }
        Ok(())
    };
    make().map_err(|error| SandboxError::Certificates(error.to_string()))
}

/// node0 alone is the member set of epoch 0; every other node is blank.
pub fn record(layout: &Layout) -> Result<(), SandboxError> {
    let name = Layout::node_name(0);
    let store = || -> Result<(), RecordFileError> {
        let mut store = RecordStore::open(&layout.node_dir(0), CLUSTER, &name)?;
        let members =
            MemberSet { epoch: 0, version: 1, nodes: vec![name.clone()], leader: name.clone(), proxy: name.clone() };
        let generations = vec![format!("{:032x}", rand::random::<u128>())];
        let record = Record { members: Some(members), state: NodeState::InSync, generations, ..store.record().clone() };
        store.replace(record)
    };
    store().map_err(|error| SandboxError::Record(error.to_string()))
}
