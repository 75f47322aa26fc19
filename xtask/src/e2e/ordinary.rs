//! Section 4: what everybody does with pods goes on working.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::expect;
use super::kubectl::merged;
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};
use crate::pod::{GREETING, GRPC, HTTP};

/// Checks probes of every type, exec, logs, port-forward and the API server.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let ask = ["/bin/xtask", "pod", "ask", "127.0.0.1:7000"];
    for (what, name, probe) in [
        (
            "httpGet probes pass",
            "http-probe",
            json!({ "httpGet": { "path": "/ready", "port": HTTP } }),
        ),
        ("tcpSocket probes pass", "tcp-probe", json!({ "tcpSocket": { "port": GREETING } })),
        ("exec probes pass", "exec-probe", json!({ "exec": { "command": ask } })),
        ("gRPC probes pass", "grpc-probe", json!({ "grpc": { "port": GRPC } })),
    ] {
        report.check("4", what, || probed(stage, name, &probe));
    }
    report.check("4", "a probe that nobody answers fails", || {
        let probe = json!({ "tcpSocket": { "port": 9 }, "periodSeconds": 1 });
        let container = merged(objects::server(&stage.image), json!({ "readinessProbe": null }));
        let container = merged(container, json!({ "readinessProbe": probe }));
        stage.start(&stage.mesh, "unprobed", objects::pod_spec(&stage.nodes[0], &container))?;
        super::kubectl::until("an event of the probe", || {
            let which = "involvedObject.name=unprobed,reason=Unhealthy";
            let events =
                stage.kubectl.list("events", &["-n", &stage.mesh, "--field-selector", which])?;
            Ok((!events.is_empty()).then_some(()))
        })
    });
    report.check("4", "kubectl exec and logs", || {
        let pod = stage.server(&stage.mesh, "ordinary", 1)?;
        // A probe of nothing: the server complains, and its complaint is the log.
        stage.tool(&pod, &["ask", &format!("127.0.0.1:{GRPC}"), "no preface"]).ok();
        super::kubectl::until("the log", || {
            let log = stage.kubectl.output(&["-n", &pod.namespace, "logs", &pod.name])?;
            Ok((!log.is_empty()).then_some(()))
        })
    });
    report.check("4", "kubectl port-forward", || {
        let pod = stage.ready(&stage.mesh, "ordinary")?;
        stage.in_mesh(&pod)?;
        let answer = Forward::start(&pod, HTTP)?.get("/forwarded")?;
        expect(answer["pod"] == "ordinary" && answer["received"] == "/forwarded", || {
            answer.to_string()
        })
    });
    report.check("4", "kubectl port-forward to where nobody listens: no answer", || {
        let pod = stage.ready(&stage.mesh, "ordinary")?;
        let answer = Forward::start(&pod, 9)?.get("/forwarded");
        expect(answer.is_err(), || format!("{answer:?}"))
    });
    report.check("4", "pods talk to the API server", || {
        let pod = stage.ready(&stage.mesh, "ordinary")?;
        let service = stage.kubectl.get("default", "service", "kubernetes")?;
        let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
        let address = SocketAddr::new(ip.parse()?, 443).to_string();
        // Plain HTTP: what it says to that shows who it is.
        let request = "GET / HTTP/1.0\r\n\r\n";
        let answer = stage.tool(&pod, &["ask", &address, request, "--patience", "60"])?;
        expect(answer.contains("HTTPS server"), || answer.clone())
    });
    let pods = ["http-probe", "tcp-probe", "exec-probe", "grpc-probe", "unprobed", "ordinary"];
    stage.delete(&stage.mesh, &pods).unwrap_or_else(|error| eprintln!("{error:#}"));
}

/// A pod is in the mesh, and ready by this probe, as startup and liveness probe too.
fn probed(stage: &Stage, name: &str, probe: &Value) -> Result<()> {
    let probe = merged(probe.clone(), json!({ "periodSeconds": 1 }));
    let mut container = objects::server(&stage.image);
    for kind in ["startupProbe", "readinessProbe", "livenessProbe"] {
        container[kind] = probe.clone();
    }
    stage.start(&stage.mesh, name, objects::pod_spec(&stage.nodes[0], &container))?;
    let pod = stage.ready(&stage.mesh, name)?;
    stage.in_mesh(&pod)?;
    let record = stage.kubectl.get(&pod.namespace, "pod", name)?;
    expect(record["status"]["containerStatuses"][0]["restartCount"] == 0, || {
        record["status"].to_string()
    })
}

/// `kubectl port-forward`.
struct Forward {
    child: Child,
    /// It says there that it handles a connection, and dies if nobody could read that.
    stdout: BufReader<ChildStdout>,
    port: u16,
}

impl Forward {
    fn start(pod: &Pod, port: u16) -> Result<Self> {
        let port = format!(":{port}");
        let mut child = Command::new("kubectl")
            .args(["-n", &pod.namespace, "port-forward", &pod.name, &port])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("running kubectl")?;
        let stdout = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut forward = Self { child, stdout, port: 0 };
        let mut line = String::new();
        forward.stdout.read_line(&mut line)?;
        // Forwarding from 127.0.0.1:41234 -> 7002
        let port = line.split(" -> ").next().and_then(|from| from.rsplit(':').next());
        forward.port = port.and_then(|port| port.parse().ok()).with_context(|| line.clone())?;
        Ok(forward)
    }

    /// What the server says of a request. That asks for an answer by itself: nobody hears that
    /// the client has said everything, since port-forward does not pass that on.
    fn get(&self, path: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        serde_json::from_str(body).with_context(|| format!("{answer:?} is no answer"))
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Fails only if it has ended before.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
