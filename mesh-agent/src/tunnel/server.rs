//! The server's side of an idle tunnel: the next connection, a refusal, a farewell.

use std::{io, pin::Pin};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

use super::{
    app::AppSocket,
    frame::{Decoded, Decoder, Frame, Header, Malformed, Refusal},
    relay::{Relay, Traffic, Transport},
};

/// Why an idle tunnel cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The connection under it failed.
    #[error("the tunnel broke off: {0}")]
    Io(#[from] io::Error),
    /// The client does not keep to the protocol.
    #[error("the client's agent does not speak nodemesh/1: {0}")]
    Protocol(#[from] Malformed),
}

/// Waits on an idle tunnel for the client's next connection; `None` when the client has closed the
/// tunnel, as it may between two connections.
///
/// It may be cancelled, to [`go_away`] and then wait again. Cancelled when half of an OPEN has
/// arrived, the next call does not recognize the other half, and that connection is lost.
///
/// # Errors
/// [`TunnelError`]: drop the tunnel.
pub async fn next_open<T: Transport>(tunnel: &mut T) -> Result<Option<Header>, TunnelError> {
    let mut decoder = Decoder::default();
    loop {
        let input = match tunnel.fill_buf().await {
            Ok([]) => None,
            // Between connections nothing can be cut short: an end without close_notify is one.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Ok(input) => Some(input),
            Err(error) => return Err(error.into()),
        };
        let Some(input) = input else {
            let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
            return if decoder.at_boundary() { Ok(None) } else { Err(cut.into()) };
        };
        match decoder.decode(input)? {
            Decoded::Partial(used) => Pin::new(&mut *tunnel).consume(used),
            Decoded::Frame(used, Frame::Open(header)) => {
                Pin::new(&mut *tunnel).consume(used);
                return Ok(Some(header));
            }
            Decoded::Frame(_, frame) => return Err(Malformed::unexpected(&frame).into()),
            Decoded::Payload(_) => unreachable!("no DATA frame has been accepted"),
        }
    }
}

/// Refuses the connection whose header was just read, and discards what the client has sent for
/// it. Returns whether the tunnel is idle again; if not, drop it.
pub async fn refuse<T: Transport>(tunnel: &mut T, refusal: Refusal) -> bool {
    let traffic = Traffic::default();
    Relay::<AppSocket, T>::refused(tunnel, refusal, &traffic).run().await.reusable
}

/// Tells the client of an idle tunnel to open no more connections on it. One whose OPEN crosses
/// this frame may still come and is served like any other; then the client closes the tunnel.
/// Once per tunnel.
///
/// # Errors
/// What writing to the tunnel says: drop it.
pub async fn go_away<T: Transport>(tunnel: &mut T) -> io::Result<()> {
    let mut frame = Vec::new();
    Frame::GoAway.encode(&mut frame);
    tunnel.write_all(&frame).await?;
    tunnel.flush().await
}
