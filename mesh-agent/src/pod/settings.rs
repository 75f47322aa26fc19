//! The settings of a pod's network namespace that matter to the agent, held open.
//!
//! Below `/proc/sys/net` the directories of all namespaces have the same name in the same directory,
//! and the kernel finds one by looking at all of them: a path takes time that grows with the pods. An
//! open file belongs to the namespace in which it was opened, whoever reads it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{netns::Netns, routing::RoutingError};

/// What the capture needs, as files of these directories: accepted sockets inherit the mark of their
/// SYN, and the kernel's own resets carry the mark of what they answer. Since 3.15.
const NEEDED: [(&str, &[&str]); 2] = [
    ("/proc/sys/net/ipv4", &["tcp_fwmark_accept", "fwmark_reflect", PORT_RANGE]),
    ("/proc/sys/net/ipv6", &["fwmark_reflect"]),
];

/// The ports that the kernel chooses from. This one is only looked at.
const PORT_RANGE: &str = "ip_local_port_range";

/// What the capture's settings have to be, and what they are without it.
const WANTED: &str = "1";
const DEFAULT: &str = "0";

/// More than any of them is long.
const LONGEST: usize = 64;

/// The settings of one namespace.
#[derive(Debug)]
pub struct Settings {
    capture: Vec<Setting>,
    port_range: Option<Setting>,
}

#[derive(Debug)]
struct Setting {
    path: String,
    file: File,
}

impl Settings {
    /// Opens them.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or a setting cannot be opened for any other reason than
    /// that it is not there: a kernel may be without IPv6.
    pub fn open(netns: &Netns) -> Result<Self, RoutingError> {
        netns.try_run(Self::open_here).map_err(RoutingError::Netns)?
    }

    fn open_here() -> Result<Self, RoutingError> {
        let mut settings = Self { capture: Vec::new(), port_range: None };
        for (directory, names) in NEEDED {
            let failed = |source| RoutingError::Setting { path: directory.to_owned(), source };
            let Some(opened) = found(open_directory(directory)).map_err(failed)? else { continue };
            for name in names {
                let path = format!("{directory}/{name}");
                match found(open_below(&opened, name)) {
                    Ok(None) => {}
                    Ok(Some(file)) if *name == PORT_RANGE => {
                        settings.port_range = Some(Setting { path, file });
                    }
                    Ok(Some(file)) => settings.capture.push(Setting { path, file }),
                    Err(source) => return Err(RoutingError::Setting { path, source }),
                }
            }
        }
        Ok(settings)
    }

    /// Makes the capture's settings what they have to be; tells how many were not.
    ///
    /// # Errors
    ///
    /// When one can be neither read nor written.
    pub fn ensure(&self) -> Result<u32, RoutingError> {
        let mut changed = 0;
        for setting in &self.capture {
            if setting.read()? != WANTED {
                setting.write(WANTED)?;
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// Whether the capture's settings are what they have to be. Those that cannot be read are not.
    pub fn hold(&self) -> bool {
        self.capture.iter().all(|setting| setting.read().is_ok_and(|found| found == WANTED))
    }

    /// Puts the capture's settings back to the kernel's defaults.
    ///
    /// # Errors
    ///
    /// When one cannot be written.
    pub fn reset(&self) -> Result<(), RoutingError> {
        self.capture.iter().try_for_each(|setting| setting.write(DEFAULT))
    }

    /// `net.ipv4.ip_local_port_range`; empty if it cannot be read.
    pub fn port_range(&self) -> String {
        self.port_range.as_ref().and_then(|range| range.read().ok()).unwrap_or_default()
    }
}

impl Setting {
    fn read(&self) -> Result<String, RoutingError> {
        let mut bytes = [0; LONGEST];
        let length = self.file.read_at(&mut bytes, 0).map_err(|error| self.failed(error))?;
        Ok(String::from_utf8_lossy(&bytes[..length]).trim().to_owned())
    }

    fn write(&self, value: &str) -> Result<(), RoutingError> {
        self.file.write_all_at(value.as_bytes(), 0).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> RoutingError {
        RoutingError::Setting { path: self.path.clone(), source }
    }
}

fn open_directory(path: impl AsRef<Path>) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

fn open_below(directory: &File, name: &str) -> io::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?.into())
}

fn found(opened: io::Result<File>) -> io::Result<Option<File>> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn settings_are_those_of_the_namespace_in_which_they_were_opened() {
        const REFLECT: &str = "/proc/sys/net/ipv4/fwmark_reflect";
        let before = fs::read_to_string(REFLECT).unwrap();
        // In a namespace of its own: the machine's settings are not this test's to change.
        let in_new = || {
            thread::spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                Settings::open_here().unwrap()
            })
            .join()
            .unwrap()
        };
        let (one, other) = (in_new(), in_new());
        assert!(!one.hold());
        assert_eq!(one.ensure().unwrap(), 3);
        assert_eq!(one.ensure().unwrap(), 0);
        assert!(one.hold() && !other.hold());
        one.reset().unwrap();
        assert!(!one.hold());
        assert_eq!(one.port_range(), other.port_range());
        assert_eq!(fs::read_to_string(REFLECT).unwrap(), before);
    }
}
