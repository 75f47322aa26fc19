//! The task that holds the connection to the control plane: joins, watches snapshots, renews the
//! node's certificate, and starts over when anything fails. Meanwhile the agent works with the
//! last snapshot.

use std::{pin::pin, sync::Arc, time::Duration};

use mesh_common::{
    api::{self, watch_request::Message},
    svid::{Kind, PeerVerifier, client_config},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{
    connect::{self, Client, ConnectError, connect, words},
    joining::{Spent, Ticket},
    node::{NodeError, NodeIdentity, NodeIssuer},
    parts::{Parts, PartsError},
    schedule::{Clock, before_it_is_too_late, retry_delays, while_certificates_last},
    snapshots::Snapshots,
    status::{Connection, Counters, Problem, Status, count},
};

/// How long the control plane may take to accept the stream of snapshots.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How often a token that is missing or was refused is tried again without any sign of change.
const TRY_TOKEN_EVERY: Duration = Duration::from_secs(60);

/// How many answers may wait for a control plane that does not read them.
const UNSENT_ANSWERS: usize = 16;

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the control plane does not let this node watch the registry: {}", words(.0))]
    Refused(tonic::Status),
    #[error("the control plane does not accept this node's certificate: {}", words(.0))]
    CertificateRefused(tonic::Status),
    #[error("the connection to the control plane is lost: {0}")]
    Lost(String),
    #[error("the node's certificate has expired and the control plane has not renewed it")]
    Expired,
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("{error}; nor can the node join anew: {joining}")]
    NotAnew { error: Box<LinkError>, joining: NodeError },
}

impl LinkError {
    /// Whether joining again would help: one side does not trust the other any more.
    fn calls_for_joining(&self) -> bool {
        match self {
            Self::Connect(error) => error.is_distrust(),
            Self::Refused(status) => status.code() == Code::Unauthenticated,
            Self::CertificateRefused(_) => true,
            Self::Node(_) | Self::Lost(_) | Self::Expired | Self::Tls(_) | Self::NotAnew { .. } => {
                false
            }
        }
    }
}

/// The only owner of the connection to the control plane.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) clock: Clock,
    pub(super) counters: Arc<Counters>,
    pub(super) issuer: NodeIssuer,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) connection: watch::Sender<Option<Client>>,
    pub(super) status: watch::Sender<Status>,
    pub(super) state: watch::Receiver<Option<api::State>>,
}

