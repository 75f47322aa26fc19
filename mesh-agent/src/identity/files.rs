//! Files with secrets in the runtime directory: mode 0600 in directories of mode 0700, replaced
//! as a whole or not at all.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use mesh_common::api::MAX_SNAPSHOT_BYTES;
use zeroize::Zeroizing;

/// More than any file here can grow to.
const MAX_FILE_BYTES: u64 = 2 * MAX_SNAPSHOT_BYTES as u64;

/// How the temporary files of unfinished writes begin. Other names must not.
const UNFINISHED: &str = ".unfinished-";

/// A directory that only the agent's user can enter.
#[derive(Clone, Debug)]
pub(super) struct PrivateDir(PathBuf);

impl PrivateDir {
    /// Opens the directory, creating it if need be, and sweeps what a crash left unfinished.
    ///
    /// # Errors
    ///
    /// Says what to do about a directory that others can reach into.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // Not following a link: whoever can replace it decides where the keys go.
        let found = fs::symlink_metadata(path)?;
        let user = nix::unistd::geteuid().as_raw();
        if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
            return Err(io::Error::other(format!(
                "{} holds private keys: make it a directory of uid {user} with mode 0700",
                path.display()
            )));
        }
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self(path.to_owned()))
    }

    /// The path of a file in it, for messages.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Reads a file. `None` if there is none.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let file = match fs::File::open(self.path(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // One allocation of the final size: growing would leave copies of a key behind.
        let size = file.metadata()?.len().min(MAX_FILE_BYTES);
        let mut contents = Zeroizing::new(Vec::with_capacity(size as usize + 1));
        file.take(MAX_FILE_BYTES).read_to_end(&mut contents)?;
        Ok(Some(contents))
    }

    /// Replaces a file, which a crash at any moment leaves either old or new.
    pub(super) fn write(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        self.write_all(name, [contents])
    }

    /// The same with contents that come in pieces.
    pub(super) fn write_all<B: AsRef<[u8]>>(
        &self,
        name: &str,
        contents: impl IntoIterator<Item = B>,
    ) -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.0)?;
        let mut buffered = io::BufWriter::new(&mut file);
        contents.into_iter().try_for_each(|piece| buffered.write_all(piece.as_ref()))?;
        buffered.flush()?;
        drop(buffered);
        file.as_file().sync_all()?;
        file.persist(self.path(name))?;
        Ok(())
    }

    /// Adds to a file, which is made if there is none. A crash can leave a part of it.
    pub(super) fn append(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let mut file =
            fs::OpenOptions::new().append(true).create(true).mode(0o600).open(self.path(name))?;
        file.write_all(contents)
    }

    /// Removes a file. One that is not there is no error.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("identity");
        let dir = PrivateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert!(dir.read("key").unwrap().is_none());

        dir.write("key", b"first").unwrap();
        dir.write("key", b"second").unwrap();
        assert_eq!(dir.read("key").unwrap().unwrap().as_slice(), b"second");
        assert_eq!(fs::metadata(dir.path("key")).unwrap().mode() & 0o777, 0o600);

        dir.remove("key").unwrap();
        dir.remove("key").unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn what_a_crash_left_is_swept() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(root.path().join(format!("{UNFINISHED}x")), "half a key").unwrap();
        fs::write(root.path().join("kept"), "").unwrap();
        PrivateDir::open(root.path()).unwrap();
        let names: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["kept"]);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let error = PrivateDir::open(root.path()).unwrap_err().to_string();
        assert!(error.contains("with mode 0700"), "{error}");

        let link = root.path().join("link");
        let target = root.path().join("target");
        fs::DirBuilder::new().mode(0o700).create(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(PrivateDir::open(&link).is_err());
        assert!(PrivateDir::open(&target).is_ok());
    }
}
