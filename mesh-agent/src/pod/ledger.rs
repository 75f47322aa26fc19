//! What was enrolled, on file: where an agent that comes later finds the namespaces in which an
//! earlier one left rules and routes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// One enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The pod's UID.
    pub uid: String,
    /// Where its network namespace was mounted.
    pub netns: PathBuf,
    /// The namespace's cookie.
    pub cookie: u64,
}

/// A directory with one file for each enrolled pod, named by the cookie.
#[derive(Clone, Debug)]
pub struct Ledger(PathBuf);

impl Ledger {
    /// The ledger below the agent's runtime directory.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made.
    pub fn open(runtime_dir: &Path) -> io::Result<Self> {
        let path = runtime_dir.join("enrolled");
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Notes a pod down.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn record(&self, entry: &Entry) -> io::Result<()> {
        let path = self.0.join(entry.cookie.to_string());
        let beside = path.with_extension("new");
        fs::write(&beside, serde_json::to_vec(entry)?)?;
        fs::rename(beside, path)
    }

    /// Strikes a pod out, if it is there.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be removed.
    pub fn strike(&self, cookie: u64) -> io::Result<()> {
        match fs::remove_file(self.0.join(cookie.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Every pod in it. A file that cannot be read is skipped: the pins are the truth, this only
    /// helps to clean up.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let files = fs::read_dir(&self.0)?;
        let read = |file: fs::DirEntry| serde_json::from_slice(&fs::read(file.path()).ok()?).ok();
        Ok(files.flatten().filter_map(read).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_found_until_it_is_struck_out() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        let entry = Entry { uid: "u".to_owned(), netns: "/n".into(), cookie: 7 };
        ledger.record(&entry).unwrap();
        fs::write(directory.path().join("enrolled/8"), "not json").unwrap();
        assert_eq!(ledger.entries().unwrap(), [entry]);
        ledger.strike(7).unwrap();
        ledger.strike(7).unwrap();
        assert!(ledger.entries().unwrap().is_empty());
    }
}
