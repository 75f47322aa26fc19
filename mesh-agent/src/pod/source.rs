//! Where the agent learns which pods it shall enrol.
//!
//! A source only says what is wanted. Enrolling, and what becomes of a pod whose enrolment fails,
//! is the manager's work; it answers each change through its [`Ack`].

use std::{fmt, future::Future, path::PathBuf};

use tokio::sync::{mpsc, oneshot};

use crate::config::Udp;

pub mod directory;

/// A pod that shall be enrolled: a registered UID bound to a network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// The UID under which the control plane's registry knows the pod.
    pub uid: String,
    /// A mount of the pod's network namespace. Only a way to it: the identity hangs on the
    /// namespace that was found there, and another one at the same path is another pod.
    pub netns: PathBuf,
    /// What happens to the pod's UDP.
    pub udp: Udp,
}

/// A change of what is wanted.
#[derive(Debug)]
pub enum PodEvent {
    /// Enrol this pod, or apply what changed in it. Answered when every layer of the guard is active
    /// and connections are steered to the agent: from then on nothing leaves the pod unencrypted,
    /// whether or not it has a certificate yet. A pod that is enrolled is looked at again.
    Upsert(PodSpec, Ack),
    /// Un-enrol this pod and close the agent's sockets in it.
    Remove {
        /// The pod's UID.
        uid: String,
        /// Why.
        cause: Removal,
        /// Answered when nothing of the enrolment is left.
        ack: Ack,
    },
    /// Every pod that was wanted at the start has been reported: what is pinned for others is a
    /// leftover. Comes once.
    Synced,
}

/// Why a pod shall be un-enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Its namespace is gone from its path, or another one is there.
    NamespaceGone,
    /// The operator or the orchestrator withdrew it.
    Withdrawn,
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NamespaceGone => "its network namespace is gone",
            Self::Withdrawn => "it was withdrawn",
        })
    }
}

/// How a change ended, told to the source that asked for it: the plugin that holds a container's
/// start, the person who waits at `mesh-agent enroll`. Dropping it unanswered is a failure.
#[derive(Debug)]
pub struct Ack(oneshot::Sender<Result<(), String>>);

impl Ack {
    /// A promise, and what will be told.
    pub fn new() -> (Self, oneshot::Receiver<Result<(), String>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    /// Tells the source that the change is done, or in the operator's words why not.
    pub fn answer(self, result: Result<(), String>) {
        // A source that no longer waits has nothing left to do with the answer.
        drop(self.0.send(result));
    }
}

/// Something that knows the pods of this node.
pub trait PodSource {
    /// Reports every pod that is wanted now, then [`PodEvent::Synced`], then each change, until
    /// `events` is closed. Changes of one pod are to be applied in the order of their events.
    ///
    /// # Errors
    ///
    /// When the source can no longer tell what changes. What is enrolled then stays enrolled.
    fn run(self, events: mpsc::Sender<PodEvent>)
    -> impl Future<Output = anyhow::Result<()>> + Send;
}
