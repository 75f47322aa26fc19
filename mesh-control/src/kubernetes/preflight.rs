//! `mesh-control install-check`: whether a cluster can run nodemesh, before anything is installed.
//!
//! What only a node itself knows, `mesh-agent check-node` finds out there.

use std::fmt;

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::{ConfigMap, Namespace, Node},
};
use kube::{Api, Client, Resource, ResourceExt as _, api::ListParams};
use serde::de::DeserializeOwned;

/// The first version of Kubernetes whose service account tokens name their node.
const FIRST_KUBERNETES: (u32, u32) = (1, 33);

/// The first kernel that the agent runs on: see its `bpf/probe.rs`.
const FIRST_KERNEL: (u32, u32) = (6, 1);

/// The first kernel that has every layer of the guard.
const FULL_GUARD: (u32, u32) = (6, 12);

/// The first containerd that tells CNI plugins the UID of a pod.
const FIRST_CONTAINERD: (u32, u32) = (1, 6);

/// What decides how strictly a namespace's pods are confined.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Parts of other meshes, by the name of the DaemonSet or Deployment.
const MESHES: [(&str, &str); 6] = [
    ("ztunnel", "Istio's ambient mode"),
    ("istiod", "Istio"),
    ("linkerd-proxy-injector", "Linkerd"),
    ("kuma-control-plane", "Kuma"),
    ("consul-connect-injector", "Consul"),
    ("kmesh", "Kmesh"),
];

/// Keys of Cilium's configuration by which it encrypts, too.
const CILIUM_ENCRYPTION: [&str; 2] = ["enable-wireguard", "enable-ipsec"];

/// What whoever installs must be allowed to create: group, resource, and whether it is in the
/// namespace of nodemesh.
const CREATED: [(&str, &str, bool); 13] = [
    ("", "namespaces", false),
    ("rbac.authorization.k8s.io", "clusterroles", false),
    ("rbac.authorization.k8s.io", "clusterrolebindings", false),
    ("admissionregistration.k8s.io", "validatingadmissionpolicies", false),
    ("admissionregistration.k8s.io", "validatingadmissionpolicybindings", false),
    ("rbac.authorization.k8s.io", "roles", true),
    ("rbac.authorization.k8s.io", "rolebindings", true),
    ("", "serviceaccounts", true),
    ("", "configmaps", true),
    ("", "services", true),
    ("apps", "deployments", true),
    ("apps", "daemonsets", true),
    ("policy", "poddisruptionbudgets", true),
];

/// What is known of a cluster.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// Major and minor, as the API server spells them.
    kubernetes: (String, String),
    nodes: Vec<NodeFacts>,
    /// Namespace and name of every DaemonSet and Deployment.
    workloads: Vec<(String, String)>,
    /// The keys of Cilium's configuration that are in force.
    cilium: Vec<String>,
    /// The pod security of the namespace of nodemesh, if it is there and says so.
    pod_security: Option<String>,
    /// Resources that whoever asks may not create.
    forbidden: Vec<String>,
}

#[derive(Clone, Debug, Default)]
struct NodeFacts {
    name: String,
    os: String,
    kernel: String,
    runtime: String,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it is.
    pub verdict: Verdict,
    /// What was found, and what to do about it.
    pub text: String,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// It works, but not as one may think.
    Warning,
    /// It will not work.
    Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Fine => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Problem => "PROBLEM",
        };
        write!(f, "{mark}  {}", self.text)
    }
}

/// Why nothing can be said of a cluster.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Whoever asks may not look.
    #[error("{0}: check with the rights of whoever is to install")]
    Forbidden(String),
    /// The API server did not answer, or failed.
    #[error("the Kubernetes API: {0}")]
    Api(kube::Error),
}

impl From<kube::Error> for CheckError {
    fn from(error: kube::Error) -> Self {
        if let kube::Error::Api(status) = &error
            && status.code == 403
        {
            Self::Forbidden(status.message.clone())
        } else {
            Self::Api(error)
        }
    }
}

