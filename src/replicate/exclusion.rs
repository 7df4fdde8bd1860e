//! What must not meet: a statement that runs node by node, DDL commits, clients' prepared transactions, and the join of a node.
//!
//! Such a statement is under way in two phases. While the leader works on it, DDL commits go on: those that would disturb it wait
//! for its locks there. From its end on the leader until every follower has done it, no DDL commit may reach a follower, because
//! the order of the two is known to nobody there. From a cut to the join of that node no such statement begins.

use std::sync::Arc;

use super::watched::Watched;

#[derive(Debug, Default)]
pub struct Exclusion {
    state: Watched<State>,
}

#[derive(Debug, Default)]
struct State {
    statement: Option<Running>,
    /// DDL commits between their first word to a follower and their end.
    flights: usize,
    /// Nodes between their cut and their join.
    cuts: usize,
    /// Statements and transactions that wait for a join: the next cut does not overtake them.
    waiting: usize,
    /// Prepared transactions of clients that are not finished.
    holds: usize,
    /// Statements and prepared transactions that were ever begun: none of them is in a backlog.
    begun: u64,
    /// Statements on followers whose locks others may wait for.
    exclusive: usize,
}

#[derive(Debug)]
struct Running {
    /// The leader's backend that works on it.
    pid: i32,
    databases: Vec<String>,
    /// The leader is done.
    following: bool,
}

/// Somebody who may have to wait for a join.
struct Behind<'a> {
    exclusion: &'a Exclusion,
    waits: bool,
}

impl Behind<'_> {
    /// Whether no node is between its cut and its join; from the first time on that one is, no other node is cut before this one has begun.
    fn is_free(&mut self, state: &mut State) -> bool {
        let free = state.cuts == 0;
        if !free && !self.waits {
            self.waits = true;
            state.waiting += 1;
        }
        free
    }
}

/// Why a DDL commit may not fly at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// The leader's backend with this process id may be working on a statement: if it still holds locks, the commit comes first.
    Leading(i32),
    /// Followers are doing it.
    Following,
}

/// A statement under way; dropping it lets the next one begin.
#[derive(Debug)]
pub struct Statement(Arc<Exclusion>);

/// A DDL commit under way.
#[derive(Debug)]
pub struct Flight(Arc<Exclusion>);

/// A node between its cut and its join.
#[derive(Debug)]
pub struct Cut(Arc<Exclusion>);

/// A prepared transaction of a client, which a node that joins would know nothing about.
#[derive(Debug)]
pub struct Hold(Arc<Exclusion>);

/// Locks are held on followers that others may wait for.
#[derive(Debug)]
pub struct Exclusive(Arc<Exclusion>);

impl Exclusion {
    /// Waits for its turn and begins. `pid`: the leader's backend; `databases`: where nobody may connect meanwhile.
    pub async fn begin(self: &Arc<Self>, pid: i32, databases: &[&str]) -> Statement {
        let running =
            || Running { pid, databases: databases.iter().map(|name| (*name).to_owned()).collect(), following: false };
        let mut behind = Behind { exclusion: self, waits: false };
        self.state
            .wait_for(|state| {
                (behind.is_free(state) && state.statement.is_none()).then(|| {
                    state.statement = Some(running());
                    state.begun += 1;
                })
            })
            .await;
        Statement(Arc::clone(self))
    }

    /// Waits until no statement is under way, no client's transaction is prepared, and none waits for the join of another node; none begins
    /// until this is dropped.
    pub async fn cut(self: &Arc<Self>) -> Cut {
        let is_quiet = |state: &State| state.statement.is_none() && state.holds == 0 && state.waiting == 0;
        self.state.wait_for(|state| is_quiet(state).then(|| state.cuts += 1)).await;
        Cut(Arc::clone(self))
    }

    /// Waits until no node is between its cut and its join; none is cut until this is dropped.
    pub async fn hold(self: &Arc<Self>) -> Hold {
        let begin = |state: &mut State| {
            state.holds += 1;
            state.begun += 1;
        };
        let mut behind = Behind { exclusion: self, waits: false };
        self.state.wait_for(|state| behind.is_free(state).then(|| begin(state))).await;
        Hold(Arc::clone(self))
    }

    /// How many statements and prepared transactions were ever begun, and whether none is under way.
    #[must_use]
    pub fn begun(&self) -> (u64, bool) {
        let state = self.state.lock();
        (state.begun, state.statement.is_none() && state.holds == 0)
    }

    /// The same for what a new epoch has found, before anything is cut in it.
    #[must_use]
    pub fn hold_found(self: &Arc<Self>) -> Hold {
        self.state.lock().holds += 1;
        Hold(Arc::clone(self))
    }

    /// Lets a DDL commit reach followers.
    ///
    /// # Errors
    /// If a statement is under way.
    pub fn fly(self: &Arc<Self>) -> Result<Flight, Conflict> {
        let mut state = self.state.lock();
        match &state.statement {
            Some(Running { following: true, .. }) => return Err(Conflict::Following),
            Some(running) => return Err(Conflict::Leading(running.pid)),
            None => state.flights += 1,
        }
        Ok(Flight(Arc::clone(self)))
    }

    /// As [`Self::fly`] for a commit that comes before the statement, which the leader still works on.
    ///
    /// # Errors
    /// If the leader is done with it.
    pub fn fly_before(self: &Arc<Self>) -> Result<Flight, Conflict> {
        let mut state = self.state.lock();
        if let Some(Running { following: true, .. }) = &state.statement {
            return Err(Conflict::Following);
        }
        state.flights += 1;
        Ok(Flight(Arc::clone(self)))
    }

