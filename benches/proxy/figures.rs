//! What follows from the measurements: medians and ratios. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::common::{median_and_max, profile};
use crate::{Case, Options, Rate, Target};

/// One run of pgbench.
pub struct Measured {
    pub case: Case,
    pub target: Target,
    pub result: Result<Rate, String>,
}

/// Everything; field names are stable.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub bench: &'static str,
    pub profile: &'static str,
    pub scale: u32,
    pub seconds: u32,
    pub rounds: u32,
    pub cases: Vec<CaseFigures>,
    /// One sentence each; none: everything held. What failed through others is no problem of ours, see `errors`.
    pub problems: Vec<String>,
    pub errors: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct CaseFigures {
    pub script: &'static str,
    pub protocol: &'static str,
    pub clients: u16,
    /// By target; what failed in every round is not there.
    pub targets: BTreeMap<&'static str, TargetFigures>,
    #[serde(skip)]
    case: Case,
}

#[derive(Debug, Serialize)]
pub struct TargetFigures {
    /// Transactions per second, median of the rounds.
    pub tps: f64,
    pub tps_min: f64,
    pub tps_max: f64,
    /// None: `direct` was not measured.
    pub ratio_to_direct: Option<f64>,
    pub latency_ms: f64,
}

impl Figures {
    pub fn new(options: &Options, targets: &[Target], measured: &[Measured], mut problems: Vec<String>) -> Self {
        let mut cases: Vec<CaseFigures> = Vec::new();
        let mut errors = Vec::new();
        for Measured { case, target, result } in measured {
            if let Err(error) = result {
                let text = format!("{case} {}: {error}", target.name());
                if target.is_ours() { problems.push(text) } else { errors.push(text) }
            }
            if !cases.iter().any(|known| known.case == *case) {
                let (script, protocol) = (case.script.name(), case.protocol.name());
                let figures = targets.iter().filter_map(|target| Some((target.name(), of(measured, *case, *target)?)));
                let targets = figures.collect();
                cases.push(CaseFigures { script, protocol, clients: case.clients, targets, case: *case });
            }
        }
        let Options { seconds, rounds, ref common, .. } = *options;
        Self { bench: "proxy", profile: profile(), scale: common.scale, seconds, rounds, cases, problems, errors }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for target in [Target::Direct, Target::Pgtandem, Target::PgtandemAlone, Target::Pgbouncer, Target::Pgpool] {
            if self.cases.iter().any(|case| case.targets.contains_key(target.name())) {
                names.push(target.name());
            }
        }
        let mut lines = vec![
            format!(
                "pgbench, transactions per second and ratio to direct; scale {}, median of {} rounds of {} s, {} build",
                self.scale, self.rounds, self.seconds, self.profile
            ),
            String::new(),
        ];
        let head: String = names.iter().map(|name| format!(" {name:>15}")).collect();
        lines.push(format!("  {:<18}{head}", "script, clients"));
        for case in &self.cases {
            let cell = |name: &&str| match case.targets.get(name) {
                None => format!(" {:>15}", "failed"),
                Some(TargetFigures { tps, ratio_to_direct: Some(ratio), .. }) => format!(" {tps:>9.0}  {ratio:.2}"),
                Some(TargetFigures { tps, .. }) => format!(" {tps:>15.0}"),
            };
            let cells: String = names.iter().map(cell).collect();
            lines.push(format!("  {:<18}{cells}", case.case.to_string()));
        }
        lines.extend(self.problems.iter().map(|problem| format!("  problem: {problem}")));
        lines.extend(self.errors.iter().map(|error| format!("  failed: {error}")));
        lines.join("\n")
    }
}

/// None: it failed each time.
fn of(measured: &[Measured], case: Case, target: Target) -> Option<TargetFigures> {
    let rates = |target: Target| {
        let of_case = measured.iter().filter(move |one| one.case == case && one.target == target);
        of_case.filter_map(|one| one.result.as_ref().ok())
    };
    rates(target).next()?;
    let (tps, tps_max) = median_and_max(rates(target).map(|rate| rate.tps));
    let direct = rates(Target::Direct).next().map(|_| median_and_max(rates(Target::Direct).map(|rate| rate.tps)).0);
    Some(TargetFigures {
        tps,
        tps_min: rates(target).map(|rate| rate.tps).fold(f64::INFINITY, f64::min),
        tps_max,
        ratio_to_direct: direct.map(|direct| tps / direct),
        latency_ms: median_and_max(rates(target).map(|rate| rate.latency_ms)).0,
    })
}
