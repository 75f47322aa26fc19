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
    if control.authority().issuer_validity().not_after <= SystemTime::now() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the issuing CA has expired\n").into_response();
    }
    "ready\n".into_response()
}
