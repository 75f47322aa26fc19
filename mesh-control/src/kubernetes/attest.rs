//! Who an agent is: the API server says so, of the token that it made for the agent's pod.

use std::fmt;

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use mesh_common::spiffe::check_segment;
use tokio::sync::Semaphore;

use crate::config::Kubernetes;

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// How many tokens the API server is asked about at once. Anybody can send some: the rest waits here.
const MAX_QUESTIONS: usize = 16;

/// Why a service account token was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// There is no API server to ask.
    #[error(
        "this control plane does not run on Kubernetes: join with a token of \
         `mesh-control token create`"
    )]
    NotOnKubernetes,
    /// It knows nodes by service account tokens only.
    #[error("this control plane runs on Kubernetes: join with the pod's service account token")]
    TokenNeeded,
    /// The API server does not accept it.
    #[error("the API server does not accept the service account token: {0}")]
    Unauthenticated(String),
    /// It was made for somebody else.
    #[error("the service account token is not for the audience {0}: project one that is")]
    Audience(String),
    /// It was made for another account.
    #[error("the service account token is of {found}, but agents are {expected}")]
    Account {
        /// Whose token it is.
        found: String,
        /// Whose it must be.
        expected: String,
    },
    /// It says of no pod.
    #[error("the service account token is bound to no pod: use a projected volume")]
    Unbound,
    /// The pod of the token is gone, or another one has its name.
    #[error("the pod {0} of the service account token is not there any more")]
    PodGone(String),
    /// Two statements of the API server do not go together.
    #[error("the pod {pod} of the service account token is not what its record says: {reason}")]
    Contradiction {
        /// The pod's name.
        pod: String,
        /// What differs.
        reason: &'static str,
    },
    /// The API server cannot be asked.
    #[error("the API server cannot be asked about the service account token: {0}")]
    Api(#[source] Box<kube::Error>),
}

/// What a good token says. None of it comes from the agent.
#[derive(Debug, PartialEq, Eq)]
struct Claims {
    pod: String,
    uid: String,
    node: Option<String>,
}

/// Asks the API server whose a token is.
pub struct Attestor {
    client: Client,
    config: Kubernetes,
    places: Semaphore,
}

impl fmt::Debug for Attestor {
    /// The client has credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attestor").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Attestor {
    /// One that asks for agents as they are configured.
    pub const fn new(client: Client, config: Kubernetes) -> Self {
        Self { client, config, places: Semaphore::const_new(MAX_QUESTIONS) }
    }

    /// Finds the node of the agent whose token this is.
    ///
    /// # Errors
    ///
    /// An [`AttestError`]; only [`AttestError::Api`] may be another one the next time.
    pub async fn node(&self, token: &str) -> Result<String, AttestError> {
        let _place = self.places.acquire().await.expect("it is never closed");
        let spec = TokenReviewSpec {
            audiences: Some(vec![self.config.audience.clone()]),
            token: Some(token.to_owned()),
        };
        let review = TokenReview { spec, ..TokenReview::default() };
        let review: TokenReview = Api::all(self.client.clone())
            .create(&PostParams::default(), &review)
            .await
            .map_err(|error| AttestError::Api(Box::new(error)))?;
        let claims = claims(review.status.unwrap_or_default(), &self.config)?;
        let pods = Api::<Pod>::namespaced(self.client.clone(), &self.config.namespace);
        let pod = pods
            .get_opt(&claims.pod)
            .await
            .map_err(|error| AttestError::Api(Box::new(error)))?
            .ok_or_else(|| AttestError::PodGone(claims.pod.clone()))?;
        placed(&pod, claims, &self.config)
    }
}

fn claims(status: TokenReviewStatus, config: &Kubernetes) -> Result<Claims, AttestError> {
    if status.authenticated != Some(true) {
        return Err(AttestError::Unauthenticated(status.error.unwrap_or_default()));
    }
    // A server that does not know of audiences returns none: then it has not looked.
    if !status.audiences.unwrap_or_default().contains(&config.audience) {
        return Err(AttestError::Audience(config.audience.clone()));
    }
    let user = status.user.unwrap_or_default();
    let expected =
        format!("system:serviceaccount:{}:{}", config.namespace, config.agent_service_account);
    if user.username.as_ref() != Some(&expected) {
        return Err(AttestError::Account { found: user.username.unwrap_or_default(), expected });
    }
    let pod = extra(&user, POD_NAME).ok_or(AttestError::Unbound)?;
    // It becomes part of a request's path.
    check_segment(&pod).map_err(|_| AttestError::Unbound)?;
    let uid = extra(&user, POD_UID).ok_or(AttestError::Unbound)?;
    Ok(Claims { pod, uid, node: extra(&user, NODE_NAME) })
}

fn extra(user: &UserInfo, key: &str) -> Option<String> {
    match user.extra.as_ref()?.get(key)?.as_slice() {
        [value] if !value.is_empty() => Some(value.clone()),
        [..] => None,
    }
}

