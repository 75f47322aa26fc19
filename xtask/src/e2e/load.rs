//! Connections that go on while something happens: new ones all the time, and one that stays open.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::lab::Canary;

use super::expect;
use super::kubectl::Session;
use super::stage::{Capture, Pod, Stage};

/// The longest that new connections may fail when an agent is replaced: what Kubernetes needs to
/// start its pod, and not what the agent does.
const LONGEST_GAP: Duration = Duration::from_secs(30);

/// Load with a canary, and a capture of it.
pub(super) struct Load {
    session: Session,
    capture: Capture,
}

/// What the load has seen.
pub(super) struct Seen {
    succeeded: u64,
    pub(super) failed: u64,
    pub(super) gap: Duration,
    text: String,
}

impl Load {
    /// Starts it from one pod to another.
    pub(super) fn start(stage: &Stage, client: &Pod, server: &Pod) -> Result<Self> {
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[])?;
        Ok(Self { session: stage.load(client, server, canary.text())?, capture })
    }

    /// Ends it: nothing was in the clear, something succeeded, and this holds.
    pub(super) fn finish(self, holds: impl FnOnce(&Seen) -> bool) -> Result<String> {
        let seen = Seen::of(&self.session.finish()?)?;
        self.capture.expect_secret()?;
        ensure!(seen.succeeded > 0, "no connection was made at all: {}", seen.text);
        expect(holds(&seen), || seen.text.clone())?;
        Ok(seen.text)
    }
}

impl Seen {
    fn of(seen: &Value) -> Result<Self> {
        let count = |key: &str| seen[key].as_u64().with_context(|| seen.to_string());
        let gap = Duration::from_millis(count("longest_gap_ms")?);
        let failed = count("refused")? + count("broken")?;
        Ok(Self { succeeded: count("succeeded")?, failed, gap, text: seen.to_string() })
    }

    /// Whether new connections failed for no longer than Kubernetes needs to start an agent.
    pub(super) fn is_bounded(&self) -> bool {
        self.gap < LONGEST_GAP
    }
}

/// A connection that is open until it is cut.
pub(super) struct Held(Session);

impl Held {
    /// Opens it, once there is a way.
    pub(super) fn open(stage: &Stage, client: &Pod, server: &Pod) -> Result<Self> {
        stage.ask_patiently(client, server.echo(), "before")?;
        let tool = ["hold", &server.echo().to_string()];
        stage.kubectl.session(&client.namespace, &client.name, &tool).map(Self)
    }

    /// Ends it, if that was not done before: it was cut, or not.
    pub(super) fn expect_cut(self, cut: bool) -> Result<()> {
        let seen = self.0.finish()?;
        expect(seen["cut"] == cut, || seen.to_string())
    }
}
