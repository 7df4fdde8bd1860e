//! The page for the night, docs/failover.md, typed line by line on two hosts with a network of their own: the host of the leader and the proxy
//! is lost, in four ways, the other one is promoted, and the lost one comes back.
//!
//! `make namespaces`; it wants root, so it does not run with the other tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod host;

use common::page::{command, commands};
use common::writer::{TABLE, Writers};
use common::{comes, text};
use host::{Host, Site};
use rustix::process::Signal;

const WRITERS: i64 = 3;

/// How the host of the leader is lost. Its cable is pulled each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// It is switched off.
    Off,
    /// Everything on it stands still, and goes on when it is back.
    Hangs,
    /// It lives, and goes on alone: what is stated is not true.
    GoesOn,
}

/// The play: `a` is lost, `b` is promoted.
struct Play {
    site: Site,
    a: usize,
    b: usize,
    /// Everything that was acknowledged and must be there.
    acknowledged: Vec<i64>,
    writers: i64,
}

impl Play {
    fn writers(&mut self, host: usize) -> Writers {
        let first = self.writers;
        self.writers += WRITERS;
        Writers::on(self.site.hosts[host].clients(), Host::proxy_port(), first..self.writers)
    }

    async fn wait_more(&self, writers: &Writers, count: usize) {
        let before = writers.count();
        let more = comes(async || writers.count() >= before + count).await;
        assert!(more, "nobody can write\n{}", self.site.cluster.logs());
    }

    /// Stops the writers and keeps what they were told.
    async fn stop(&mut self, mut writers: Writers) {
        writers.stop().await;
        self.acknowledged.extend(writers.acknowledged());
    }

    fn names(&self) -> (String, String) {
        (self.site.hosts[self.a].name(), self.site.hosts[self.b].name())
    }

    /// Both hosts hold the same, all that was acknowledged, none twice, and nothing prepared.
    async fn check(&self) {
        let list: Vec<String> = self.acknowledged.iter().map(ToString::to_string).collect();
        let wrong = format!(
            "select (select count(*) from unnest('{{{}}}'::bigint[]) n where n not in (select n from written))::text || ' lost, ' || \
             (select count(*) - count(distinct n) from written)::text || ' twice, ' || \
             (select count(*) from pg_prepared_xacts)::text || ' prepared'",
            list.join(",")
        );
        for host in &self.site.hosts {
            let is_right = async || host.ask(&self.site.cluster, &wrong).await == "0 lost, 0 twice, 0 prepared";
            let said = comes(is_right).await;
            assert!(said, "{}: {}", host.name(), host.ask(&self.site.cluster, &wrong).await);
        }
        let all = "select md5(string_agg(n::text, ',' order by n)) from written";
        let [one, other] = &self.site.hosts;
        assert_eq!(one.ask(&self.site.cluster, all).await, other.ask(&self.site.cluster, all).await);
    }

    /// `a` is lost, and everything is done as the page says. `stands_by`: a proxy runs on `b` already.
    async fn lose(&mut self, loss: Loss, stands_by: bool) {
        eprintln!("---- {loss:?}{}", if stands_by { ", a proxy stands by" } else { "" });
        let (a, b) = self.names();
        let page = commands(0, &a, &b);
        let [status, promote, stated, recover] = page.as_slice() else { panic!("{page:?}") };
        let writers = self.writers(self.a);
        self.wait_more(&writers, 50).await;
        if stands_by {
            let says = format!("the proxy of this cluster runs on {a}");
            self.site.wait_status(self.b, &[&says]).await;
        }

        self.site.pull_cable();
        let mut alone = None;
        match loss {
            Loss::Off => {
                self.site.hosts[self.a].power_off().await;
                self.stop(writers).await;
            }
            Loss::Hangs => {
                self.site.hosts[self.a].signal(Signal::STOP);
                alone = Some(writers);
            }
            Loss::GoesOn => {
                // What is acknowledged from its lease's end on is on the old host alone.
                self.site.wait_status(self.a, &[&format!("{b} is out")]).await;
                self.wait_more(&writers, 50).await;
                alone = Some(writers);
            }
        }

        // Nobody is served where nothing was typed.
        assert!(self.site.hosts[self.b].connect().await.is_err());
        self.site.typed(self.b, status, &[]);
        let asked = self.site.typed(self.b, promote, &["--yes"]);
        assert!(!asked.status.success());
        for part in ["SAFE ONLY IF WHAT YOU STATE IS TRUE", &format!("--peer-is-dead {a}")] {
            assert!(text(&asked).contains(part), "{part}");
        }
        self.site.succeeds(self.b, stated, &["--yes"]);
        if !stands_by {
            self.site.hosts[self.b].start(&self.site.cluster, "proxy");
        }
        let served = comes(async || self.site.hosts[self.b].connect().await.is_ok()).await;
        assert!(served, "{}\n{}", self.site.status(self.b), self.site.cluster.logs());
        self.site.wait_status(self.b, &[&format!("writes are on {b} alone")]).await;
        let on_b = self.writers(self.b);
        self.wait_more(&on_b, 50).await;

        self.comes_back(loss, alone).await;
        match loss {
            Loss::GoesOn => {
                self.site.wait_status(self.b, &["forked"]).await;
                let refused = self.site.typed(self.b, recover, &[]);
                assert!(!refused.status.success());
                self.site.succeeds(self.b, &command("pgtandem discard-fork a", &a, &b), &["--yes"]);
            }
            Loss::Off | Loss::Hangs => {
                self.site.wait_status(self.b, &["stale", &format!("pgtandem recover {a}")]).await;
            }
        }
        self.site.succeeds(self.b, recover, &[]);
        self.wait_more(&on_b, 50).await;
        self.stop(on_b).await;
        self.site.wait_well(self.b).await;
        self.check().await;
    }

