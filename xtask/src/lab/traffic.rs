//! Clients and servers inside pods, without any program: sockets made by a thread of ours that
//! entered the pod.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::SockRef;

use super::{Netns, patience, until};

/// A server in a namespace: a thread per connection. Dropping it closes its listener.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
    acceptor: Option<JoinHandle<()>>,
}

impl Netns {
    /// Listens on a port of every address, IPv4 too.
    pub fn listen(&self, port: u16) -> Result<TcpListener> {
        self.run(|| when_free(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))))
            .with_context(|| format!("listening on port {port} in {}", self.name()))
    }

    /// Connects, and gives up on anything that takes longer than [`patience`].
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = self.run(|| TcpStream::connect_timeout(&to, patience()))?;
        patient(&stream)?;
        Ok(stream)
    }

    /// Serves connections to a port with `handler`, which gets a patient stream.
    pub fn serve(
        &self,
        port: u16,
        handler: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> Result<Server> {
        let listener = Arc::new(self.listen(port)?);
        let handler = Arc::new(handler);
        let accepting = Arc::clone(&listener);
        let acceptor = thread::spawn(move || {
            // Ends when the listener is shut down.
            while let Ok((stream, _)) = accepting.accept() {
                let handler = Arc::clone(&handler);
                thread::spawn(move || {
                    if patient(&stream).is_ok() {
                        handler(stream);
                    }
                });
            }
        });
        Ok(Server { listener, acceptor: Some(acceptor) })
    }

    /// Sends back what comes, and ends when the client does.
    pub fn echo(&self, port: u16) -> Result<Server> {
        self.serve(port, |stream| {
            // A connection that breaks is the client's business to notice.
            io::copy(&mut &stream, &mut &stream).ok();
            stream.shutdown(Shutdown::Write).ok();
        })
    }
}

/// Binds a socket, again and again while the address is in use: a child that another thread is just
/// starting holds a copy of whatever was closed here, until it has become its program.
pub fn when_free<T>(mut bind: impl FnMut() -> io::Result<T>) -> Result<T> {
    until("the address to be free", || match bind() {
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        result => Some(result),
    })?
    .map_err(Into::into)
}

impl Drop for Server {
    fn drop(&mut self) {
        SockRef::from(&*self.listener).shutdown(Shutdown::Both).ok();
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
    }
}

/// Sends `bytes` to an echo server, ends, and checks that they all come back and nothing else.
pub fn exchange(mut stream: TcpStream, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).context("sending to the echo server")?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back).context("reading from the echo server")?;
    ensure!(back == bytes, "sent {} bytes, {} came back", bytes.len(), back.len());
    Ok(())
}

/// Checks that a connection which sends `bytes` is refused, or reset without an answer.
pub fn expect_refusal(from: &Netns, to: SocketAddr, bytes: &[u8]) -> Result<()> {
    let talk = || {
        let mut stream = from.connect(to)?;
        stream.write_all(bytes)?;
        stream.read(&mut [0; 64])
    };
    let error = match talk() {
        Ok(0) => bail!("{to} ended the connection cleanly"),
        Ok(count) => bail!("{to} answered with {count} bytes"),
        Err(error) => error,
    };
    let refused = matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset
    );
    ensure!(refused, "{to} was neither refused nor reset: {error}");
    Ok(())
}

/// Accepts one connection within [`patience`].
pub fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    // The receive timeout of a listening socket is that of accept().
    SockRef::from(listener).set_read_timeout(Some(patience()))?;
    let (stream, peer) = listener.accept().context("waiting for a connection")?;
    patient(&stream)?;
    Ok((stream, canonical(peer)))
}

/// An IPv4 address that a dual-stack socket shows as IPv6, as itself.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether this address is one of a dual-stack listener's.
pub fn is_same_host(one: SocketAddr, other: IpAddr) -> bool {
    canonical(one).ip() == other
}

/// Makes the close of this socket a reset.
pub fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO))
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(patience()))?;
    stream.set_write_timeout(Some(patience()))
}
