//! Keeping the plugin installed: other installers write their network configuration when they
//! start, and a service account's token is replaced every hour.

use std::{sync::Arc, time::Duration};

use mesh_common::ending::Ending;
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::Notify;

use super::{InstallError, Installation, token::Tokens, turn::Turn};

/// When what failed is tried again, if nothing else happens.
const RETRY: Duration = Duration::from_secs(5);

/// When everything is looked at, if nothing happens. inotify does not tell of everything: not of a
/// link in a path that now leads elsewhere, nor of anything once the node is out of watches.
const CHECK: Duration = Duration::from_secs(30);

/// Applies the installation whenever something has changed, until the process is told to end.
pub(super) async fn keep(installation: &Installation) -> Result<(), InstallError> {
    // As a container's first process it would not end by default.
    let mut ending = Ending::listen().map_err(InstallError::Signals)?;
    let touched = Arc::new(Notify::new());
    let mut watcher = None;
    let mut turn = None;
    let mut tokens = Tokens::default();
    let mut problem = None;
    loop {
        // First: what changes from here on is an event.
        let watched = watch(&mut watcher, &touched, installation);
        let token = installation.token(&mut tokens).await;
        let applied = apply(&mut turn, installation, token.as_deref().ok());
        let said = token.and(applied).and(watched).err().map(|error| error.to_string());
        match (&problem, &said) {
            (before, Some(said)) if before.as_ref() != Some(said) => {
                tracing::warn!("the plugin is not installed as it should be: {said}");
            }
            (Some(_), None) => tracing::info!("the plugin is installed as it should be"),
            _ => {}
        }
        problem = said;
        let pause = if problem.is_some() { RETRY } else { CHECK };
        tokio::select! {
            () = touched.notified() => {}
            () = tokio::time::sleep(pause) => {}
            () = ending.told() => return Ok(()),
        }
    }
}

/// The turn is kept: what must not happen between two rounds is an uninstallation.
fn apply(
    turn: &mut Option<Turn>,
    installation: &Installation,
    token: Option<&str>,
) -> Result<(), InstallError> {
    let turn = match turn {
        Some(turn) => turn,
        none => none.insert(Turn::take(&installation.places.bin_dir)?),
    };
    installation.apply(turn, token)
}

/// Each time: if a directory was replaced, the watch so far is of the old one.
fn watch(
    watcher: &mut Option<RecommendedWatcher>,
    touched: &Arc<Notify>,
    installation: &Installation,
) -> Result<(), InstallError> {
    let failed = |path: &std::path::Path| {
        let path = path.to_owned();
        |source| InstallError::Watch { path, source }
    };
    let Installation { places, service_account, .. } = installation;
    let watcher = match watcher {
        Some(watcher) => watcher,
        none => {
            let touch = Arc::clone(touched);
            let new = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Our own reading is an event too.
                if !event.is_ok_and(|event| is_reading(event.kind)) {
                    touch.notify_one();
                }
            });
            none.insert(new.map_err(failed(&places.conf_dir))?)
        }
    };
    for path in [&places.bin_dir, &places.conf_dir, service_account] {
        watcher.watch(path, RecursiveMode::NonRecursive).map_err(failed(path))?;
    }
    Ok(())
}

fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}