/// Looks at the cluster with the rights of whoever asks, and changes nothing. `namespace` is where
/// nodemesh is to be installed.
///
/// # Errors
///
/// When the API server does not let it look.
pub async fn check(client: &Client, namespace: &str) -> Result<Vec<Finding>, CheckError> {
    Ok(judge(&gather(client, namespace).await?, namespace))
}

async fn gather(client: &Client, namespace: &str) -> Result<Facts, kube::Error> {
    let version = client.apiserver_version().await?;
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let mut workloads = names::<DaemonSet>(client).await?;
    workloads.extend(names::<Deployment>(client).await?);
    let config = Api::<ConfigMap>::namespaced(client.clone(), "kube-system");
    let config = config.get_opt("cilium-config").await?.and_then(|config| config.data);
    let found = Api::<Namespace>::all(client.clone()).get_opt(namespace).await?;
    let mut forbidden = Vec::new();
    for (group, resource, inside) in CREATED {
        if !may_create(client, group, resource, inside.then_some(namespace)).await? {
            forbidden.push(resource.to_owned());
        }
    }
    Ok(Facts {
        kubernetes: (version.major, version.minor),
        nodes: nodes.items.into_iter().map(node).collect(),
        workloads,
        cilium: config
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| (value == "true").then_some(key))
            .collect(),
        pod_security: found.and_then(|found| found.labels().get(POD_SECURITY).cloned()),
        forbidden,
    })
}

async fn names<K>(client: &Client) -> Result<Vec<(String, String)>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned,
{
    let found = Api::<K>::all(client.clone()).list_metadata(&ListParams::default()).await?;
    Ok(found.items.iter().map(|x| (x.namespace().unwrap_or_default(), x.name_any())).collect())
}

async fn may_create(
    client: &Client,
    group: &str,
    resource: &str,
    namespace: Option<&str>,
) -> Result<bool, kube::Error> {
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                verb: Some("create".to_owned()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let answer = Api::all(client.clone()).create(&Default::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

fn node(node: Node) -> NodeFacts {
    let name = node.name_any();
    let info = node.status.and_then(|status| status.node_info).unwrap_or_default();
    NodeFacts {
        name,
        os: info.operating_system,
        kernel: info.kernel_version,
        runtime: info.container_runtime_version,
    }
}

fn judge(facts: &Facts, namespace: &str) -> Vec<Finding> {
    let mut findings = vec![kubernetes(&facts.kubernetes)];
    findings.extend(facts.nodes.iter().map(judge_node));
    if facts.nodes.is_empty() {
        findings.push(problem("the cluster has no node".to_owned()));
    }
    findings.extend(others(facts));
    findings.push(match facts.pod_security.as_deref() {
        None | Some("privileged") => fine(format!("pods of {namespace} may be privileged")),
        Some(level) => problem(format!(
            "the namespace {namespace} lets no agent run ({POD_SECURITY}={level}): label it with \
             {POD_SECURITY}=privileged"
        )),
    });
    findings.push(if facts.forbidden.is_empty() {
        fine("you may create everything that the chart has".to_owned())
    } else {
        let list = facts.forbidden.join(", ");
        problem(format!("you may not create {list}: have a cluster administrator install it"))
    });
    findings
}

fn kubernetes((major, minor): &(String, String)) -> Finding {
    let text = format!("{major}.{minor}");
    let (major, minor) = FIRST_KUBERNETES;
    match version(&text) {
        Some(found) if found >= FIRST_KUBERNETES => fine(format!("Kubernetes {text}")),
        _ => problem(format!(
            "Kubernetes {text}: nodemesh needs {major}.{minor} or newer, whose service account \
             tokens name the node"
        )),
    }
}

fn judge_node(node: &NodeFacts) -> Finding {
    let NodeFacts { name, os, kernel, runtime } = node;
    if os != "linux" {
        return warning(format!("node {name}: {os} has no mesh; its pods stay outside"));
    }
    let (major, minor) = FIRST_KERNEL;
    if version(kernel).is_none_or(|found| found < FIRST_KERNEL) {
        let text = format!("node {name}: Linux {kernel}, and {major}.{minor} is needed");
        return problem(text);
    }
    let containerd = runtime.strip_prefix("containerd://");
    if containerd.and_then(version).is_some_and(|found| found < FIRST_CONTAINERD) {
        let (major, minor) = FIRST_CONTAINERD;
        return problem(format!(
            "node {name}: {runtime} does not tell CNI plugins the UID of a pod: {major}.{minor} does"
        ));
    }
    if version(kernel).is_none_or(|found| found < FULL_GUARD) {
        let (major, minor) = FULL_GUARD;
        return warning(format!(
            "node {name}: Linux {kernel} has two layers of the guard; {major}.{minor} has three"
        ));
    }
    fine(format!("node {name}: Linux {kernel}, {runtime}"))
}

fn others(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (namespace, name) in &facts.workloads {
        let mesh = MESHES.iter().find(|(part, _)| part == name);
        findings.extend(mesh.map(|(_, mesh)| {
            warning(format!(
                "{mesh} is installed ({namespace}/{name}): a pod can be in one mesh only, keep its \
                 namespaces apart"
            ))
        }));
    }
    let encrypts = facts.cilium.iter().find(|key| CILIUM_ENCRYPTION.contains(&key.as_str()));
    findings.extend(encrypts.map(|key| {
        warning(format!(
            "Cilium encrypts between nodes ({key} in cilium-config): what the mesh carries is then \
             encrypted twice"
        ))
    }));
    if findings.is_empty() {
        findings.push(fine("no other mesh".to_owned()));
    }
    findings
}

/// The first two numbers of a version, whatever is before, between (`v1`, `33+`) and behind them.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(|part| {
        let digits = part.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse().ok()
    });
    Some((parts.next()??, parts.next()??))
}

