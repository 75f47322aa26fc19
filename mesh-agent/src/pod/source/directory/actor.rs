//! The task behind [`DirectorySource`](super::DirectorySource): one round per event, each of which
//! compares everything that is there with everything that was reported. Only what the event is about
//! is read: with a thousand pods, reading the rest would take longer than an enrolment.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use notify::{
    EventKind, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::warn;

use super::{
    super::{Ack, PodEvent},
    Command, Problems, Reply, Request,
    files::{self, Contents, FileState, Files, PodFile},
    namespace::{self, MountTable, NamespaceId},
    plan::{self, Change, Pods},
};
use crate::config::Udp;

/// When what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// The name in [`Problems`] of the directory itself.
const DIRECTORY: &str = ".";

/// Tells the answers to successive changes apart.
type ChangeNumber = u64;

pub(super) struct Actor {
    directory: PathBuf,
    default_udp: Udp,
    problems: watch::Sender<Problems>,
    events: mpsc::Sender<PodEvent>,
    watcher: notify::RecommendedWatcher,
    touched: Arc<Touched>,
    mounts: MountTable,
    /// The directory that `contents` are of.
    read: Option<DirectoryId>,
    contents: Contents,
    files: Files,
    /// What is mounted where, since the mount table last changed.
    mounted: HashMap<PathBuf, Result<NamespaceId, String>>,
    /// What was reported as wanted, and not as unwanted since.
    reported: Pods,
    /// Why enrolments failed, by UID.
    refused: BTreeMap<String, String>,
    last_change: ChangeNumber,
    /// The last change of each pod, until it is answered.
    in_flight: HashMap<String, ChangeNumber>,
    answers: FuturesUnordered<BoxFuture<'static, Answer>>,
    waiting: HashMap<ChangeNumber, Vec<Waiting>>,
}

/// Device and inode number.
type DirectoryId = (u64, u64);

/// What may have changed in the directory.
#[derive(Debug, Default)]
struct Touched {
    names: Mutex<Names>,
    notify: Notify,
}

/// Of files that may have changed.
#[derive(Debug, Default)]
enum Names {
    /// All there are.
    #[default]
    All,
    These(BTreeSet<String>),
}

impl Touched {
    /// Pod files may have changed; or, if a path names no file of the directory, all of them.
    fn touch(&self, paths: &[PathBuf], directory: &Path) {
        let mut names = self.names();
        for path in paths {
            let file = path.file_name().and_then(|name| name.to_str());
            match (&mut *names, file.filter(|_| path.parent() == Some(directory))) {
                (Names::These(names), Some(file)) if files::is_pod_file(file) => {
                    names.insert(file.to_owned());
                }
                (_, Some(_)) => {}
                (names, None) => *names = Names::All,
            }
        }
        drop(names);
        self.notify.notify_one();
    }

    fn touch_all(&self) {
        *self.names() = Names::All;
        self.notify.notify_one();
    }

    fn take(&self) -> Names {
        std::mem::replace(&mut *self.names(), Names::These(BTreeSet::new()))
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        // Nothing is left half done by a panic.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a change ended.
struct Answer {
    uid: String,
    change: ChangeNumber,
    result: Result<(), String>,
}

/// A person who waits for a change.
struct Waiting {
    reply: Reply,
    /// The file to remove if the change fails and no other has followed.
    created: Option<PathBuf>,
}

impl Actor {
    pub(super) fn new(
        directory: PathBuf,
        default_udp: Udp,
        problems: watch::Sender<Problems>,
        events: mpsc::Sender<PodEvent>,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create pods_dir {}", directory.display()))?;
        let touched = Arc::<Touched>::default();
        let (touch, of) = (Arc::clone(&touched), directory.clone());
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            match event {
                // Our own reading is an event too.
                Ok(event) if is_reading(event.kind) => {}
                Ok(event) if !event.need_rescan() => touch.touch(&event.paths, &of),
                Ok(_) | Err(_) => touch.touch_all(),
            }
        })
        .context("cannot watch pods_dir: inotify")?;
        let mounts = MountTable::watch().context("cannot watch /proc/self/mountinfo")?;
        Ok(Self {
            directory,
            default_udp,
            problems,
            events,
            watcher,
            touched,
            mounts,
            read: None,
            contents: Contents::new(),
            files: Files::new(),
            mounted: HashMap::new(),
            reported: Pods::new(),
            refused: BTreeMap::new(),
            last_change: 0,
            in_flight: HashMap::new(),
            answers: FuturesUnordered::new(),
            waiting: HashMap::new(),
        })
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> anyhow::Result<()> {
        let nothing = BTreeSet::new();
        self.round(&nothing).await;
        self.send(PodEvent::Synced).await;
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let failing = !self.problems.borrow().is_empty();
            tokio::select! {
                () = self.events.closed() => return Ok(()),
                () = self.touched.notify.notified() => self.round(&nothing).await,
                changed = self.mounts.changed() => {
                    changed.context("cannot watch /proc/self/mountinfo")?;
                    self.mounted.clear();
                    self.round(&nothing).await;
                }
                Some((request, reply)) = commands.recv() => self.serve(request, reply).await,
                Some(answer) = self.answers.next() => {
                    self.take(answer);
                    self.round(&nothing).await;
                }
                _ = retry.tick(), if failing => {
                    let again = self.refused.keys().cloned().collect();
                    self.read = None;
                    self.mounted.clear();
                    self.round(&again).await;
                }
            }
        }
    }

