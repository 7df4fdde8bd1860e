//! Talks to a sandbox's proxy over its `control.sock`, as the commands do: one JSON object a line, both ways.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::Layout;

/// Longest answer, bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no answer from the proxy on {}: {source}", .path.display())]
    NoAnswer { path: PathBuf, source: std::io::Error },
    /// With the next thing to do.
    #[error("{what}")]
    Refused { what: String, hint: String, phase: Option<String> },
}

/// A recovery that ended well, as the command sees it.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The last report, with the field names of `pgtandem recover --json`.
    pub report: Value,
    /// When it became known that the gate had opened again after the cut.
    pub cut_at: Option<Instant>,
    /// The same after the join.
    pub joined_at: Instant,
    pub took: Duration,
}

impl Recovered {
    /// A number of the report.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<f64> {
        self.report.get(name).and_then(Value::as_f64)
    }
}

/// Asks the proxy and returns what stands beside `"result"`; `progress` gets every line before that.
pub async fn ask(layout: &Layout, request: &Value, mut progress: impl FnMut(&Value)) -> Result<Value, ControlError> {
    let path = layout.proxy_dir().join("control.sock");
    let talk = async {
        let mut stream = UnixStream::connect(&path).await?;
        stream.write_all(format!("{request}\n").as_bytes()).await?;
        let mut stream = BufReader::new(stream);
        loop {
            let mut line = Vec::new();
            if (&mut stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let mut answer: Value = serde_json::from_slice(&line)?;
            if answer.get("result").is_some() || answer.get("error").is_some() {
                return Ok(answer.take());
            }
            progress(&answer);
        }
    };
    let answer: Value = talk.await.map_err(|source: std::io::Error| ControlError::NoAnswer { path, source })?;
    let Some(error) = answer.get("error") else { return Ok(answer.get("result").cloned().unwrap_or_default()) };
    let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
    let (what, hint) = (text("what").unwrap_or_default(), text("hint").unwrap_or_default());
    Err(ControlError::Refused { what, hint, phase: text("phase") })
}

/// Recovers a node and waits for the end. One that is a member is detached first.
pub async fn recover(layout: &Layout, node: &str) -> Result<Recovered, ControlError> {
    let (started, mut cut_at) = (Instant::now(), None);
    let request = json!({ "command": "recover", "node": node, "yes": true });
    let result = ask(layout, &request, |report| {
        if cut_at.is_none() && report.get("cut_gate_ms").is_some_and(Value::is_number) {
            cut_at = Some(Instant::now());
        }
    })
    .await?;
    let report = result.get("recovery").cloned().unwrap_or(result);
    Ok(Recovered { report, cut_at, joined_at: Instant::now(), took: started.elapsed() })
}

/// Names of the members, as the proxy has them now.
pub async fn members(layout: &Layout) -> Result<Vec<String>, ControlError> {
    let result = ask(layout, &json!({ "command": "status" }), |_| {}).await?;
    let status = result.get("status").unwrap_or(&result);
    let names = status.get("members").and_then(Value::as_array).into_iter().flatten();
    Ok(names.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Waits until `node` is a member, or is none; false when `limit` is over before.
pub async fn wait_member(layout: &Layout, node: &str, is_member: bool, limit: Duration) -> bool {
    let started = Instant::now();
    loop {
        // A proxy that is being started again answers a little later.
        if members(layout).await.is_ok_and(|members| members.iter().any(|member| member == node) == is_member) {
            return true;
        }
        if started.elapsed() > limit {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
