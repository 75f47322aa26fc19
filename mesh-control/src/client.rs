//! Talks to the admin socket of a running server.

use std::path::Path;

use axum::http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;

use crate::admin::ErrorResponse;

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error(
        "mesh-control does not answer on {path} ({reason}): is it running, is this the right \
         --admin-socket, are you root?"
    )]
    Unreachable {
        /// The socket.
        path: String,
        /// What the kernel or HTTP said.
        reason: String,
    },
    /// The server refused.
    #[error("{0}")]
    Refused(String),
}

/// Sends one request and returns the body of the answer.
///
/// # Errors
///
/// Both [`ClientError`]s.
pub async fn request<T: Serialize + Sync>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&T>,
) -> Result<Bytes, ClientError> {
    let (status, body) = exchange(socket, method, path, body).await.map_err(|error| {
        ClientError::Unreachable { path: socket.display().to_string(), reason: error.to_string() }
    })?;
    if status.is_success() {
        return Ok(body);
    }
    let text = serde_json::from_slice(&body)
        .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |e: ErrorResponse| e.error);
    Err(ClientError::Refused(text))
}

async fn exchange<T: Serialize + Sync>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&T>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "mesh-control")
        .header("content-type", "application/json")
        .body(Full::<Bytes>::from(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    Ok((status, response.into_body().collect().await?.to_bytes()))
}
