//! The task that tells the control plane what the owners of applications must see.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};
use tonic::Code;

use mesh_common::api;

use super::{
    connect::{Client, words},
    registry::Snapshot,
    schedule::retry_delays,
};
use crate::stats::Reports;

/// How often at most it is told.
const EVERY: Duration = Duration::from_secs(5);

/// How long the control plane may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// About how many reports are in one call: with the longest texts they fit into it.
const BATCH: usize = 100;

/// Sends reports as long as it is not dropped.
#[derive(Debug)]
pub(super) struct Reporting {
    pub(super) node: String,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) connection: watch::Receiver<Option<Client>>,
    pub(super) reports: Arc<Reports>,
}

impl Reporting {
    /// Runs until it is dropped, or the agent ends.
    pub(super) async fn run(mut self) {
        let mut delays = retry_delays();
        loop {
            self.reports.some().await;
            let connected = self.connection.wait_for(Option::is_some).await;
            let Some(client) = connected.ok().and_then(|client| client.clone()) else { return };
            let pause = if self.send(client).await {
                delays = retry_delays();
                EVERY
            } else {
                delays.next().unwrap_or_default().max(EVERY)
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether there is an answer.
    async fn send(&self, mut client: Client) -> bool {
        let mut reports = self.reports.take(BATCH);
        // Of others it would be refused, and these with them.
        let registry = Arc::clone(&self.snapshots.borrow());
        let is_here = |report: &api::PodReport| {
            registry.by_uid(&report.pod_uid).is_some_and(|pod| pod.node == self.node)
        };
        let taken = reports.len();
        reports.retain(is_here);
        self.reports.refused(taken - reports.len());
        if reports.is_empty() {
            return true;
        }
        let request = api::ReportRequest { reports: reports.clone() };
        let why = match timeout(ANSWER_WITHIN, client.report(request)).await {
            Ok(Ok(_)) => return true,
            Ok(Err(status)) if is_final(&status) => {
                self.reports.refused(reports.len());
                tracing::warn!("the control plane does not take reports: {}", words(&status));
                return true;
            }
            Ok(Err(status)) => words(&status),
            Err(_) => "no answer".to_owned(),
        };
        tracing::debug!(why, "reports are not sent yet");
        self.reports.put_back(reports);
        false
    }
}

/// Whether the same call would have the same answer again.
fn is_final(status: &tonic::Status) -> bool {
    matches!(
        status.code(),
        Code::PermissionDenied | Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange
    )
}
