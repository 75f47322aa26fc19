//! Pods from a directory of pod files: the source for nodes without an orchestrator.
//!
//! A pod file is `<name>.yaml` with `uid`, `netns` and optionally `udp`. A file that becomes
//! invalid changes nothing: its pod stays as it was, and `status` says what is wrong. A pod is
//! wanted as long as its file is there and its namespace is mounted where the file says.
//!
//! Nothing is polled. inotify tells of the files; the kernel's notification of changes to the
//! mount table tells of namespaces, whose mounting over an existing file inotify does not see.

mod actor;
mod files;
mod namespace;
mod plan;

use std::{collections::BTreeMap, path::PathBuf};

use tokio::sync::{mpsc, oneshot, watch};

use super::{PodEvent, PodSource};
use crate::config::Udp;

/// What is wrong with a pod file, in the operator's words, by the file's name. The directory
/// itself has the name `.`.
pub type Problems = BTreeMap<String, String>;

/// Watches a directory of pod files.
#[derive(Debug)]
pub struct DirectorySource {
    directory: PathBuf,
    default_udp: Udp,
    commands: mpsc::Receiver<Command>,
    problems: watch::Sender<Problems>,
}

/// Adds and removes pod files, and waits until that has taken effect.
#[derive(Clone, Debug)]
pub struct PodDirectory {
    commands: mpsc::Sender<Command>,
    problems: watch::Receiver<Problems>,
}

/// What a person asks for.
#[derive(Debug)]
enum Request {
    Enroll {
        uid: String,
        netns: PathBuf,
        udp: Option<Udp>,
    },
    /// With `netns`: only if the pod is bound to it.
    Unenroll {
        uid: String,
        netns: Option<PathBuf>,
    },
}

type Reply = oneshot::Sender<Result<(), String>>;
type Command = (Request, Reply);

impl DirectorySource {
    /// A source for the pod files of `directory`, which is created if need be, and the handle to
    /// change them. `default_udp` holds for files that do not say.
    pub fn new(directory: PathBuf, default_udp: Udp) -> (Self, PodDirectory) {
        let (command_sender, commands) = mpsc::channel(16);
        let (problems, problem_receiver) = watch::channel(Problems::new());
        (
            Self { directory, default_udp, commands, problems },
            PodDirectory { commands: command_sender, problems: problem_receiver },
        )
    }
}

impl PodSource for DirectorySource {
    async fn run(self, events: mpsc::Sender<PodEvent>) -> anyhow::Result<()> {
        actor::Actor::new(self.directory, self.default_udp, self.problems, events)?
            .run(self.commands)
            .await
    }
}

impl PodDirectory {
    /// Writes a pod file and waits until the pod's guard is active. A pod file that this call
    /// created is removed again if that fails.
    ///
    /// # Errors
    ///
    /// In the operator's words.
    pub async fn enroll(
        &self,
        uid: String,
        netns: PathBuf,
        udp: Option<Udp>,
    ) -> Result<(), String> {
        self.request(Request::Enroll { uid, netns, udp }).await
    }

    /// Removes a pod's file and waits until nothing of its enrolment is left. With `netns`: if its
    /// file names that one, and otherwise there is nothing to do.
    ///
    /// # Errors
    ///
    /// In the operator's words.
    pub async fn unenroll(&self, uid: String, netns: Option<PathBuf>) -> Result<(), String> {
        self.request(Request::Unenroll { uid, netns }).await
    }

    /// What is wrong with the pod files.
    pub fn problems(&self) -> Problems {
        self.problems.borrow().clone()
    }

    async fn request(&self, request: Request) -> Result<(), String> {
        let stopping = || "the agent is stopping".to_owned();
        let (reply, answer) = oneshot::channel();
        self.commands.send((request, reply)).await.map_err(|_| stopping())?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }
}

#[cfg(test)]
mod tests;
