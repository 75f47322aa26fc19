//! Clients that talk to a server over new connections, again and again, and count.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Result, ensure};

use super::traffic::exchange;
use super::{Canary, Pod, Server, until};

/// A client and an echo server, over each address family.
#[derive(Debug)]
pub struct Load {
    client: Pod,
    addresses: [SocketAddr; 2],
    canaries: [Canary; 2],
    stop: AtomicBool,
    succeeded: [AtomicU64; 2],
    failed: [AtomicU64; 2],
    first_failure: Mutex<Option<String>>,
    _echo: Server,
}

impl Load {
    /// Starts the server; the client begins with [`Load::during`].
    pub fn new(client: &Pod, server: &Pod, port: u16) -> Result<Self> {
        Ok(Self {
            client: client.clone(),
            addresses: server.sockets(port),
            canaries: [Canary::random(), Canary::random()],
            stop: AtomicBool::new(false),
            succeeded: Default::default(),
            failed: Default::default(),
            first_failure: Mutex::new(None),
            _echo: server.echo(port)?,
        })
    }

    /// What every connection of an address family carries.
    pub fn canaries(&self) -> &[Canary; 2] {
        &self.canaries
    }

    /// Runs `work` while the client talks.
    pub fn during<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.stop.store(false, Ordering::Relaxed);
        thread::scope(|scope| {
            let _stop = Stop(&self.stop);
            for family in [0, 1] {
                scope.spawn(move || {
                    while !self.stop.load(Ordering::Relaxed) {
                        self.count(family);
                    }
                });
            }
            work()
        })
    }

    fn count(&self, family: usize) {
        let (address, canary) = (self.addresses[family], &self.canaries[family]);
        let connect = || exchange(self.client.connect(address)?, canary.bytes());
        let Err(error) = connect() else {
            self.succeeded[family].fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.failed[family].fetch_add(1, Ordering::Relaxed);
        let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("to {address}: {error:#}"));
    }

    /// Waits for that many more successes of each address family.
    pub fn wait_for_successes(&self, more: u64) -> Result<()> {
        wait("the load to succeed", &self.succeeded, more)
    }

    /// Waits for that many more failures of each address family.
    pub fn wait_for_failures(&self, more: u64) -> Result<()> {
        wait("the load to fail", &self.failed, more)
    }

    /// Fails if any connection has failed.
    pub fn expect_no_failures(&self) -> Result<()> {
        let [failed, succeeded] = [&self.failed, &self.succeeded].map(counts);
        let first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.as_deref().unwrap_or_default();
        ensure!(
            failed == [0, 0],
            "IPv4 and IPv6: {failed:?} connections failed, {succeeded:?} succeeded; first {first}"
        );
        ensure!(!succeeded.contains(&0), "no connection was made at all: {succeeded:?}");
        Ok(())
    }
}

/// Sets a flag when it is dropped, also when the work panics: a scope waits for its threads before
/// the panic goes on.
#[derive(Debug)]
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn counts(counters: &[AtomicU64; 2]) -> [u64; 2] {
    counters.each_ref().map(|counter| counter.load(Ordering::Relaxed))
}

fn wait(what: &str, counters: &[AtomicU64; 2], more: u64) -> Result<()> {
    let goals = counts(counters).map(|count| count + more);
    until(what, || {
        let reached = counts(counters).iter().zip(goals).all(|(count, goal)| *count >= goal);
        reached.then_some(())
    })
}