    /// The lost host is there again: it serves nobody, and says so.
    async fn comes_back(&mut self, loss: Loss, alone: Option<Writers>) {
        let old = &self.site.hosts[self.a];
        self.site.plug_in_cable();
        match loss {
            Loss::Off => {
                old.start(&self.site.cluster, "agent");
                old.start(&self.site.cluster, "proxy");
            }
            Loss::Hangs => old.signal(Signal::CONT),
            Loss::GoesOn => {}
        }
        let refused = async || old.connect().await.is_err_and(|error| error == "57P03");
        assert!(comes(refused).await, "{}\n{}", self.site.status(self.a), self.site.cluster.logs());
        self.site.wait_status(self.a, &["the proxy of this host runs and serves nobody"]).await;
        let Some(mut writers) = alone else { return };
        writers.stop().await;
        if loss == Loss::Hangs {
            // What it had acknowledged before is on the other host, and it has acknowledged nothing since.
            self.acknowledged.extend(writers.acknowledged());
        }
    }

    /// The PostgreSQL of `a` is lost, `b` leads through the proxy of `a`, and then nothing comes through to that host. Its proxy lives, and can
    /// acknowledge nothing.
    async fn lose_the_proxys_host(&mut self) {
        eprintln!("---- b leads already");
        let (a, b) = self.names();
        let page = commands(0, &a, &b);
        let [_, promote, _, recover] = page.as_slice() else { panic!("{page:?}") };
        let writers = self.writers(self.a);
        self.wait_more(&writers, 50).await;
        self.site.cluster.kill_postgres(self.a);
        self.site.wait_status(self.a, &[&format!("leader {b}")]).await;
        self.wait_more(&writers, 50).await;
        self.site.pull_cable();
        let said = self.site.succeeds(self.b, promote, &["--yes"]);
        assert!(said.contains(&format!("promote {b}: SAFE\n")), "{said}");
        let served = comes(async || self.site.hosts[self.b].connect().await.is_ok()).await;
        assert!(served, "{}\n{}", self.site.status(self.b), self.site.cluster.logs());
        let on_b = self.writers(self.b);
        self.wait_more(&on_b, 50).await;
        self.comes_back(Loss::Hangs, Some(writers)).await;
        self.site.wait_status(self.b, &["stale", &format!("pgtandem recover {a}")]).await;
        self.site.succeeds(self.b, recover, &[]);
        self.wait_more(&on_b, 50).await;
        self.stop(on_b).await;
        self.site.wait_well(self.b).await;
        self.check().await;
    }

    /// The planned change, typed where the proxy serves: back to where it was.
    async fn switch_back(&mut self) {
        let (a, b) = self.names();
        let planned = commands(1, &b, &a);
        let [switch] = planned.as_slice() else { panic!("{planned:?}") };
        self.site.wait_status(self.a, &[&format!("the proxy of this cluster runs on {b}")]).await;
        self.site.succeeds(self.b, switch, &[]);
        let served = comes(async || self.site.hosts[self.a].connect().await.is_ok()).await;
        assert!(served, "{}\n{}", self.site.status(self.a), self.site.cluster.logs());
        let refused = async || self.site.hosts[self.b].connect().await.is_err_and(|error| error == "57P03");
        assert!(comes(refused).await, "{}", self.site.status(self.b));
        let writers = self.writers(self.a);
        self.wait_more(&writers, 50).await;
        self.stop(writers).await;
        self.site.wait_well(self.a).await;
        self.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_for_the_night_on_two_hosts() {
    let site = Site::up().await;
    site.hosts[0].connect().await.unwrap().batch_execute(TABLE).await.unwrap();
    let mut play = Play { site, a: 0, b: 1, acknowledged: Vec::new(), writers: 0 };
    play.lose(Loss::Off, false).await;
    play.switch_back().await;
    play.lose(Loss::Hangs, true).await;
    play.switch_back().await;
    play.lose(Loss::GoesOn, true).await;
    play.switch_back().await;
    play.lose_the_proxys_host().await;
}
