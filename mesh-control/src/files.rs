//! Files that must survive a crash whole, and be seen by nobody else.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    time::SystemTime,
};

/// Creates a directory with mode 0700 if there is none, parents as usual, or checks that only its
/// owner, the server's user, can enter it.
///
/// # Errors
///
/// What the kernel says, or `PermissionDenied` with what to do.
pub fn private_dir(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // Not following a link: whoever can replace it decides where the keys go.
    let found = fs::symlink_metadata(path)?;
    let us = nix::unistd::geteuid().as_raw();
    if found.is_dir() && found.uid() == us && found.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "holds secrets, but is owned by uid {} with mode {:04o}: make it a directory of uid \
             {us} with mode 0700",
            found.uid(),
            found.mode() & 0o7777
        ),
    ))
}

/// Puts a file with mode 0600 in place, whole or not at all, also across a loss of power. The
/// directory must be on one file system with itself, so that the rename is atomic.
///
/// # Errors
///
/// What the kernel says; the file is then as it was before.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the path of a file"));
    };
    let temporary = dir.join(format!(".{}.new", name.display()));
    // What a crash left behind may have been made with other permissions.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_dir(dir)
}

/// Removes a file, durably.
///
/// # Errors
///
/// What the kernel says.
pub fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Reads a file that may not exist.
///
/// # Errors
///
/// What the kernel says, except that there is none.
pub fn read_optional(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file that an operator wrote, as it was found. Its content may have been unreadable.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file's name, without the directory.
    pub file: String,
    /// When it was last written.
    pub modified: SystemTime,
    /// Its text, or why there is none.
    pub content: Result<String, String>,
}

/// No file that an operator writes for us is longer.
const MAX_SOURCE_BYTES: u64 = 256 * 1024;

/// Reads every file of a directory that has one of the extensions. Hidden files are left out: they
/// are being written.
///
/// # Errors
///
/// If the directory itself cannot be read. A file that cannot is a [`Source`] that says why.
pub fn sources(dir: &Path, extensions: &[&str]) -> io::Result<Vec<Source>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        let Some(file) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if file.starts_with('.') || !extension.is_some_and(|found| extensions.contains(&found)) {
            continue;
        }
        let (modified, content) = match source(&path) {
            Ok((modified, text)) => (modified, Ok(text)),
            // Removed since the directory was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => (SystemTime::UNIX_EPOCH, Err(error.to_string())),
        };
        sources.push(Source { file: file.to_owned(), modified, content });
    }
    Ok(sources)
}

fn source(path: &Path) -> io::Result<(SystemTime, String)> {
    let metadata = fs::metadata(path)?;
    // A FIFO would never end.
    if !metadata.is_file() || metadata.len() > MAX_SOURCE_BYTES {
        return Err(io::Error::other(format!("not a file of at most {MAX_SOURCE_BYTES} bytes")));
    }
    Ok((metadata.modified()?, fs::read_to_string(path)?))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn files_are_private_whatever_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        fs::write(&path, "old").unwrap();
        fs::write(dir.path().join(".secret.new"), "of a crash").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!((read_optional(&path).unwrap().as_deref(), mode(&path)), (Some("new"), 0o600));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        assert_eq!(read_optional(&path).unwrap(), None);
    }

    #[test]
    fn sources_are_the_visible_files_of_a_kind() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("a.yaml", "A"), ("b.yml", "B"), (".c.yaml", "C"), ("d.txt", "D")] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        fs::create_dir(dir.path().join("e.yaml")).unwrap();
        let mut found = sources(dir.path(), &["yaml", "yml"]).unwrap();
        found.sort_by(|a, b| a.file.cmp(&b.file));
        let content = |s: &Source| (s.file.clone(), s.content.clone().unwrap_or_default());
        let [a, b, e] = &found[..] else { panic!("{found:?}") };
        assert_eq!(content(a), ("a.yaml".to_owned(), "A".to_owned()));
        assert_eq!(content(b), ("b.yml".to_owned(), "B".to_owned()));
        assert!(e.content.is_err());
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        private_dir(&path).unwrap();
        private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o710)).unwrap();
        assert!(private_dir(&path).unwrap_err().to_string().contains("mode 0710"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(private_dir(&link).is_err(), "a link could lead anywhere");
    }
}
