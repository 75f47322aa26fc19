//! The operator's door: HTTP over a unix socket that only root can use.

use std::{
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path as UrlPath, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream, unix::SocketAddr};
use tokio_util::sync::CancellationToken;

use crate::{
    control::{AdminError, Control},
    kubernetes::cluster::Cluster,
    registry::Workload,
    replicas, status,
};

/// Asks for a join token.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// For which node.
    pub node: String,
    /// How long it can be used.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
}

/// A new join token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenResponse {
    /// Its text.
    pub token: String,
}

/// Why a request was not granted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorResponse {
    /// For a person.
    pub error: String,
}

/// Listens on a unix socket with mode 0600, in place of a dead one.
///
/// # Errors
///
/// If another server answers there, or the kernel refuses.
pub async fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context("creating its directory")?;
    }
    if UnixStream::connect(path).await.is_ok() {
        anyhow::bail!("another server answers there");
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    // Until here others could connect, but are turned away below.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// What the operator asks.
#[derive(Clone, Debug)]
struct Desk {
    control: Arc<Control>,
    cluster: Option<Arc<Cluster>>,
}

/// Serves the operator until `shutdown`. A `cluster` knows the other replicas, and who is outside of
/// the mesh.
///
/// # Errors
///
/// What the kernel says.
pub async fn serve(
    control: Arc<Control>,
    cluster: Option<Arc<Cluster>>,
    listener: UnixListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    axum::serve(RootOnly(listener), router(Desk { control, cluster }))
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await
}

/// Accepts root, and the user that the server runs as.
struct RootOnly(UnixListener);

impl axum::serve::Listener for RootOnly {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            let (stream, address) = axum::serve::Listener::accept(&mut self.0).await;
            match stream.peer_cred().map(|peer| peer.uid()) {
                Ok(uid) if uid == 0 || uid == nix::unistd::geteuid().as_raw() => {
                    return (stream, address);
                }
                peer => tracing::warn!(?peer, "refused on the admin socket: not root"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn router(desk: Desk) -> Router {
    Router::new()
        .route("/v1/status", get(show))
        .route("/v1/tokens", post(create_token))
        .route("/v1/workloads", put(register))
        .route("/v1/workloads/{uid}", delete(deregister))
        .layer(DefaultBodyLimit::max(64 * 1024))
        .with_state(desk)
}

async fn show(State(Desk { control, cluster }): State<Desk>) -> Json<status::Status> {
    Json(show_all(&control, cluster.as_deref()).await)
}

/// Asks every replica. The answer of one that is silent takes some seconds.
pub async fn show_all(control: &Control, cluster: Option<&Cluster>) -> status::Status {
    let addresses = cluster.map(Cluster::replicas).unwrap_or_default();
    let others = replicas::ask(control, &addresses).await;
    let own = status::gather(control, SystemTime::now());
    status::whole(own, others, &control.view(), cluster.map(Cluster::outside))
}

async fn create_token(
    State(Desk { control, .. }): State<Desk>,
    Json(request): Json<TokenRequest>,
) -> Response {
    blocking(move || {
        let token = control.create_token(&request.node, request.ttl, SystemTime::now())?;
        Ok(Json(TokenResponse { token }))
    })
    .await
}

async fn register(
    State(Desk { control, .. }): State<Desk>,
    Json(workload): Json<Workload>,
) -> Response {
    blocking(move || control.register(&workload).map(|()| StatusCode::NO_CONTENT)).await
}

async fn deregister(
    State(Desk { control, .. }): State<Desk>,
    UrlPath(uid): UrlPath<String>,
) -> Response {
    blocking(move || control.deregister(&uid).map(|()| StatusCode::NO_CONTENT)).await
}

/// Runs what waits for the disk.
async fn blocking<T: IntoResponse + Send + 'static>(
    work: impl FnOnce() -> Result<T, AdminError> + Send + 'static,
) -> Response {
    let (status, error) = match tokio::task::spawn_blocking(work).await {
        Ok(Ok(response)) => return response.into_response(),
        Ok(Err(error)) => {
            let status = match error {
                AdminError::Conflict(_) => StatusCode::CONFLICT,
                AdminError::NotFound(_) => StatusCode::NOT_FOUND,
                AdminError::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
                AdminError::Storage { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, error.to_string())
        }
        Err(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "mesh-control failed: see its log".to_owned())
        }
    };
    (status, Json(ErrorResponse { error })).into_response()
}
