//! A control plane of the release before, or of the one after.

use mesh_common::report::Reason;
use tonic::Code;

use super::*;
use crate::identity::services::Found;
use crate::stats::{Report, Reports};

#[tokio::test(start_paused = true)]
async fn one_that_takes_no_reports_serves_as_ever() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    let reports = Arc::new(Reports::default());
    let _reporting = identity.report(Arc::clone(&reports));
    let tell = |text: &str| {
        reports
            .add(UID, Report { reason: Reason::GuardDropped, text: text.to_owned(), peer: None });
    };
    bench.fake.set_report_error(Some(Code::Unimplemented));
    tell("nobody is to know");
    // What goes on meanwhile is what it is there for.
    next_svid(&handle, &svid).await;
    assert_eq!(bench.fake.reports().borrow().len(), 1, "the same is not asked again");
    assert_eq!(reports.dropped(), 1);
    assert_eq!(identity.counters().disconnects.load(Ordering::Relaxed), 0);
    let version = bench.fake.change(|snapshot| snapshot.workloads[0].owner = "Job/a".to_owned());
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));

    // It has been replaced by one that takes them.
    bench.fake.set_report_error(None);
    tell("now it is");
    let mut told = bench.fake.reports();
    let told = timeout(DEADLINE, told.wait_for(|all| all.len() == 2)).await.unwrap().unwrap();
    assert_eq!(told[1].message, "now it is");
}

#[tokio::test(start_paused = true)]
async fn one_that_knows_less_of_services_and_one_that_knows_more_are_both_understood() {
    let bench = Bench::new();
    let identity = bench.start();
    let port = |snapshot: &Snapshot| {
        let address = "10.96.0.1:80".parse().unwrap();
        match snapshot.services().find(address) {
            Found::Port(port) => Some(port.locality),
            Found::NoPort | Found::Nothing => None,
        }
    };
    let of = |locality| api::Service {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        addresses: vec!["10.96.0.1".to_owned()],
        ports: vec![api::ServicePort { name: String::new(), port: 80 }],
        locality,
        ..Default::default()
    };
    for (locality, understood) in [
        (None, None),
        (Some(api::Locality::SameNodeFirst as i32), Some(api::Locality::SameNodeFirst)),
        // A preference that is not known here is none.
        (Some(9), Some(api::Locality::Anywhere)),
    ] {
        let services = locality.map(of).into_iter().collect();
        let version = bench.fake.change(|snapshot| snapshot.services = services);
        assert_eq!(bench.fake.answer_to(version).await, Ok(()));
        assert_eq!(port(&identity.snapshots().borrow()), understood);
    }
}
