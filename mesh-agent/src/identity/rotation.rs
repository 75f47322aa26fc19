//! One pod's certificate from enrolment to un-enrolment: asked for, checked, published, rotated,
//! and taken out of use as soon as it is no longer true.

use std::{future, pin::pin, sync::Arc, time::Duration};

use mesh_common::api;
use tokio::sync::watch;
use tonic::Status as Refusal;

use super::{
    connect::{Client, words},
    credentials::{self, CredentialsError, NewKey},
    registry::Snapshot,
    schedule::{Clock, Service, before_it_is_too_late, retry_delays},
    status::{Counters, Problem, count},
    svid::{Assignment, Registration, Rejection, Svid},
    svid_store::SvidStore,
};

/// How long the CA may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What the rotations of all pods share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) node: String,
    pub(super) clock: Clock,
    pub(super) store: SvidStore,
    pub(super) counters: Arc<Counters>,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) connection: watch::Receiver<Option<Client>>,
}

/// Why there is no new certificate for a pod.
#[derive(Debug, thiserror::Error)]
enum IssueError {
    #[error("the control plane does not issue a certificate: {}", words(.0))]
    Refused(Refusal),
    #[error("the control plane does not answer")]
    Timeout,
    #[error("the certificate from the control plane is not used: {0}")]
    Rejected(#[from] Rejection),
    #[error("the certificate from the control plane is not used: {0}")]
    Credentials(#[from] CredentialsError),
}

/// The task that keeps one pod's certificate. Whoever holds a receiver sees `None` once the task
/// has ended, however it ended.
#[derive(Debug)]
pub(super) struct Rotation {
    pub(super) uid: String,
    pub(super) context: Arc<Context>,
    pub(super) svid: watch::Sender<Option<Arc<Svid>>>,
    pub(super) problem: watch::Sender<Option<Problem>>,
}

impl Drop for Rotation {
    fn drop(&mut self) {
        self.svid.send_replace(None);
    }
}

impl Rotation {
    /// Runs until it is dropped.
    pub(super) async fn run(self) {
        let mut snapshots = self.context.snapshots.clone();
        loop {
            let registration = self.registration(&snapshots.borrow_and_update());
            match &registration {
                Registration::Unknown => {
                    self.report("the control plane has not yet said which pods are registered");
                }
                Registration::Elsewhere(reason) => {
                    self.withdraw(reason);
                    self.context.store.remove(&self.uid);
                }
                Registration::Here(assignment) => self.adopt(assignment),
            }
            tokio::select! {
                () = self.changed(&registration, &mut snapshots) => {}
                () = self.serve(&registration) => {}
            }
        }
    }

    fn registration(&self, snapshot: &Snapshot) -> Registration {
        Registration::of(&self.uid, &self.context.node, snapshot)
    }

    /// Returns when the registry says something else about this pod than `before`.
    async fn changed(&self, before: &Registration, snapshots: &mut watch::Receiver<Arc<Snapshot>>) {
        while snapshots.changed().await.is_ok() {
            if self.registration(&snapshots.borrow_and_update()) != *before {
                return;
            }
        }
        // The agent is ending, and this task with it.
        future::pending().await
    }

    /// Goes on with the certificate in use, or else the stored one, if it fits the assignment.
    fn adopt(&self, assignment: &Assignment) {
        let Context { clock, store, snapshots, .. } = &*self.context;
        let now = clock.now();
        let current = self.svid.borrow().clone();
        if let Some(svid) = current {
            let service = Service { issued: svid.issued, next_rotation: svid.next_rotation };
            let key = Arc::clone(&svid.key);
            match Svid::new(assignment, key, |_| service, now) {
                Ok(svid) => self.publish(svid),
                Err(rejection) => self.withdraw(&rejection.to_string()),
            }
        } else if let Some(key) = store.load(&self.uid) {
            let lifetime = snapshots.borrow().settings().svid_lifetime;
            let svid = Svid::new(
                assignment,
                key,
                |leaf| {
                    // The certificate does not say when it was issued: its beginning is set back.
                    let issued = leaf.not_after.checked_sub(lifetime).unwrap_or(leaf.not_before);
                    Service::new(issued.max(leaf.not_before), leaf.not_after)
                },
                now,
            );
            match svid {
                Ok(svid) => self.publish(svid),
                Err(rejection) => {
                    tracing::info!(pod = self.uid, %rejection, "not using the stored certificate");
                }
            }
        }
    }

    /// Keeps a certificate in use as long as the assignment stays the same. Never returns.
    async fn serve(&self, registration: &Registration) {
        let Registration::Here(assignment) = registration else {
            return future::pending().await;
        };
        loop {
            let current = self.svid.borrow().clone();
            let mut renewal = pin!(self.renew(assignment, current.as_deref()));
            let svid = tokio::select! {
                svid = &mut renewal => svid,
                () = self.expire(current.as_deref()) => renewal.await,
            };
            self.publish(svid);
        }
    }

    /// Takes a certificate out of use when it has expired.
    async fn expire(&self, current: Option<&Svid>) {
        let Some(svid) = current else { return future::pending().await };
        self.context.clock.sleep_until(svid.leaf.not_after).await;
        count(&self.context.counters.svids_expired);
        self.withdraw("its certificate has expired and there is no other");
    }

    /// Gets the successor of a certificate when it is time, however long that takes.
    async fn renew(&self, assignment: &Assignment, current: Option<&Svid>) -> Svid {
        let Context { clock, counters, connection, .. } = &*self.context;
        if let Some(svid) = current {
            clock.sleep_until(svid.next_rotation).await;
        }
        let mut connection = connection.clone();
        for delay in retry_delays() {
            let client = self.connected(&mut connection).await;
            let error = match self.issue(client, assignment).await {
                Ok(svid) => return svid,
                Err(error) => error,
            };
            count(&counters.svid_failures);
            if let IssueError::Rejected(_) | IssueError::Credentials(_) = error {
                count(&counters.svids_rejected);
            }
            let left = current
                .map(|svid| svid.remaining(clock.now()))
                .filter(|remaining| !remaining.is_zero());
            let delay = before_it_is_too_late(delay, left);
            tracing::warn!(pod = self.uid, %error, retry_in = ?delay, "no new certificate");
            self.report(&error.to_string());
            tokio::time::sleep(delay).await;
        }
        unreachable!("the delays have no end")
    }

    /// Waits for a connection to the control plane, whose task does the waiting between attempts.
    async fn connected(&self, connection: &mut watch::Receiver<Option<Client>>) -> Client {
        if connection.borrow().is_none() {
            self.report("the control plane is not connected, so no certificate can be asked for");
        }
        let client = connection.wait_for(Option::is_some).await.ok().and_then(|c| c.clone());
        match client {
            Some(client) => client,
            // The agent is ending, and this task with it.
            None => future::pending().await,
        }
    }

    async fn issue(&self, mut client: Client, assignment: &Assignment) -> Result<Svid, IssueError> {
        let Context { clock, counters, store, .. } = &*self.context;
        let key = NewKey::generate()?;
        let request = api::IssueSvidRequest { pod_uid: self.uid.clone(), csr: key.csr()? };
        let answer = tokio::time::timeout(ANSWER_WITHIN, client.issue_svid(request)).await;
        let chain = answer
            .map_err(|_| IssueError::Timeout)?
            .map_err(IssueError::Refused)?
            .into_inner()
            .chain;
        let pem = key.to_pem(&chain);
        let now = clock.now();
        let svid = Svid::new(
            assignment,
            credentials::from_pem(pem.as_bytes())?,
            |leaf| Service::new(now, leaf.not_after),
            now,
        )?;
        store.save(&self.uid, &pem);
        count(&counters.svids_issued);
        tracing::info!(
            pod = self.uid,
            id = %svid.id,
            serial = svid.leaf.serial,
            valid_for = ?svid.remaining(now),
            "new certificate"
        );
        Ok(svid)
    }

    fn publish(&self, svid: Svid) {
        self.problem.send_replace(None);
        self.svid.send_replace(Some(Arc::new(svid)));
    }

    fn withdraw(&self, reason: &str) {
        self.report(reason);
        if self.svid.send_replace(None).is_some() {
            count(&self.context.counters.svids_withdrawn);
            tracing::warn!(
                pod = self.uid,
                reason,
                "certificate withdrawn, connections are refused"
            );
        }
    }

    fn report(&self, message: &str) {
        let at = self.context.clock.now();
        self.problem.send_replace(Some(Problem { at, message: message.to_owned() }));
    }
}
