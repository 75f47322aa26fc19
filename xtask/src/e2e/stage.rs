//! Two nodes of the cluster, a namespace in the mesh and one outside, and a watcher on every node.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use xtask::lab::Canary;

use super::chart::{Chart, NAMESPACE};
use super::expect;
use super::kubectl::{INTERRUPTED, Kubectl, Session, until};
use super::objects;
use crate::pod::ECHO;
use crate::{commands, image};

/// Everything that a check needs.
pub(super) struct Stage {
    pub(super) kubectl: Kubectl,
    pub(super) chart: Chart,
    /// The image of our own tool.
    pub(super) image: String,
    pub(super) nodes: [String; 2],
    /// The namespace whose pods are in the mesh.
    pub(super) mesh: String,
    /// The namespace whose pods are not.
    pub(super) plain: String,
    watching: String,
    /// What reboots a node.
    pub(super) reboot: Option<PathBuf>,
    /// What the nodes were like before.
    pub(super) untouched: Vec<Value>,
}

/// A pod as the API server knows it.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) node: String,
    pub(super) ip: IpAddr,
}

const WATCHER: &str = "watcher";
const AGENT: &str = "nodemesh-agent";

impl Stage {
    /// Makes the namespaces and the watchers.
    pub(super) fn set_up(chart: Chart, reboot: Option<PathBuf>) -> Result<Self> {
        let name = format!("e2e-{}", &Canary::random().text()[..5]);
        let kubectl = Kubectl::new(&name);
        let installed = kubectl
            .list("daemonsets", &["-A", "--field-selector", "metadata.name=nodemesh-agent"])?;
        ensure!(
            installed.is_empty(),
            "nodemesh is installed on this cluster, and this would remove it: remove it yourself, or \
             take another cluster"
        );
        let repository = chart.value("image.repository").unwrap_or(image::REPOSITORY);
        let tag = chart.value("image.tag").unwrap_or(env!("CARGO_PKG_VERSION"));
        let image = format!("{repository}/{}:{tag}", image::E2E);
        let [mesh, plain, watching] =
            ["mesh", "plain", "watch"].map(|role| format!("{name}-{role}"));
        let mut stage = Self {
            nodes: two_nodes(&kubectl)?,
            kubectl,
            chart,
            image,
            mesh,
            plain,
            watching,
            reboot,
            untouched: Vec::new(),
        };
        stage.kubectl.apply(vec![
            objects::namespace(&stage.mesh, true),
            objects::namespace(&stage.plain, false),
            objects::namespace(&stage.watching, false),
        ])?;
        for namespace in [&stage.mesh, &stage.plain, &stage.watching] {
            stage.usable(namespace)?;
        }
        stage.kubectl.apply(vec![objects::watchers(&stage.watching, WATCHER, &stage.image)])?;
        stage.rolled_out(&stage.watching, "daemonset/watcher").context(
            "the watchers do not start: is the image imported (cargo xtask image --with-e2e)?",
        )?;
        stage.untouched = stage.look_at_nodes()?;
        Ok(stage)
    }

    /// Makes a namespace outside of the mesh, and returns its name.
    pub(super) fn another_namespace(&self, role: &str) -> Result<String> {
        let name = format!("{}-{role}", self.plain);
        self.kubectl.apply(vec![objects::namespace(&name, false)])?;
        self.usable(&name)?;
        Ok(name)
    }

    /// Waits until pods can be made in a namespace.
    fn usable(&self, namespace: &str) -> Result<()> {
        let account = || self.kubectl.get(namespace, "serviceaccount", "default").map(Some);
        until("the namespace's service account", account).map(drop)
    }

    /// Waits until a Deployment, DaemonSet or StatefulSet is as it should be.
    pub(super) fn rolled_out(&self, namespace: &str, what: &str) -> Result<()> {
        let arguments = ["-n", namespace, "rollout", "status", what, "--timeout=120s"];
        self.kubectl.output(&arguments).map(drop)
    }

    /// A server in one of the namespaces, ready.
    pub(super) fn server(&self, namespace: &str, name: &str, node: usize) -> Result<Pod> {
        let spec = objects::pod_spec(&self.nodes[node], &objects::server(&self.image));
        self.start(namespace, name, spec)?;
        self.ready(namespace, name)
    }

    /// Makes a pod.
    pub(super) fn start(&self, namespace: &str, name: &str, spec: Value) -> Result<()> {
        self.kubectl.apply(vec![objects::pod(namespace, name, spec)])
    }

