//! Reports become Events of the pods that they are about, where `kubectl describe pod` shows them.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use mesh_common::report::Reason;
use tokio::{sync::mpsc, time::timeout};

use super::{cluster::Cluster, pods::Owner};
use crate::{control::Control, metrics::Outcome, reports::Report};

/// The name of whoever writes, on each Event.
const CONTROLLER: &str = "nodemesh.io/control";

/// Reports that wait for the API server. Further ones are dropped.
const WAITING: usize = 256;

/// How long the API server may take for one.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// The longest note that the API server takes, in bytes.
const MAX_NOTE: usize = 1024;

/// Writes Events in the background.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Report>);

impl Events {
    /// Begins. Those that could not be written are counted, logged and gone: an application's
    /// owner is helped by what is so now.
    pub fn start(client: Client, cluster: Arc<Cluster>, control: Arc<Control>) -> Self {
        let (sender, mut receiver) = mpsc::channel::<Report>(WAITING);
        // Of what repeats itself it changes the Event that is there.
        let reporter =
            Reporter { controller: CONTROLLER.to_owned(), instance: Some(control.name.clone()) };
        let recorder = Recorder::new(client, reporter);
        tokio::spawn(async move {
            while let Some(report) = receiver.recv().await {
                let owner = report.peer.and_then(|peer| cluster.owner(peer));
                let event = event(&report, owner);
                let pod = cluster.record(&report.pod).unwrap_or_else(|| reference(&report));
                let error = match timeout(ANSWER_WITHIN, recorder.publish(&event, &pod)).await {
                    Ok(Ok(())) => {
                        control.metrics.event(Outcome::Written);
                        continue;
                    }
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
                control.metrics.event(Outcome::Failed);
                let (namespace, name) = (&report.pod.namespace, &report.pod.name);
                tracing::warn!(namespace, name, error, "writing an Event failed");
            }
        });
        Self(sender)
    }

    /// Has a report written, unless too many wait.
    pub fn write(&self, report: Report) -> bool {
        self.0.try_send(report).is_ok()
    }
}

/// Of a pod whose record is not here, or not any more.
fn reference(Report { pod, .. }: &Report) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    }
}

fn event(report: &Report, owner: Option<Owner>) -> Event {
    let peer = match &owner {
        Some(Owner::Pod(pod)) => {
            let name = |part: &Option<String>| part.clone().unwrap_or_default();
            Some(format!("{}/{}", name(&pod.namespace), name(&pod.name)))
        }
        Some(Owner::Node(node)) => Some(format!("the node {node}")),
        None => report.peer.map(|address| address.to_string()),
    };
    let mut note = match peer {
        Some(peer) => format!("{} {peer}", report.message),
        None => report.message.clone(),
    };
    note.truncate(note.floor_char_boundary(MAX_NOTE));
    // Two peers are two Events: without this the second would be counted as the first again.
    let secondary = match owner {
        Some(Owner::Pod(pod)) => Some(*pod),
        Some(Owner::Node(_)) | None => None,
    };
    Event {
        type_: EventType::Warning,
        reason: report.reason.name().to_owned(),
        note: Some(note),
        action: action(report.reason).to_owned(),
        secondary,
    }
}

/// What was done, or failed.
const fn action(reason: Reason) -> &'static str {
    match reason {
        Reason::PlaintextRefused
        | Reason::PeerNotAllowed
        | Reason::DestinationNotInMesh
        | Reason::EgressDenied
        | Reason::TooManyConnections => "Connect",
        Reason::GuardDropped => "Send",
        Reason::ConnectionsCut | Reason::NotUnderGuard => "Enrol",
        Reason::NoCertificate | Reason::CertificateNotRotating => "IssueCertificate",
    }
}
