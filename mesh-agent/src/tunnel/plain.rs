//! The same relay without a tunnel: for plaintext that policy allows, and within the node.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use super::{
    app::App,
    pump::{Framing, Pump, PumpError, Window},
    relay::{End, Traffic},
};

/// Carries a connection between two sockets, to its end: [`End::Finished`], [`End::ClientReset`] or
/// [`End::ServerReset`]. Dropping the future resets both. Its bytes count in all of `traffic`.
pub async fn relay_plain<C: App, S: App>(
    mut client: C,
    mut server: S,
    traffic: &[&Traffic],
) -> End {
    let (mut up, mut down) = (Half::default(), Half::default());
    let end = poll_fn(|cx| {
        let sent = up.poll(cx, &mut client, &mut server);
        let received = down.poll(cx, &mut server, &mut client);
        for traffic in traffic {
            traffic.set(up.pump.moved(), down.pump.moved());
        }
        match (sent, received) {
            (Poll::Ready(Err(PumpError::Source)), _)
            | (_, Poll::Ready(Err(PumpError::Sink(_)))) => Poll::Ready(End::ClientReset),
            (Poll::Ready(Err(PumpError::Sink(_))), _)
            | (_, Poll::Ready(Err(PumpError::Source))) => Poll::Ready(End::ServerReset),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Finished),
            (Poll::Pending, _) | (_, Poll::Pending) => Poll::Pending,
        }
    })
    .await;
    if matches!(end, End::Finished) {
        client.finish();
        server.finish();
    }
    end
}

/// One direction, to the shutdown of its sink.
struct Half {
    pump: Pump,
    shut: bool,
}

impl Default for Half {
    fn default() -> Self {
        Self { pump: Pump::new(Framing::Raw), shut: false }
    }
}

impl Half {
    fn poll<R: App, W: App>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
    ) -> Poll<Result<(), PumpError>> {
        if !self.shut {
            ready!(self.pump.poll(cx, Some(source), sink, Window::Open))?;
            // An error means that the connection is gone, and then there is nothing to tell it.
            let _gone = ready!(Pin::new(sink).poll_shutdown(cx));
            self.shut = true;
        }
        Poll::Ready(Ok(()))
    }
}