impl Link {
    /// Runs until it is dropped.
    pub(super) async fn run(self) {
        let token = self.issuer.credential.watch();
        let mut identity = self.stored_identity();
        let mut spent = Spent::default();
        let mut delays = retry_delays();
        loop {
            self.status.send_modify(|status| {
                status.node_certificate = identity.as_ref().map(NodeIdentity::status);
            });
            let synced_before = self.status.borrow().last_sync;
            let result = match &identity {
                Some(identity) => match self.session(identity).await {
                    Err(error) if error.calls_for_joining() => {
                        let delay = delays.next().unwrap_or_default();
                        self.join_instead(error, &mut spent, delay).await
                    }
                    result => result,
                },
                None => self.join(&mut spent).await.map_err(LinkError::Node),
            };
            self.connection.send_replace(None);
            if self.status.borrow().last_sync != synced_before {
                delays = retry_delays();
            }
            let error = match result {
                Ok(new) => {
                    count(&self.counters.node_certificates);
                    let (id, serial) = (&new.leaf.id, &new.leaf.serial);
                    tracing::info!(%id, serial, "new node certificate");
                    // What the control plane says with it is newer than what we have stored.
                    self.snapshots.trust(&new.bundle);
                    identity = Some(new);
                    continue;
                }
                Err(error) => error,
            };
            self.disconnected(&error);
            let delay = match error {
                LinkError::Expired => {
                    identity = None;
                    continue;
                }
                LinkError::Node(error) if error.needs_a_token() => TRY_TOKEN_EVERY,
                LinkError::Node(_)
                | LinkError::Connect(_)
                | LinkError::Refused(_)
                | LinkError::CertificateRefused(_)
                | LinkError::Lost(_)
                | LinkError::Tls(_)
                | LinkError::NotAnew { .. } => {
                    let lifetime = self.snapshots.current().settings().svid_lifetime;
                    let delay = delays.next().unwrap_or(TRY_TOKEN_EVERY);
                    while_certificates_last(delay, lifetime)
                }
            };
            tokio::select! {
                () = token.changed() => {}
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Joins with whatever there is.
    async fn join(&self, spent: &mut Spent) -> Result<NodeIdentity, NodeError> {
        let Self { issuer, counters, .. } = self;
        let result = match issuer.credential.read(&issuer.node) {
            Ok(ticket) => self.join_with(&ticket, spent).await,
            Err(error) => Err(error),
        };
        result.inspect_err(|_| count(&counters.node_certificate_failures))
    }

    async fn join_with(
        &self,
        ticket: &Ticket,
        spent: &mut Spent,
    ) -> Result<NodeIdentity, NodeError> {
        let result = self.issuer.join(ticket, || self.clock.now()).await;
        if matches!(result, Ok(_) | Err(NodeError::JoinToken(_))) {
            *spent = ticket.spent();
        }
        result
    }

    /// The node's certificate is not expired, but of no use: joining anew helps, if that is
    /// possible. A control plane that refuses also what it has just issued gets a `pause`.
    async fn join_instead(
        &self,
        error: LinkError,
        spent: &mut Spent,
        pause: Duration,
    ) -> Result<NodeIdentity, LinkError> {
        let Self { issuer, counters, .. } = self;
        let not_anew = |joining| LinkError::NotAnew { error: Box::new(error), joining };
        let ticket = match issuer.credential.read_another(&issuer.node, spent) {
            Ok(ticket) => ticket,
            Err(joining) => return Err(not_anew(joining)),
        };
        match self.join_with(&ticket, spent).await {
            Ok(identity) => {
                tokio::time::sleep(pause).await;
                Ok(identity)
            }
            Err(joining) => {
                count(&counters.node_certificate_failures);
                Err(not_anew(joining))
            }
        }
    }

    fn stored_identity(&self) -> Option<NodeIdentity> {
        self.issuer.load(self.clock.now()).unwrap_or_else(|error| {
            count(&self.counters.file_errors);
            tracing::warn!(error, "ignoring the stored node certificate: joining anew");
            None
        })
    }

    /// Connects and follows the registry, until the node has a new certificate to connect with.
    async fn session(&self, identity: &NodeIdentity) -> Result<NodeIdentity, LinkError> {
        let snapshot = self.snapshots.current();
        let bundle = Arc::clone(snapshot.bundle().unwrap_or(&identity.bundle));
        let verifier = PeerVerifier::new(bundle, Kind::Control);
        let key = Arc::clone(&identity.key);
        let tls = client_config(Arc::new(verifier), Some(key), api::ALPN)?;
        let expired = async {
            self.clock.sleep_until(identity.leaf.not_after).await;
            Err(LinkError::Expired)
        };
        let followed = async {
            let connection = connect(&self.issuer.dialer, &self.issuer.endpoints, tls).await?;
            self.follow(identity, connection).await
        };
        tokio::select! {
            result = expired => result,
            result = followed => result,
        }
    }

    async fn follow(
        &self,
        identity: &NodeIdentity,
        connection: connect::Connection,
    ) -> Result<NodeIdentity, LinkError> {
        let mut client = connection.client.clone();
        let (answers, requests) = mpsc::channel(UNSENT_ANSWERS);
        let say = |message| {
            answers
                .try_send(api::WatchRequest { message: Some(message) })
                .map_err(|_| LinkError::Lost("it takes no answers".to_owned()))
        };
        say(Message::Hello(api::Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            deltas: true,
        }))?;
        let mut stream = timeout(ANSWER_WITHIN, client.watch(ReceiverStream::new(requests)))
            .await
            .map_err(|_| LinkError::Lost("no answer".to_owned()))?
            .map_err(|status| {
                if connection.is_refused() {
                    LinkError::CertificateRefused(status)
                } else {
                    LinkError::Refused(status)
                }
            })?
            .into_inner();
        let connect::Connection { endpoint, server_chain, .. } = connection;
        let server_chain = server_chain.into();
        self.connected(endpoint, client.clone());

        let mut state = self.state.clone();
        state.mark_changed();
        let mut parts = Parts::default();
        let distrusted = Notify::new();
        let mut renewal = pin!(self.renew(identity, client, &distrusted));
        loop {
            let snapshot = tokio::select! {
                renewed = &mut renewal => return Ok(renewed),
                state = news(&mut state) => {
                    say(Message::State(state))?;
                    continue;
                }
                message = stream.message() => match message {
                    Ok(Some(snapshot)) => snapshot,
                    Ok(None) => return Err(LinkError::Lost("it has ended the stream".to_owned())),
                    Err(status) => return Err(LinkError::Lost(words(&status))),
                },
            };
            let lost = |error: PartsError| LinkError::Lost(error.to_string());
            let Some(snapshot) = parts.add(snapshot).map_err(lost)? else { continue };
            say(self.apply(snapshot, &server_chain).await?)?;
            if let Some(bundle) = self.snapshots.current().bundle()
                && !identity.is_vouched_for_by(bundle, self.clock.now())
            {
                distrusted.notify_one();
            }
        }
    }

    /// Puts a snapshot to use, or not, and says so.
    async fn apply(
        &self,
        snapshot: api::Snapshot,
        server_chain: &Arc<[CertificateDer<'static>]>,
    ) -> Result<Message, LinkError> {
        let version = snapshot.version;
        let (snapshots, chain) = (Arc::clone(&self.snapshots), Arc::clone(server_chain));
        let now = self.clock.now();
        // A large one takes a good part of a second: connections must not wait for it.
        let applied =
            tokio::task::spawn_blocking(move || snapshots.apply(snapshot, &chain, now)).await;
        Ok(match applied.map_err(|error| LinkError::Lost(error.to_string()))? {
            Ok(()) => {
                count(&self.counters.snapshots_applied);
                self.status.send_modify(|status| {
                    status.version = version;
                    status.last_sync = Some(self.clock.now());
                });
                Message::Ack(api::Ack { version })
            }
            Err(error) => {
                count(&self.counters.snapshots_refused);
                tracing::error!(version, %error, "snapshot refused, going on with the one before");
                self.report(&format!("snapshot {version} refused: {error}"));
                Message::Nack(api::Nack { version, error: error.to_string() })
            }
        })
    }

    /// Gets the node's next certificate when it is time, however long that takes.
    async fn renew(
        &self,
        identity: &NodeIdentity,
        client: Client,
        distrusted: &Notify,
    ) -> NodeIdentity {
        tokio::select! {
            () = self.clock.sleep_until(identity.next_renewal) => {}
            () = distrusted.notified() => {}
        }
        for delay in retry_delays() {
            let snapshot = self.snapshots.current();
            let bundle = snapshot.bundle().unwrap_or(&identity.bundle);
            let now = || self.clock.now();
            let error = match self.issuer.renew(identity, bundle, client.clone(), now).await {
                Ok(renewed) => return renewed,
                Err(error) => error,
            };
            count(&self.counters.node_certificate_failures);
            let left = identity.leaf.not_after.duration_since(self.clock.now()).ok();
            let delay = before_it_is_too_late(delay, left);
            tracing::warn!(%error, retry_in = ?delay, "the node's certificate is not renewed");
            self.report(&error.to_string());
            tokio::time::sleep(delay).await;
        }
        unreachable!("the delays have no end")
    }

    fn connected(&self, endpoint: String, client: Client) {
        count(&self.counters.connects);
        tracing::info!(endpoint, "connected to the control plane");
        let since = self.clock.now();
        self.status.send_modify(|status| {
            status.connection = Connection::Connected { endpoint, since };
        });
        self.connection.send_replace(Some(client));
    }

    fn disconnected(&self, error: &LinkError) {
        count(&self.counters.disconnects);
        tracing::warn!(%error, "not connected to the control plane");
        self.report(&error.to_string());
        let needs_a_token = matches!(error, LinkError::Node(error) if error.needs_a_token());
        let now = self.clock.now();
        self.status.send_modify(|status| {
            status.connection = match status.connection {
                _ if needs_a_token => Connection::AwaitingToken,
                Connection::Disconnected { since } => Connection::Disconnected { since },
                Connection::Starting | Connection::AwaitingToken | Connection::Connected { .. } => {
                    Connection::Disconnected { since: now }
                }
            };
        });
    }

    fn report(&self, message: &str) {
        let problem = Problem { at: self.clock.now(), message: message.to_owned() };
        self.status.send_modify(|status| status.last_error = Some(problem));
    }
}

/// The state of the pods, once it has changed.
async fn news(state: &mut watch::Receiver<Option<api::State>>) -> api::State {
    loop {
        if state.changed().await.is_err() {
            // Nobody looks any more: the agent is ending.
            std::future::pending::<()>().await;
        }
        if let Some(state) = state.borrow_and_update().clone() {
            return state;
        }
    }
}
