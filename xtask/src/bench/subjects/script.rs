//! Any other node proxy: a script sets it up and takes it down. docs/performance.md is the contract.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};

use super::bare::Bare;
use super::{Endpoint, PORTS, Subject, certificates};

/// A peer that was given on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    script: PathBuf,
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, script) = text.split_once('=').context("it is not NAME=SCRIPT")?;
        let is_name = |name: &str| {
            (1..=20).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        ensure!(is_name(name), "the name must be 1 to 20 letters, digits and hyphens");
        Ok(Self { name: name.to_owned(), script: script.into() })
    }
}

/// Takes the peer down when it is dropped.
struct Running {
    down: Command,
    bare: Bare,
}

/// What `up` says on its standard output.
#[derive(Debug, PartialEq)]
struct Answer {
    dial: Option<IpAddr>,
    pids: Vec<u32>,
}

impl Peer {
    /// Sets it up.
    pub(crate) fn up(&self) -> Result<Subject> {
        let bare = Bare::new(&format!("bench-{}", self.name))?;
        let directory = bare.lab.directory("peer")?;
        certificates::write(&directory, &["a", "b"])?;
        let far = Endpoint::start(&bare.lab, &bare.far, bare.far.v4())?;
        let mut up = self.command("up", &bare, &directory)?;
        let running = Running { down: self.command("down", &bare, &directory)?, bare };
        let output = up.output().with_context(|| format!("running {}", self.script.display()))?;
        let log = running.bare.lab.logs().join("up.log");
        std::fs::write(&log, &output.stderr)?;
        ensure!(
            output.status.success(),
            "{} up: {}: {}",
            self.script.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let answer = parse(&String::from_utf8_lossy(&output.stdout))?;
        Ok(Subject {
            name: self.name.clone(),
            client: running.bare.client.clone(),
            proxies: answer.pids,
            far: Endpoint { dialled: answer.dial.unwrap_or(far.dialled), ..far },
            near: None,
            _rest: Box::new(running),
        })
    }

    fn command(&self, verb: &str, bare: &Bare, directory: &Path) -> Result<Command> {
        let Bare { nodes: [a, b], client, far, .. } = bare;
        // A relative path is the caller's.
        let script = self.script.canonicalize();
        let script = script.with_context(|| format!("there is no {}", self.script.display()))?;
        let mut command = Command::new(script);
        command.arg(verb).stdin(Stdio::null()).env("BENCH_DIR", directory);
        command.env("BENCH_PORTS", PORTS.map(|port| port.to_string()).join(" "));
        for (variable, netns) in
            [("NODE_A", &**a), ("NODE_B", &**b), ("CLIENT", &**client), ("SERVER", &**far)]
        {
            command.env(format!("BENCH_{variable}_NETNS"), netns.name());
        }
        for (variable, address) in [
            ("NODE_A", a.address()),
            ("NODE_B", b.address()),
            ("NODE_A_TO_PODS", a.address_to_pods()),
            ("NODE_B_TO_PODS", b.address_to_pods()),
            ("CLIENT", client.v4()),
            ("SERVER", far.v4()),
        ] {
            command.env(format!("BENCH_{variable}_ADDRESS"), address.to_string());
        }
        Ok(command)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match self.down.stdout(Stdio::null()).status() {
            Ok(status) if status.success() => {}
            Ok(status) => eprintln!("bench: {:?}: {status}", self.down.get_program()),
            Err(error) => eprintln!("bench: {:?}: {error}", self.down.get_program()),
        }
    }
}

/// Lines `dial=ADDRESS` and `pid=NUMBER`.
fn parse(output: &str) -> Result<Answer> {
    let mut answer = Answer { dial: None, pids: Vec::new() };
    for line in output.lines().filter(|line| !line.trim().is_empty()) {
        match line.trim().split_once('=') {
            Some(("dial", address)) => {
                answer.dial = Some(address.parse().context(line.to_owned())?)
            }
            Some(("pid", pid)) => answer.pids.push(pid.parse().context(line.to_owned())?),
            Some(_) | None => bail!("the script says {line:?}: only dial= and pid= mean something"),
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_script_says() {
        let answer = Answer { dial: Some("10.77.1.1".parse().unwrap()), pids: vec![17, 4] };
        assert_eq!(parse("dial=10.77.1.1\npid=17\n\npid=4\n").unwrap(), answer);
        assert_eq!(parse("").unwrap(), Answer { dial: None, pids: vec![] });
        for wrong in ["started", "dial=localhost", "pid=", "port=1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_the_command_line_says() {
        assert_eq!("some-proxy=./up.sh".parse::<Peer>().unwrap().name, "some-proxy");
        for wrong in ["up.sh", "=up.sh", "a b=up.sh", "../x=up.sh"] {
            assert!(wrong.parse::<Peer>().is_err(), "{wrong}");
        }
    }
}
