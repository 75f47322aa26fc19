//! An API server for tests: a function instead of a cluster.

use std::sync::Arc;

use kube::{Client, client::Body};
use serde_json::Value;
use tower::service_fn;

/// A client whose requests are answered by `script`: method, path and body to status and body.
pub(crate) fn scripted(
    script: impl Fn(&str, &str, &Value) -> (u16, Value) + Send + Sync + 'static,
) -> Client {
    let script = Arc::new(script);
    let service = service_fn(move |request: axum::http::Request<Body>| {
        let script = Arc::clone(&script);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let target = head.uri.path_and_query().unwrap().as_str();
            let path = if target.contains("watch=") { target } else { head.uri.path() };
            let (status, answer) = script(head.method.as_str(), path, &body);
            let text = match answer.as_array() {
                // A watch: one event a line.
                Some(events) => events.iter().map(|event| format!("{event}\n")).collect(),
                None => answer.to_string(),
            };
            let response = axum::http::Response::builder().status(status);
            Ok::<_, std::convert::Infallible>(response.body(Body::from(text.into_bytes())).unwrap())
        }
    });
    Client::new(service, "default")
}
