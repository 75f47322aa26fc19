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
    canary: Canary,
    stop: AtomicBool,
    succeeded: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
    _echo: Server,
}

impl Load {
    /// Starts the server; the client begins with [`Load::during`].
    pub fn new(client: &Pod, server: &Pod, port: u16) -> Result<Self> {
        Ok(Self {
            client: client.clone(),
            addresses: server.sockets(port),
            canary: Canary::random(),
            stop: AtomicBool::new(false),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            first_failure: Mutex::new(None),
            _echo: server.echo(port)?,
        })
    }

    /// What every connection carries.
    pub fn canary(&self) -> &Canary {
        &self.canary
    }

    /// Runs `work` while the client talks.
    pub fn during<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.stop.store(false, Ordering::Relaxed);
        thread::scope(|scope| {
            let _stop = Stop(&self.stop);
            for address in self.addresses {
                scope.spawn(move || {
                    while !self.stop.load(Ordering::Relaxed) {
                        self.count(address);
                    }
                });
            }
            work()
        })
    }

    fn count(&self, address: SocketAddr) {
        let connect = || exchange(self.client.connect(address)?, self.canary.bytes());
        let Err(error) = connect() else {
            self.succeeded.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("to {address}: {error:#}"));
    }

    /// Waits for that many more successes.
    pub fn wait_for_successes(&self, more: u64) -> Result<()> {
        wait("the load to succeed", &self.succeeded, more)
    }

    /// Waits for that many more failures.
    pub fn wait_for_failures(&self, more: u64) -> Result<()> {
        wait("the load to fail", &self.failed, more)
    }

    /// Fails if any connection has failed.
    pub fn expect_no_failures(&self) -> Result<()> {
        let (failed, succeeded) =
            (self.failed.load(Ordering::Relaxed), self.succeeded.load(Ordering::Relaxed));
        let first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.as_deref().unwrap_or_default();
        ensure!(failed == 0, "{failed} connections failed, {succeeded} succeeded; first {first}");
        ensure!(succeeded > 0, "no connection was made at all");
        Ok(())
    }
}

/// Also when the work panics: the scope waits for its threads before the panic goes on.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn wait(what: &str, counter: &AtomicU64, more: u64) -> Result<()> {
    let goal = counter.load(Ordering::Relaxed) + more;
    until(what, || (counter.load(Ordering::Relaxed) >= goal).then_some(()))
}
