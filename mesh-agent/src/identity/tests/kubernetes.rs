//! Joining with the service account token of the agent's pod.

use super::*;
use crate::identity::credentials::certificates_to_pem;

/// With a token that the API server accepts, and the right roots.
fn bench() -> Bench {
    let bench = Bench::new();
    bench.fake.set_service_account_token("first");
    fs::write(token_file(&bench), "first\n").unwrap();
    write_roots(&bench, &[&bench.fake.authority()]);
    bench
}

fn token_file(bench: &Bench) -> PathBuf {
    bench.dir.path().join("token")
}

fn bundle_file(bench: &Bench) -> PathBuf {
    bench.dir.path().join("ca.crt")
}

fn write_roots(bench: &Bench, authorities: &[&Authority]) {
    let roots: Vec<_> = authorities.iter().map(|authority| authority.root()).collect();
    fs::write(bundle_file(bench), certificates_to_pem(&roots)).unwrap();
}

fn start(bench: &Bench) -> Identity {
    let (token_file, bundle_file) = (token_file(bench), bundle_file(bench));
    let credential = Credential::ServiceAccount { token_file, bundle_file };
    bench.start_with(Config { credential, ..bench.config() })
}

async fn error_with(identity: &Identity, word: &str) -> String {
    let status = until(identity.status(), word, |status| {
        status.last_error.as_ref().is_some_and(|error| error.message.contains(word))
    });
    let status = status.await;
    assert_ne!(status.connection, Connection::AwaitingToken, "nobody has to do anything");
    status.last_error.unwrap().message
}

#[tokio::test(start_paused = true)]
async fn the_pod_s_token_serves_as_often_as_need_be() {
    let bench = bench();
    bench.fake.set_node_lifetime(24 * HOUR);
    let identity = start(&bench);
    connected(&identity).await;
    assert_eq!(bench.fake.joins(), 1);

    bench.fake.void_node_certificates();
    until(identity.status(), "it has joined anew", |_| bench.fake.joins() == 2).await;
    connected(&identity).await;

    bench.fake.set_reachable(false);
    tokio::time::sleep(25 * HOUR).await;
    bench.fake.set_reachable(true);
    until(identity.status(), "it has joined anew", |_| bench.fake.joins() == 3).await;
    connected(&identity).await;
    assert_eq!(bench.fake.renewals(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_is_read_when_it_is_shown() {
    let bench = bench();
    bench.fake.set_service_account_token("second");
    let identity = start(&bench);
    let error = error_with(&identity, "service account token").await;
    assert!(error.contains("the API server does not accept the token"), "{error}");
    assert!(!error.contains("mesh-control token create"), "{error}");
    // The kubelet replaces it.
    fs::write(token_file(&bench), "second").unwrap();
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there_yet_is_waited_for() {
    let bench = bench();
    fs::remove_file(token_file(&bench)).unwrap();
    let roots = fs::read(bundle_file(&bench)).unwrap();
    fs::remove_file(bundle_file(&bench)).unwrap();
    let identity = start(&bench);
    error_with(&identity, "ConfigMap nodemesh-bundle").await;
    fs::write(bundle_file(&bench), "").unwrap();
    error_with(&identity, "no certificate in it").await;
    fs::write(bundle_file(&bench), roots).unwrap();
    error_with(&identity, "projected volume").await;
    assert_eq!(bench.fake.joins(), 0);
    fs::write(token_file(&bench), "first").unwrap();
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn another_control_plane_never_sees_the_token() {
    let bench = bench();
    write_roots(&bench, &[&Authority::new("elsewhere")]);
    let identity = start(&bench);
    error_with(&identity, "vouches").await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(bench.fake.joins(), 0);
    write_roots(&bench, &[&Authority::new("elsewhere"), &bench.fake.authority()]);
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_missed_the_new_root_finds_it_in_the_bundle() {
    let bench = bench();
    let identity = start(&bench);
    connected(&identity).await;
    bench.fake.set_reachable(false);
    let new = Arc::new(Authority::new("new"));
    bench.fake.trust(&[new.root()]);
    bench.fake.sign_with(&new);
    bench.fake.set_reachable(true);
    let error = error_with(&identity, "vouches").await;
    assert!(error.contains("nor can the node join anew"), "{error}");
    assert_eq!(bench.fake.joins(), 1);
    write_roots(&bench, &[&new]);
    until(identity.status(), "it has joined anew", |_| bench.fake.joins() == 2).await;
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_root_is_trusted_no_more_joins_anew() {
    let bench = bench();
    let identity = start(&bench);
    connected(&identity).await;
    let (old, new) = (bench.fake.authority(), Arc::new(Authority::new("new")));
    let version = bench.fake.trust(&[old.root(), new.root()]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    write_roots(&bench, &[&old, &new]);

    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    bench.fake.sign_with(&new);
    bench.fake.trust(&[new.root()]);
    bench.fake.set_reachable(true);
    // It trusts the control plane, but the control plane does not trust its certificate, which is
    // valid for long.
    let mut status = identity.status();
    let joined = timeout(DEADLINE, status.wait_for(|_| bench.fake.joins() == 2)).await.is_ok();
    assert!(joined, "{:?}", identity.status().borrow().last_error);
    connected(&identity).await;
}

/// On a clock that stands still while something is busy.
#[tokio::test(start_paused = true)]
async fn a_control_plane_that_refuses_what_it_issues_is_not_asked_without_end() {
    let bench = bench();
    let identity = start(&bench);
    connected(&identity).await;
    bench.fake.set_stubborn();
    tokio::time::sleep(HOUR).await;
    let joins = bench.fake.joins();
    assert!((2..200).contains(&joins), "{joins}");
}
