//! Section 8: two Deployments and a Service talk, proved on the wire and by both sides' identities.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use xtask::lab::Canary;

use super::expect;
use super::kubectl::{merged, until};
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};

/// Checks with two Deployments, one on each node.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut talk = None;
    report.check("8", "two Deployments and a Service talk, only TLS 1.3 between the nodes", || {
        let (client, server) = deploy(stage, &stage.mesh)?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[&client, &server])?;
        let answer = stage.ask_patiently(&client, service(stage, &stage.mesh)?, canary.text())?;
        capture.expect_tls13()?;
        expect(answer["received"] == canary.text(), || answer.to_string())?;
        talk = Some((client, server, answer));
        Ok(())
    });
    report.check("8", "the server sees the client's pod address", || {
        let (client, server, answer) = talk.as_ref().context("they did not talk")?;
        talked(client, server, answer)
    });
    report.check("8", "both agents name both identities, and one trace", || {
        let (client, server, _) = talk.as_ref().context("they did not talk")?;
        both_name(stage, "mtls", client, server)
    });
    if let Some((client, server, _)) = &talk {
        second_family(stage, report, client, server);
    }
    report.measure("5", "every layer of the guard that a pod's device allows is active", || {
        let (client, _, _) = talk.as_ref().context("they did not talk")?;
        let entry = stage.in_mesh(client)?;
        let layers = entry["guard"].as_array().context("no guard")?;
        let active = layers.iter().all(|layer| layer["active"] == true);
        expect(active && layers.len() > 1, || entry["guard"].to_string())?;
        let names: Vec<_> = layers.iter().filter_map(|layer| layer["layer"].as_str()).collect();
        Ok(names.join(", "))
    });
    report.check("8", "two pods of one node talk on no wire, by both identities", || {
        let client = with_account(stage, "near-client", "client", 0)?;
        let server = with_account(stage, "near-server", "server", 0)?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[])?;
        let answer = stage.ask_patiently(&client, server.echo(), canary.text())?;
        capture.expect_secret()?;
        talked(&client, &server, &answer)?;
        both_name(stage, "local", &client, &server)
    });
    stage
        .delete(&stage.mesh, &["near-client", "near-server"])
        .unwrap_or_else(|error| eprintln!("{error:#}"));
    report.check("8", "without the label the canary is on the wire", || {
        let (client, server) = deploy(stage, &stage.plain)?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[&client, &server])?;
        stage.ask_patiently(&client, service(stage, &stage.plain)?, canary.text())?;
        capture.expect_plaintext()
    });
    for namespace in [&stage.mesh, &stage.plain] {
        let delete = ["-n", namespace, "delete", "deployment,service", "--all"];
        stage.kubectl.output(&delete).map_or_else(|error| eprintln!("{error:#}"), drop);
    }
}

/// On a cluster of two address families, checks the one that the pods do not prefer.
fn second_family(stage: &Stage, report: &mut Report, client: &Pod, server: &Pod) {
    const WHAT: &str =
        "the pods' addresses of the other family, and the Service's, are in the mesh";
    let pods = [client, server].map(|pod| second_address(stage, pod));
    match pods {
        [Ok(Some(client)), Ok(Some(server))] => report.check("5", WHAT, || {
            let service = stage.kubectl.get(&stage.mesh, "service", "server")?;
            let service =
                service["spec"]["clusterIPs"][1].as_str().context("no second clusterIP")?;
            let canary = Canary::random();
            let capture = stage.capture(&canary, &[&client, &server])?;
            for to in [server.echo(), SocketAddr::new(service.parse()?, 80)] {
                let answer = stage.ask_patiently(&client, to, canary.text())?;
                talked(&client, &server, &answer)?;
            }
            capture.expect_tls13()
        }),
        [Err(error), _] | [_, Err(error)] => report.check("5", WHAT, || Err(error)),
        _ => report.skip("5", WHAT, "the pods of this cluster have one address each"),
    }
}

/// The same pod, by another of its addresses.
fn second_address(stage: &Stage, pod: &Pod) -> Result<Option<Pod>> {
    let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
    let Some(ip) = record["status"]["podIPs"][1]["ip"].as_str() else { return Ok(None) };
    Ok(Some(Pod { ip: ip.parse()?, ..pod.clone() }))
}

/// The server answered, and saw the client's own address.
fn talked(client: &Pod, server: &Pod, answer: &Value) -> Result<()> {
    let peer: SocketAddr = answer["peer"].as_str().context("no peer")?.parse()?;
    let right = peer.ip() == client.ip && answer["pod"] == server.name.as_str();
    expect(right, || answer.to_string())
}

/// A client on the first node, a server on the second; each with a service account of its own.
fn deploy(stage: &Stage, namespace: &str) -> Result<(Pod, Pod)> {
    let families = json!({ "spec": { "ipFamilyPolicy": "PreferDualStack" } });
    let mut objects = vec![merged(objects::service(namespace, "server", "server"), families)];
    for (name, node) in [("client", &stage.nodes[0]), ("server", &stage.nodes[1])] {
        let mut spec = objects::pod_spec(node, &objects::server(&stage.image));
        spec["serviceAccountName"] = json!(name);
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": name, "namespace": namespace },
        }));
        objects.push(objects::deployment(namespace, name, 1, &spec));
    }
    stage.kubectl.apply(objects)?;
    let one = |name| {
        stage.all_ready(namespace, name, 1)?.pop().with_context(|| format!("no pod of {name}"))
    };
    Ok((one("client")?, one("server")?))
}

fn service(stage: &Stage, namespace: &str) -> Result<SocketAddr> {
    super::services::address(stage, namespace, "server")
}

/// A pod in the mesh with one of the service accounts.
fn with_account(stage: &Stage, name: &str, account: &str, node: usize) -> Result<Pod> {
    let mut spec = objects::pod_spec(&stage.nodes[node], &objects::server(&stage.image));
    spec["serviceAccountName"] = json!(account);
    stage.start(&stage.mesh, name, spec)?;
    stage.ready(&stage.mesh, name)
}

/// The agents of both pods know of their connection, by one trace.
fn both_name(stage: &Stage, kind: &str, client: &Pod, server: &Pod) -> Result<()> {
    let outbound = access(stage, kind, client, "outbound", client, server)?;
    let inbound = access(stage, kind, server, "inbound", client, server)?;
    let trace = &outbound["trace"];
    expect(trace.is_string() && *trace == inbound["trace"], || format!("{outbound} {inbound}"))
}

/// The line of a pod's agent about a connection from client to server.
fn access(
    stage: &Stage,
    kind: &str,
    of: &Pod,
    direction: &str,
    client: &Pod,
    server: &Pod,
) -> Result<Value> {
    let identity = |account| format!("/ns/{}/sa/{account}", stage.mesh);
    let is_of = |line: &Value, key: &str, suffix: &str| {
        line[key].as_str().is_some_and(|value| value.ends_with(suffix))
    };
    until("the access log to name both identities", || {
        let lines = stage.access_log(&of.node)?;
        let of_pods = |line: &&Value| {
            line["direction"] == direction
                && line["client_uid"] == client.uid.as_str()
                && line["server_uid"] == server.uid.as_str()
        };
        let line = lines.iter().rfind(of_pods).context("no line of it")?;
        let right = line["kind"] == kind
            && is_of(line, "client_id", &identity("client"))
            && is_of(line, "server_id", &identity("server"));
        expect(right, || line.to_string())?;
        Ok(Some(line.clone()))
    })
}
