use std::{fs, path::Path, time::Duration};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tempfile::TempDir;
use tokio::{sync::mpsc::Receiver, task::JoinHandle, time::timeout};

use super::{
    super::{Ack, PodSpec, Removal},
    *,
};

/// Far longer than anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A new network namespace mounted at a path, until dropped. Needs root.
struct Namespace(PathBuf);

impl Namespace {
    fn mount(path: PathBuf) -> Self {
        fs::write(&path, "").unwrap();
        mount_new(&path);
        Self(path)
    }
}

fn mount_new(path: &Path) {
    let target = path.to_owned();
    // A thread of its own: the namespace must not stay with the test's.
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let namespace = Path::new("/proc/thread-self/ns/net");
        mount(Some(namespace), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    })
    .join()
    .unwrap();
}

impl Drop for Namespace {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(&self.0).unwrap();
    }
}

struct Fixture {
    // Before `root`, which cannot be removed while they are mounted.
    a: Option<Namespace>,
    root: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("pods")).unwrap();
        let a = Some(Namespace::mount(root.path().join("a")));
        Self { a, root }
    }

    fn netns(&self) -> PathBuf {
        self.root.path().join("a")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("pods").join(name)
    }

    fn declare(&self, name: &str, uid: &str) {
        let text = format!("uid: {uid}\nnetns: {}\n", self.netns().display());
        fs::write(self.file(name), text).unwrap();
    }

    fn start(&self) -> Running {
        let (source, pods) = DirectorySource::new(self.root.path().join("pods"), Udp::Deny);
        let (sender, events) = mpsc::channel(1);
        Running { task: tokio::spawn(source.run(sender)), events, pods }
    }
}

struct Running {
    task: JoinHandle<anyhow::Result<()>>,
    events: Receiver<PodEvent>,
    pods: PodDirectory,
}

impl Running {
    async fn event(&mut self) -> PodEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event").expect("a running source")
    }

    async fn upsert(&mut self) -> (PodSpec, Ack) {
        match self.event().await {
            PodEvent::Upsert(spec, ack) => (spec, ack),
            event @ (PodEvent::Remove { .. } | PodEvent::Synced) => panic!("{event:?}"),
        }
    }

    async fn enrolled(&mut self) -> PodSpec {
        let (spec, ack) = self.upsert().await;
        ack.answer(Ok(()));
        spec
    }

    async fn removed(&mut self) -> (String, Removal) {
        match self.event().await {
            PodEvent::Remove { uid, cause, ack } => {
                ack.answer(Ok(()));
                (uid, cause)
            }
            event @ (PodEvent::Upsert(..) | PodEvent::Synced) => panic!("{event:?}"),
        }
    }

    async fn synced(&mut self) {
        let event = self.event().await;
        assert!(matches!(event, PodEvent::Synced), "{event:?}");
    }

    async fn problem(&mut self, file: &str) -> String {
        let problems = self.pods.problems.wait_for(|problems| problems.contains_key(file));
        timeout(PATIENCE, problems).await.expect("a problem").unwrap()[file].clone()
    }

    async fn no_problem(&mut self) {
        let solved = self.pods.problems.wait_for(Problems::is_empty);
        drop(timeout(PATIENCE, solved).await.expect("no problem").unwrap());
    }
}

