//! The directory of network configurations: which one the runtime uses, and the plugin in it.
//!
//! Container runtimes use the first file by name. What it was before is kept beside the plugin's
//! other state, so that it can be given back byte by byte.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    super::{PLUGIN_NAME, durable},
    InstallError, failed,
    network::Network,
};

/// What runtimes take for a network configuration.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// The two directories.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) networks: PathBuf,
    pub(super) originals: PathBuf,
}

impl Files {
    /// Puts the plugin into the network that the runtime uses, and into no other. Returns its
    /// file if that has changed anything.
    pub(super) fn add(&self, entry: &Value) -> Result<Option<PathBuf>, InstallError> {
        let names = self.names()?;
        let first = names.first().ok_or_else(|| InstallError::NoNetwork(self.networks.clone()))?;
        // Beside a list of ours, a lone plugin of the same name is its owner's latest word.
        let lone = |name: &&String| listed(name) == listed(first) && **name != listed(first);
        let name = names.iter().find(lone).unwrap_or(first);
        let path = self.networks.join(name);
        let text = fs::read(&path).map_err(failed(&path))?;
        let found = parse(&path, &text)?;
        let target = self.networks.join(listed(name));
        let wanted = found.with_plugin(entry);
        let changed = found != wanted || path != target;
        if changed {
            self.check_free(&path, &target)?;
            if !found.has_plugin() {
                self.keep(name, &text)?;
            }
            write(&target, wanted.to_text().as_bytes(), mode(&path)?)?;
            if path != target {
                remove(&path)?;
            }
        }
        for other in names.iter().filter(|other| listed(other) != listed(name)) {
            self.restore(other)?;
        }
        Ok(changed.then_some(target))
    }

    /// The network that the runtime uses, if the plugin can be added to it.
    pub(super) fn first(&self) -> Result<PathBuf, InstallError> {
        let names = self.names()?;
        let first = names.first().ok_or_else(|| InstallError::NoNetwork(self.networks.clone()))?;
        let path = self.networks.join(first);
        parse(&path, &fs::read(&path).map_err(failed(&path))?)?;
        Ok(path)
    }

    /// Takes the plugin out of every network.
    pub(super) fn remove(&self) -> Result<(), InstallError> {
        self.names()?.iter().try_for_each(|name| self.restore(name))?;
        // Or where this program does not look for it: inside another plugin's entry, in a file
        // that does not parse. A runtime that finds the name and no binary starts no pod.
        for name in self.names()? {
            let path = self.networks.join(name);
            let text = fs::read(&path).map_err(failed(&path))?;
            if text.windows(PLUGIN_NAME.len()).any(|part| part == PLUGIN_NAME.as_bytes()) {
                return Err(InstallError::StillNamed(path));
            }
        }
        Ok(())
    }

    /// The runtime's candidates, in its order.
    fn names(&self) -> Result<Vec<String>, InstallError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.networks).map_err(failed(&self.networks))? {
            let entry = entry.map_err(failed(&self.networks))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let extension = Path::new(&name).extension().and_then(|extension| extension.to_str());
            let named = extension.is_some_and(|extension| EXTENSIONS.contains(&extension));
            if named && !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// A list that is to take a lone plugin's place must not take another network's.
    fn check_free(&self, path: &Path, target: &Path) -> Result<(), InstallError> {
        if path == target {
            return Ok(());
        }
        match fs::read(target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed(target)(error)),
            Ok(text) if parse(target, &text)?.has_plugin() => Ok(()),
            Ok(_) => Err(InstallError::Ambiguous(path.to_owned(), target.to_owned())),
        }
    }

    /// Keeps what a network was before.
    fn keep(&self, name: &str, text: &[u8]) -> Result<(), InstallError> {
        fs::create_dir_all(&self.originals).map_err(failed(&self.originals))?;
        let path = self.originals.join(name);
        // It may have secrets, and nobody but root needs it here.
        write(&path, text, 0o600)?;
        self.forget(name, Some(name))
    }

    /// Forgets what a network was before, under any extension but that of `but`.
    fn forget(&self, name: &str, but: Option<&str>) -> Result<(), InstallError> {
        let mut others = namesakes(name).filter(|other| Some(other.as_str()) != but);
        others.try_for_each(|other| remove(&self.originals.join(other)))
    }

    /// Takes the plugin out of one network: gives the original back if nothing else was changed.
    fn restore(&self, name: &str) -> Result<(), InstallError> {
        let path = self.networks.join(name);
        let text = fs::read(&path).map_err(failed(&path))?;
        // What does not parse is not what `add` wrote.
        let Ok(found) = Network::parse(&text) else { return Ok(()) };
        if !found.has_plugin() {
            return Ok(());
        }
        let remaining = found.without_plugin();
        let original = namesakes(name).find_map(|original| {
            let text = fs::read(self.originals.join(&original)).ok()?;
            Network::parse(&text).is_ok_and(|was| was == remaining).then_some((original, text))
        });
        let (original, text) =
            original.unwrap_or_else(|| (name.to_owned(), remaining.to_text().into_bytes()));
        write(&self.networks.join(&original), &text, mode(&path)?)?;
        if original != name {
            remove(&path)?;
        }
        self.forget(name, None)
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<Network, InstallError> {
    Network::parse(text).map_err(|source| InstallError::Network { path: path.to_owned(), source })
}

/// The name of the list that has what a file has.
fn listed(name: &str) -> String {
    Path::new(name).with_extension("conflist").to_string_lossy().into_owned()
}

/// What a network's file can have been called before it became a list.
fn namesakes(name: &str) -> impl Iterator<Item = String> {
    EXTENSIONS.map(|e| Path::new(name).with_extension(e).to_string_lossy().into_owned()).into_iter()
}

fn mode(path: &Path) -> Result<u32, InstallError> {
    Ok(fs::metadata(path).map_err(failed(path))?.permissions().mode() & 0o7777)
}

fn write(path: &Path, text: &[u8], mode: u32) -> Result<(), InstallError> {
    durable::write(path, mode, text).map_err(failed(path))
}

fn remove(path: &Path) -> Result<(), InstallError> {
    durable::remove(path).map(drop).map_err(failed(path))
}