    /// Waits until followers have done the statement under way, if there is one.
    pub async fn followed(&self) {
        self.state
            .wait_for(|state| state.statement.as_ref().is_none_or(|running| !running.following).then_some(()))
            .await;
    }

    /// Waits until no statement is under way.
    pub async fn quiet(&self) {
        self.state.wait_for(|state| state.statement.is_none().then_some(())).await;
    }

    /// Waits until this database may be connected to.
    pub async fn may_connect(&self, database: &str) {
        let affected = |state: &State| {
            state.statement.as_ref().is_some_and(|running| running.databases.iter().any(|name| name == database))
        };
        self.state.wait_for(|state| (!affected(state)).then_some(())).await;
    }

    /// Says that followers are about to take locks that others may wait for.
    #[must_use]
    pub fn exclusive(self: &Arc<Self>) -> Exclusive {
        self.state.lock().exclusive += 1;
        Exclusive(Arc::clone(self))
    }

    /// Whether a half may have to wait on a follower for longer than on the leader.
    #[must_use]
    pub fn may_block_halves(&self) -> bool {
        let state = self.state.lock();
        state.exclusive > 0 || state.statement.as_ref().is_some_and(|running| running.following)
    }
}

impl Statement {
    /// The leader is done: no DDL commit starts to fly from here on.
    pub fn begin_to_follow(&self) {
        self.0.state.change(|state| {
            if let Some(running) = &mut state.statement {
                running.following = true;
            }
        });
    }

    /// The same, and waits for those that fly.
    pub async fn follow(&self) {
        self.begin_to_follow();
        self.0.state.wait_for(|state| (state.flights == 0).then_some(())).await;
    }
}

impl Drop for Behind<'_> {
    fn drop(&mut self) {
        if self.waits {
            self.exclusion.state.change(|state| state.waiting -= 1);
        }
    }
}

impl Drop for Statement {
    fn drop(&mut self) {
        self.0.state.change(|state| state.statement = None);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.state.change(|state| state.flights -= 1);
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.state.change(|state| state.cuts -= 1);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.state.change(|state| state.holds -= 1);
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        self.0.state.change(|state| state.exclusive -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_statement_at_a_time_and_none_between_cut_and_join() {
        let exclusion = Arc::new(Exclusion::default());
        assert_eq!(exclusion.begun(), (0, true));
        let first = exclusion.begin(1, &[]).await;
        assert_eq!(exclusion.begun(), (1, false));
        let mut second = Box::pin(exclusion.begin(2, &[]));
        let mut cut = Box::pin(exclusion.cut());
        assert!((&mut second).now_or_never().is_none() && (&mut cut).now_or_never().is_none());
        drop(first);
        let cut = cut.await;
        let mut hold = Box::pin(exclusion.hold());
        assert!((&mut hold).now_or_never().is_none());
        assert!((&mut second).now_or_never().is_none());
        drop(cut);
        second.await;
        let held = hold.await;
        let mut cut = Box::pin(exclusion.cut());
        assert!((&mut cut).now_or_never().is_none());
        drop(held);
        cut.await;
    }

    #[tokio::test]
    async fn several_cuts_do_not_keep_anybody_waiting_one_after_the_other() {
        let exclusion = Arc::new(Exclusion::default());
        let first = exclusion.cut().await;
        let second = exclusion.cut().await;
        let mut statement = Box::pin(exclusion.begin(1, &[]));
        let mut hold = Box::pin(exclusion.hold());
        assert!((&mut statement).now_or_never().is_none() && (&mut hold).now_or_never().is_none());
        let mut third = Box::pin(exclusion.cut());
        assert!((&mut third).now_or_never().is_none(), "they wait already");
        drop((first, second));
        // Whoever looks first.
        assert!((&mut third).now_or_never().is_none());
        drop(statement.await);
        drop(hold.await);
        let third = third.await;
        // Nobody waits for one that has stopped waiting.
        let mut gives_up = Box::pin(exclusion.hold());
        assert!((&mut gives_up).now_or_never().is_none());
        drop(gives_up);
        drop(exclusion.cut().await);
        drop(third);
    }

    #[tokio::test]
    async fn ddl_commits_go_before_the_statement_or_after_all_followers_have_it() {
        let exclusion = Arc::new(Exclusion::default());
        let statement = exclusion.begin(7, &[]).await;
        assert_eq!(exclusion.fly().err(), Some(Conflict::Leading(7)));
        let before = exclusion.fly_before().unwrap();
        let mut follow = Box::pin(statement.follow());
        assert!((&mut follow).now_or_never().is_none());
        assert_eq!(exclusion.fly_before().err(), Some(Conflict::Following));
        drop(before);
        follow.await;
        assert_eq!(exclusion.fly().err(), Some(Conflict::Following));
        let mut followed = Box::pin(exclusion.followed());
        assert!((&mut followed).now_or_never().is_none() && exclusion.may_block_halves());
        drop(statement);
        followed.await;
        exclusion.fly().unwrap();
    }

    #[tokio::test]
    async fn nobody_connects_to_a_database_that_is_being_copied() {
        let exclusion = Arc::new(Exclusion::default());
        let statement = exclusion.begin(7, &["shop", "template1"]).await;
        exclusion.may_connect("other").await;
        let mut shop = Box::pin(exclusion.may_connect("shop"));
        assert!((&mut shop).now_or_never().is_none());
        drop(statement);
        shop.await;
    }
}