#[tokio::test]
async fn what_is_there_is_reported_before_synced() {
    let fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    fixture.declare(".hidden.yaml", "u2");
    fixture.declare("note.txt", "u3");
    let mut source = fixture.start();
    let expected = PodSpec { uid: "u1".to_owned(), netns: fixture.netns(), udp: Udp::Deny };
    assert_eq!(source.enrolled().await, expected);
    source.synced().await;
    drop(source.events);
    timeout(PATIENCE, source.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn pods_follow_their_files() {
    let fixture = Fixture::new();
    let mut source = fixture.start();
    source.synced().await;
    fixture.declare("one.yaml", "u1");
    assert_eq!(source.enrolled().await.uid, "u1");
    let text = format!("uid: u1\nnetns: {}\nudp: allow\n", fixture.netns().display());
    fs::write(fixture.file("one.yaml"), text).unwrap();
    assert_eq!(source.enrolled().await.udp, Udp::Allow);
    fs::remove_file(fixture.file("one.yaml")).unwrap();
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::Withdrawn));
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_is_reported() {
    let fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    let mut source = fixture.start();
    source.enrolled().await;
    source.synced().await;
    for (text, word) in [
        ("uid: u1\nnetns: /a\nnetnss: /b\n", "netnss"),
        ("uid: a/b\nnetns: /a\n", "a/b"),
        ("uid: .a\nnetns: /a\n", "dot"),
        ("uid: u1\nnetns: a\n", "absolute"),
        ("uid: u1\n", "netns"),
    ] {
        fs::write(fixture.file("one.yaml"), text).unwrap();
        let changed = source.pods.problems.wait_for(|problems| {
            problems.get("one.yaml").is_some_and(|problem| problem.contains(word))
        });
        drop(timeout(PATIENCE, changed).await.expect(word).unwrap());
    }
    // The next event is of another file: the broken one caused none.
    fixture.declare("two.yaml", "u2");
    assert_eq!(source.enrolled().await.uid, "u2");
    fixture.declare("one.yaml", "u1");
    source.no_problem().await;
    fs::remove_file(fixture.file("one.yaml")).unwrap();
    assert_eq!(source.removed().await.0, "u1");
}

#[tokio::test]
async fn a_pod_ends_with_its_namespace() {
    let mut fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    let mut source = fixture.start();
    source.enrolled().await;
    source.synced().await;

    fixture.a = None;
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::NamespaceGone));
    assert!(source.problem("one.yaml").await.contains("no network namespace"));

    fixture.a = Some(Namespace::mount(fixture.netns()));
    assert_eq!(source.enrolled().await.uid, "u1");
    source.no_problem().await;

    // Another one over it, as seen by whoever looks at the path: another pod.
    mount_new(&fixture.netns());
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::NamespaceGone));
    assert_eq!(source.enrolled().await.uid, "u1");
    umount2(&fixture.netns(), MntFlags::MNT_DETACH).unwrap();
    assert_eq!(source.removed().await.1, Removal::NamespaceGone);
    assert_eq!(source.enrolled().await.uid, "u1");
}

#[tokio::test]
async fn a_link_in_proc_is_refused_because_its_end_cannot_be_seen() {
    let fixture = Fixture::new();
    let mut source = fixture.start();
    source.synced().await;
    let error = source.pods.enroll("u1".into(), "/proc/self/ns/net".into(), None).await;
    assert!(error.unwrap_err().contains("mount it first"));
    assert_eq!(fs::read_dir(fixture.file("")).unwrap().count(), 0);
}

#[tokio::test]
async fn enrolling_waits_for_the_guard() {
    let fixture = Fixture::new();
    let mut source = fixture.start();
    source.synced().await;
    let enroll = |source: &Running| {
        let (pods, netns) = (source.pods.clone(), fixture.netns());
        tokio::spawn(async move { pods.enroll("u1".to_owned(), netns, Some(Udp::Allow)).await })
    };
    let first = enroll(&source);
    let (spec, ack) = source.upsert().await;
    assert_eq!(spec.udp, Udp::Allow);
    assert!(fixture.file("u1.yaml").exists());
    assert!(!first.is_finished());
    let second = enroll(&source);
    ack.answer(Ok(()));
    assert_eq!(first.await.unwrap(), Ok(()));
    // Of a pod that is there already, the answer is about now as well.
    let (spec_again, ack) = source.upsert().await;
    assert_eq!(spec_again, spec);
    assert!(!second.is_finished());
    ack.answer(Ok(()));
    assert_eq!(second.await.unwrap(), Ok(()));

    let pods = source.pods.clone();
    let unenroll = tokio::spawn(async move { pods.unenroll("u1".to_owned(), None).await });
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::Withdrawn));
    assert_eq!(unenroll.await.unwrap(), Ok(()));
    assert!(!fixture.file("u1.yaml").exists());
    let error = source.pods.unenroll("u1".to_owned(), None).await.unwrap_err();
    assert!(error.contains("no file"), "{error}");
}

