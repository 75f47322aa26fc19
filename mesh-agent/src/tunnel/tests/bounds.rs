//! How much a connection may hold.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, DuplexStream,
        ReadBuf,
    },
    net::TcpStream,
};

use super::{
    super::{App, AppSocket, Role, Traffic, frame::MAX_FRAME, relay},
    lab::{header, tcp_pair, tls_configs, within},
};
use crate::tls::Stream;

/// An application in memory.
pub(super) struct InMemory(pub(super) DuplexStream);

impl App for InMemory {
    fn finish(self) {}
}

impl AsyncRead for InMemory {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for InMemory {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A byte stream without an end, and a sink that is full.
struct Endless;

impl App for Endless {
    fn finish(self) {}
}

impl AsyncRead for Endless {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = buf.remaining();
        buf.initialize_unfilled();
        buf.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

/// A TLS connection in memory, over a pipe of `pipe` bytes each way.
async fn tls_in_memory(
    pipe: usize,
) -> (tokio_rustls::client::TlsStream<DuplexStream>, tokio_rustls::server::TlsStream<DuplexStream>)
{
    let (near, far) = tokio::io::duplex(pipe);
    let (client, server) = tls_configs();
    let name = "tunnel.test".try_into().unwrap();
    let (near, far) = tokio::join!(
        tokio_rustls::TlsConnector::from(client).connect(name, near),
        tokio_rustls::TlsAcceptor::from(server).accept(far),
    );
    (near.unwrap(), far.unwrap())
}

/// Polls a future until it has stopped making progress.
fn poll_until_stuck<F: Future>(mut future: Pin<&mut F>, mut progress: impl FnMut() -> u64) {
    let mut seen = None;
    while seen != Some(progress()) {
        seen = Some(progress());
        for _ in 0..8 {
            let cx = &mut Context::from_waker(Waker::noop());
            assert!(future.as_mut().poll(cx).is_pending());
        }
    }
}

const PIPE: usize = 4096;

#[tokio::test]
async fn what_an_agent_takes_for_a_tunnel_that_is_stuck_is_bounded() {
    let (_near, mut far) = tls_in_memory(PIPE).await;
    let traffic = Traffic::default();
    let relay = std::pin::pin!(relay(Endless, &mut far, Role::Server, &traffic));
    poll_until_stuck(relay, || traffic.from_server());
    let held = traffic.from_server();
    // One batch of ours, which rustls holds encrypted. The lower bound is the twin: it did read.
    assert!(held >= MAX_FRAME as u64, "{held} bytes");
    assert!(held <= 128 * 1024, "{held} bytes taken from an application whose peer reads none");
}

#[tokio::test]
async fn what_an_agent_takes_for_an_application_that_is_stuck_is_bounded() {
    let (mut near, mut far) = tls_in_memory(PIPE).await;
    let traffic = Traffic::default();
    let (mut sent, frame) = (0_u64, [&[3, 0x10, 0][..], &[0; 4096]].concat());
    {
        let mut relay = std::pin::pin!(relay(Endless, &mut far, Role::Server, &traffic));
        let mut idle = 0;
        while idle < 100 {
            let cx = &mut Context::from_waker(Waker::noop());
            match Pin::new(&mut near).poll_write(cx, &frame) {
                Poll::Ready(n) => {
                    sent += n.unwrap() as u64;
                    idle = 0;
                }
                Poll::Pending => idle += 1,
            }
            assert!(Pin::new(&mut near).poll_flush(cx).is_pending() || idle == 0);
            // The other direction must not be what stops it.
            let mut waste = [0; 8192];
            let mut waste = ReadBuf::new(&mut waste);
            let _pending = Pin::new(&mut near).poll_read(cx, &mut waste);
            assert!(relay.as_mut().poll(cx).is_pending());
        }
    }
    assert_eq!(traffic.from_client(), 0, "the application has taken nothing");
    // The sender's 64 KiB of ciphertext, the pipe, and at most two records at the receiver.
    assert!(sent >= 4096, "{sent} bytes");
    assert!(sent <= 64 * 1024 + 3 * MAX_FRAME as u64, "{sent} bytes sent into a stuck connection");
}

#[tokio::test]
async fn a_stuck_connection_does_not_stop_the_one_beside_it() {
    let mut stuck = super::lab::Connection::new().await;
    let flood = vec![0; 64 << 20];
    let mut flooding = tokio::spawn(async move {
        let result = stuck.client.write_all(&flood).await;
        (result, stuck)
    });
    let mut lively = super::lab::Connection::new().await;
    for _ in 0..100 {
        super::lab::say(&mut lively.client, b"ping").await;
        super::lab::hear(&mut lively.server, b"ping").await;
    }
    // Backpressure reached the writer: kernel buffers end somewhere below 64 MiB.
    let writer =
        std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut flooding).poll(cx).is_ready()));
    assert!(!writer.await, "an application could write 64 MiB that nobody reads");
    flooding.abort();
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    let (_application, app) = tcp_pair().await;
    let app = AppSocket::new(app).unwrap();
    let (near, _far) = tcp_pair().await;
    let mut tunnel = BufReader::new(near);
    let traffic = Traffic::default();
    let idle = relay::<AppSocket, BufReader<TcpStream>>(app, &mut tunnel, Role::Server, &traffic);
    let size = size_of_val(&idle);
    assert!(size <= 1024, "the relay's future takes {size} bytes");
    assert!(size_of::<Stream>() <= 4096);
}

#[tokio::test]
async fn a_bulk_stream_lets_others_run() {
    let (near, far) = tokio::io::duplex(1 << 30);
    let mut near = BufReader::new(near);
    let traffic = Traffic::default();
    let mut relay = std::pin::pin!(relay(Endless, &mut near, Role::Server, &traffic));
    let cx = &mut Context::from_waker(Waker::noop());
    assert!(relay.as_mut().poll(cx).is_pending());
    let once = traffic.from_server();
    assert!(once > 0 && once <= 1 << 20, "{once} bytes in one turn");
    drop(far);
}

#[tokio::test]
async fn a_full_frame_is_one_full_record() {
    let (near, far) = tokio::io::duplex(1 << 20);
    let mut near = BufReader::new(near);
    let mut far = far;
    let traffic = Traffic::default();
    let mut relay = std::pin::pin!(relay(Endless, &mut near, Role::Client(header()), &traffic));
    let cx = &mut Context::from_waker(Waker::noop());
    assert!(relay.as_mut().poll(cx).is_pending());
    let mut bytes = vec![0; 3 + 23 + 3];
    within("the preface", far.read_exact(&mut bytes)).await.unwrap();
    let [.., kind, hi, lo] = bytes[..] else { unreachable!("it is longer") };
    assert_eq!((kind, usize::from(u16::from_be_bytes([hi, lo])) + 3), (3, MAX_FRAME));
}
