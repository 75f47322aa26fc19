//! `/metrics`, `/healthz` and `/readyz`.

use std::{io, sync::Arc, time::SystemTime};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{control::Control, status};

/// Serves probes and metrics until `shutdown`.
///
/// # Errors
///
/// What the kernel says.
pub async fn serve(
    control: Arc<Control>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    axum::serve(listener, router(control)).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(control)
}

async fn metrics(State(control): State<Arc<Control>>) -> Response {
    status::update_gauges(&control, SystemTime::now());
    match control.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Ready means: agents are served. What is merely degraded is for `status` to say.
async fn ready(State(control): State<Arc<Control>>) -> Response {
    if !control.is_ready() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the API server has not been heard yet\n")
            .into_response();
    }
    if control.authority().issuer_validity().not_after <= SystemTime::now() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the issuing CA has expired\n").into_response();
    }
    "ready\n".into_response()
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;
    use crate::{config::Config, registry::Registry, services::Files};

    async fn get(control: &Arc<Control>, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router(Arc::clone(control)).oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn open(dir: &tempfile::TempDir, more: &str) -> Arc<Control> {
        let path = dir.path().join("config.yaml");
        let state = dir.path().join("state");
        let text = format!("trust_domain: a\nstate_dir: {}\n{more}", state.display());
        std::fs::write(&path, text).unwrap();
        Arc::new(Control::open(Config::load(&path).unwrap(), SystemTime::now()).unwrap())
    }

    #[tokio::test]
    async fn on_kubernetes_it_is_ready_when_the_cluster_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let control = open(&dir, "kubernetes: {}");
        control.reload();
        assert_eq!(get(&control, "/healthz").await.0, StatusCode::OK);
        assert_eq!(get(&control, "/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
        control.set_cluster(Registry::default(), Files::default());
        assert_eq!(get(&control, "/readyz").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn probes_and_metrics_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let control = open(&dir, "");
        assert_eq!(get(&control, "/healthz").await.0, StatusCode::OK);
        assert_eq!(get(&control, "/readyz").await.0, StatusCode::OK);
        assert_eq!(get(&control, "/other").await.0, StatusCode::NOT_FOUND);
        let (_, metrics) = get(&control, "/metrics").await;
        for line in [
            "nodemesh_control_certificates_issued_total{kind=\"control\"} 1",
            "nodemesh_control_refusals_total{reason=\"token-used\"} 0",
            "nodemesh_control_agents_connected 0",
        ] {
            assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
        }
    }
}