const fn fine(text: String) -> Finding {
    Finding { verdict: Verdict::Fine, text }
}

const fn warning(text: String) -> Finding {
    Finding { verdict: Verdict::Warning, text }
}

const fn problem(text: String) -> Finding {
    Finding { verdict: Verdict::Problem, text }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::scripted::scripted;

    fn good() -> Facts {
        let [name, os, kernel, runtime] =
            ["n1", "linux", "6.12.9-amd64", "containerd://2.1.0"].map(str::to_owned);
        Facts {
            kubernetes: ("1".to_owned(), "33+".to_owned()),
            nodes: vec![NodeFacts { name, os, kernel, runtime }],
            ..Facts::default()
        }
    }

    #[test]
    fn a_cluster_that_can_run_it_has_nothing_against_it() {
        let findings = judge(&good(), "nodemesh-system");
        assert!(findings.iter().all(|found| found.verdict == Verdict::Fine), "{findings:?}");
    }

    #[tokio::test]
    async fn who_may_not_look_is_told_in_one_sentence() {
        let answer = json!({"status": "Failure", "code": 403, "message": "nodes is forbidden"});
        let client = scripted(move |_, path, _| match path {
            "/version" => (200, json!(k8s_openapi::apimachinery::pkg::version::Info::default())),
            _ => (403, answer.clone()),
        });
        let error = check(&client, "nodemesh-system").await.unwrap_err().to_string();
        assert!(error.starts_with("nodes is forbidden: ") && error.contains("rights"), "{error}");
    }

    #[test]
    fn whatever_stands_against_it_is_said() {
        use Verdict::{Problem, Warning};
        type Case = (fn(&mut Facts), Verdict, &'static str);
        let cases: [Case; 12] = [
            (|f| f.kubernetes.1 = "32".to_owned(), Problem, "1.33"),
            (|f| f.kubernetes.1 = "?".to_owned(), Problem, "1.33"),
            (|f| f.nodes.clear(), Problem, "no node"),
            (|f| f.nodes[0].kernel = "5.15.0-generic".to_owned(), Problem, "6.1 is"),
            (|f| f.nodes[0].kernel = String::new(), Problem, "6.1 is"),
            (|f| f.nodes[0].kernel = "6.11.0-generic".to_owned(), Warning, "two layers"),
            (|f| f.nodes[0].runtime = "containerd://1.5.18".to_owned(), Problem, "UID"),
            (|f| f.nodes[0].os = "windows".to_owned(), Warning, "outside"),
            (
                |f| f.workloads.push(("istio-system".to_owned(), "ztunnel".to_owned())),
                Warning,
                "Istio's ambient mode",
            ),
            (|f| f.cilium.push("enable-wireguard".to_owned()), Warning, "twice"),
            (|f| f.pod_security = Some("baseline".to_owned()), Problem, "privileged"),
            (|f| f.forbidden.push("daemonsets".to_owned()), Problem, "daemonsets"),
        ];
        for (change, verdict, word) in cases {
            let mut facts = good();
            change(&mut facts);
            let bad: Vec<_> = judge(&facts, "nodemesh-system")
                .into_iter()
                .filter(|found| found.verdict != Verdict::Fine)
                .collect();
            assert!(bad.len() == 1 && bad[0].verdict == verdict, "{word}: {bad:?}");
            assert!(bad[0].text.contains(word), "{word}: {bad:?}");
        }
    }

    #[tokio::test]
    async fn the_cluster_is_asked_and_nothing_is_changed() {
        let list = |items: Value| (200, json!({"kind": "List", "metadata": {}, "items": items}));
        let client = scripted(move |method, path, body| match (method, path) {
            ("GET", "/version") => {
                let text = [
                    "major",
                    "minor",
                    "gitVersion",
                    "gitCommit",
                    "gitTreeState",
                    "buildDate",
                    "goVersion",
                    "compiler",
                    "platform",
                ];
                let mut info: Value =
                    text.iter().map(|key| ((*key).to_owned(), json!("1"))).collect();
                info["minor"] = json!("36");
                (200, info)
            }
            ("GET", "/api/v1/nodes") => list(json!([{
                "metadata": {"name": "n1"},
                "status": {"nodeInfo": {
                    "operatingSystem": "linux", "kernelVersion": "6.18.0", "architecture": "amd64",
                    "containerRuntimeVersion": "containerd://2.1.9", "bootID": "", "machineID": "",
                    "systemUUID": "", "kubeletVersion": "", "kubeProxyVersion": "", "osImage": "",
                }},
            }])),
            ("GET", "/apis/apps/v1/daemonsets") => {
                list(json!([{"metadata": {"namespace": "x", "name": "ztunnel"}}]))
            }
            ("GET", "/apis/apps/v1/deployments") => list(json!([])),
            ("GET", "/api/v1/namespaces/kube-system/configmaps/cilium-config") => {
                (200, json!({"metadata": {}, "data": {"enable-ipsec": "true", "debug": "true"}}))
            }
            ("GET", "/api/v1/namespaces/mesh") => {
                (200, json!({"metadata": {"labels": {POD_SECURITY: "restricted"}}}))
            }
            ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews") => {
                let attributes = &body["spec"]["resourceAttributes"];
                let allowed = attributes["resource"] != "clusterroles";
                (201, json!({"metadata": {}, "spec": {}, "status": {"allowed": allowed}}))
            }
            other => panic!("unexpected: {other:?}"),
        });
        let findings = check(&client, "mesh").await.unwrap();
        let bad: Vec<_> = findings
            .iter()
            .filter(|found| found.verdict != Verdict::Fine)
            .map(ToString::to_string)
            .collect();
        assert_eq!(bad.len(), 4, "{bad:?}");
        for (line, word) in
            bad.iter().zip(["ztunnel", "enable-ipsec", "restricted", "clusterroles"])
        {
            assert!(line.contains(word), "{line}");
        }
    }
}
