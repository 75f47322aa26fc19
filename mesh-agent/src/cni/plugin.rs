//! What each command does: the decision's inputs and outputs.

use std::{collections::BTreeSet, fs, time::Duration};

use mesh_common::membership::is_system;
use serde_json::Value;
use tokio::time::timeout;

use super::{
    cluster::{self, ClusterError},
    decision::{Decision, Note, Refusal, Verdict, decide},
    protocol::{Attachment, AttachmentId, CniError, Command, Later, PodRef, Settings},
    state::{Record, State},
};
use crate::admin::{Client, ClientError};

/// How long a pod's start waits for its guard. Runtimes wait for two minutes and more.
const ENROL: Duration = Duration::from_secs(30);

/// How long the agent may take for anything else.
const ANSWER: Duration = Duration::from_secs(10);

/// One call of the plugin.
pub(super) struct Plugin {
    settings: Settings,
    state: State,
    agent: Client,
}

impl Plugin {
    pub(super) fn new(settings: Settings) -> Self {
        let state = State::new(&settings.state_dir);
        let agent = Client::new(&settings.admin_socket);
        Self { settings, state, agent }
    }

    /// Does what the runtime wants, and returns what is to be printed.
    pub(super) async fn execute(&self, command: Command) -> Result<Option<Value>, CniError> {
        match command {
            Command::Add(attachment) => {
                self.add(&attachment).await?;
                return Ok(Some(attachment.result));
            }
            Command::Check(attachment) => self.check(&attachment).await?,
            Command::Del(id) => self.del(&id).await,
            Command::Gc(valid) => self.gc(&valid).await?,
            Command::Status => self.status().await?,
        }
        Ok(None)
    }

    async fn add(&self, attachment: &Attachment) -> Result<(), CniError> {
        let Some(pod) = self.ordinary(attachment) else { return Ok(()) };
        let (Decision { verdict, note }, seen) = self.decide(pod).await;
        match note {
            Note::Keep => {}
            // Without the note the next pod waits for the API.
            Note::Outside => best_effort(self.state.note_outside(&pod.namespace)),
            Note::Forget => self.state.forget_outside(&pod.namespace)?,
        }
        match verdict {
            Verdict::Pass => {
                if let Err(error) = seen {
                    eprintln!("nodemesh-cni: {pod} starts outside the mesh unseen: {error}");
                }
                Ok(())
            }
            Verdict::Refuse(refusal) => Err(refused(refusal, pod, seen).into()),
            Verdict::Enrol(uid) => {
                // By one name however it is called: /var/run is a link.
                let netns = fs::canonicalize(&attachment.netns).map_err(|error| {
                    let problem = format!("is {}: {error}", attachment.netns.display());
                    CniError::Environment { name: "CNI_NETNS", problem }
                })?;
                // Before it is true, so that there is nothing without a record.
                let record = Record { uid, netns };
                self.state.record(&attachment.id, &record)?;
                let enrolling = self.agent.enroll(&record.uid, &record.netns, None);
                within(ENROL, enrolling).await?;
                self.sweep().await;
                Ok(())
            }
        }
    }

    async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        let Some(pod) = self.ordinary(attachment) else { return Ok(()) };
        if let Some(record) = self.state.recorded(&attachment.id)? {
            let status = within(ANSWER, self.agent.status()).await?;
            let guarded = status.pods.iter().any(|pod| {
                pod.uid == record.uid
                    && pod.netns == record.netns
                    && pod.guard.iter().all(|layer| layer.active)
            });
            return if guarded { Ok(()) } else { Err(CniError::NotEnrolled(pod.to_string())) };
        }
        let (decision, seen) = self.decide(pod).await;
        match decision.verdict {
            Verdict::Pass => Ok(()),
            Verdict::Enrol(_) => Err(CniError::NotEnrolled(pod.to_string())),
            Verdict::Refuse(refusal) => Err(refused(refusal, pod, seen).into()),
        }
    }

    /// Never fails: what is left is left to the next call.
    async fn del(&self, id: &AttachmentId) {
        let id = id.to_string();
        best_effort(self.state.end(|name| name == id));
        self.sweep().await;
    }

    async fn gc(&self, valid: &BTreeSet<AttachmentId>) -> Result<(), CniError> {
        let valid: BTreeSet<_> = valid.iter().map(ToString::to_string).collect();
        self.state.end(|name| !valid.contains(name))?;
        self.sweep().await;
        Ok(())
    }

    /// Whether pods can start at all. An agent that is away holds only the pods of the mesh, and
    /// the runtime would declare the whole node unready for it.
    async fn status(&self) -> Result<(), CniError> {
        let usable = cluster::check(&self.settings.kubeconfig).await;
        usable.map_err(|error| CniError::Unavailable(error.to_string()))
    }

    /// The pod of an attachment, unless it is outside by its name alone.
    fn ordinary<'a>(&self, attachment: &'a Attachment) -> Option<&'a PodRef> {
        let own = &self.settings.namespace;
        attachment.pod.as_ref().filter(|pod| !is_system(&pod.namespace, own))
    }

    async fn decide(&self, pod: &PodRef) -> (Decision, Result<(), ClusterError>) {
        let seen = cluster::read(&self.settings.kubeconfig, pod).await;
        let outside = self.state.is_outside(&pod.namespace);
        (decide(pod, &self.settings.namespace, &seen, outside), seen.map(drop))
    }

    /// Un-enrols the pods of attachments that ended, now or while the agent was away.
    async fn sweep(&self) {
        // In this order: a pod is recorded before it is enrolled.
        let known = self.state.ended().and_then(|ended| Ok((ended, self.state.in_use()?)));
        let (ended, in_use) = match known {
            Ok(known) => known,
            Err(error) => return best_effort(Err(error)),
        };
        for (name, record) in ended {
            // The runtime used the same path again, or attached the pod twice.
            if in_use.contains(&record) {
                best_effort(self.state.settle(&name));
                continue;
            }
            let unenrolling = self.agent.unenroll(&record.uid, Some(&record.netns));
            match within(ANSWER, unenrolling).await {
                Ok(()) => best_effort(self.state.settle(&name)),
                Err(error @ Later::Agent(ClientError::Answer(_) | ClientError::Refused(_))) => {
                    best_effort(Err(error.into()));
                }
                // Nor will it answer for the others.
                Err(error) => return best_effort(Err(error.into())),
            }
        }
    }
}

fn refused(refusal: Refusal, pod: &PodRef, seen: Result<(), ClusterError>) -> Later {
    let pod = pod.clone();
    match refusal {
        Refusal::Unknown => {
            let reason = seen.err().map(|error| error.to_string()).unwrap_or_default();
            Later::Unknown { pod, reason }
        }
        Refusal::NoSuchPod => Later::NoSuchPod(pod),
        Refusal::OtherPod => Later::OtherPod(pod),
    }
}

async fn within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, Later> {
    match timeout(limit, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Later::AgentTimeout(limit.as_secs())),
    }
}

/// Standard error is the runtime's log.
fn best_effort(result: Result<(), CniError>) {
    if let Err(error) = result {
        eprintln!("nodemesh-cni: {error}");
    }
}