    /// Reads what has changed and reports what is different, and again the pods in `again`.
    async fn round(&mut self, again: &BTreeSet<String>) {
        let mut problems = Problems::new();
        match self.read_files() {
            Ok(()) => self.files = files::update(&self.files, self.contents.clone()),
            Err(error) => {
                self.read = None;
                let error = format!("cannot read {}: {error}", self.directory.display());
                problems.insert(DIRECTORY.to_owned(), error);
            }
        }
        let mut wanted = Pods::new();
        let mut declared = BTreeSet::new();
        for (name, file) in &self.files {
            let mut problem = file.problem.clone();
            if let Some(spec) = &file.spec {
                declared.insert(spec.uid.clone());
                let found = self.mounted.entry(spec.netns.clone());
                match found.or_insert_with(|| namespace::mounted_at(&spec.netns)) {
                    Ok(namespace) => {
                        let pod = plan::Pod { spec: spec.clone(), namespace: *namespace };
                        wanted.insert(spec.uid.clone(), pod);
                    }
                    Err(missing) => problem = problem.or(Some(missing.clone())),
                }
                problem = problem.or_else(|| self.refused.get(&spec.uid).cloned());
            }
            problems.extend(problem.map(|problem| (name.clone(), problem)));
        }
        for change in plan::changes(&self.reported, &wanted, &declared, again) {
            self.report(change).await;
        }
        self.publish(problems);
    }

    fn read_files(&mut self) -> anyhow::Result<()> {
        // Each time: if the directory was replaced, the watch so far is of the old one.
        self.watcher.watch(&self.directory, notify::RecursiveMode::NonRecursive)?;
        let found = fs::metadata(&self.directory)?;
        let found = Some((found.dev(), found.ino()));
        let names = match self.touched.take() {
            Names::These(names) if self.read == found => names,
            Names::These(_) | Names::All => {
                self.contents.clear();
                files::names(&self.directory)?
            }
        };
        for name in names {
            let Some(content) = files::load(&self.directory.join(&name), self.default_udp) else {
                self.contents.remove(&name);
                continue;
            };
            // It may be of a pod that has come to the path of another one.
            if let Ok(spec) = &content {
                self.mounted.remove(&spec.netns);
            }
            self.contents.insert(name, content);
        }
        self.read = found;
        Ok(())
    }

    fn publish(&self, problems: Problems) {
        self.problems.send_if_modified(|before| {
            for (file, problem) in &problems {
                if before.get(file) != Some(problem) {
                    warn!(file, "pod file: {problem}");
                }
            }
            let changed = *before != problems;
            *before = problems;
            changed
        });
    }

    async fn report(&mut self, change: Change) {
        let (ack, answer) = Ack::new();
        let (uid, event) = match change {
            Change::Upsert(pod) => {
                let spec = pod.spec.clone();
                self.reported.insert(spec.uid.clone(), pod);
                (spec.uid.clone(), PodEvent::Upsert(spec, ack))
            }
            Change::Remove(uid, cause) => {
                self.reported.remove(&uid);
                self.refused.remove(&uid);
                (uid.clone(), PodEvent::Remove { uid, cause, ack })
            }
        };
        self.last_change += 1;
        let change = self.last_change;
        self.in_flight.insert(uid.clone(), change);
        self.send(event).await;
        let answer = answer.map(move |result| Answer {
            uid,
            change,
            result: result.unwrap_or_else(|_| Err("the agent is stopping".to_owned())),
        });
        self.answers.push(answer.boxed());
    }

    async fn send(&mut self, event: PodEvent) {
        // Nobody receives: `run` ends at once.
        drop(self.events.send(event).await);
    }

