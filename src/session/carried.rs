//! What of a session lives in the leader's backend alone and is made again when another server takes over: its settings and its LISTENs, as
//! the statements that made them; and what can not be made again, and why.
//!
//! What a statement leaves behind is judged once per shape (`sql::stays`); here it is kept for as long as the server would have kept it, the
//! ends of transactions and savepoints included. Pure.

use std::sync::Arc;

use crate::sql::set_config::settings;
use crate::sql::stays::Stays;

/// Texts that one session keeps, bytes; past that it can not move.
const BYTES_MAX: usize = 64 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    stays: Stays,
    text: Arc<str>,
}

#[derive(Debug, Default)]
pub struct Carried {
    /// In the order in which they are to be made again; at most one of each key.
    entries: Vec<Entry>,
    bytes: usize,
    /// Of the transaction under way, each with the number of savepoints that were open.
    pending: Vec<(usize, Entry)>,
    unmovable: Option<&'static str>,
}

impl Carried {
    /// A statement was done. `savepoints`: how many are open; `None`: outside a transaction.
    pub fn note(&mut self, stays: &Stays, text: &str, savepoints: Option<usize>) {
        match stays {
            Stays::Nothing => return,
            // The server keeps these whatever becomes of the transaction (locks), or they are too rare to tell apart.
            Stays::Unmovable(why) => return self.unmovable = Some(why),
            Stays::SetConfig if is_local(text) => return,
            Stays::SetConfig => {
                let Some(settings) = settings(text) else {
                    return self.unmovable = Some("it has used set_config() for the whole session");
                };
                for setting in settings {
                    self.note(&Stays::Set(setting.name), &setting.text, savepoints);
                }
                return;
            }
            _ => {}
        }
        let entry = Entry { stays: stays.clone(), text: text.into() };
        match savepoints {
            Some(open) => self.pending.push((open, entry)),
            None => self.apply(entry),
        }
    }

    /// The transaction ended.
    pub fn end(&mut self, committed: bool) {
        for (_, entry) in std::mem::take(&mut self.pending) {
            if committed {
                self.apply(entry);
            }
        }
    }

    /// ROLLBACK TO the savepoint at this place.
    pub fn roll_back_to(&mut self, place: usize) {
        self.pending.retain(|(open, _)| *open <= place);
    }

    /// RELEASE of the savepoint at this place: what was done since then is the transaction's.
    pub fn release(&mut self, place: usize) {
        for (open, _) in &mut self.pending {
            *open = (*open).min(place);
        }
    }

    fn apply(&mut self, entry: Entry) {
        let before = self.entries.len();
        match &entry.stays {
            Stays::All => {
                *self = Self::default();
                return;
            }
            // RESET ALL leaves the roles alone.
            Stays::ResetAll => self.entries.retain(|kept| match &kept.stays {
                Stays::Set(name) => matches!(name.as_str(), "role" | "session_authorization"),
                _ => true,
            }),
            Stays::UnlistenAll => self.entries.retain(|kept| !matches!(kept.stays, Stays::Listen(_))),
            Stays::Set(name) | Stays::Reset(name) => {
                self.entries.retain(|kept| !matches!(&kept.stays, Stays::Set(known) if known == name));
            }
            Stays::Listen(channel) | Stays::Unlisten(channel) => {
                self.entries.retain(|kept| !matches!(&kept.stays, Stays::Listen(known) if known == channel));
            }
            Stays::Nothing | Stays::SetConfig | Stays::Unmovable(_) => {}
        }
        if self.entries.len() < before {
            self.bytes = self.entries.iter().map(|kept| kept.text.len()).sum();
        }
        if matches!(entry.stays, Stays::Set(_) | Stays::Listen(_)) {
            self.bytes += entry.text.len();
            if self.bytes > BYTES_MAX {
                self.unmovable = Some("its settings are too long to be kept");
                return;
            }
            self.entries.push(entry);
        }
    }

    /// Why the session can not go on at another server, if it can not.
    #[must_use]
    pub fn unmovable(&self) -> Option<&'static str> {
        self.unmovable
    }

    /// The statements that make it again, in order.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.entries.iter().map(|entry| &entry.text)
    }
}

/// Whether every `set_config()` of a text ends with its transaction: its last argument is a plain `true`.
fn is_local(text: &str) -> bool {
    let plain: String = text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_lowercase()).collect();
    let calls = plain.matches("set_config(").count();
    calls > 0 && plain.matches(",true)").count() == calls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str) -> Stays {
        Stays::Set(name.to_owned())
    }

    fn texts(carried: &Carried) -> Vec<&str> {
        carried.texts().map(|text| &**text).collect()
    }

    #[test]
    fn the_last_of_each_is_kept_in_the_order_of_setting() {
        let mut carried = Carried::default();
        carried.note(&set("work_mem"), "set work_mem = 1", None);
        carried.note(&set("role"), "set role r", None);
        carried.note(&set("work_mem"), "set work_mem = 2", None);
        carried.note(&Stays::Listen("a".into()), "listen a", None);
        assert_eq!(texts(&carried), ["set role r", "set work_mem = 2", "listen a"]);
        carried.note(&Stays::ResetAll, "reset all", None);
        assert_eq!(texts(&carried), ["set role r", "listen a"]);
        carried.note(&Stays::UnlistenAll, "unlisten *", None);
        carried.note(&Stays::Unmovable("why"), "select pg_advisory_lock(1)", None);
        assert_eq!((texts(&carried), carried.unmovable()), (vec!["set role r"], Some("why")));
        carried.note(&Stays::All, "discard all", None);
        assert_eq!((texts(&carried), carried.unmovable()), (vec![], None));
    }

    #[test]
    fn what_a_transaction_sets_is_kept_if_it_commits() {
        let mut carried = Carried::default();
        carried.note(&set("a"), "set a = 1", Some(0));
        carried.note(&set("b"), "set b = 1", Some(1));
        carried.note(&set("c"), "set c = 1", Some(2));
        carried.release(1);
        carried.roll_back_to(0);
        carried.end(true);
        assert_eq!(texts(&carried), ["set a = 1"]);
        carried.note(&set("a"), "set a = 2", Some(0));
        carried.end(false);
        assert_eq!(texts(&carried), ["set a = 1"]);
    }

    #[test]
    fn set_config_with_literals_is_a_setting() {
        let mut carried = Carried::default();
        carried.note(&set("timezone"), "set time zone 'UTC'", None);
        carried.note(&Stays::SetConfig, "SELECT set_config('TimeZone', 'Asia/Tokyo', false)", Some(0));
        carried.end(true);
        assert_eq!(texts(&carried), ["SELECT pg_catalog.set_config('TimeZone', 'Asia/Tokyo', false)"]);
        carried.note(&Stays::SetConfig, "SELECT set_config('a.b', $1, false)", None);
        assert!(carried.unmovable().is_some());
    }

    #[test]
    fn a_local_set_config_leaves_nothing() {
        assert!(is_local("SELECT set_config('a', 'b', true), set_config ('c', 'd', TRUE)"));
        assert!(!is_local("SELECT set_config('a', 'b', true), set_config('c', 'd', false)"));
        assert!(!is_local("SELECT set_config($1, $2, $3)"));
    }
}
