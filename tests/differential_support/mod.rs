//! Folders of SQL scripts through a lone server and through the proxy: what psql prints must be the same, byte for
//! byte, and the nodes must hold the same afterwards.
//!
//! ```text
//! script -> psql -> first lone server   ─┐ not the same: the script is unstable and does not count
//!        -> psql -> second lone server  ─┘
//!        -> psql -> proxy, two nodes      compared with the first; then the tables of both nodes
//! at the end: dumps of both nodes, compared
//! ```
//!
//! Nothing is normalised. A script that can not be the same stands in docs/differential.md with the reason.

mod dump;
mod expected;
mod lone;
mod psql;
mod suite;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use pgtandem::sandbox::{Layout, compare, control, demo};

use crate::common::Cluster;
use expected::Expected;
use lone::Lone;
use psql::{Place, Psql};
use suite::{Script, Suite};

/// Lines of a diff that the report shows; the whole of it is in the folder of results.
const SHOWN_LINES_MAX: usize = 12;

/// What came of one script.
enum Verdict {
    Same,
    /// Two lone servers print different things.
    Unstable,
    /// The proxy's output differs from the lone server's, in so many lines.
    Differs {
        lines: usize,
        head: String,
    },
    /// The servers differ afterwards, or a node was lost, whatever psql printed.
    Nodes(Vec<String>),
    Skipped(&'static str),
}

/// What came of a folder.
#[derive(Default)]
pub struct Totals {
    pub same: usize,
    pub stable: usize,
    /// A sentence each; none: all that is expected to be the same is the same.
    pub failures: Vec<String>,
}

/// Everything that a run needs.
struct Run {
    suite: Suite,
    expected: Expected,
    results: PathBuf,
    cluster: Cluster,
    first: Lone,
    second: Lone,
}

/// Runs every script of a folder, prints a line for each and the totals.
pub async fn run(dir: &Path, only: &[&str], results: &Path) -> Totals {
    let work = crate::common::folder();
    let suite = Suite::open(dir, only, work.path());
    let first = Lone::start(&work.path().join("lone1")).await;
    let second = Lone::start(&work.path().join("lone2")).await;
    let cluster = crate::common::cluster();
    // Only this program makes that folder, and what an earlier run left in it would be taken for this one's.
    let _ = std::fs::remove_dir_all(results);
    std::fs::create_dir_all(results).expect("a folder for the results");
    let run = Run { suite, expected: Expected::of(dir), results: results.to_owned(), cluster, first, second };
    let totals = run.all().await;
    println!("{} of {} stable scripts print the same; diffs are in {}", totals.same, totals.stable, results.display());
    totals
}

impl Run {
    async fn all(&self) -> Totals {
        let mut totals = Totals::default();
        for place in [self.first.place(), self.second.place(), self.proxy()] {
            self.suite.prepare(&place);
        }
        for script in &self.suite.scripts {
            let verdict = self.script(script).await;
            let name = script.name.as_str();
            let reason = self.expected.reason(name);
            match &verdict {
                Verdict::Same => {
                    totals.same += 1;
                    totals.stable += 1;
                    println!("{name}: same");
                    if reason.is_some() {
                        totals.failures.push(format!("{name} is the same now: take it out of {}", expected::FILE));
                    }
                }
                Verdict::Unstable => println!("{name}: unstable, differs between two lone servers"),
                Verdict::Skipped(why) => println!("{name}: skipped, {why}"),
                Verdict::Differs { lines, head } => {
                    totals.stable += 1;
                    match reason {
                        Some(reason) => println!("{name}: differs in {lines} lines, as expected: {reason}"),
                        None => {
                            println!("{name}: DIFFERS in {lines} lines\n{head}");
                            totals.failures.push(format!("{name} differs"));
                        }
                    }
                }
                Verdict::Nodes(differences) => {
                    totals.stable += 1;
                    let text = differences.join("\n    ");
                    println!("{name}: THE NODES DIFFER\n    {text}");
                    totals.failures.push(format!("{name}: {text}"));
                }
            }
        }
        let differences = self.dumps();
        if !differences.is_empty() {
            println!("dumps of the nodes DIFFER\n{}", head(&differences));
            totals.failures.push("the dumps of the nodes differ".to_owned());
        }
        totals
    }

