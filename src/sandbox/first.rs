//! What makes node0 the first member: the cluster's certificates and node0's record.

use super::{Layout, SandboxError};

/// The certificate authority in `D/ca`, a certificate for the proxy and for each node.
pub fn certificates(_layout: &Layout) -> Result<(), SandboxError> {
    Ok(())
}

/// node0 alone is the member set of epoch 0; every other node is blank.
pub fn record(_layout: &Layout) -> Result<(), SandboxError> {
    Ok(())
}
