//! The sole right to change what is installed on a node, and the plugin's binary, which goes with
//! it: whoever removes it must not meet somebody who still puts it into network configurations.

use std::{
    fs,
    fs::{File, TryLockError},
    io::{self, BufRead as _, BufReader},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use super::{super::durable, InstallError, failed};

/// The program itself, whatever its name.
const OWN_BINARY: &str = "/proc/self/exe";

const MODE: u32 = 0o755;

/// Held until it is dropped, also by the death of the process.
pub(super) struct Turn {
    _directory: File,
    installed: Option<Stamp>,
}

/// Tells a file from the one that was there before, whatever was done to it.
#[derive(PartialEq, Eq)]
struct Stamp {
    inode: u64,
    changed: (i64, i64),
}

impl Turn {
    /// Takes the turn at a directory of plugins.
    pub(super) fn take(directory: &Path) -> Result<Self, InstallError> {
        let file = File::open(directory).map_err(failed(directory))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(InstallError::Busy(directory.to_owned())),
            Err(TryLockError::Error(error)) => return Err(failed(directory)(error)),
        }
        durable::sweep(directory).map_err(failed(directory))?;
        Ok(Self { _directory: file, installed: None })
    }

    /// Makes a binary this program. Replaced as a whole: the runtime may start it at any moment.
    pub(super) fn copy_binary(&mut self, target: &Path) -> Result<(), InstallError> {
        let found = Stamp::of(target);
        if found.is_some() && found == self.installed {
            return Ok(());
        }
        let own = Path::new(OWN_BINARY);
        if !is_same(own, target).map_err(failed(target))? {
            let content = File::open(own).map_err(failed(own))?;
            durable::write(target, MODE, content).map_err(failed(target))?;
        }
        self.installed = Stamp::of(target);
        Ok(())
    }
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        Some(Self { inode: found.ino(), changed: (found.ctime(), found.ctime_nsec()) })
    }
}

/// Whether a file is there with a program's content, and can be started.
fn is_same(own: &Path, target: &Path) -> io::Result<bool> {
    let found = match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found?,
    };
    let length = fs::metadata(own)?.len();
    if !found.is_file() || found.permissions().mode() & 0o7777 != MODE || found.len() != length {
        return Ok(false);
    }
    let [mut own, mut target] =
        [BufReader::new(File::open(own)?), BufReader::new(File::open(target)?)];
    loop {
        let (ours, theirs) = (own.fill_buf()?, target.fill_buf()?);
        let length = ours.len().min(theirs.len());
        if length == 0 || ours[..length] != theirs[..length] {
            return Ok(ours.is_empty() && theirs.is_empty());
        }
        own.consume(length);
        target.consume(length);
    }
}
