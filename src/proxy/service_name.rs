//! The DNS name that clients connect to: where it points is asked every few seconds, and a proxy to whose host it no longer points stops
//! serving. So changing one DNS record is enough to be sure that an old host, which nobody can reach to switch it off, takes no client.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup_ip::LookupIp;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::observe::status::Problem;
use crate::replicate::hub::{Hub, Reign};

/// Longest wait for the answer to one question, and at most half of the time between two.
const ANSWER_MS_MAX: u64 = 2_000;
/// Answers in a row that name other hosts, until the proxy stops.
const ELSEWHERE_MAX: u32 = 2;
/// The same without an answer that names this host, for a strict one: who can not ask does not know that it may still serve.
const NOT_HERE_MAX: u32 = 3;
/// Answers in a row that name this host, until a strict proxy begins: five times the time between two. Whoever was named before has stopped after
/// three times one and a half.
const HERE_MIN: u32 = 6;

/// Where the name points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Here,
    /// To these; none: the name has no address.
    Elsewhere(Vec<IpAddr>),
    Unknown(String),
}

/// What follows from the answers. Pure.
#[derive(Debug)]
pub struct Pointing {
    is_strict: bool,
    /// It has pointed here since the proxy runs: only then it means something that it does not any more, unless this is strict.
    has_pointed_here: bool,
    here: u32,
    elsewhere: u32,
    not_here: u32,
    may_serve: bool,
    last: Answer,
}

impl Pointing {
    #[must_use]
    pub fn new(is_strict: bool) -> Self {
        let last = Answer::Unknown("it was not asked for yet".into());
        Self { is_strict, has_pointed_here: false, here: 0, elsewhere: 0, not_here: 0, may_serve: !is_strict, last }
    }

    pub fn seen(&mut self, answer: Answer) {
        match answer {
            Answer::Here => (self.here, self.elsewhere, self.not_here) = (self.here + 1, 0, 0),
            Answer::Elsewhere(_) => {
                (self.here, self.elsewhere, self.not_here) = (0, self.elsewhere + 1, self.not_here + 1);
            }
            // Says nothing against what was known before.
            Answer::Unknown(_) => (self.here, self.not_here) = (0, self.not_here + 1),
        }
        self.has_pointed_here |= self.here > 0;
        self.last = answer;
        let begins = self.here >= if self.is_strict { HERE_MIN } else { 1 };
        let moved = self.elsewhere >= ELSEWHERE_MAX && (self.is_strict || self.has_pointed_here);
        if begins {
            self.may_serve = true;
        } else if moved || (self.is_strict && self.not_here >= NOT_HERE_MAX) {
            self.may_serve = false;
        }
    }

    /// Why the proxy of this host must not serve, if so.
    #[must_use]
    pub fn problem(&self, name: &str) -> Option<Problem> {
        if self.may_serve {
            return None;
        }
        let hint = format!("let {name} point to this host if it is to serve; it begins by itself then");
        let what = match &self.last {
            Answer::Here => {
                format!("{name} points to this host since a moment ago; whoever was there before is given time to stop")
            }
            Answer::Elsewhere(addresses) if addresses.is_empty() => format!("{name} has no address in the DNS"),
            Answer::Elsewhere(addresses) => {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                format!("{name} points to {}, not to this host", addresses.join(", "))
            }
            Answer::Unknown(why) => format!("it is not known where {name} points: {why}"),
        };
        Some(Problem { what, hint })
    }
}

/// The name, and how it is asked for.
pub struct ServiceName {
    name: String,
    /// Addresses of this host.
    own: Vec<IpAddr>,
    every: Duration,
    answer_max: Duration,
    resolver: TokioResolver,
    pointing: Pointing,
}

