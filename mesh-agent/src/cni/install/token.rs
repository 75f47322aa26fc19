//! The plugin's own token. It is bound to the node, so that it outlives the pod that asks for it: pods
//! start on a node whose `mesh-agent` pod is being replaced, too.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::timeout;

use super::InstallError;

/// Whose token it is: somebody who may read pods and namespaces, and is no agent.
pub(super) const ACCOUNT: &str = "nodemesh-cni";

/// For a node that is down, or whose agent does not start, over night. The API server may make it
/// shorter, and the chart lets agents ask for no more.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// The rest of an installation waits for it.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// The token in use.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    present: Option<Token>,
}

struct Token {
    text: String,
    next: SystemTime,
}

impl Tokens {
    /// The token of this node, another one once half of the last one's life is over.
    pub(super) async fn of_node(
        &mut self,
        client: impl AsyncFnOnce() -> Result<Client, InstallError>,
        namespace: &str,
        node: &str,
        now: SystemTime,
    ) -> Result<String, InstallError> {
        if let Some(Token { text, next }) = &self.present
            && now < *next
        {
            return Ok(text.clone());
        }
        let api = Api::<ServiceAccount>::namespaced(client().await?, namespace);
        let (request, how) = (request(node), PostParams::default());
        let asking = api.create_token_request(ACCOUNT, &how, &request);
        let answer = timeout(ANSWER_WITHIN, asking).await.map_err(|_| InstallError::NoAnswer)?;
        let answer = answer.map_err(|source| InstallError::Token(Box::new(source)))?;
        let status = answer.status.ok_or(InstallError::NoAnswer)?;
        let end = SystemTime::from(status.expiration_timestamp.0);
        let next = now + end.duration_since(now).unwrap_or_default() / 2;
        self.present = Some(Token { text: status.token.clone(), next });
        Ok(status.token)
    }
}

fn request(node: &str) -> TokenRequest {
    TokenRequest {
        spec: TokenRequestSpec {
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(node.to_owned()),
                uid: None,
            }),
            expiration_seconds: i64::try_from(LIFE.as_secs()).ok(),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    }
}

/// Without the token itself.
impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("next", &self.next).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use serde_json::json;

    use super::*;
    use crate::kubernetes::scripted::scripted;

    const PATH: &str = "/api/v1/namespaces/mesh/serviceaccounts/nodemesh-cni/token";

    #[test]
    fn it_is_bound_to_the_node() {
        let request = serde_json::to_value(request("n1")).unwrap();
        let bound = json!({"apiVersion": "v1", "kind": "Node", "name": "n1"});
        assert_eq!(request["spec"]["boundObjectRef"], bound);
        assert_eq!(request["spec"]["expirationSeconds"], 86_400);
    }

    #[tokio::test]
    async fn another_one_is_asked_for_at_half_of_its_life_and_kept_from_then_on() {
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        let client = scripted(move |method, path| {
            assert_eq!((method, path), ("POST", PATH));
            let n = count.fetch_add(1, Ordering::SeqCst) + 1;
            let end = ["2026-01-01T10:00:00Z", "2026-01-01T15:00:00Z", ""][n as usize - 1];
            if end.is_empty() {
                return (403, json!({"kind": "Status", "code": 403, "message": "not for you"}));
            }
            let status = json!({"token": format!("t{n}"), "expirationTimestamp": end});
            let spec = json!({"audiences": []});
            (201, json!({"kind": "TokenRequest", "spec": spec, "status": status}))
        });
        // 2026-01-01T00:00:00Z
        let at =
            |hour: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600 + 3600 * hour);
        let mut tokens = Tokens::default();
        for (hour, token) in [(0, "t1"), (4, "t1"), (5, "t2"), (9, "t2")] {
            let client = async || Ok(client.clone());
            let found = tokens.of_node(client, "mesh", "n1", at(hour)).await;
            assert_eq!(found.unwrap(), token, "{hour}");
        }
        let refused = tokens.of_node(async || Ok(client.clone()), "mesh", "n1", at(10)).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("not for you") && refused.contains(ACCOUNT), "{refused}");
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        assert!(!format!("{tokens:?}").contains("t2"));
    }
}
