//! Pod files: reading all of a directory, writing one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use mesh_common::spiffe::check_segment;
use serde::{Deserialize, Serialize};

use super::super::PodSpec;
use crate::config::{Udp, parse_yaml};

/// Far more than a pod file needs.
const MAX_BYTES: u64 = 64 << 10;

const SUFFIX: &str = ".yaml";

/// The content of a pod file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PodFile {
    pub(super) uid: String,
    pub(super) netns: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) udp: Option<Udp>,
}

impl PodFile {
    /// Checks the content.
    pub(super) fn check(&self, default_udp: Udp) -> Result<PodSpec, String> {
        let Self { uid, netns, udp } = self;
        check_segment(uid).map_err(|error| format!("uid: {error}"))?;
        if !netns.is_absolute() {
            return Err(format!("netns: {} is not an absolute path", netns.display()));
        }
        if uid.starts_with('.') {
            return Err(format!("uid: {uid:?} begins with a dot"));
        }
        Ok(PodSpec { uid: uid.clone(), netns: netns.clone(), udp: udp.unwrap_or(default_udp) })
    }
}

/// What is known of one pod file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FileState {
    /// Its last valid content.
    pub(super) spec: Option<PodSpec>,
    /// Why its present content is not used.
    pub(super) problem: Option<String>,
}

/// Every pod file by name.
pub(super) type Files = BTreeMap<String, FileState>;

/// What each pod file of the directory holds at present.
pub(super) type Contents = BTreeMap<String, Result<PodSpec, String>>;

/// Takes in what a directory holds now: an invalid file keeps the pod it had, and a UID belongs to
/// the file that had it first.
pub(super) fn update(before: &Files, now: Contents) -> Files {
    let keeps_its_uid = |(name, found): &(String, Result<PodSpec, String>)| {
        let old = before.get(name).and_then(|file| file.spec.as_ref());
        found.as_ref().map_or(true, |new| old.is_some_and(|old| old.uid == new.uid))
    };
    let (incumbents, newcomers): (Vec<_>, Vec<_>) = now.into_iter().partition(keeps_its_uid);

    let mut files = Files::new();
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    for (name, found) in incumbents.into_iter().chain(newcomers) {
        let usable = found.and_then(|spec| match owners.get(&spec.uid) {
            None => Ok(spec),
            Some(owner) => Err(format!("{owner} already declares the pod {}", spec.uid)),
        });
        let file = match usable {
            Ok(spec) => FileState { spec: Some(spec), problem: None },
            Err(problem) => {
                let old = before.get(&name).and_then(|file| file.spec.clone());
                let spec = old.filter(|spec| !owners.contains_key(&spec.uid));
                FileState { spec, problem: Some(problem) }
            }
        };
        if let Some(spec) = &file.spec {
            owners.insert(spec.uid.clone(), name.clone());
        }
        files.insert(name, file);
    }
    files
}

/// Whether a file of this name is a pod file. Names that begin with a dot are left alone.
pub(super) fn is_pod_file(name: &str) -> bool {
    name.ends_with(SUFFIX) && !name.starts_with('.')
}

/// The names of all pod files.
pub(super) fn names(directory: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        names.extend(entry?.file_name().into_string().ok().filter(|name| is_pod_file(name)));
    }
    Ok(names)
}

/// Reads a pod file; `None` if there is none.
pub(super) fn load(path: &Path, default_udp: Udp) -> Option<Result<PodSpec, String>> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(error.to_string())),
        Ok(text) => {
            let file = parse_yaml::<PodFile>(&text).map_err(|error| error.to_string());
            Some(file.and_then(|file| file.check(default_udp)))
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    // Opening a FIFO would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("it is larger than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

/// The name of the file that [`write`] makes for a pod.
pub(super) fn name_for(uid: &str) -> String {
    format!("{uid}{SUFFIX}")
}

/// Writes a pod file as a whole or not at all.
pub(super) fn write(path: &Path, file: &PodFile) -> io::Result<()> {
    let text = serde_saphyr::to_string(file).map_err(io::Error::other)?;
    let mut temporary = tempfile::Builder::new()
        .prefix(".unfinished-")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(path.parent().unwrap_or(path))?;
    temporary.write_all(text.as_bytes())?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(uid: &str) -> PodSpec {
        PodSpec { uid: uid.to_owned(), netns: "/a".into(), udp: Udp::Allow }
    }

    /// Files by name, each with its UID or a problem.
    fn found(files: &[(&str, Option<&str>)]) -> Contents {
        files
            .iter()
            .map(|(name, uid)| ((*name).to_owned(), uid.map(spec).ok_or("broken".to_owned())))
            .collect()
    }

    /// Which UID each file ends up with, and whether something is wrong with the file.
    fn outcome(files: &Files) -> Vec<(&str, Option<&str>, bool)> {
        files
            .iter()
            .map(|(name, file)| {
                let uid = file.spec.as_ref().map(|spec| spec.uid.as_str());
                (name.as_str(), uid, file.problem.is_some())
            })
            .collect()
    }

    #[test]
    fn a_broken_file_keeps_its_pod_and_a_removed_one_does_not() {
        let before = update(&Files::new(), found(&[("a", Some("1")), ("b", Some("2"))]));
        let after = update(&before, found(&[("a", None)]));
        assert_eq!(outcome(&after), [("a", Some("1"), true)]);
    }

    #[test]
    fn a_uid_belongs_to_the_file_that_had_it_first() {
        let before = update(&Files::new(), found(&[("b", Some("1"))]));
        let after = update(&before, found(&[("a", Some("1")), ("b", Some("1"))]));
        assert_eq!(outcome(&after), [("a", None, true), ("b", Some("1"), false)]);
        let broken = update(&before, found(&[("a", Some("1")), ("b", None)]));
        assert_eq!(outcome(&broken), [("a", None, true), ("b", Some("1"), true)]);
        let at_start = update(&Files::new(), found(&[("a", Some("1")), ("b", Some("1"))]));
        assert_eq!(outcome(&at_start), [("a", Some("1"), false), ("b", None, true)]);
        let freed = update(&after, found(&[("a", Some("1"))]));
        assert_eq!(outcome(&freed), [("a", Some("1"), false)]);
    }

    #[test]
    fn a_file_that_wants_what_it_cannot_have_does_not_keep_what_another_took() {
        let before = update(&Files::new(), found(&[("b", Some("1")), ("c", Some("2"))]));
        let after = update(&before, found(&[("a", Some("1")), ("b", Some("2")), ("c", Some("2"))]));
        assert_eq!(
            outcome(&after),
            [("a", Some("1"), false), ("b", None, true), ("c", Some("2"), false)]
        );
    }
}
