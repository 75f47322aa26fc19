use std::time::Duration;

use rustls::{
    ExtractedSecrets, client::UnbufferedClientConnection,
    crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
};
use tokio::io::{
    AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex,
};
use tokio_rustls::TlsAcceptor;

use super::{super::handshake::establish, *};
use crate::tunnel::tests::lab::{hear, say, tls_configs, within};

const PIPE: usize = 1 << 20;

/// The n-th key of either direction.
fn secret(n: u8) -> (u64, ConnectionTrafficSecrets) {
    let (key, iv) = (AeadKey::from([n; 32]), Iv::from([0; 12]));
    (0, ConnectionTrafficSecrets::Aes256Gcm { key, iv })
}

struct Numbered {
    sent: u8,
    received: u8,
}

impl Renewal for Numbered {
    fn transmit(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        self.sent += 1;
        Ok(secret(self.sent))
    }

    fn receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        self.received += 1;
        Ok(secret(self.received))
    }
}

fn records<S>(socket: S) -> Records<S> {
    let established = Established {
        suite: TLS13_AES_256_GCM_SHA384,
        secrets: ExtractedSecrets { tx: secret(0), rx: secret(0) },
        renewal: Box::new(Numbered { sent: 0, received: 0 }),
        peer: Peer::default(),
    };
    Records::new(socket, established).unwrap()
}

/// Both ends, and who is between them.
fn pair() -> (Records<DuplexStream>, [DuplexStream; 2], Records<DuplexStream>) {
    let (near, near_wire) = duplex(PIPE);
    let (far_wire, far) = duplex(PIPE);
    (records(near), [near_wire, far_wire], records(far))
}

/// Both ends of a connection over a pipe of so many bytes each way, with nobody between them.
pub(crate) fn in_memory(pipe: usize) -> (Records<DuplexStream>, Records<DuplexStream>) {
    let (near, far) = duplex(pipe);
    (records(near), records(far))
}

/// One record as it goes over the wire.
async fn next_record(wire: &mut DuplexStream) -> Vec<u8> {
    let mut record = vec![0; HEADER];
    within("a record", wire.read_exact(&mut record)).await.unwrap();
    let length = u16::from_be_bytes([record[3], record[4]]);
    record.resize(HEADER + usize::from(length), 0);
    within("a record", wire.read_exact(&mut record[HEADER..])).await.unwrap();
    record
}

/// What the far end makes of these bytes.
async fn made_of(bytes: &[u8]) -> TlsError {
    let (_near, [_, mut wire], mut far) = pair();
    wire.write_all(bytes).await.unwrap();
    tls_error(within("an error", far.fill_buf()).await.unwrap_err())
}

fn tls_error(error: io::Error) -> TlsError {
    error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()).unwrap().clone()
}

/// Sends one record of any kind.
async fn send(end: &mut Records<DuplexStream>, kind: ContentType, text: &[u8]) {
    end.seal(kind, text).unwrap();
    end.flush().await.unwrap();
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect()
}

#[tokio::test]
async fn rustls_understands_every_byte_and_is_understood() {
    let (client, server) = tls_configs();
    let (mut near, far) = duplex(PIPE);
    let session = UnbufferedClientConnection::new(client, "tunnel.test".try_into().unwrap());
    let (established, far) =
        tokio::join!(establish(session.unwrap(), &mut near), TlsAcceptor::from(server).accept(far));
    let (mut near, mut far) = (Records::new(near, established.unwrap()).unwrap(), far.unwrap());
    for length in [1, 17, MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 5 * MAX_TEXT] {
        let sent = bytes(length);
        say(&mut near, &sent).await;
        hear(&mut far, &sent).await;
        say(&mut far, &sent).await;
        hear(&mut near, &sent).await;
    }
    // New keys, which either side asks for.
    near.sealer.limit = 0;
    say(&mut near, b"mine is new").await;
    hear(&mut far, b"mine is new").await;
    assert!(!near.sealer.is_worn());
    far.get_mut().1.refresh_traffic_keys().unwrap();
    say(&mut far, b"yours as well").await;
    hear(&mut near, b"yours as well").await;
    assert_eq!(near.opener.sequence, 1);
    assert!(near.asked);
    say(&mut near, b"done").await;
    assert!(!near.asked);
    assert_eq!(near.sealer.sequence, 1);
    hear(&mut far, b"done").await;
    near.shutdown().await.unwrap();
    assert_eq!(within("the end", far.read(&mut [0])).await.unwrap(), 0);
    far.shutdown().await.unwrap();
    assert_eq!(within("the end", near.fill_buf()).await.unwrap(), b"");
}