#[tokio::test]
async fn a_pod_that_got_another_namespace_is_not_ended_with_the_one_before() {
    let fixture = Fixture::new();
    let second = Namespace::mount(fixture.root.path().join("b"));
    let mut source = fixture.start();
    source.synced().await;
    let enroll = |source: &Running, netns: &Path| {
        let (pods, netns) = (source.pods.clone(), netns.to_owned());
        tokio::spawn(async move { pods.enroll("u1".to_owned(), netns, None).await })
    };
    let enrolling = enroll(&source, &fixture.netns());
    assert_eq!(source.enrolled().await.netns, fixture.netns());
    enrolling.await.unwrap().unwrap();

    // The sandbox failed later on, and the runtime made another for the same pod.
    let enrolling = enroll(&source, &second.0);
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::NamespaceGone));
    assert_eq!(source.enrolled().await.netns, second.0);
    enrolling.await.unwrap().unwrap();
    let file = fs::read_to_string(fixture.file("u1.yaml")).unwrap();
    assert!(file.contains(second.0.to_str().unwrap()), "{file}");
    assert_eq!(fs::read_dir(fixture.file("")).unwrap().count(), 1);

    let end = |source: &Running, netns: &Path| {
        let (pods, netns) = (source.pods.clone(), netns.to_owned());
        tokio::spawn(async move { pods.unenroll("u1".to_owned(), Some(netns)).await })
    };
    end(&source, &fixture.netns()).await.unwrap().unwrap();
    assert!(fixture.file("u1.yaml").exists());
    let ending = end(&source, &second.0);
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::Withdrawn));
    ending.await.unwrap().unwrap();
    assert!(!fixture.file("u1.yaml").exists());
    end(&source, &second.0).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_failed_enrolment_leaves_no_file() {
    let fixture = Fixture::new();
    let mut source = fixture.start();
    source.synced().await;
    let (pods, netns) = (source.pods.clone(), fixture.netns());
    let enroll = tokio::spawn(async move { pods.enroll("u1".to_owned(), netns, None).await });
    let (_, ack) = source.upsert().await;
    ack.answer(Err("no such pod".to_owned()));
    assert_eq!(enroll.await.unwrap(), Err("no such pod".to_owned()));
    assert_eq!(source.removed().await, ("u1".to_owned(), Removal::Withdrawn));
    assert!(!fixture.file("u1.yaml").exists());
}

/// The one whose sandbox failed is answered after the other has asked.
#[tokio::test]
async fn an_enrolment_that_was_overtaken_takes_nothing_along() {
    for (late, left) in [(Ok(()), true), (Err("no room".to_owned()), false)] {
        let fixture = Fixture::new();
        let second = Namespace::mount(fixture.root.path().join("b"));
        let mut source = fixture.start();
        source.synced().await;
        let pods = source.pods.clone();
        let enroll = |netns: &Path| {
            let (pods, netns) = (pods.clone(), netns.to_owned());
            tokio::spawn(async move { pods.enroll("u1".to_owned(), netns, None).await })
        };
        let early = enroll(&fixture.netns());
        let (_, early_ack) = source.upsert().await;
        let later = enroll(&second.0);
        assert_eq!(source.removed().await, ("u1".to_owned(), Removal::NamespaceGone));
        let (spec, ack) = source.upsert().await;
        assert_eq!(spec.netns, second.0);

        early_ack.answer(Err("the sandbox is gone".to_owned()));
        assert!(early.await.unwrap().is_err());
        assert!(fixture.file("u1.yaml").exists());
        ack.answer(late.clone());
        assert_eq!(later.await.unwrap(), late);
        assert_eq!(fixture.file("u1.yaml").exists(), left);
        if !left {
            assert_eq!(source.removed().await, ("u1".to_owned(), Removal::Withdrawn));
        }
    }
}

#[tokio::test]
async fn a_refused_pod_file_is_reported_and_tried_again() {
    let fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    let mut source = fixture.start();
    let (_, ack) = source.upsert().await;
    source.synced().await;
    ack.answer(Err("not yet".to_owned()));
    assert_eq!(source.problem("one.yaml").await, "not yet");
    source.enrolled().await;
    source.no_problem().await;
}

#[tokio::test]
async fn a_directory_that_cannot_be_read_keeps_its_pods() {
    let fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    let mut source = fixture.start();
    source.enrolled().await;
    source.synced().await;
    fs::rename(fixture.file(""), fixture.root.path().join("away")).unwrap();
    assert!(source.problem(".").await.contains("pods"));
    fs::rename(fixture.root.path().join("away"), fixture.file("")).unwrap();
    source.no_problem().await;
    fixture.declare("two.yaml", "u2");
    assert_eq!(source.enrolled().await.uid, "u2");
}

/// With a thousand pods, reading all files for each would take longer than anything else. One that is
/// changed behind the directory is a file that only who reads everything sees as it is.
#[tokio::test]
async fn only_what_was_touched_is_read_again() {
    let fixture = Fixture::new();
    fixture.declare("one.yaml", "u1");
    let mut source = fixture.start();
    source.enrolled().await;
    source.synced().await;
    // Changed through another name, of which inotify does not tell.
    let elsewhere = fixture.root.path().join("elsewhere.yaml");
    fs::hard_link(fixture.file("one.yaml"), &elsewhere).unwrap();
    fs::write(&elsewhere, "not a pod file").unwrap();
    fixture.declare("two.yaml", "u2");
    assert_eq!(source.enrolled().await.uid, "u2");
    source.no_problem().await;
    fs::write(fixture.file("one.yaml"), "not a pod file").unwrap();
    source.problem("one.yaml").await;
}
