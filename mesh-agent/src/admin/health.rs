//! Whether the agent is well: pure functions of its status.

use super::status::{ControlPlaneState, Pod, Status};

/// Whether every pod that the agent knows of is enrolled and served.
pub(super) fn is_ready(status: &Status) -> bool {
    status.pods_synced
        && status.control_plane.snapshot_version > 0
        && status.programs.iter().all(|program| program.attached)
        && status.pods.iter().all(|pod| pod.listening && pod.guard.iter().all(|layer| layer.active))
}

/// What the operator should look at, in words.
pub(super) fn degraded(status: &Status) -> Vec<String> {
    let mut reasons = Vec::new();
    let control_plane = &status.control_plane;
    let problem = control_plane.problem.as_deref();
    let because = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
    match control_plane.state {
        ControlPlaneState::Connected => {}
        ControlPlaneState::Starting => {
            reasons.push(format!("not connected to the control plane yet{because}"));
        }
        ControlPlaneState::AwaitingToken => {
            reasons.push(format!("the node has no certificate and no join token{because}"));
        }
        ControlPlaneState::Disconnected => {
            reasons.push(format!("not connected to the control plane{because}"));
        }
    }
    if control_plane.snapshot_version == 0 {
        reasons.push("the registry is not known yet: every connection is refused".to_owned());
    }
    for program in status.programs.iter().filter(|program| !program.attached) {
        reasons.push(format!("the eBPF program {} is not attached", program.name));
    }
    if !status.pods_synced {
        reasons.push("the pods of this node are not all known yet".to_owned());
    }
    for pod in &status.pods {
        let label = pod.label();
        reasons
            .extend(pod_reasons(pod, status).into_iter().map(|why| format!("pod {label}: {why}")));
    }
    for pod in &status.unguarded {
        reasons
            .push(format!("pod {}: in the mesh, but not under guard: {}", pod.name, pod.problem));
    }
    for file in &status.pod_files {
        reasons.push(format!("pod file {}: {}", file.file, file.problem));
    }
    reasons
}

fn pod_reasons(pod: &Pod, status: &Status) -> Vec<String> {
    let mut reasons = Vec::new();
    if pod.identity.is_none() && status.control_plane.snapshot_version > 0 {
        reasons.push("it is not registered: `mesh-control register` it".to_owned());
    }
    if !pod.listening {
        reasons.push("the agent's listeners in it are not open".to_owned());
    }
    if let Some(problem) = &pod.problem {
        reasons.push(format!("its capture cannot be kept up: {problem}"));
    }
    for layer in pod.guard.iter().filter(|layer| !layer.active) {
        reasons.push(format!("the guard's layer {} is not active", layer.layer));
    }
    let problem = pod.certificate_problem.as_deref();
    match (&pod.certificate, problem) {
        (None, problem) => {
            reasons.push(format!("no certificate: {}", problem.unwrap_or("requested")));
        }
        (Some(certificate), _) if certificate.not_after <= status.time => {
            reasons.push(format!("its certificate expired at {}", certificate.not_after));
        }
        (Some(_), Some(problem)) => reasons.push(format!("its certificate is old: {problem}")),
        (Some(_), None) => {}
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::{GuardLayer, PodFile, Program, UnguardedPod, tests::healthy};
    use time::Duration;

    #[test]
    fn a_healthy_agent_is_ready_and_has_nothing_to_say() {
        let status = healthy();
        assert!(is_ready(&status));
        assert_eq!(degraded(&status), Vec::<String>::new());
    }

    /// A change to a healthy agent, whether it is still ready, and a word of what is said.
    type Case = (fn(&mut Status), bool, &'static str);

    #[test]
    fn whatever_is_wrong_is_said() {
        let cases: [Case; 14] = [
            (|s| s.control_plane.state = ControlPlaneState::Disconnected, true, "control plane"),
            (|s| s.control_plane.state = ControlPlaneState::Starting, true, "control plane"),
            (|s| s.control_plane.state = ControlPlaneState::AwaitingToken, true, "join token"),
            (|s| s.control_plane.snapshot_version = 0, false, "registry"),
            (
                |s| s.programs.push(Program { name: "connect4".to_owned(), attached: false }),
                false,
                "connect4",
            ),
            (|s| s.pods_synced = false, false, "not all known"),
            (|s| s.pods[0].listening = false, false, "listeners"),
            (
                |s| {
                    let layer = "device".to_owned();
                    s.pods[0].guard.push(GuardLayer { layer, active: false, devices: vec![] });
                },
                false,
                "device",
            ),
            (|s| s.pods[0].problem = Some("no answer".to_owned()), true, "no answer"),
            (|s| s.pods[0].certificate = None, true, "no certificate"),
            (
                |s| {
                    let expired = s.time - Duration::SECOND;
                    s.pods[0].certificate.as_mut().unwrap().not_after = expired;
                },
                true,
                "expired",
            ),
            (|s| s.pods[0].certificate_problem = Some("CA away".to_owned()), true, "CA away"),
            (
                |s| {
                    let [uid, name, problem] =
                        ["u2", "shop/old-0", "start it anew"].map(str::to_owned);
                    s.unguarded.push(UnguardedPod { uid, name, problem });
                },
                true,
                "shop/old-0: in the mesh, but not under guard: start it anew",
            ),
            (
                |s| {
                    let problem = "unknown key".to_owned();
                    s.pod_files.push(PodFile { file: "a.yaml".to_owned(), problem });
                },
                true,
                "a.yaml: unknown key",
            ),
        ];
        for (change, ready, word) in cases {
            let mut status = healthy();
            change(&mut status);
            let reasons = degraded(&status);
            assert_eq!(reasons.len(), 1, "{word}: {reasons:?}");
            assert!(reasons[0].contains(word), "{reasons:?}");
            assert_eq!(is_ready(&status), ready, "{word}");
        }
    }

    #[test]
    fn an_unregistered_pod_is_said_to_be_one() {
        let mut status = healthy();
        (status.pods[0].identity, status.pods[0].name) = (None, None);
        assert_eq!(degraded(&status), ["pod u1: it is not registered: `mesh-control register` it"]);
    }
}
