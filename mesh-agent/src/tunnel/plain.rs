//! The same relay without a tunnel, for plaintext that policy allows.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use super::{
    app::App,
    pump::{Framing, Pump, PumpError, Window},
    relay::{End, Traffic},
};

/// Carries a connection between two sockets, to its end: [`End::Finished`], [`End::ClientReset`] or
/// [`End::ServerReset`]. Dropping the future resets both.
pub async fn relay_plain<C: App, S: App>(mut client: C, mut server: S, traffic: &Traffic) -> End {
    let mut up = Half::new(&traffic.from_client);
    let mut down = Half::new(&traffic.from_server);
    let end = poll_fn(|cx| {
        let sent = match up.poll(cx, &mut client, &mut server) {
            Poll::Ready(Err(PumpError::Source)) => return Poll::Ready(End::ClientReset),
            Poll::Ready(Err(PumpError::Sink(_))) => return Poll::Ready(End::ServerReset),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let received = match down.poll(cx, &mut server, &mut client) {
            Poll::Ready(Err(PumpError::Source)) => return Poll::Ready(End::ServerReset),
            Poll::Ready(Err(PumpError::Sink(_))) => return Poll::Ready(End::ClientReset),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if sent && received { Poll::Ready(End::Finished) } else { Poll::Pending }
    })
    .await;
    if matches!(end, End::Finished) {
        client.finish();
        server.finish();
    }
    end
}

/// One direction, to the shutdown of its sink.
struct Half<'a> {
    pump: Pump,
    shut: bool,
    moved: &'a AtomicU64,
}

impl<'a> Half<'a> {
    const fn new(moved: &'a AtomicU64) -> Self {
        Self { pump: Pump::new(Framing::Raw), shut: false, moved }
    }

    fn poll<R: App, W: App>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
    ) -> Poll<Result<(), PumpError>> {
        if !self.shut {
            let progress = self.pump.poll(cx, Some(source), sink, Window::Open);
            self.moved.store(self.pump.moved(), Ordering::Relaxed);
            ready!(progress)?;
            // An error means that the connection is gone, and then there is nothing to tell it.
            let _gone = ready!(Pin::new(sink).poll_shutdown(cx));
            self.shut = true;
        }
        Poll::Ready(Ok(()))
    }
}