fn placed(pod: &Pod, claims: Claims, config: &Kubernetes) -> Result<String, AttestError> {
    if pod.metadata.uid.as_ref() != Some(&claims.uid) {
        return Err(AttestError::PodGone(claims.pod));
    }
    let contradiction = |reason| AttestError::Contradiction { pod: claims.pod.clone(), reason };
    let spec = pod.spec.as_ref().ok_or_else(|| contradiction("no spec"))?;
    if spec.service_account_name.as_ref() != Some(&config.agent_service_account) {
        return Err(contradiction("another service account"));
    }
    let node = spec.node_name.clone().filter(|node| check_segment(node).is_ok());
    let node = node.ok_or_else(|| contradiction("no node"))?;
    // Tokens name their node since Kubernetes 1.30; before, the pod's record alone says it.
    if claims.node.is_some_and(|claimed| claimed != node) {
        return Err(contradiction("another node"));
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::scripted::scripted;

    fn status() -> Value {
        json!({
            "authenticated": true, "audiences": ["nodemesh-control"],
            "user": {
                "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
                "extra": {POD_NAME: ["agent-x"], POD_UID: ["u1"], NODE_NAME: ["n1"]},
            },
        })
    }

    fn pod() -> Value {
        json!({
            "metadata": {"name": "agent-x", "uid": "u1"},
            "spec": {
                "nodeName": "n1", "serviceAccountName": "nodemesh-agent", "containers": [],
            },
        })
    }

    async fn attest(status: Value, pod: Option<Value>) -> Result<String, AttestError> {
        let client = scripted(move |method, path, body| match (method, path) {
            ("POST", "/apis/authentication.k8s.io/v1/tokenreviews") => {
                assert_eq!(body["spec"]["token"], "the-token");
                assert_eq!(body["spec"]["audiences"], json!(["nodemesh-control"]));
                (201, json!({"metadata": {}, "spec": {}, "status": status}))
            }
            ("GET", "/api/v1/namespaces/nodemesh-system/pods/agent-x") => match &pod {
                Some(pod) => (200, pod.clone()),
                None => (404, json!({"status": "Failure", "code": 404, "reason": "NotFound"})),
            },
            other => panic!("unexpected: {other:?}"),
        });
        Attestor::new(client, Kubernetes::default()).node("the-token").await
    }

    fn with(mut value: Value, pointer: &str, new: Value) -> Value {
        *value.pointer_mut(pointer).unwrap() = new;
        value
    }

    #[tokio::test]
    async fn the_node_is_the_one_that_the_api_says() {
        assert_eq!(attest(status(), Some(pod())).await.unwrap(), "n1");
        let mut old = status();
        old["user"]["extra"].as_object_mut().unwrap().remove(NODE_NAME);
        assert_eq!(attest(old, Some(pod())).await.unwrap(), "n1");
    }

    #[tokio::test]
    async fn whatever_is_not_right_is_refused_and_named() {
        use AttestError as E;
        let is = |result: Result<String, E>, right: fn(&E) -> bool| {
            let error = result.unwrap_err();
            assert!(right(&error), "{error:?}");
        };
        let s = |pointer, new| attest(with(status(), pointer, new), Some(pod()));
        let p = |pointer, new| attest(status(), Some(with(pod(), pointer, new)));
        is(s("/authenticated", json!(false)).await, |e| matches!(e, E::Unauthenticated(_)));
        is(s("/audiences", json!(["other"])).await, |e| matches!(e, E::Audience(_)));
        is(s("/audiences", Value::Null).await, |e| matches!(e, E::Audience(_)));
        let other = json!("system:serviceaccount:shop:nodemesh-agent");
        is(s("/user/username", other).await, |e| matches!(e, E::Account { .. }));
        is(s("/user/extra", json!({POD_NAME: ["agent-x"]})).await, |e| matches!(e, E::Unbound));
        is(s("/user/extra", json!({POD_UID: ["u1"]})).await, |e| matches!(e, E::Unbound));
        let traversal = json!({POD_NAME: ["../secrets/x"], POD_UID: ["u1"]});
        is(s("/user/extra", traversal).await, |e| matches!(e, E::Unbound));
        is(attest(status(), None).await, |e| matches!(e, E::PodGone(_)));
        is(p("/metadata/uid", json!("u2")).await, |e| matches!(e, E::PodGone(_)));
        let contradicts = |e: &E| matches!(e, E::Contradiction { .. });
        is(p("/spec/serviceAccountName", json!("x")).await, contradicts);
        is(p("/spec/nodeName", json!("n2")).await, contradicts);
        is(p("/spec/nodeName", Value::Null).await, contradicts);
    }

    #[tokio::test]
    async fn an_api_server_that_fails_is_no_verdict() {
        let client = scripted(|_, _, _| (403, json!({"status": "Failure", "code": 403})));
        let result = Attestor::new(client, Kubernetes::default()).node("the-token").await;
        assert!(matches!(result, Err(AttestError::Api(_))));
    }
}
