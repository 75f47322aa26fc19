//! The gRPC calls: each one finds out who asks, lets [`Control`] decide, and counts refusals.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::Stream;
use mesh_common::{
    api::{
        self, Encoded, control_plane_server::ControlPlane, replicas_server::Replicas,
        watch_request::Message as WatchMessage,
    },
    svid::{Leaf, TrustBundle},
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    ca::Issued,
    control::Control,
    feed::Feed,
    kubernetes::{
        attest::{AttestError, Attestor},
        events::Events,
    },
    metrics::{Extent, Outcome},
    refusal::Refusal,
    registry::Workload,
    reports::{self, Report},
    server::Peer,
    sessions::{Handle, Session},
    snapshot::{Parts, Snapshot},
    status::{self, PodState},
};

/// How long an agent that opens a stream may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How many whole snapshots are on their way at a time, counted until the agent has answered. The
/// other agents wait for their turn, and go on with what they have: after a restart of the control
/// plane every one of them comes, and their snapshots must fit into memory.
const TURNS: usize = 64;

/// One message is a whole snapshot, all of it in memory until it is sent.
const TURNS_FOR_ONE_MESSAGE: u32 = 16;

/// How long an agent may take to answer before another has its turn.
const TURN: Duration = Duration::from_secs(30);

/// An agent's text that is kept or logged is cut to this many characters.
const MAX_TEXT: usize = 512;

/// The service.
#[derive(Clone, Debug)]
pub struct Service {
    control: Arc<Control>,
    shutdown: CancellationToken,
    cluster: Option<Arc<(Attestor, Events)>>,
    turns: Arc<Semaphore>,
}

impl Service {
    /// A service that ends its streams at `shutdown`. Of a `cluster`: who knows service account
    /// tokens, and who writes Events.
    pub fn new(
        control: Arc<Control>,
        cluster: Option<(Attestor, Events)>,
        shutdown: CancellationToken,
    ) -> Self {
        let turns = Arc::new(Semaphore::new(TURNS));
        Self { control, shutdown, cluster: cluster.map(Arc::new), turns }
    }

    /// Runs what may block on the file system, and reports what was refused.
    async fn decide<T: Send + 'static>(
        &self,
        peer: &Peer,
        call: &'static str,
        decision: impl FnOnce(&Control, &Peer) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        let (control, caller) = (Arc::clone(&self.control), peer.clone());
        tokio::task::spawn_blocking(move || decision(&control, &caller))
            .await
            .map_err(|_| Status::internal("the control plane failed: see its log"))?
            .map_err(|refusal| self.refuse(peer, call, &refusal))
    }

    /// The node of the agent with this service account token.
    async fn attest(&self, token: &str) -> Result<String, AttestError> {
        match self.cluster.as_deref() {
            Some((attestor, _)) => attestor.node(token).await,
            None => Err(AttestError::NotOnKubernetes),
        }
    }

    /// Tells the operator, and, in a cluster, the pod's owner.
    fn tell(&self, report: Report) {
        if !self.control.may_report(&report.pod, Instant::now()) {
            return self.control.metrics.event(Outcome::Dropped);
        }
        let Workload { namespace, name, node, .. } = &report.pod;
        let (reason, message, count) = (report.reason.name(), &report.message, report.count);
        let peer = report.peer.map(tracing::field::display);
        tracing::info!(namespace, name, node, reason, message, peer, count, "an agent reports");
        if let Some((_, events)) = self.cluster.as_deref()
            && !events.write(report)
        {
            self.control.metrics.event(Outcome::Dropped);
        }
    }

    fn refuse(&self, peer: &Peer, call: &'static str, refusal: &Refusal) -> Status {
        self.control.metrics.refused(refusal.reason());
        let reason = refusal.reason().name();
        tracing::warn!(address = %peer.address, call, reason, error = %refusal, "refused");
        refusal.status()
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Status::internal("a call without a connection"))
}