    /// Deletes pods, and waits until they are gone.
    pub(super) fn delete(&self, namespace: &str, pods: &[&str]) -> Result<()> {
        let delete = ["-n", namespace, "delete", "pod", "--ignore-not-found", "--timeout=120s"];
        self.kubectl.output(&[&delete, pods].concat()).map(drop)
    }

    /// A pod, once it is ready.
    pub(super) fn ready(&self, namespace: &str, name: &str) -> Result<Pod> {
        until(&format!("pod {name} to be ready"), || {
            let pod = self.kubectl.get(namespace, "pod", name)?;
            expect(has_condition(&pod, "Ready"), || pod["status"].to_string())?;
            Pod::of(&pod).map(Some)
        })
    }

    /// The pods with a label `app`, once there are so many and all are ready.
    pub(super) fn all_ready(&self, namespace: &str, app: &str, count: usize) -> Result<Vec<Pod>> {
        until(&format!("{count} pods of {app} to be ready"), || {
            let pods =
                self.kubectl.list("pods", &["-n", namespace, "-l", &format!("app={app}")])?;
            let ready = pods.iter().all(|pod| {
                has_condition(pod, "Ready") && pod["metadata"]["deletionTimestamp"].is_null()
            });
            let statuses = || pods.iter().map(|pod| pod["status"].to_string()).collect();
            expect(ready && pods.len() == count, statuses)?;
            pods.iter().map(Pod::of).collect::<Result<_>>().map(Some)
        })
    }

    /// The agent's pod on a node.
    pub(super) fn agent(&self, node: &str) -> Result<Pod> {
        self.on_node(NAMESPACE, "app.kubernetes.io/component=agent", node)
    }

    fn on_node(&self, namespace: &str, label: &str, node: &str) -> Result<Pod> {
        let field = format!("spec.nodeName={node}");
        let which = ["-n", namespace, "-l", label, "--field-selector", &field];
        let pods = self.kubectl.list("pods", &which)?;
        let lives = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pod = pods.iter().find(lives);
        Pod::of(pod.with_context(|| format!("no pod with {label} on {node}"))?)
    }

    /// What `mesh-agent status` says on a node.
    pub(super) fn status(&self, node: &str, view: &[&str]) -> Result<Value> {
        let agent = self.agent(node)?;
        let exec = ["-n", NAMESPACE, "exec", &agent.name, "-c", "agent", "--"];
        let status = ["mesh-agent", "status", "--json"];
        // A degraded agent is a status as well, and kubectl adds its complaint to that.
        let output = self.kubectl.output(&[&exec, &status[..], view].concat());
        let text = output.unwrap_or_else(|error| format!("{error:#}"));
        let json = text.find('{').map_or("", |at| &text[at..]);
        let mut values = serde_json::Deserializer::from_str(json).into_iter();
        values.next().with_context(|| text.clone())?.with_context(|| text.clone())
    }

    /// What the agent of its node knows of a pod, or null.
    pub(super) fn entry(&self, pod: &Pod) -> Result<Value> {
        let mut status = self.status(&pod.node, &[])?;
        let pods = status["pods"].as_array_mut().context("a status without pods")?;
        Ok(pods.iter_mut().find(|entry| entry["uid"] == pod.uid).map_or(Value::Null, Value::take))
    }

    /// Waits until a pod is in the mesh: under guard, served, with a certificate.
    pub(super) fn in_mesh(&self, pod: &Pod) -> Result<Value> {
        until(&format!("{} to be in the mesh", pod.name), || {
            let entry = self.entry(pod)?;
            let complete = entry["listening"] == true
                && entry["problem"].is_null()
                && !entry["certificate"].is_null();
            expect(complete, || format!("{entry}"))?;
            Ok(Some(entry))
        })
    }

    /// Fails if an agent has to do with a pod.
    pub(super) fn outside(&self, pod: &Pod) -> Result<()> {
        let entry = self.entry(pod)?;
        expect(entry.is_null(), || format!("{} is in the mesh: {entry}", pod.name))
    }

