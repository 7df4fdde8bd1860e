//! PostgreSQL's wire protocol: frames, startup, a server connection.