/// The node that calls, and its certificate.
fn identify(control: &Control, peer: &Peer) -> Result<(String, Leaf), Refusal> {
    control.authenticate(peer.chain.as_deref(), SystemTime::now())
}

/// The name of the node that calls.
fn node(control: &Control, peer: &Peer) -> Result<String, Refusal> {
    identify(control, peer).map(|(node, _)| node)
}

fn der(chain: &[CertificateDer<'static>]) -> Vec<Vec<u8>> {
    chain.iter().map(|certificate| certificate.to_vec()).collect()
}

fn node_certificate(control: &Control, issued: &Issued) -> api::NodeCertificate {
    let bundle = Some(control.view().bundle.to_api());
    api::NodeCertificate { chain: der(&issued.chain), bundle }
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

#[tonic::async_trait]
impl ControlPlane for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Encoded, Status>> + Send>>;

    async fn join(
        &self,
        request: Request<api::JoinRequest>,
    ) -> Result<Response<api::NodeCertificate>, Status> {
        let (peer, request) = (peer(&request)?, request.into_inner());
        let attested = match request.service_account_token.as_str() {
            "" => None,
            token => {
                let node = self.attest(token).await;
                Some(node.map_err(|error| self.refuse(&peer, "join", &error.into()))?)
            }
        };
        self.decide(&peer, "join", move |control, _| {
            let now = SystemTime::now();
            let issued = match attested {
                Some(node) => control.renew_node(node, &request.csr, now)?,
                None => control.join(&request.token, &request.csr, now)?,
            };
            Ok(node_certificate(control, &issued))
        })
        .await
        .map(Response::new)
    }

    async fn renew_node(
        &self,
        request: Request<api::RenewNodeRequest>,
    ) -> Result<Response<api::NodeCertificate>, Status> {
        let (peer, request) = (peer(&request)?, request.into_inner());
        self.decide(&peer, "renew-node", move |control, peer| {
            let node = node(control, peer)?;
            let issued = control.renew_node(node, &request.csr, SystemTime::now())?;
            Ok(node_certificate(control, &issued))
        })
        .await
        .map(Response::new)
    }

    async fn issue_svid(
        &self,
        request: Request<api::IssueSvidRequest>,
    ) -> Result<Response<api::IssueSvidResponse>, Status> {
        let (peer, request) = (peer(&request)?, request.into_inner());
        self.decide(&peer, "issue-svid", move |control, peer| {
            let node = node(control, peer)?;
            let uid = cut(&request.pod_uid);
            let issued = control.issue_svid(&node, &uid, &request.csr, SystemTime::now())?;
            Ok(api::IssueSvidResponse { chain: der(&issued.chain) })
        })
        .await
        .map(Response::new)
    }

    async fn watch(
        &self,
        request: Request<Streaming<api::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (peer, mut requests) = (peer(&request)?, request.into_inner());
        let (node, Leaf { not_after, .. }) = self.decide(&peer, "watch", identify).await?;
        // One: an agent that does not read has one snapshot on the way, and then the newest.
        let (sender, receiver) = mpsc::channel(1);
        let service = self.clone();
        tokio::spawn(async move {
            let result = service.stream(&peer, &node, not_after, &mut requests, &sender).await;
            let status = match result {
                Ok(()) => return tracing::info!(node, "agent disconnected"),
                Err(status) => status,
            };
            tracing::info!(node, reason = status.message(), "stream ended");
            // Nobody may be there to be told.
            drop(sender.send(Err(status)).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn report(
        &self,
        request: Request<api::ReportRequest>,
    ) -> Result<Response<api::ReportResponse>, Status> {
        let (peer, request) = (peer(&request)?, request.into_inner());
        let reports = self.decide(&peer, "report", move |control, peer| {
            let node = node(control, peer)?;
            reports::admit(&control.view().registry, &node, request.reports)
        });
        reports.await?.into_iter().for_each(|report| self.tell(report));
        Ok(Response::new(api::ReportResponse {}))
    }
}

#[tonic::async_trait]
impl Replicas for Service {
    async fn status(
        &self,
        request: Request<api::ReplicaStatusRequest>,
    ) -> Result<Response<api::ReplicaStatus>, Status> {
        let peer = peer(&request)?;
        let status = self.decide(&peer, "status", |control, peer| {
            let now = SystemTime::now();
            control.authenticate_replica(peer.chain.as_deref(), now)?;
            Ok(serde_json::to_vec(&status::gather(control, now)))
        });
        let status = status.await?.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(api::ReplicaStatus { instance: self.control.instance, status }))
    }
}

impl Service {
    async fn stream(
        &self,
        peer: &Peer,
        node: &str,
        not_after: SystemTime,
        requests: &mut Streaming<api::WatchRequest>,
        sender: &mpsc::Sender<Result<Encoded, Status>>,
    ) -> Result<(), Status> {
        let first = timeout(HELLO_TIMEOUT, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello"))??;
        let Some(api::WatchRequest { message: Some(WatchMessage::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message must be a Hello"));
        };
        let end = CancellationToken::new();
        let agent_version = cut(&hello.agent_version);
        tracing::info!(node, address = %peer.address, agent_version, "agent connected");
        let now = SystemTime::now();
        let session = Session::new(peer.address, agent_version, now, not_after, end.clone());
        let session = self.control.sessions.open(node, session);
        let mut snapshots = self.control.publisher().subscribe();
        let mut feed = Feed::new(hello.deltas);
        let mut parts = VecDeque::new();
        let mut turn: Option<Turn> = None;
        let mut judged = None;
        loop {
            let turn_ends = turn.as_ref().map(|turn| turn.ends);
            tokio::select! {
                () = self.shutdown.cancelled() => {
                    return Err(Status::unavailable("the control plane is shutting down"));
                }
                () = end.cancelled() => {
                    return Err(Status::aborted("the node has opened another stream, or joined again"));
                }
                () = at(turn_ends) => turn = None,
                answer = requests.message() => {
                    let Some(answer) = answer? else { return Ok(()) };
                    turn = turn.filter(|turn| !answers(&answer, turn.version));
                    note(&session, &mut feed, node, answer)?;
                }
                place = sender.reserve(), if !parts.is_empty() => {
                    let Ok(place) = place else { return Ok(()) };
                    if let Some(part) = parts.pop_front() {
                        place.send(Ok(part));
                    }
                }
                next = self.next(feed, hello.deltas, &mut snapshots, sender),
                    if parts.is_empty() =>
                {
                    let Some(next) = next else { return Ok(()) };
                    self.recheck(peer, &mut judged).await?;
                    let version = next.snapshot.version();
                    let extent = if next.turn.is_some() { Extent::Whole } else { Extent::Difference };
                    turn = next.turn.map(|permit| {
                        Turn { version, ends: Instant::now() + TURN, _permit: permit }
                    });
                    feed.sent(version, extent == Extent::Difference);
                    let bytes = next.parts.iter().map(|part| part.as_ref().len() as u64).sum();
                    self.control.metrics.sent(extent, 1, bytes);
                    parts.extend(next.parts.iter().cloned());
                    let sent = Some((version, SystemTime::now()));
                    session.update(|session| session.sent = sent);
                }
            }
        }
    }

    /// What is to be sent next, when there is something, and room for it, and, if it is a whole
    /// snapshot, when it is this agent's turn. Loses nothing if it is dropped.
    async fn next(
        &self,
        feed: Feed,
        deltas: bool,
        snapshots: &mut watch::Receiver<Arc<Snapshot>>,
        sender: &mpsc::Sender<Result<Encoded, Status>>,
    ) -> Option<Next> {
        drop(sender.reserve().await.ok()?);
        snapshots.wait_for(|present| feed.wants(present.version())).await.map(drop).ok()?;
        let snapshot = Arc::clone(&snapshots.borrow());
        if let Some(parts) = feed.base().and_then(|base| snapshot.since(base)) {
            return Some(Next { snapshot, parts, turn: None });
        }
        let turns = if deltas { 1 } else { TURNS_FOR_ONE_MESSAGE };
        let turn = Arc::clone(&self.turns).acquire_many_owned(turns).await.ok()?;
        // There may be a newer one meanwhile.
        let snapshot = Arc::clone(&snapshots.borrow());
        let encoding = Arc::clone(&snapshot);
        let encode = move || if deltas { encoding.whole() } else { [encoding.in_one()].into() };
        let parts = tokio::task::spawn_blocking(encode).await.ok()?;
        Some(Next { snapshot, parts, turn: Some(turn) })
    }

    /// The change may have been that this agent's root is trusted no more, or that its node is
    /// gone. A signature that was good is good as long as the roots are the same.
    async fn recheck(&self, peer: &Peer, judged: &mut Option<Judged>) -> Result<(), Status> {
        let last = judged.take();
        let now = self
            .decide(peer, "watch", move |control, peer| {
                let present = Arc::clone(&control.view().bundle);
                match last {
                    Some(judged) if Arc::ptr_eq(&judged.bundle, &present) => {
                        control.admits(&judged.node, &judged.leaf)?;
                        Ok(judged)
                    }
                    Some(_) | None => {
                        let (node, leaf) = identify(control, peer)?;
                        Ok(Judged { node, leaf, bundle: present })
                    }
                }
            })
            .await?;
        *judged = Some(now);
        Ok(())
    }
}

/// An agent's certificate, and the roots by which it was last judged.
struct Judged {
    node: String,
    leaf: Leaf,
    bundle: Arc<TrustBundle>,
}

/// What an agent is sent.
struct Next {
    snapshot: Arc<Snapshot>,
    parts: Parts,
    /// Of a whole snapshot.
    turn: Option<OwnedSemaphorePermit>,
}

/// A whole snapshot that the agent has not answered yet.
struct Turn {
    version: u64,
    ends: Instant,
    _permit: OwnedSemaphorePermit,
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Whether an agent has done with a version.
fn answers(answer: &api::WatchRequest, version: u64) -> bool {
    match answer.message {
        Some(
            WatchMessage::Ack(api::Ack { version: answered })
            | WatchMessage::Nack(api::Nack { version: answered, .. }),
        ) => answered >= version,
        Some(WatchMessage::Hello(_) | WatchMessage::State(_)) | None => false,
    }
}

fn note(
    session: &Handle<'_>,
    feed: &mut Feed,
    node: &str,
    answer: api::WatchRequest,
) -> Result<(), Status> {
    match answer.message {
        Some(WatchMessage::Ack(api::Ack { version })) => session.update(|session| {
            if session.sent.is_some_and(|(sent, _)| version <= sent) {
                session.acknowledged = Some(version);
                session.refused = session.refused.take().filter(|(refused, _)| *refused > version);
            }
        }),
        Some(WatchMessage::Nack(api::Nack { version, error })) => {
            let error = cut(&error);
            tracing::warn!(node, version, error, "the agent cannot use the snapshot");
            feed.refused(version);
            session.update(|session| session.refused = Some((version, error)));
        }
        Some(WatchMessage::State(state)) => {
            let pods = state.pods.into_iter().map(pod_state).collect();
            session.update(|session| session.pods = Some(pods));
        }
        Some(WatchMessage::Hello(_)) => {
            return Err(Status::invalid_argument("a second Hello"));
        }
        // From a newer agent.
        None => {}
    }
    Ok(())
}

/// The size of a request bounds how many there are.
fn pod_state(state: api::PodState) -> (String, PodState) {
    let api::PodState { uid, enrolled, certificate_not_after, problem } = state;
    let not_after = OffsetDateTime::from_unix_timestamp(certificate_not_after).ok();
    let certificate_not_after = not_after.filter(|_| certificate_not_after != 0);
    let problem = Some(cut(&problem)).filter(|problem| !problem.is_empty());
    (cut(&uid), PodState { enrolled, certificate_not_after, problem })
}
