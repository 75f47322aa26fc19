//! Section 4: Services.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use xtask::lab::Canary;

use super::expect;
use super::kubectl::{merged, until};
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};
use crate::pod::HTTP;

const BACKEND: &str = "backend";

/// How often a client asks to be sure that an endpoint which could answer does.
const OFTEN: usize = 30;

/// Checks with a client, and an endpoint on each node.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut cast = None;
    report.check("4", "a ClusterIP reaches both endpoints, by mTLS, at a named targetPort", || {
        let cast = cast.insert(start(stage)?);
        let to = serve(stage, BACKEND, json!({}))?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &cast.all())?;
        stage.ask_patiently(&cast.client, to, canary.text())?;
        expect_reached(stage, &cast.client, to, &cast.names())?;
        capture.expect_tls13()
    });
    let cast = || cast.as_ref().context("there are no pods");
    report.check("4", "a port that the Service has not is refused at once", || {
        let to = address(stage, &stage.mesh, BACKEND)?;
        stage.expect_refusal(&cast()?.client, SocketAddr::new(to.ip(), 81), "nobody")
    });
    report.check("4", "ClientIP affinity keeps a client with one endpoint", || {
        let to = serve(stage, "sticky", json!({ "sessionAffinity": "ClientIP" }))?;
        let seen = who(stage, &cast()?.client, to)?;
        expect(seen.len() == 1, || format!("{seen:?}"))
    });
    report.check("4", "trafficDistribution keeps a client with its own node's endpoint", || {
        let to = serve(stage, "near", json!({ "trafficDistribution": "PreferSameNode" }))?;
        expect_reached(stage, &cast()?.client, to, &BTreeSet::from([cast()?.near.name.clone()]))
    });
    report.check("4", "a targetPort by number, and an external IP", || {
        let external: IpAddr = match cast()?.client.ip {
            IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 80).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x80).into(),
        };
        let to = serve(
            stage,
            "numbered",
            json!({
                "externalIPs": [external],
                "ports": [{ "port": 80, "targetPort": crate::pod::ECHO }],
            }),
        )?;
        stage.ask_patiently(&cast()?.client, to, "number")?;
        stage.ask_patiently(&cast()?.client, SocketAddr::new(external, 80), "external").map(drop)
    });
    report.check("4", "a headless Service's endpoints are reached by their addresses", || {
        apply(stage, "headless", json!({ "clusterIP": "None" }))?;
        let cast = cast()?;
        let addresses = endpoints(stage, "headless")?;
        for pod in [&cast.near, &cast.far] {
            ensure!(addresses.contains(&pod.ip.to_string()), "{addresses:?} lack {}", pod.ip);
            stage.ask_patiently(&cast.client, pod.echo(), "headless")?;
        }
        Ok(())
    });
    report.check("4", "a Service of endpoints outside the mesh is refused, as policy says", || {
        let outside = stage.server(&stage.plain, "outside", 0)?;
        stage.kubectl.apply(vec![objects::service(&stage.plain, "outside", "outside")])?;
        let to = address(stage, &stage.plain, "outside")?;
        stage.ask_patiently(&outside, outside.echo(), "it works")?;
        stage.expect_refusal(&cast()?.client, to, "policy")
    });
    report.check("4", "a pod outside is refused by a Service of pods in the mesh", || {
        let outside = stage.ready(&stage.plain, "outside")?;
        stage.expect_refusal(&outside, address(stage, &stage.mesh, BACKEND)?, "strict")
    });
    report.check("4", "an endpoint that is not ready gets no connections", || {
        let cast = cast()?;
        turn(stage, &cast.near, "/unready")?;
        let to = address(stage, &stage.mesh, BACKEND)?;
        expect_reached(stage, &cast.client, to, &BTreeSet::from([cast.far.name.clone()]))
    });
    report.check("4", "no endpoints: refused at once", || {
        let cast = cast()?;
        turn(stage, &cast.far, "/unready")?;
        let to = address(stage, &stage.mesh, BACKEND)?;
        until("the Service to refuse", || {
            stage.expect_refusal(&cast.client, to, "nobody").map(Some)
        })
    });
    report.check("4", "ready again: reached again", || {
        let cast = cast()?;
        turn(stage, &cast.near, "/ready-again")?;
        turn(stage, &cast.far, "/ready-again")?;
        expect_reached(stage, &cast.client, address(stage, &stage.mesh, BACKEND)?, &cast.names())
    });
    clean_up(stage).unwrap_or_else(|error| eprintln!("{error:#}"));
}

