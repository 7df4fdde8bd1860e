//! Where a node that was away stands: the marks that it has, and whether the next transaction of its backlog is the very next one. Pure.
//!
//! Each transaction names the one that its mark had committed before it. So a transaction that is missing on the node or in the backlog is
//! found out, whichever it is; and one that the node has already is not applied a second time.

use std::collections::HashMap;

use crate::replicate::flight::Decision;
use crate::replicate::resolve::Marks;

/// Marks that the node has, by database.
#[derive(Debug, Default)]
pub struct Chain {
    at: HashMap<String, Marks>,
}

/// How a transaction fits to what the node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// It is the next one of its mark.
    Next,
    /// The node has it.
    Present,
    /// The node is not where it has to be for it.
    Torn(String),
}

impl Chain {
    #[must_use]
    pub fn new(at: HashMap<String, Marks>) -> Self {
        Self { at }
    }

    /// How the next transaction fits. The node is taken to have it from here on.
    pub fn link(&mut self, database: &str, decision: &Decision) -> Link {
        let marks = self.at.entry(database.to_owned()).or_default();
        let has = marks.entry(decision.mark_id).or_insert(0);
        if decision.mark_n <= *has {
            return Link::Present;
        }
        if decision.after != Some(*has) {
            let before = decision.after.map_or_else(|| "unknown".to_owned(), |n| n.to_string());
            return Link::Torn(format!(
                "in database {database} it has transaction {has} of mark {}, and the next one comes after {before}",
                decision.mark_id
            ));
        }
        *has = decision.mark_n;
        Link::Next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(mark_id: i32, mark_n: i64, after: Option<i64>) -> Decision {
        Decision { mark_id, mark_n, after, gid: String::new(), owner: None }
    }

    #[test]
    fn what_is_missing_anywhere_is_found_out_and_what_is_there_is_not_applied_again() {
        let mut chain = Chain::new(HashMap::from([("shop".to_owned(), Marks::from([(1, 5)]))]));
        assert_eq!(chain.link("shop", &decision(1, 5, Some(4))), Link::Present);
        // 6 was rolled back.
        assert_eq!(chain.link("shop", &decision(1, 7, Some(5))), Link::Next);
        assert!(matches!(chain.link("shop", &decision(1, 9, Some(8))), Link::Torn(_)), "8 is in no backlog");
        assert!(matches!(chain.link("shop", &decision(1, 9, None)), Link::Torn(_)));
        assert_eq!(chain.link("shop", &decision(1, 8, Some(7))), Link::Next);
        // A mark that was not used before, and the same one of another database.
        assert_eq!(chain.link("shop", &decision(2, 1, Some(0))), Link::Next);
        assert!(matches!(chain.link("bench", &decision(1, 9, Some(8))), Link::Torn(_)));
    }

    #[test]
    fn a_node_that_lost_a_transaction_in_its_crash_is_found_out() {
        let mut chain = Chain::new(HashMap::from([("shop".to_owned(), Marks::from([(1, 4)]))]));
        assert!(matches!(chain.link("shop", &decision(1, 6, Some(5))), Link::Torn(_)));
    }
}