    fn take(&mut self, Answer { uid, change, result }: Answer) {
        let is_last = self.in_flight.get(&uid) == Some(&change);
        if is_last {
            self.in_flight.remove(&uid);
            match &result {
                Ok(()) => drop(self.refused.remove(&uid)),
                Err(error) if self.reported.contains_key(&uid) => {
                    self.refused.insert(uid, error.clone());
                }
                Err(error) => warn!(pod = uid, "un-enrolling failed: {error}"),
            }
        }
        for Waiting { reply, created } in self.waiting.remove(&change).unwrap_or_default() {
            // A later request has made the file its own.
            if let Some(path) = created.filter(|_| is_last && result.is_err()) {
                withdraw(&path);
            }
            // Whoever waited may have gone.
            drop(reply.send(result.clone()));
        }
    }

    async fn serve(&mut self, request: Request, reply: Reply) {
        match request {
            Request::Enroll { uid, netns, udp } => {
                self.enroll(&PodFile { uid, netns, udp }, reply).await;
            }
            Request::Unenroll { uid, netns } => self.unenroll(&uid, netns.as_deref(), reply).await,
        }
    }

    async fn enroll(&mut self, file: &PodFile, reply: Reply) {
        let created = match self.add_file(file) {
            Ok(created) => created,
            Err(error) => return drop(reply.send(Err(error))),
        };
        // Looked at anew, and reported even if it is what it was: the answer is to be true now.
        self.mounted.remove(&file.netns);
        self.round(&BTreeSet::from([file.uid.clone()])).await;
        let wanted = self.reported.get(&file.uid).is_some_and(|pod| pod.spec.netns == file.netns);
        if let Some(change) = self.in_flight.get(&file.uid).filter(|_| wanted) {
            self.waiting.entry(*change).or_default().push(Waiting { reply, created });
            return;
        }
        let problem = self.problem(&files::name_for(&file.uid));
        created.as_deref().into_iter().for_each(withdraw);
        drop(reply.send(Err(problem)));
    }

    async fn unenroll(&mut self, uid: &str, netns: Option<&Path>, reply: Reply) {
        if netns.is_some_and(|netns| !self.is_bound(uid, netns)) {
            return drop(reply.send(Ok(())));
        }
        let name = match self.remove_file(uid) {
            Ok(name) => name,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.round(&BTreeSet::new()).await;
        if self.reported.contains_key(uid) {
            return drop(reply.send(Err(self.problem(&name))));
        }
        match self.in_flight.get(uid) {
            Some(change) => {
                self.waiting.entry(*change).or_default().push(Waiting { reply, created: None });
            }
            None => drop(reply.send(Ok(()))),
        }
    }

    /// Why a pod file has not taken effect.
    fn problem(&self, name: &str) -> String {
        let problems = self.problems.borrow();
        let problem = problems.get(name).or_else(|| problems.get(DIRECTORY)).cloned();
        problem.unwrap_or_else(|| format!("{name} was changed meanwhile: try again"))
    }

    /// Writes a pod file. Returns its path if there was none before, or only that of an enrolment
    /// which is not answered yet.
    fn add_file(&self, file: &PodFile) -> Result<Option<PathBuf>, String> {
        let name = files::name_for(&file.uid);
        let spec = file.check(self.default_udp)?;
        namespace::mounted_at(&spec.netns)?;
        match self.file_of(&spec.uid) {
            Some(other) if other != name => Err(format!(
                "the pod file {} declares {} already: change it there",
                self.directory.join(other).display(),
                spec.uid
            )),
            owner => {
                let path = self.directory.join(&name);
                files::write(&path, file)
                    .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
                // Not only when inotify tells.
                self.touched.touch(slice::from_ref(&path), &self.directory);
                let mut waiting = self.waiting.values().flatten();
                let is_new = waiting.any(|waiting| waiting.created.as_ref() == Some(&path));
                Ok((is_new || owner.is_none()).then_some(path))
            }
        }
    }

    /// Removes a pod's file. Returns its name.
    fn remove_file(&self, uid: &str) -> Result<String, String> {
        let Some(name) = self.file_of(uid) else {
            return Err(format!("no file in {} declares {uid}", self.directory.display()));
        };
        let path = self.directory.join(name);
        fs::remove_file(&path)
            .map_err(|error| format!("cannot remove {}: {error}", path.display()))?;
        self.touched.touch(slice::from_ref(&path), &self.directory);
        Ok(name.to_owned())
    }

    /// Whether a pod's file names this network namespace.
    fn is_bound(&self, uid: &str, netns: &Path) -> bool {
        let mut specs = self.files.values().filter_map(|file| file.spec.as_ref());
        specs.any(|spec| spec.uid == uid && spec.netns == netns)
    }

    /// The name of the file that declares a pod.
    fn file_of(&self, uid: &str) -> Option<&str> {
        let declares = |file: &FileState| file.spec.as_ref().is_some_and(|spec| spec.uid == uid);
        self.files.iter().find(|(_, file)| declares(file)).map(|(name, _)| name.as_str())
    }
}

fn withdraw(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        warn!("cannot remove {}: {error}", path.display());
    }
}

fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}
