//! How much a connection may hold.

use std::{
    io::{self, IoSliceMut},
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, BufStream,
        DuplexStream, ReadBuf,
    },
    net::TcpStream,
};

use super::{
    super::{App, AppSocket, Role, Traffic, frame::MAX_FRAME, relay, relay_plain},
    lab::{header, hear, say, tcp_pair, within},
};
use crate::tls::{Stream, records::tests::in_memory};

/// An application in memory.
pub(super) struct InMemory<S = DuplexStream>(pub(super) S);

impl<S: AsyncRead + AsyncWrite + Unpin> App for InMemory<S> {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(&mut parts[0]);
        Pin::new(&mut self.0).poll_read(cx, &mut buf).map_ok(|()| buf.filled().len())
    }

    fn finish(self) {}
}

impl<S: AsyncWrite + Unpin> AsyncWrite for InMemory<S> {
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
    fn poll_read(
        &mut self,
        _: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()))
    }

    fn finish(self) {}
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
    let (_near, mut far) = in_memory(PIPE);
    let traffic = Traffic::default();
    let relay = std::pin::pin!(relay(Endless, &mut far, Role::Server, &traffic));
    poll_until_stuck(relay, || traffic.from_server());
    let held = traffic.from_server();
    // One batch of ours, which is kept encrypted. The lower bound is the twin: it did read.
    assert!(held >= MAX_FRAME as u64, "{held} bytes");
    assert!(held <= 128 * 1024, "{held} bytes taken from an application whose peer reads none");
}

#[tokio::test]
async fn what_an_agent_takes_for_an_application_that_is_stuck_is_bounded() {
    let (mut near, mut far) = in_memory(PIPE);
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
async fn what_a_relay_without_a_tunnel_takes_is_bounded() {
    let traffic = Traffic::default();
    let counted = [&traffic];
    let mut relay = std::pin::pin!(relay_plain(Endless, Endless, &counted));
    for _ in 0..100 {
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(relay.as_mut().poll(cx).is_pending());
    }
    for held in [traffic.from_client(), traffic.from_server()] {
        assert!((MAX_FRAME as u64..=64 * 1024).contains(&held), "{held} bytes");
    }
}

/// An application, or another agent, and a sink that keeps what it is given until it is flushed.
fn hoarding() -> (DuplexStream, BufStream<DuplexStream>) {
    let (near, far) = tokio::io::duplex(1 << 10);
    (near, BufStream::new(far))
}

#[tokio::test]
async fn what_sinks_hold_back_is_let_go_when_nothing_follows() {
    let (mut application, app) = hoarding();
    let (mut far, mut tunnel) = hoarding();
    let traffic = Traffic::default();
    let relay = relay(InMemory(app), &mut tunnel, Role::Server, &traffic);
    let talk = async {
        say(&mut application, b"answer").await;
        hear(&mut far, b"\x02\0\x01\0\x03\0\x06answer").await;
        say(&mut far, b"\x03\0\x08question").await;
        hear(&mut application, b"question").await;
    };
    tokio::select! {
        outcome = relay => panic!("{outcome:?}", outcome = outcome.end),
        () = talk => {}
    }
}

#[tokio::test]
async fn without_a_tunnel_as_well() {
    let (mut client, client_side) = hoarding();
    let (mut server, server_side) = hoarding();
    let traffic = Traffic::default();
    let counted = [&traffic];
    let relay = relay_plain(InMemory(client_side), InMemory(server_side), &counted);
    let talk = async {
        say(&mut client, b"question").await;
        hear(&mut server, b"question").await;
        say(&mut server, b"answer").await;
        hear(&mut client, b"answer").await;
    };
    tokio::select! {
        end = relay => panic!("{end:?}"),
        () = talk => {}
    }
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
        say(&mut lively.client, b"ping").await;
        hear(&mut lively.server, b"ping").await;
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
