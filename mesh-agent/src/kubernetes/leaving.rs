//! Whether a pod that the registry no longer names was taken out of the mesh: the API server is
//! asked. That the registry does not name it proves nothing: it may be late, and it may lie.

use std::time::Duration;

use kube::Client;
use mesh_common::membership::{Membership, Outside};

use super::facts::Facts;

/// How long the API server may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A pod as it was registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) namespace: String,
    pub(super) name: String,
}

/// What has become of a pod that was in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The registry is late.
    Member,
    /// It runs on, outside of the mesh.
    Outside(Outside),
    /// It has ended, or another pod has its name: its namespace goes by itself.
    Over,
}

/// Why nothing is known.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error("the API server: {0}")]
    Api(#[from] kube::Error),
    #[error("the API server did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Timeout,
}

/// Asks what has become of the pod `uid`. `own_namespace` is where nodemesh is installed.
pub(super) async fn ask(
    client: &Client,
    name: &Name,
    uid: &str,
    own_namespace: &str,
) -> Result<Fate, AskError> {
    let Name { namespace, name } = name;
    let asking = Facts::read(client.clone(), namespace, name);
    let found =
        tokio::time::timeout(ANSWER_WITHIN, asking).await.map_err(|_| AskError::Timeout)??;
    Ok(match found.filter(|found| found.uid == uid && !found.is_over) {
        None => Fate::Over,
        Some(found) => match Membership::of(&found.candidate(namespace), own_namespace) {
            Membership::Pod | Membership::Namespace => Fate::Member,
            Membership::Outside(why) => Fate::Outside(why),
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::scripted::scripted, *};

    const MESH: &str = "nodemesh.io/mesh";

    fn pod(uid: &str, labels: &Value, phase: &str) -> (u16, Value) {
        let metadata = json!({"name": "cart-0", "uid": uid, "labels": labels});
        (200, json!({"metadata": metadata, "spec": {"containers": []}, "status": {"phase": phase}}))
    }

    fn namespace(labels: &Value) -> (u16, Value) {
        (200, json!({"metadata": {"name": "shop", "labels": labels}}))
    }

    fn failure(code: u16) -> (u16, Value) {
        let reason = if code == 404 { "NotFound" } else { "Forbidden" };
        (code, json!({"status": "Failure", "code": code, "reason": reason}))
    }

    async fn asked(pod: (u16, Value), namespace: (u16, Value)) -> Result<Fate, AskError> {
        let client = scripted(move |method, path| match (method, path) {
            ("GET", "/api/v1/namespaces/shop/pods/cart-0") => pod.clone(),
            ("GET", "/api/v1/namespaces/shop") => namespace.clone(),
            other => panic!("unexpected: {other:?}"),
        });
        let name = Name { namespace: "shop".to_owned(), name: "cart-0".to_owned() };
        ask(&client, &name, "u1", "nodemesh-system").await
    }

    #[tokio::test]
    async fn only_a_pod_that_runs_on_without_the_mesh_has_left_it() {
        let (none, yes, no) = (json!({}), json!({MESH: "enabled"}), json!({MESH: "disabled"}));
        let running = |labels| pod("u1", labels, "Running");
        for (pod, namespace, expected) in [
            (running(&none), namespace(&yes), Fate::Member),
            (running(&yes), namespace(&none), Fate::Member),
            (running(&none), namespace(&none), Fate::Outside(Outside::NotAsked)),
            (running(&no), namespace(&yes), Fate::Outside(Outside::OptedOut)),
            (pod("u2", &none, "Running"), namespace(&none), Fate::Over),
            (pod("u1", &none, "Succeeded"), namespace(&none), Fate::Over),
            (failure(404), namespace(&none), Fate::Over),
            (running(&none), failure(404), Fate::Over),
        ] {
            let what = format!("{pod:?} {namespace:?}");
            assert_eq!(asked(pod, namespace).await.unwrap(), expected, "{what}");
        }
    }

    #[tokio::test]
    async fn an_api_server_that_fails_has_said_nothing() {
        let pod = || pod("u1", &json!({}), "Running");
        asked(failure(403), namespace(&json!({}))).await.unwrap_err();
        asked(pod(), failure(403)).await.unwrap_err();
        asked(pod(), failure(500)).await.unwrap_err();
    }
}
