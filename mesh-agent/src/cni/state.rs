//! What the plugin remembers between its calls: empty files for namespaces that were seen outside
//! the mesh, and for every attachment that it enrolled the pod and its network namespace.
//!
//! A pod's UID does not say which of its sandboxes is meant: a runtime that replaced one may end
//! the old one long after the new one was enrolled. The attachment does.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    durable,
    protocol::{AttachmentId, CniError},
};

/// What was enrolled for an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) uid: String,
    pub(super) netns: PathBuf,
}

/// The directory.
#[derive(Debug)]
pub(super) struct State {
    /// A file per namespace.
    outside: PathBuf,
    /// Records of attachments in use.
    attachments: PathBuf,
    /// Records of those that ended and may be enrolled still.
    ended: PathBuf,
}

impl State {
    pub(super) fn new(directory: &Path) -> Self {
        let [outside, attachments, ended] =
            ["outside", "attachments", "ended"].map(|name| directory.join(name));
        Self { outside, attachments, ended }
    }

    /// Whether a namespace was seen outside. What cannot be read was not.
    pub(super) fn is_outside(&self, namespace: &str) -> bool {
        self.outside.join(namespace).exists()
    }

    /// Notes that a namespace is outside.
    pub(super) fn note_outside(&self, namespace: &str) -> Result<(), CniError> {
        create_directory(&self.outside)?;
        let path = self.outside.join(namespace);
        // It has no content that could be there by half.
        fs::File::create(&path).map(drop).map_err(failed(&path))
    }

    /// Forgets that a namespace is outside, for good: also if the node loses its power now.
    pub(super) fn forget_outside(&self, namespace: &str) -> Result<(), CniError> {
        remove(&self.outside.join(namespace))
    }

    /// Records what is enrolled for an attachment.
    pub(super) fn record(&self, id: &AttachmentId, record: &Record) -> Result<(), CniError> {
        create_directory(&self.attachments)?;
        let path = self.attachments.join(id.to_string());
        let text = serde_json::to_vec(record).map_err(|error| failed(&path)(error.into()))?;
        durable::write(&path, 0o600, text.as_slice()).map_err(failed(&path))
    }

    /// What was enrolled for an attachment.
    pub(super) fn recorded(&self, id: &AttachmentId) -> Result<Option<Record>, CniError> {
        read(&self.attachments.join(id.to_string()))
    }

    /// Moves the attachments that ended aside.
    pub(super) fn end(&self, has_ended: impl Fn(&str) -> bool) -> Result<(), CniError> {
        for name in names(&self.attachments)?.into_iter().filter(|name| has_ended(name)) {
            create_directory(&self.ended)?;
            let from = self.attachments.join(&name);
            match fs::rename(&from, self.ended.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&from)(error));
                }
                // Another call has done it.
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// The attachments in use.
    pub(super) fn in_use(&self) -> Result<Vec<Record>, CniError> {
        Ok(records(&self.attachments)?.into_iter().map(|(_, record)| record).collect())
    }

    /// The attachments that ended, by a name for [`Self::settle`].
    pub(super) fn ended(&self) -> Result<Vec<(String, Record)>, CniError> {
        records(&self.ended)
    }

    /// Forgets an attachment that ended, of which nothing is left.
    pub(super) fn settle(&self, name: &str) -> Result<(), CniError> {
        remove(&self.ended.join(name))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> CniError {
    move |source| CniError::State { path: path.to_owned(), source }
}

fn create_directory(path: &Path) -> Result<(), CniError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))
}

fn remove(path: &Path) -> Result<(), CniError> {
    durable::remove(path).map(drop).map_err(failed(path))
}

fn records(directory: &Path) -> Result<Vec<(String, Record)>, CniError> {
    let mut records = Vec::new();
    for name in names(directory)? {
        // Unless another call has settled it.
        if let Some(record) = read(&directory.join(&name))? {
            records.push((name, record));
        }
    }
    Ok(records)
}

fn read(path: &Path) -> Result<Option<Record>, CniError> {
    match fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).map(Some).map_err(|error| failed(path)(error.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path)(error)),
    }
}

/// The files of a directory that may not be there, without unfinished ones.
fn names(directory: &Path) -> Result<Vec<String>, CniError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed(directory))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed(directory))?.file_name();
        names.extend(name.into_string().ok().filter(|name| !name.starts_with('.')));
    }
    Ok(names)
}