    /// The lines of the access log of a node's agent, since it started.
    pub(super) fn access_log(&self, node: &str) -> Result<Vec<Value>> {
        let agent = self.agent(node)?;
        let log = self.kubectl.output(&["-n", NAMESPACE, "logs", &agent.name, "-c", "agent"])?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["target"] == "access").collect())
    }

    /// Runs our tool in a pod; what it prints.
    pub(super) fn tool(&self, pod: &Pod, arguments: &[&str]) -> Result<String> {
        let exec = ["-n", &pod.namespace, "exec", &pod.name, "--", "xtask", "pod"];
        self.kubectl.output(&[&exec, arguments].concat())
    }

    /// Asks an echo server from a pod; the answer.
    pub(super) fn ask(&self, from: &Pod, to: SocketAddr, text: &str) -> Result<Value> {
        let answer = self.tool(from, &["ask", &to.to_string(), text])?;
        serde_json::from_str(&answer).with_context(|| format!("{answer} is no answer"))
    }

    /// The same, again and again until there is an answer: a pod is known a moment after it started.
    pub(super) fn ask_patiently(&self, from: &Pod, to: SocketAddr, text: &str) -> Result<Value> {
        let answer = self.tool(from, &["ask", &to.to_string(), text, "--patience", "60"])?;
        serde_json::from_str(&answer).with_context(|| format!("{answer} is no answer"))
    }

    /// Fails unless a connection is refused or reset, rather than answered or left to time out.
    pub(super) fn expect_refusal(&self, from: &Pod, to: SocketAddr, text: &str) -> Result<()> {
        match self.tool(from, &["ask", &to.to_string(), text]) {
            Ok(answer) => bail!("{to} answered: {answer}"),
            Err(error) => {
                let words = format!("{error:#}");
                let refused = words.contains("refused") || words.contains("reset");
                expect(refused, || format!("neither refused nor reset: {words}"))
            }
        }
    }

    /// Load from one pod to another that goes on until it is finished.
    pub(super) fn load(&self, from: &Pod, to: &Pod, text: &str) -> Result<Session> {
        let to = to.echo().to_string();
        self.kubectl.session(&from.namespace, &from.name, &["load", &to, text])
    }

    /// Runs our tool in the watcher of a node; what it prints.
    pub(super) fn on(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let watcher = self.on_node(&self.watching, "app=watcher", node)?;
        self.tool(&watcher, arguments)
    }

    /// The watcher of a node: a pod that is on the node's network.
    pub(super) fn watcher(&self, node: &str) -> Result<Pod> {
        self.on_node(&self.watching, "app=watcher", node)
    }

    /// Captures on both nodes. What the pods say to each other is to be TLS 1.3.
    pub(super) fn capture(&self, canary: &Canary, pods: &[&Pod]) -> Result<Capture> {
        self.capture_on(&self.nodes, canary, pods)
    }

    /// The same on some nodes.
    pub(super) fn capture_on(
        &self,
        nodes: &[String],
        canary: &Canary,
        pods: &[&Pod],
    ) -> Result<Capture> {
        let pods: Vec<_> = pods.iter().map(|pod| format!("--pod={}", pod.ip)).collect();
        let mut tool = vec!["capture", "--canary", canary.text()];
        tool.extend(pods.iter().map(String::as_str));
        let sessions = nodes.iter().map(|node| {
            let watcher = self.watcher(node)?;
            self.kubectl.session(&self.watching, &watcher.name, &tool)
        });
        Ok(Capture(sessions.collect::<Result<_>>()?))
    }

    /// What nodemesh may leave on the nodes.
    pub(super) fn look_at_nodes(&self) -> Result<Vec<Value>> {
        let [networks, binaries] = self.cni_directories();
        let plugin = format!("{binaries}/nodemesh-cni");
        let paths =
            [networks, &plugin, "/run/nodemesh", "/sys/fs/bpf/nodemesh", "/var/lib/nodemesh"];
        let look = |node: &String| -> Result<Value> {
            let files = self.on(node, &[&["look"], &paths[..]].concat())?;
            let files: Value = serde_json::from_str(&files).context("what the node looks like")?;
            let programs: Value = serde_json::from_str(&self.on(node, &["tcx"])?)?;
            Ok(json!({ "node": node, "files": files, "tcx": programs }))
        };
        self.nodes.iter().map(look).collect()
    }

    /// Where the nodes have their network configurations and plugins.
    pub(super) fn cni_directories(&self) -> [&str; 2] {
        [
            self.chart.value("cni.confDir").unwrap_or("/etc/cni/net.d"),
            self.chart.value("cni.binDir").unwrap_or("/opt/cni/bin"),
        ]
    }

    /// Runs `work` with no agent on any node, and brings the agents back.
    pub(super) fn without_agents<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let place = |where_: Value| {
            let patch = json!({ "spec": { "template": { "spec": { "nodeSelector": where_ } } } });
            let patch = ["-n", NAMESPACE, "patch", "daemonset", AGENT, "-p", &patch.to_string()];
            self.kubectl.output(&patch)
        };
        let nowhere = "nodemesh.io/e2e-nowhere";
        place(json!({ nowhere: "true" }))?;
        let outcome = until("the agents to be gone", || {
            let pods = self
                .kubectl
                .list("pods", &["-n", NAMESPACE, "-l", "app.kubernetes.io/component=agent"])?;
            Ok(pods.is_empty().then_some(()))
        })
        .and_then(|()| work());
        place(json!({ nowhere: null }))?;
        self.agents_ready()?;
        outcome
    }

    /// Waits until every node has a ready agent.
    pub(super) fn agents_ready(&self) -> Result<()> {
        self.rolled_out(NAMESPACE, "daemonset/nodemesh-agent")
    }

    /// Leaves the logs of nodemesh where they can be read afterwards.
    pub(super) fn keep_logs(&self) {
        let keep = || -> Result<()> {
            let directory = commands::root()?.join("target/e2e");
            fs::create_dir_all(&directory)?;
            for pod in self.kubectl.list("pods", &["-n", NAMESPACE])? {
                let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
                let logs = ["-n", NAMESPACE, "logs", name, "--all-containers", "--prefix"];
                let text = self.kubectl.output(&logs).unwrap_or_else(|error| format!("{error:#}"));
                fs::write(directory.join(format!("{name}.log")), text)?;
            }
            eprintln!("the logs are in {}", directory.display());
            Ok(())
        };
        if let Err(error) = keep() {
            eprintln!("the logs are not kept: {error:#}");
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        INTERRUPTED.store(false, Ordering::Relaxed);
        if let Err(error) = self.kubectl.delete_namespaces() {
            eprintln!("left behind: {error:#}");
        }
    }
}

