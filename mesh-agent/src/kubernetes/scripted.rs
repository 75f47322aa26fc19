//! An API server for tests: a function instead of a cluster.

use std::sync::Arc;

use http_body_util::BodyExt as _;
use kube::{Client, client::Body};
use serde_json::Value;
use tower::service_fn;

/// A client whose requests are answered by `script`: method and path to status and body.
pub(crate) fn scripted(
    script: impl Fn(&str, &str) -> (u16, Value) + Send + Sync + 'static,
) -> Client {
    let script = Arc::new(script);
    let service = service_fn(move |request: axum::http::Request<Body>| {
        let script = Arc::clone(&script);
        async move {
            let (head, body) = request.into_parts();
            drop(body.collect().await);
            let (status, answer) = script(head.method.as_str(), head.uri.path());
            let response = axum::http::Response::builder().status(status);
            let body = Body::from(answer.to_string().into_bytes());
            Ok::<_, std::convert::Infallible>(response.body(body).unwrap())
        }
    });
    Client::new(service, "default")
}