#[tokio::test]
async fn the_wire_sees_nothing_in_plaintext() {
    let (mut near, [mut wire, _], _far) = pair();
    say(&mut near, b"a secret").await;
    let record = next_record(&mut wire).await;
    assert_eq!(record.len(), HEADER + 8 + 1 + 16);
    assert!(!record.windows(4).any(|window| window == b"secr"));
}

#[tokio::test]
async fn a_record_is_taken_once_in_its_turn_and_unchanged() {
    for attack in ["none", "forged", "shortened", "replayed", "reordered", "left out"] {
        let (mut near, [mut near_wire, mut far_wire], mut far) = pair();
        say(&mut near, b"first").await;
        say(&mut near, b"other").await;
        let mut first = next_record(&mut near_wire).await;
        let mut other = next_record(&mut near_wire).await;
        match attack {
            "forged" => first[HEADER] ^= 1,
            "shortened" => {
                first.pop();
                first[4] -= 1;
            }
            "replayed" => other.clone_from(&first),
            "reordered" => std::mem::swap(&mut first, &mut other),
            "left out" => first.clear(),
            _ => {}
        }
        far_wire.write_all(&[first, other].concat()).await.unwrap();
        let mut heard = [0; 10];
        let ended = within("the records", far.read_exact(&mut heard)).await;
        if attack == "none" {
            ended.unwrap();
            assert_eq!(&heard, b"firstother");
            continue;
        }
        assert_eq!(tls_error(ended.unwrap_err()), TlsError::DecryptError, "{attack}");
        // And the peer is told.
        let alert = next_record(&mut far_wire).await;
        near_wire.write_all(&alert).await.unwrap();
        let told = tls_error(within("the alert", near.fill_buf()).await.unwrap_err());
        assert_eq!(told, TlsError::AlertReceived(AlertDescription::BadRecordMac), "{attack}");
    }
}

#[tokio::test]
async fn what_is_no_record_is_refused_without_waiting_for_more() {
    assert_eq!(made_of(&[23, 3, 3, 0x41, 1]).await, TlsError::PeerSentOversizedRecord);
    assert_eq!(made_of(&[23, 3, 3, 0, 0]).await, TlsError::DecryptError);
    for kind in [0, 20, 21, 22, b'G'] {
        let refused = made_of(&[kind, 3, 3, 0x41, 0]).await;
        assert!(matches!(refused, TlsError::InappropriateMessage { .. }), "{refused:?}");
    }
}

#[tokio::test]
async fn only_what_tunnels_use_is_taken_from_the_peer() {
    for (kind, text, refused) in [
        (ContentType::Handshake, &[4, 0, 0, 1, 0][..], "InappropriateHandshakeMessage"),
        (ContentType::Handshake, &[24, 0, 0, 1, 2], "InappropriateHandshakeMessage"),
        (
            ContentType::Handshake,
            &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0],
            "InappropriateHandshakeMessage",
        ),
        (ContentType::Handshake, &[], "InappropriateHandshakeMessage"),
        (ContentType::Alert, &[1], "InappropriateMessage"),
        (ContentType::Alert, &[2, 42], "AlertReceived(BadCertificate)"),
        (ContentType::Heartbeat, &[1, 0], "InappropriateMessage"),
        (ContentType::ChangeCipherSpec, &[1], "PeerMisbehaved"),
    ] {
        let (mut near, mut far) = in_memory(PIPE);
        say(&mut near, b"data").await;
        send(&mut near, kind, text).await;
        hear(&mut far, b"data").await;
        let error = tls_error(within("an error", far.fill_buf()).await.unwrap_err());
        assert!(format!("{error:?}").starts_with(refused), "{kind:?} {text:?}: {error:?}");
    }
}