impl ServiceName {
    /// None: no name is configured.
    ///
    /// # Errors
    /// If no server can be asked: the system's settings can not be read.
    pub fn new(config: &Config) -> Result<Option<Self>, NetError> {
        let fence = &config.fence;
        let Some(name) = &fence.dns else { return Ok(None) };
        let node = config.node(&config.proxy.node);
        let own = node.map_or_else(Vec::new, |node| match node.service_addresses.as_slice() {
            [] => vec![node.agent.ip()],
            given => given.to_vec(),
        });
        let mut builder = if fence.dns_servers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let server = |address: &std::net::SocketAddr| {
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                    connection.port = address.port();
                    connection
                });
                NameServerConfig::new(address.ip(), true, connections.into())
            };
            let servers = fence.dns_servers.iter().map(server).collect();
            TokioResolver::builder_with_config(
                ResolverConfig::from_parts(None, Vec::new(), servers),
                TokioRuntimeProvider::default(),
            )
        };
        let answer_max = Duration::from_millis(ANSWER_MS_MAX.min(fence.dns_ms / 2));
        asking(builder.options_mut(), answer_max);
        Ok(Some(Self {
            name: name.trim_end_matches('.').to_owned(),
            own,
            every: Duration::from_millis(fence.dns_ms),
            answer_max,
            resolver: builder.build()?,
            pointing: Pointing::new(fence.dns_strict),
        }))
    }

    /// Before anything is served: a strict one has to know first.
    pub fn begin(&self, hub: &Hub) {
        self.tell(hub, self.pointing.problem(&self.name));
    }

    async fn ask(&self) -> Answer {
        let answer = timeout(self.answer_max, self.addresses()).await;
        match answer {
            Err(_) => Answer::Unknown(format!("no answer within {} ms", self.answer_max.as_millis())),
            Ok(Err(error)) => Answer::Unknown(error.to_string()),
            Ok(Ok(addresses)) if addresses.iter().any(|address| self.own.contains(address)) => Answer::Here,
            Ok(Ok(addresses)) => Answer::Elsewhere(addresses),
        }
    }

    /// Where it points, of the kinds of address that this host has: one kind without an answer must not look like a name without one.
    async fn addresses(&self) -> Result<Vec<IpAddr>, NetError> {
        // With the dot at its end it is this name and no other one below a search domain.
        let full = format!("{}.", self.name);
        let mut addresses = Vec::new();
        for is_v4 in [true, false].into_iter().filter(|is_v4| self.own.iter().any(|own| own.is_ipv4() == *is_v4)) {
            let found = if is_v4 {
                self.resolver.ipv4_lookup(full.as_str()).await
            } else {
                self.resolver.ipv6_lookup(full.as_str()).await
            };
            match found {
                Ok(found) => addresses.extend(LookupIp::from(found).iter()),
                Err(error) if error.is_no_records_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(addresses)
    }

    /// Asks until `stop`, and ends the reign where the name has gone elsewhere.
    pub async fn watch(mut self, hub: Arc<Hub>, stop: CancellationToken) {
        let asking = async {
            loop {
                let answer = self.ask().await;
                self.pointing.seen(answer);
                self.tell(&hub, self.pointing.problem(&self.name));
                tokio::time::sleep(self.every).await;
            }
        };
        tokio::select! {
            () = asking => {}
            () = stop.cancelled() => {}
        }
    }

    fn tell(&self, hub: &Hub, problem: Option<Problem>) {
        let problem = problem.map(Arc::new);
        let was_fenced = hub.fenced.send_replace(problem.clone()).is_some();
        match &problem {
            None if was_fenced => tracing::info!(name = self.name, "the service name points to this host"),
            None => {}
            Some(why) => {
                // Also one that was just raised.
                hub.reign.send_if_modified(|reign| {
                    let serves = matches!(reign, Reign::Serving { .. });
                    if serves {
                        tracing::error!(next = why.hint, "this proxy stops serving: {}", why.what);
                        *reign = Reign::Waiting(Arc::clone(why));
                    }
                    serves
                });
            }
        }
    }
}

/// Each question is new, of the DNS alone, and short.
fn asking(options: &mut ResolverOpts, answer_max: Duration) {
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = answer_max;
    options.attempts = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elsewhere() -> Answer {
        Answer::Elsewhere(vec![IpAddr::from([192, 0, 2, 7])])
    }

    fn after(is_strict: bool, answers: &[Answer]) -> Option<String> {
        let mut pointing = Pointing::new(is_strict);
        for answer in answers {
            pointing.seen(answer.clone());
        }
        pointing.problem("db.example.org").map(|problem| problem.what)
    }

    #[test]
    fn a_proxy_stops_when_the_name_has_gone_elsewhere_and_begins_when_it_is_back() {
        let unknown = || Answer::Unknown("no answer".into());
        let here = || Answer::Here;
        assert_eq!(after(false, &[]), None);
        assert_eq!(after(false, &[elsewhere(), elsewhere(), elsewhere()]), None, "it never pointed here");
        assert_eq!(after(false, &[here(), elsewhere()]), None, "once is not enough");
        assert_eq!(after(false, &[here(), unknown(), unknown(), unknown(), unknown()]), None);
        let stopped = after(false, &[here(), elsewhere(), unknown(), elsewhere()]).unwrap();
        assert_eq!(stopped, "db.example.org points to 192.0.2.7, not to this host");
        assert!(after(false, &[here(), elsewhere(), elsewhere(), unknown()]).is_some());
        assert_eq!(after(false, &[here(), elsewhere(), elsewhere(), here()]), None);
    }

    #[test]
    fn a_strict_one_needs_to_know() {
        let mut answers = vec![Answer::Here; 5];
        assert!(after(true, &[]).is_some() && after(true, &answers).is_some());
        answers.push(Answer::Here);
        assert_eq!(after(true, &answers), None);
        let unknown = Answer::Unknown("no answer".into());
        answers.extend([unknown.clone(), unknown.clone()]);
        assert_eq!(after(true, &answers), None);
        answers.push(unknown);
        assert_eq!(after(true, &answers).unwrap(), "it is not known where db.example.org points: no answer");
        assert_eq!(after(true, &[Answer::Elsewhere(Vec::new())]).unwrap(), "db.example.org has no address in the DNS");
        // Whoever was named before has stopped before the next one begins, whatever each of them hears.
        const { assert!(HERE_MIN > NOT_HERE_MAX && NOT_HERE_MAX > ELSEWHERE_MAX) };
    }
}
