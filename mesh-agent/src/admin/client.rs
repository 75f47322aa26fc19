//! The command line's side of the admin socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use axum::http::{Method, Request, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::{
    server::{Enrollment, Refusal, Withdrawal},
    status::{OpenConnections, Status},
};
use crate::config::Udp;

/// Why the agent did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("no mesh-agent answers at {path}: {source}{hint}", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// The agent hung up.
    #[error("the mesh-agent at {path} hung up: {source}", path = path.display())]
    HungUp {
        /// The socket.
        path: PathBuf,
        /// How.
        source: hyper::Error,
    },
    /// The answer makes no sense.
    #[error("the agent's answer is not understood ({0}): is it of another version?")]
    Answer(String),
    /// The agent says why not.
    #[error("{0}")]
    Refused(String),
}

/// Talks to an agent.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the agent behind this socket.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// The state of everything.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        parse(&self.get("/v1/status").await?)
    }

    /// The open connections of every pod.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn connections(&self) -> Result<OpenConnections, ClientError> {
        parse(&self.get("/v1/connections").await?)
    }

    /// Enrols a pod, and waits until it is under guard.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn enroll(
        &self,
        uid: &str,
        netns: &Path,
        udp: Option<Udp>,
    ) -> Result<(), ClientError> {
        let body = Enrollment { netns: netns.to_owned(), udp };
        self.request(Method::PUT, &format!("/v1/pods/{uid}"), Some(&body)).await.map(drop)
    }

    /// Waits until an enrolled pod has a certificate, at most for so many seconds.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn certified(&self, uid: &str, wait: u64) -> Result<(), ClientError> {
        self.get(&format!("/v1/pods/{uid}/certificate?wait={wait}")).await.map(drop)
    }

    /// Un-enrols a pod, and waits until nothing of that is left. With `netns`: if it is bound to
    /// that network namespace, and otherwise there is nothing to do.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn unenroll(&self, uid: &str, netns: Option<&Path>) -> Result<(), ClientError> {
        let body = Withdrawal { netns: netns.map(Path::to_owned) };
        self.request(Method::DELETE, &format!("/v1/pods/{uid}"), Some(&body)).await.map(drop)
    }

    async fn get(&self, path: &str) -> Result<Bytes, ClientError> {
        self.request(Method::GET, path, None::<&()>).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, ClientError> {
        let internal = |error: &dyn std::error::Error| ClientError::Answer(error.to_string());
        let json = body.map(serde_json::to_vec).transpose().map_err(|error| internal(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "mesh-agent")
            .header("content-type", "application/json")
            .body(Full::<Bytes>::from(json.unwrap_or_default()))
            .map_err(|error| internal(&error))?;

        let stream = UnixStream::connect(&self.socket).await.map_err(|source| {
            let hint = if source.kind() == io::ErrorKind::PermissionDenied {
                ". Only root may ask it"
            } else {
                ". Is it running? Is the path its admin_socket (--socket, --config)?"
            };
            ClientError::Unreachable { path: self.socket.clone(), source, hint }
        })?;
        let hung_up = |source| ClientError::HungUp { path: self.socket.clone(), source };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(hung_up)?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok((status, response.into_body().collect().await?.to_bytes()))
        };
        // The connection moves the bytes of the exchange, and is done with when that is.
        let (status, body) = tokio::select! {
            biased;
            answer = exchange => answer,
            Err(error) = connection => Err(error),
        }
        .map_err(hung_up)?;
        if status.is_success() {
            Ok(body)
        } else if status == StatusCode::UNPROCESSABLE_ENTITY {
            Err(ClientError::Refused(parse::<Refusal>(&body)?.error))
        } else {
            Err(ClientError::Answer(status.to_string()))
        }
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Answer(error.to_string()))
}
