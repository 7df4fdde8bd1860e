//! What was played in all runs together: a small file, written after each round.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// The round that comes next.
    pub next: u64,
    pub green: u64,
    /// Rounds whose fault could not be made on that machine.
    pub skipped: u64,
    pub red: Vec<u64>,
}

#[derive(Debug, Default)]
pub struct State {
    path: Option<PathBuf>,
    pub seeds: BTreeMap<u64, Seed>,
}

impl State {
    /// That of earlier runs; none without a folder.
    pub fn load(folder: Option<&Path>) -> Self {
        let Some(folder) = folder else { return Self::default() };
        std::fs::create_dir_all(folder).expect("a folder for the state");
        let path = folder.join("state.json");
        let seeds = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => panic!("{}: {error}", path.display()),
        };
        Self { path: Some(path), seeds }
    }

    pub fn of(&mut self, seed: u64) -> &mut Seed {
        self.seeds.entry(seed).or_default()
    }

    /// Replaces the file whole: a run may be ended at any time.
    pub fn store(&self) {
        let Some(path) = &self.path else { return };
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(&self.seeds).expect("plain values");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path)).expect("the state");
    }

    pub fn summary(&self) -> String {
        let count = |of: fn(&Seed) -> u64| self.seeds.values().map(of).sum::<u64>();
        let red: Vec<String> = self
            .seeds
            .iter()
            .flat_map(|(seed, rounds)| rounds.red.iter().map(move |round| format!("{seed}/{round}")))
            .collect();
        let red = if red.is_empty() { "none".to_owned() } else { red.join(", ") };
        let (green, skipped) = (count(|seed| seed.green), count(|seed| seed.skipped));
        format!("{green} rounds green, {skipped} skipped, red (seed/round): {red}")
    }
}

#[test]
fn a_later_run_goes_on_where_the_last_one_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = State::load(Some(folder.path()));
    *state.of(7) = Seed { next: 3, green: 2, skipped: 0, red: vec![1] };
    state.store();
    let mut again = State::load(Some(folder.path()));
    assert_eq!(again.of(7), &Seed { next: 3, green: 2, skipped: 0, red: vec![1] });
    assert_eq!(again.of(8), &Seed::default());
    assert_eq!(again.summary(), "2 rounds green, 0 skipped, red (seed/round): 7/1");
}
