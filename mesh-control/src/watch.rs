//! Notices changes of the operator's directories.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::Notify;

/// A change is seldom alone: what comes within this time is taken together. It also lets an editor
/// finish that does not write its file at once.
const SETTLE: Duration = Duration::from_millis(100);

/// A directory may have been replaced by another, which the kernel does not tell.
const RECHECK: Duration = Duration::from_secs(30);

/// Calls `reload` after every change in one of the directories, for ever. `reload` may block.
pub async fn watch(dirs: Vec<PathBuf>, reload: impl Fn() + Send + Sync + 'static) {
    let (reload, changed) = (Arc::new(reload), Arc::new(Notify::new()));
    loop {
        // Watched anew each time, and before it is read, so that nothing is missed.
        let watchers: Vec<_> = dirs.iter().filter_map(|dir| watcher(dir, &changed)).collect();
        let work = Arc::clone(&reload);
        if tokio::task::spawn_blocking(move || work()).await.is_err() {
            tracing::error!("reading the operator's directories failed");
        }
        if tokio::time::timeout(RECHECK, changed.notified()).await.is_ok() {
            tokio::time::sleep(SETTLE).await;
        }
        drop(watchers);
    }
}

fn watcher(dir: &Path, changed: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let changed = Arc::clone(changed);
    let handler = move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| is_change(event.kind)) {
            changed.notify_one();
        }
    };
    let started = notify::recommended_watcher(handler).and_then(|mut watcher| {
        watcher.watch(dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    started
        .inspect_err(|error| {
            let dir = dir.display();
            tracing::warn!(%dir, %error, "cannot watch: changes take up to 30 s");
        })
        .ok()
}

/// Reading a file must not count, or reading would never end.
fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
    }
}
