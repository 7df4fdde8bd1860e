//! What ran in the `once` lane, by shape, and which shapes are refused because they gave another result on a follower.
//!
//! In the proxy's memory alone: a shape that was refused may run again after a restart, and is found again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sql::shape;

/// Shapes that are counted one by one; what comes after them is counted under one name.
const SHAPES_MAX: usize = 1000;
/// Bytes of a shape's text that are kept.
const SHAPE_BYTES_MAX: usize = 500;
/// The name of all shapes past [`SHAPES_MAX`].
const OTHERS: &str = "(other shapes)";

/// One shape: a text without its literals, in one database.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShapeName {
    pub database: Arc<str>,
    pub text: Arc<str>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShapeCount {
    /// How often it ran on every member.
    pub runs: u64,
    /// How often it was undone because it did not end before its limit under the closed gate.
    pub again: u64,
    /// Why it is not proven to do the same on every server; empty if it is.
    pub unproven: String,
    /// Why it is refused from now on.
    pub refused: Option<String>,
}

/// What ran in the `once` lane since the proxy started.
#[derive(Debug, Default)]
pub struct Shapes {
    counts: Mutex<HashMap<ShapeName, ShapeCount>>,
    /// One such statement after the other, in the order of asking.
    pub order: Arc<tokio::sync::Mutex<()>>,
}

impl ShapeName {
    /// From a shape's key. No literal is in it, also where the key has some because they decide what the statement does.
    #[must_use]
    pub fn new(database: &Arc<str>, key: &str) -> Self {
        let text = shape::without_literals(key);
        let text = match text.char_indices().find(|(at, _)| *at >= SHAPE_BYTES_MAX) {
            Some((at, _)) => format!("{} ...", text.get(..at).unwrap_or_default()),
            None => text,
        };
        Self { database: Arc::clone(database), text: text.into() }
    }
}

impl Shapes {
    fn counts(&self) -> MutexGuard<'_, HashMap<ShapeName, ShapeCount>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, name: &ShapeName, change: impl FnOnce(&mut ShapeCount)) {
        let mut counts = self.counts();
        if counts.len() >= SHAPES_MAX && !counts.contains_key(name) {
            let others = ShapeName { database: Arc::from(""), text: Arc::from(OTHERS) };
            return change(counts.entry(others).or_default());
        }
        change(counts.entry(name.clone()).or_default());
    }

    pub fn ran(&self, name: &ShapeName, unproven: Option<&str>) {
        self.change(name, |count| {
            count.runs += 1;
            unproven.unwrap_or_default().clone_into(&mut count.unproven);
        });
    }

    pub fn again(&self, name: &ShapeName) {
        self.change(name, |count| count.again += 1);
    }

    /// From now on it is refused.
    pub fn refuse(&self, name: &ShapeName, why: &str) {
        self.change(name, |count| count.refused = Some(why.to_owned()));
    }

    /// Why this shape is refused, if it is.
    #[must_use]
    pub fn refused(&self, name: &ShapeName) -> Option<String> {
        self.counts().get(name)?.refused.clone()
    }

    /// All shapes, those that are refused first, then by how often they ran.
    #[must_use]
    pub fn list(&self) -> Vec<(ShapeName, ShapeCount)> {
        let mut list: Vec<_> = self.counts().iter().map(|(name, count)| (name.clone(), count.clone())).collect();
        list.sort_by(|(a, x), (b, y)| {
            y.refused.is_some().cmp(&x.refused.is_some()).then(y.runs.cmp(&x.runs)).then(a.cmp(b))
        });
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_not_kept_and_refused_shapes_come_first() {
        let shapes = Shapes::default();
        let name = |key: &str| ShapeName::new(&Arc::from("shop"), key);
        assert_eq!(&*name("CALL p(\0s, \0i)").text, "CALL p(?, ?)");
        let code =
            "DO $a$ begin update t set a = 'x y', b = $$secret$$ where id = 7; perform f($$two words 8$$); end $a$";
        let masked = "DO $a$ begin update t set a = ?, b = ? where id = ?; perform f(?); end $a$";
        assert_eq!(&*name(code).text, masked);
        assert_eq!(&*name("DO 'begin perform f(7); end'").text, "DO ?");
        assert_eq!(&*name("DO $$ begin perform f('it ends never").text, "DO ?");
        assert_eq!(
            &*name("SELECT f(\0i), set_config('a.b', 'secret', true)").text,
            "SELECT f(?), set_config(?, ?, true)"
        );
        assert_eq!(name(&"é".repeat(SHAPE_BYTES_MAX)).text.len(), SHAPE_BYTES_MAX + 4);
        (0..3).for_each(|_| shapes.ran(&name("CALL often()"), None));
        shapes.ran(&name("CALL bad()"), Some("it is written in C"));
        shapes.refuse(&name("CALL bad()"), "it changed other rows on b");
        let list = shapes.list();
        assert_eq!(&*list[0].0.text, "CALL bad()");
        assert_eq!((list[0].1.unproven.as_str(), list[1].1.runs), ("it is written in C", 3));
        assert!(shapes.refused(&name("CALL often()")).is_none());
    }

    #[test]
    fn the_number_of_shapes_is_limited() {
        let shapes = Shapes::default();
        for i in 0..SHAPES_MAX + 5 {
            shapes.ran(&ShapeName::new(&Arc::from("shop"), &format!("CALL p{i}()")), None);
        }
        assert_eq!(shapes.list().len(), SHAPES_MAX + 1);
        assert_eq!(&*shapes.list()[0].0.text, OTHERS);
    }
}