impl Pod {
    /// From its record.
    pub(super) fn of(pod: &Value) -> Result<Self> {
        let text = |value: &Value| -> Result<String> {
            value.as_str().map(str::to_owned).with_context(|| format!("{pod} is not complete"))
        };
        Ok(Self {
            namespace: text(&pod["metadata"]["namespace"])?,
            name: text(&pod["metadata"]["name"])?,
            uid: text(&pod["metadata"]["uid"])?,
            node: text(&pod["spec"]["nodeName"])?,
            ip: text(&pod["status"]["podIP"])?.parse()?,
        })
    }

    /// Where its echo server is.
    pub(super) fn echo(&self) -> SocketAddr {
        SocketAddr::new(self.ip, ECHO)
    }
}

/// A capture on nodes.
pub(super) struct Capture(Vec<Session>);

impl Capture {
    /// Ends it: the canary was seen on no node, and the nodes did see something.
    pub(super) fn expect_secret(self) -> Result<()> {
        for seen in self.finish()? {
            expect(seen["canary"] == false, || format!("the canary is in the clear: {seen}"))?;
            expect(seen["frames"] != 0, || format!("inconclusive, nothing was seen: {seen}"))?;
        }
        Ok(())
    }

    /// Ends it: besides, what the pods said to each other was TLS 1.3 on every node.
    pub(super) fn expect_tls13(self) -> Result<()> {
        for seen in self.finish()? {
            expect(seen["canary"] == false, || format!("the canary is in the clear: {seen}"))?;
            expect(seen["not_tls13"].is_null(), || seen.to_string())?;
        }
        Ok(())
    }

    /// Ends it: the canary was seen on every node. The same matcher, where it must fire.
    pub(super) fn expect_plaintext(self) -> Result<()> {
        for seen in self.finish()? {
            expect(seen["canary"] == true, || format!("the canary is not to be seen: {seen}"))?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<Value>> {
        self.0.into_iter().map(Session::finish).collect()
    }
}

/// Whether a condition of an object is true.
pub(super) fn has_condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.is_some_and(|conditions| {
        conditions
            .iter()
            .any(|condition| condition["type"] == kind && condition["status"] == "True")
    })
}

fn two_nodes(kubectl: &Kubectl) -> Result<[String; 2]> {
    let nodes = kubectl.list("nodes", &[])?;
    let usable = nodes.iter().filter(|node| {
        has_condition(node, "Ready")
            && node["spec"]["unschedulable"] != true
            && node["spec"]["taints"].is_null()
    });
    let names = usable.filter_map(|node| {
        node["metadata"]["labels"]["kubernetes.io/hostname"].as_str().map(str::to_owned)
    });
    names
        .take(2)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|found| anyhow::anyhow!("two nodes without taints are needed, found {found:?}"))
}
