//! Effects, transactions, commit, gate, followers, backlog, in-doubt resolution.
