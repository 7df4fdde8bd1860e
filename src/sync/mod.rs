//! Files and WAL: scan, digests, send, receive, relay.
