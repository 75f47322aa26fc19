//! Files that are there as a whole or not at all, also after the node has lost its power: what one
//! step rests on is on the disk before the next step is taken.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

/// Of files that are not complete yet. No container runtime takes them for a configuration.
const UNFINISHED: &str = ".nodemesh-cni-";

/// Replaces a file.
pub(super) fn write(path: &Path, mode: u32, mut content: impl Read) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(directory)?;
    io::copy(&mut content, &mut file)?;
    // After its making, where the process's mask would take bits away.
    file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync(directory)
}

/// Removes a file. Returns whether there was one.
pub(super) fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => sync(path.parent().unwrap_or(path)).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what a process that was killed has left unfinished in a directory. Nobody may be writing
/// there.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED)) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}
