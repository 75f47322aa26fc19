use mesh_common::report::Reason;
use tonic::Code;

use super::*;
use crate::stats::{Report, Reports};

fn plaintext() -> Report {
    let text = "refused: STRICT, plaintext from".to_owned();
    Report { reason: Reason::PlaintextRefused, text, peer: "10.0.0.9".parse().ok() }
}

/// Waits for reports, and returns the count of each.
async fn counts(mut reports: watch::Receiver<Vec<api::PodReport>>, wanted: usize) -> Vec<u64> {
    let reports = timeout(DEADLINE, reports.wait_for(|all| all.len() >= wanted)).await;
    let reports = reports.expect("the control plane is told").unwrap();
    assert!(reports.iter().all(|report| report.pod_uid == UID), "{reports:?}");
    reports.iter().map(|report| report.count).collect()
}

#[tokio::test(start_paused = true)]
async fn the_control_plane_is_told_also_of_what_happened_while_it_was_away() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    let reports = Arc::new(Reports::default());
    let _reporting = identity.report(Arc::clone(&reports));
    reports.add(UID, plaintext());
    assert_eq!(counts(bench.fake.reports(), 1).await, [1]);

    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    reports.add(UID, plaintext());
    reports.add(UID, plaintext());
    bench.fake.set_reachable(true);
    assert_eq!(counts(bench.fake.reports(), 2).await, [1, 2]);
    assert_eq!(reports.dropped(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_taken_now_is_sent_again_and_what_is_refused_is_not() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    let reports = Arc::new(Reports::default());
    let _reporting = identity.report(Arc::clone(&reports));
    bench.fake.set_report_error(Some(Code::Unavailable));
    reports.add(UID, plaintext());
    assert_eq!(counts(bench.fake.reports(), 2).await, [1, 1]);
    bench.fake.set_report_error(Some(Code::PermissionDenied));
    let seen = bench.fake.reports().borrow().len();
    counts(bench.fake.reports(), seen + 1).await;
    let refused = async {
        while reports.dropped() == 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(DEADLINE, refused).await.unwrap();
    assert!(reports.take(1).is_empty());
}

#[tokio::test(start_paused = true)]
async fn of_pods_that_are_not_here_nothing_is_told() {
    let bench = Bench::new();
    let elsewhere = api::Workload { node: "node-2".to_owned(), ..workload("elsewhere", 2) };
    bench.fake.register(elsewhere);
    let identity = bench.start();
    connected(&identity).await;
    let reports = Arc::new(Reports::default());
    for uid in ["elsewhere", "nobody", UID] {
        reports.add(uid, plaintext());
    }
    let _reporting = identity.report(Arc::clone(&reports));
    assert_eq!(counts(bench.fake.reports(), 1).await, [1]);
    assert_eq!(reports.dropped(), 2);
}

#[tokio::test(start_paused = true)]
async fn each_stream_begins_with_the_state_of_the_pods_and_goes_on_with_changes() {
    let bench = Bench::new();
    let (state, state_seen) = watch::channel(None);
    let told = async |wanted: &[&str]| {
        let wanted: Vec<_> = wanted.iter().map(|uid| vec![(*uid).to_owned()]).collect();
        let told = async {
            let mut answers = bench.fake.answers();
            while bench.fake.states() != wanted {
                answers.changed().await.unwrap();
            }
        };
        let in_time = timeout(DEADLINE, told).await;
        assert!(in_time.is_ok(), "{:?} is not {wanted:?}", bench.fake.states());
    };
    let of = |uid: &str| {
        let pod = api::PodState { uid: uid.to_owned(), ..Default::default() };
        Some(api::State { pods: vec![pod] })
    };
    let identity = bench.start_with(Config { state: state_seen, ..bench.config() });
    connected(&identity).await;
    // Nobody has looked yet: that is not to say that there is none.
    assert!(bench.fake.states().is_empty());
    state.send_replace(of("a"));
    told(&["a"]).await;
    state.send_replace(of("b"));
    told(&["a", "b"]).await;
    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    bench.fake.set_reachable(true);
    told(&["a", "b", "b"]).await;
}