struct Cast {
    client: Pod,
    /// On the client's node.
    near: Pod,
    /// On the other.
    far: Pod,
}

impl Cast {
    fn all(&self) -> [&Pod; 3] {
        [&self.client, &self.near, &self.far]
    }

    fn names(&self) -> BTreeSet<String> {
        [&self.near, &self.far].map(|pod| pod.name.clone()).into()
    }
}

fn start(stage: &Stage) -> Result<Cast> {
    let backend = |name: &str, node: usize| {
        let spec = objects::pod_spec(&stage.nodes[node], &objects::server(&stage.image));
        let label = json!({ "metadata": { "labels": { "app": BACKEND } } });
        merged(objects::pod(&stage.mesh, name, spec), label)
    };
    stage.kubectl.apply(vec![backend("near", 0), backend("far", 1)])?;
    let client = stage.server(&stage.mesh, "customer", 0)?;
    Ok(Cast {
        client,
        near: stage.ready(&stage.mesh, "near")?,
        far: stage.ready(&stage.mesh, "far")?,
    })
}

fn clean_up(stage: &Stage) -> Result<()> {
    for namespace in [&stage.mesh, &stage.plain] {
        stage.kubectl.output(&["-n", namespace, "delete", "service", "--all"])?;
    }
    stage.delete(&stage.mesh, &["customer", "near", "far"])?;
    stage.delete(&stage.plain, &["outside"])
}

/// Makes a Service of the backends that is a little different; where it is.
fn serve(stage: &Stage, name: &str, different: Value) -> Result<SocketAddr> {
    apply(stage, name, different)?;
    address(stage, &stage.mesh, name)
}

fn apply(stage: &Stage, name: &str, different: Value) -> Result<()> {
    let service = objects::service(&stage.mesh, name, BACKEND);
    stage.kubectl.apply(vec![merged(service, json!({ "spec": different }))])
}

/// The ClusterIP of a Service, and its port.
pub(super) fn address(stage: &Stage, namespace: &str, name: &str) -> Result<SocketAddr> {
    let service = stage.kubectl.get(namespace, "service", name)?;
    let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
    Ok(SocketAddr::new(ip.parse()?, 80))
}

fn endpoints(stage: &Stage, name: &str) -> Result<Vec<String>> {
    until("the endpoints", || {
        let label = format!("kubernetes.io/service-name={name}");
        let slices = stage.kubectl.list("endpointslices", &["-n", &stage.mesh, "-l", &label])?;
        let addresses =
            slices.iter().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let addresses: Vec<_> = addresses
            .filter_map(|endpoint| endpoint["addresses"][0].as_str().map(str::to_owned))
            .collect();
        Ok((addresses.len() == 2).then_some(addresses))
    })
}

/// Which pods answer.
fn who(stage: &Stage, client: &Pod, to: SocketAddr) -> Result<BTreeSet<String>> {
    let times = OFTEN.to_string();
    let ask = ["ask", &to.to_string(), "who", "--times", &times, "--patience", "60"];
    let answers = stage.tool(client, &ask)?;
    let name = |line: &str| -> Result<String> {
        let answer: Value = serde_json::from_str(line)?;
        Ok(answer["pod"].as_str().context("no name")?.to_owned())
    };
    answers.lines().map(name).collect()
}

fn expect_reached(
    stage: &Stage,
    client: &Pod,
    to: SocketAddr,
    expected: &BTreeSet<String>,
) -> Result<()> {
    until(&format!("{expected:?} to answer, all of them and nobody else"), || {
        let seen = who(stage, client, to)?;
        expect(seen == *expected, || format!("{seen:?} did"))?;
        Ok(Some(()))
    })
}

/// Tells a server to be ready or not, over its own loopback.
fn turn(stage: &Stage, pod: &Pod, path: &str) -> Result<()> {
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stage.tool(pod, &["ask", &format!("127.0.0.1:{HTTP}"), &request]).map(drop)
}