    fn proxy(&self) -> Place {
        Place {
            name: "proxy",
            bin_dir: self.cluster.layout.plan.bin_dir.clone(),
            port: self.cluster.layout.proxy_port(),
        }
    }

    async fn script(&self, script: &Script) -> Verdict {
        let Some(file) = &script.file else { return Verdict::Skipped("the folder has no such file") };
        let output = async |place: &Place| Psql { suite: &self.suite, place }.run(&script.name, file).await;
        let lone = output(&self.first.place()).await;
        let again = output(&self.second.place()).await;
        let found = output(&self.proxy()).await;
        let write = |kind: &str, bytes: &[u8]| {
            let path = self.results.join(format!("{}.{kind}", script.name));
            std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            path
        };
        let logs = self.cluster.logs();
        let nodes = self.nodes().await;
        if !nodes.is_empty() {
            write("nodes", format!("{}\n{logs}", nodes.join("\n")).as_bytes());
        }
        let (lone_file, found_file) = (write("lone", &lone), write("proxy", &found));
        let diff = dump::diff(&lone_file, &found_file);
        write("diff", diff.as_bytes());
        if !nodes.is_empty() {
            Verdict::Nodes(nodes)
        } else if lone != again {
            write("unstable", dump::diff(&lone_file, &write("again", &again)).as_bytes());
            Verdict::Unstable
        } else if lone == found {
            Verdict::Same
        } else {
            let changed =
                |line: &&str| line.starts_with(['-', '+']) && !line.starts_with("---") && !line.starts_with("+++");
            Verdict::Differs { lines: diff.lines().filter(changed).count(), head: head(&diff) }
        }
    }

    /// What is wrong with the nodes after a script, one sentence each. A node that differs or left is recovered, so that the
    /// scripts after this one are judged by themselves.
    async fn nodes(&self) -> Vec<String> {
        let layout = &self.cluster.layout;
        let mut wrong = Vec::new();
        let members = control::members(layout).await.expect("the proxy answers");
        let absent: Vec<String> =
            (0..layout.plan.nodes).map(Layout::node_name).filter(|n| !members.contains(n)).collect();
        wrong.extend(absent.iter().map(|node| format!("{node} is no member any more: {}", self.why(node))));
        if absent.is_empty() {
            let unfinished = demo::wait_finished(layout).await.expect("servers answer");
            wrong.extend(unfinished.iter().map(|gid| format!("transaction {gid} is not finished")));
            wrong.extend(compare::compare(layout).await.expect("servers answer").differences);
        }
        if !wrong.is_empty() {
            for index in 1..layout.plan.nodes {
                self.cluster.recover(index);
            }
        }
        wrong
    }

    /// What the proxy's log says last about a node that left.
    fn why(&self, node: &str) -> String {
        let log = std::fs::read(self.cluster.layout.proxy_log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let about = |line: &&str| line.contains("leaves the member set") && line.contains(node);
        log.lines().rev().find(about).unwrap_or("the proxy's log does not say why").to_owned()
    }

    /// The diff of the dumps of the nodes; empty if they are the same.
    fn dumps(&self) -> String {
        let layout = &self.cluster.layout;
        let dumps: Vec<PathBuf> = (0..layout.plan.nodes)
            .map(|index| {
                let path = self.results.join(format!("{}.dump", Layout::node_name(index)));
                let text = dump::server(&layout.plan.bin_dir, layout.postgres_port(index));
                std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                path
            })
            .collect();
        let mut all = String::new();
        for other in &dumps[1..] {
            all.push_str(&dump::diff(&dumps[0], other));
        }
        all
    }
}

fn head(diff: &str) -> String {
    let mut text = String::new();
    let lines = diff.lines().skip_while(|line| !line.starts_with("@@"));
    for line in lines.take(SHOWN_LINES_MAX) {
        // Writing to a string can not fail.
        let _ = writeln!(text, "    {line}");
    }
    text.trim_end().to_owned()
}
