//! The two listeners.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path as FilePath, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, put},
    serve::Listener,
};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tracing::warn;

use super::{Admin, metrics};
use crate::config::Udp;

/// Why the agent cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another agent answers at the socket.
    #[error("another mesh-agent is running: it answers at {}", .0.display())]
    Running(PathBuf),
    /// The unix socket cannot be made.
    #[error("cannot listen at admin_socket {}: {source}", path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The TCP socket cannot be opened.
    #[error("cannot listen at http_listen {address}: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Both listeners, open.
#[derive(Debug)]
pub struct Server {
    unix: RootOnly,
    tcp: TcpListener,
}

impl Server {
    /// Opens the listeners. Must be called in a tokio runtime. What an earlier agent left at
    /// `socket` is replaced.
    ///
    /// # Errors
    ///
    /// [`BindError`].
    pub async fn bind(socket: &FilePath, http: SocketAddr) -> Result<Self, BindError> {
        let unix = bind_unix(socket).await?;
        let tcp = TcpListener::bind(http)
            .await
            .map_err(|source| BindError::Tcp { address: http, source })?;
        Ok(Self { unix: RootOnly(unix), tcp })
    }

    /// Where HTTP is served.
    ///
    /// # Errors
    ///
    /// When the kernel does not know.
    pub fn http_address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Answers until it is dropped.
    ///
    /// # Errors
    ///
    /// Never in practice: single connections that fail are not an error.
    pub async fn serve(self, admin: Arc<Admin>) -> io::Result<()> {
        let operator = Router::new()
            .route("/v1/status", get(status))
            .route("/v1/connections", get(connections))
            .route("/v1/pods/{uid}", put(enroll).delete(unenroll))
            .route("/v1/pods/{uid}/certificate", get(certified))
            .with_state(Arc::clone(&admin));
        let anybody = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(scrape))
            .with_state(admin);
        let unix = axum::serve(self.unix, operator);
        let tcp = axum::serve(self.tcp, anybody);
        tokio::try_join!(unix, tcp)?;
        Ok(())
    }
}

async fn bind_unix(path: &FilePath) -> Result<UnixListener, BindError> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(BindError::Running(path.to_owned()));
    }
    let bind = || {
        let leftover = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        if leftover {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        // Whoever connected before this is judged by `RootOnly` all the same.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    bind().map_err(|source| BindError::Unix { path: path.to_owned(), source })
}

/// Hangs up on everybody but root, and the user that the agent runs as.
#[derive(Debug)]
struct RootOnly(UnixListener);

impl Listener for RootOnly {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.0).await;
            match stream.peer_cred() {
                Ok(peer) if is_trusted(peer.uid()) => return (stream, address),
                Ok(peer) => warn!(uid = peer.uid(), "a user other than root at the admin socket"),
                Err(error) => warn!("the admin socket's peer is unknown: {error}"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// What `enroll` sends.
///
/// An agent refuses what it does not know, since it may be what the caller relies on. So what an agent
/// of the last release does not know is left out unless it is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Enrollment {
    pub(super) netns: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) udp: Option<Udp>,
}

/// What `unenroll` sends; as with [`Enrollment`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Withdrawal {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) netns: Option<PathBuf>,
}

/// What is answered when something cannot be done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Refusal {
    pub(super) error: String,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (StatusCode::UNPROCESSABLE_ENTITY, Json(self)).into_response()
    }
}

async fn status(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.status()).into_response()
}

async fn connections(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.connections()).into_response()
}

async fn enroll(
    State(admin): State<Arc<Admin>>,
    Path(uid): Path<String>,
    Json(Enrollment { netns, udp }): Json<Enrollment>,
) -> Result<StatusCode, Refusal> {
    let enrolled = admin.pods.enroll(uid, netns, udp).await;
    enrolled.map(|()| StatusCode::NO_CONTENT).map_err(|error| Refusal { error })
}

/// What a client that waits for a certificate says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Patience {
    /// Seconds.
    wait: u64,
}

async fn certified(
    State(admin): State<Arc<Admin>>,
    Path(uid): Path<String>,
    Query(Patience { wait }): Query<Patience>,
) -> Result<StatusCode, Refusal> {
    let certified = admin.certified(&uid, Duration::from_secs(wait)).await;
    certified.map(|()| StatusCode::NO_CONTENT).map_err(|error| Refusal { error })
}

async fn unenroll(
    State(admin): State<Arc<Admin>>,
    Path(uid): Path<String>,
    Json(Withdrawal { netns }): Json<Withdrawal>,
) -> Result<StatusCode, Refusal> {
    let unenrolled = admin.pods.unenroll(uid, netns).await;
    unenrolled.map(|()| StatusCode::NO_CONTENT).map_err(|error| Refusal { error })
}

async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, String) {
    let status = admin.status();
    if status.ready {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        let reasons: String = status.degraded.iter().map(|reason| format!("{reason}\n")).collect();
        (StatusCode::SERVICE_UNAVAILABLE, reasons)
    }
}

async fn scrape(State(admin): State<Arc<Admin>>) -> Response {
    let dropped = admin.stats.reports().dropped();
    match metrics::encode(admin.status(), Arc::clone(&admin.counters), dropped) {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