#[tokio::test]
async fn close_notify_is_an_end_and_anything_else_is_not() {
    for orderly in [true, false] {
        let (mut near, mut far) = in_memory(PIPE);
        say(&mut near, b"last words").await;
        if orderly {
            near.shutdown().await.unwrap();
        }
        drop(near);
        hear(&mut far, b"last words").await;
        let ended = within("the end", far.fill_buf()).await;
        if orderly {
            assert_eq!(ended.unwrap(), b"");
            assert_eq!(far.fill_buf().await.unwrap(), b"");
        } else {
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}

#[tokio::test]
async fn a_record_may_be_empty_and_come_in_pieces() {
    let (mut near, [mut near_wire, mut far_wire], mut far) = pair();
    send(&mut near, ContentType::ApplicationData, b"").await;
    say(&mut near, &bytes(3 * MAX_TEXT)).await;
    let mut wire = Vec::new();
    for _ in 0..4 {
        wire.extend(next_record(&mut near_wire).await);
    }
    let pieces = tokio::spawn(async move {
        for piece in wire.chunks(1009) {
            far_wire.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        far_wire
    });
    hear(&mut far, &bytes(3 * MAX_TEXT)).await;
    pieces.await.unwrap();
}

#[tokio::test]
async fn keys_are_renewed_in_time_and_on_request() {
    let (mut near, mut far) = in_memory(PIPE);
    for round in 0..20 {
        // Of a new key, too.
        near.sealer.limit = 3;
        send(&mut far, ContentType::Handshake, KEY_UPDATE_REQUESTED).await;
        far.sealer = Sealer::new(far.suite, far.renewal.transmit().unwrap()).unwrap();
        for text in [b"a", b"b"] {
            say(&mut far, text).await;
            hear(&mut near, text).await;
            say(&mut near, text).await;
            hear(&mut far, text).await;
            assert!(near.sealer.sequence <= 3, "{round}");
        }
    }
    let renewed = near.renewal.transmit().unwrap();
    let ConnectionTrafficSecrets::Aes256Gcm { key, .. } = renewed.1 else {
        panic!("another cipher")
    };
    assert_eq!(key.as_ref()[0], 21, "once in a round, and now");
}

#[test]
fn a_key_serves_for_no_more_records_than_the_cipher_allows() {
    let suite = TLS13_AES_256_GCM_SHA384.tls13().unwrap();
    // RFC 8446, 5.5: 2^24.5 full records.
    assert!(Sealer::new(suite, secret(0)).unwrap().limit < 1 << 24);
}

#[tokio::test]
async fn an_idle_connection_keeps_no_buffer() {
    let (mut near, mut far) = in_memory(PIPE);
    say(&mut near, &bytes(100_000)).await;
    hear(&mut far, &bytes(100_000)).await;
    let waits = tokio::time::timeout(Duration::from_millis(10), far.fill_buf()).await;
    assert!(waits.is_err());
    assert!(!far.received.is_lent());
    assert_eq!((near.sealed.len(), near.sent), (0, 0));
    assert!(size_of_val(&far) <= 320, "{} bytes", size_of_val(&far));
}

#[tokio::test]
async fn a_write_waits_until_the_one_before_is_sent() {
    let (mut near, mut far) = in_memory(64);
    let cx = &mut Context::from_waker(std::task::Waker::noop());
    let text = bytes(CAPACITY + 1);
    let Poll::Ready(Ok(taken)) = Pin::new(&mut near).poll_write(cx, &text) else {
        panic!("it did not take any")
    };
    assert_eq!(taken, CAPACITY);
    assert!(Pin::new(&mut near).poll_write(cx, &text).is_pending());
    let flushed = tokio::spawn(async move {
        near.flush().await.unwrap();
        near
    });
    hear(&mut far, &text[..CAPACITY]).await;
    flushed.await.unwrap();
}

#[tokio::test]
async fn the_peer_shows_its_certificate() {
    let (client, server) = tls_configs();
    let (mut near, far) = duplex(PIPE);
    let session = UnbufferedClientConnection::new(client, "tunnel.test".try_into().unwrap());
    let (established, _far) =
        tokio::join!(establish(session.unwrap(), &mut near), TlsAcceptor::from(server).accept(far));
    let near = Records::new(near, established.unwrap()).unwrap();
    assert_eq!(near.peer().certificates.len(), 1);
}
