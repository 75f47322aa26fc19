//! Notices that the operator has put a join token in place.

use std::{path::Path, sync::Arc};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::Notify;

/// Watches the directory of a file, which need not exist.
#[derive(Debug)]
pub(super) struct TokenWatch {
    changed: Arc<Notify>,
    _watcher: Option<RecommendedWatcher>,
}

impl TokenWatch {
    /// Starts watching. What cannot be watched never changes.
    pub(super) fn start(file: &Path) -> Self {
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| is_change(event.kind)) {
                notify.notify_one();
            }
        })
        .and_then(|mut watcher| {
            let dir = file.parent().unwrap_or(file);
            watcher.watch(dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        })
        .inspect_err(|error| {
            tracing::debug!(file = %file.display(), %error, "cannot watch for a join token");
        })
        .ok();
        Self { changed, _watcher: watcher }
    }

    /// There is nothing to watch.
    pub(super) fn never() -> Self {
        Self { changed: Arc::default(), _watcher: None }
    }

    /// Returns when something in the directory has changed since the last call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Reading the token is an event as well, and must not make us read it again.
const fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Any | EventKind::Access(_) | EventKind::Remove(_) | EventKind::Other => false,
    }
}
