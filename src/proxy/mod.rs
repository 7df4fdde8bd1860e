//! The daemon that speaks PostgreSQL's protocol to clients.
