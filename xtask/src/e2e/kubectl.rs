//! The program `kubectl`, which finds the cluster by `KUBECONFIG`.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::pod::READY;

/// How long anything in the cluster may take.
///
/// Nothing waits for it to pass: it is only reached when something hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// On every object of a run.
const LABEL: &str = "nodemesh.io/e2e";

/// After it nothing new is begun: every call fails, so that a run ends and cleans up.
pub(super) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Calls `kubectl` for one run, whose name is on everything that it makes.
#[derive(Clone, Debug)]
pub(super) struct Kubectl {
    run: String,
}

impl Kubectl {
    pub(super) fn new(run: &str) -> Self {
        Self { run: run.to_owned() }
    }

    /// What it prints, or an error with what it complains of.
    pub(super) fn output<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        self.output_given(arguments, "")
    }

    /// The same, with this on its standard input.
    pub(super) fn output_given<S: AsRef<OsStr>>(
        &self,
        arguments: &[S],
        input: &str,
    ) -> Result<String> {
        let mut command = command(arguments)?;
        let mut child = command.spawn().context("running kubectl: is it on the PATH?")?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        let output = thread::scope(|scope| {
            // It may end without having read all of it.
            scope.spawn(move || stdin.write_all(input.as_bytes()).ok());
            child.wait_with_output()
        })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {text}{}", describe(&command), complaint.trim());
        }
        Ok(text)
    }

    /// The JSON that it prints.
    pub(super) fn json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value> {
        let text = self.output(arguments)?;
        serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
    }

    /// One object.
    pub(super) fn get(&self, namespace: &str, kind: &str, name: &str) -> Result<Value> {
        self.json(&["-n", namespace, "get", kind, name, "-o", "json"])
    }

    /// The objects that match, for example by a label: `["-l", "app=x"]`.
    pub(super) fn list(&self, kind: &str, which: &[&str]) -> Result<Vec<Value>> {
        let mut list = self.json(&[&["get", kind, "-o", "json"], which].concat())?;
        let Value::Array(items) = list["items"].take() else { bail!("{list} is no list") };
        Ok(items)
    }

    /// Makes or changes objects, labelled as this run's.
    pub(super) fn apply(&self, objects: Vec<Value>) -> Result<()> {
        let items: Vec<_> = objects
            .into_iter()
            .map(|object| merged(object, json!({ "metadata": { "labels": { LABEL: self.run } } })))
            .collect();
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        self.apply_text(&list.to_string())
    }

    /// Makes or changes what a manifest says.
    pub(super) fn apply_text(&self, manifest: &str) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.output_given(&arguments, manifest).map(drop)
    }

    /// Deletes every namespace of this run, with all that is in it.
    pub(super) fn delete_namespaces(&self) -> Result<()> {
        let label = format!("{LABEL}={}", self.run);
        self.output(&["delete", "namespace", "-l", &label, "--timeout=180s"]).map(drop)
    }

    /// Starts something in a pod that goes on until it is told to end.
    pub(super) fn session(&self, namespace: &str, pod: &str, tool: &[&str]) -> Result<Session> {
        let exec = ["-n", namespace, "exec", "-i", pod, "--", "xtask", "pod"];
        let mut command = command(&[&exec, tool].concat())?;
        let mut child = command.spawn().context("running kubectl")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no standard output")?;
        let mut session =
            Session { child, stdin, stdout: BufReader::new(stdout), tool: tool.join(" ") };
        let mut line = String::new();
        session.stdout.read_line(&mut line)?;
        if line.trim() != READY {
            bail!("{}: {line}{}", session.tool, complaint(&mut session.child));
        }
        Ok(session)
    }
}

fn command<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Command> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    let mut command = Command::new("kubectl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

fn describe(command: &Command) -> String {
    let words: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    format!("kubectl {}", words.join(" "))
}

/// What goes on in a pod. Dropping it ends it.
pub(super) struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    tool: String,
}

impl Session {
    /// Tells it to end; what it has seen.
    pub(super) fn finish(mut self) -> Result<Value> {
        self.stdin.take();
        let mut text = String::new();
        self.stdout.read_to_string(&mut text)?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: {text}{}", self.tool, complaint(&mut self.child)))
    }
}

/// What a child that ends says.
fn complaint(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut text).ok();
    }
    text
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stdin.take();
        // Fails only if it has ended before.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Tries until there is something, or fails saying what never came, and why. An error is no reason
/// to give up: the API server may be busy.
pub(super) fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = attempt();
        if let Ok(Some(found)) = outcome {
            return Ok(found);
        }
        if Instant::now() > deadline || INTERRUPTED.load(Ordering::Relaxed) {
            let error = outcome.err().map(|error| format!(": {error:#}")).unwrap_or_default();
            bail!("waited {} s in vain: {what}{error}", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// A JSON merge patch (RFC 7386), applied.
pub(super) fn merged(mut object: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { return patch };
    if !object.is_object() {
        object = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            object.as_object_mut().and_then(|fields| fields.remove(&key));
        } else {
            object[&key] = merged(object[&key].take(), value);
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_adds_replaces_and_removes() {
        let object = json!({ "a": { "b": 1, "c": [2] }, "d": 3 });
        let patch = json!({ "a": { "b": null, "c": [4], "e": { "f": 5 } }, "g": 6 });
        let expected = json!({ "a": { "c": [4], "e": { "f": 5 } }, "d": 3, "g": 6 });
        assert_eq!(merged(object, patch), expected);
    }

    #[test]
    fn waiting_says_what_for() {
        INTERRUPTED.store(true, Ordering::Relaxed);
        let error = until("rain", || -> Result<Option<()>> { bail!("no cloud") }).unwrap_err();
        assert!(error.to_string().ends_with("rain: no cloud"), "{error}");
    }
}
