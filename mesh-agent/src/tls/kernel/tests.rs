//! What is different when the kernel encrypts. That the rest is not, the tests of the tunnel say:
//! they run both ways, see `lab`.

use std::fs;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::either::Either;

use super::{
    super::{Stream, is_worn},
    *,
};
use crate::tunnel::{
    frame::Frame,
    tests::lab::{
        assert_reset, header, hear, joined, say, server_agent, tcp_pair, tunnel_between, within,
    },
};

const KEY: [u8; 32] = [7; 32];

fn secrets() -> ExtractedSecrets {
    let direction = || {
        let (key, iv) = (AeadKey::from(KEY), Iv::from([0; 12]));
        (0, ConnectionTrafficSecrets::Aes256Gcm { key, iv })
    };
    ExtractedSecrets { tx: direction(), rx: direction() }
}

fn kernel(stream: &mut Stream) -> &mut KernelTls {
    match stream {
        Either::Right(stream) => stream,
        Either::Left(_) => panic!("the kernel does not encrypt it"),
    }
}

/// What reading says when there is no more.
async fn end(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<()> {
    let rest = within("the end", stream.fill_buf()).await?;
    assert_eq!(rest, b"", "no end");
    Ok(())
}

#[tokio::test]
async fn the_probe_says_what_becomes_of_tunnels() {
    let probed = probe();
    // Asking for it has loaded the module, if there is one.
    let offered = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
    assert_eq!(probed.is_ok(), offered.split_whitespace().any(|name| name == "tls"), "{probed:?}");
    for (client, server) in [(true, false), (false, true), (true, true)] {
        match (&probed, tunnel_between(client, server).await) {
            (Ok(()), made) => {
                let (mut near, mut far) = made.unwrap();
                say(&mut near, b"question").await;
                hear(&mut far, b"question").await;
                say(&mut far, b"answer").await;
                hear(&mut near, b"answer").await;
            }
            (Err(why), made) => {
                let error = made.expect_err("a tunnel without what the probe misses");
                let text = error.to_string();
                assert!(text.contains("the kernel does not take the keys"), "{text}: {why}");
            }
        }
    }
}

#[tokio::test]
async fn a_socket_that_the_kernel_does_not_take_is_closed_without_a_byte() {
    let (near, mut far) = tcp_pair().await;
    // The kernel takes established connections only, and there are kernels that take none.
    far.shutdown().await.unwrap();
    near.readable().await.unwrap();
    let error = KernelTls::new(near, secrets(), Peer::default()).expect_err("it took the keys");
    assert!(!format!("{error:?}").contains("7, 7"), "{error:?}");
    assert_eq!(within("the end", far.read_to_end(&mut Vec::new())).await.unwrap(), 0);
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn close_notify_is_an_end_and_anything_else_is_not() {
    for (near_in_kernel, far_in_kernel) in [(true, false), (false, true), (true, true)] {
        for orderly in [true, false] {
            let (mut near, mut far) = tunnel_between(near_in_kernel, far_in_kernel).await.unwrap();
            say(&mut near, b"last words").await;
            if orderly {
                near.shutdown().await.unwrap();
            }
            drop(near);
            hear(&mut far, b"last words").await;
            let ended = end(&mut far).await;
            if orderly {
                ended.unwrap();
                end(&mut far).await.unwrap();
            } else {
                assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn half_a_record_is_not_taken_for_a_record() {
    let (client, mut relayed_client) = tcp_pair().await;
    let (mut relayed_server, server) = tcp_pair().await;
    let mut near = KernelTls::new(client, secrets(), Peer::default()).unwrap();
    let mut far = KernelTls::new(server, secrets(), Peer::default()).unwrap();
    say(&mut near, b"whole").await;
    say(&mut near, b"broken").await;
    // Header, the text, its type, the tag.
    let mut records = [0; 2 * 22 + 5 + 6];
    relayed_client.read_exact(&mut records).await.unwrap();
    assert!(!records.windows(5).any(|window| window == b"whole"), "plaintext on the wire");
    relayed_server.write_all(&records[..records.len() - 1]).await.unwrap();
    drop(relayed_server);
    hear(&mut far, b"whole").await;
    assert_eq!(end(&mut far).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn a_forged_record_ends_the_tunnel() {
    let (client, mut relayed_client) = tcp_pair().await;
    let (mut relayed_server, server) = tcp_pair().await;
    let mut near = KernelTls::new(client, secrets(), Peer::default()).unwrap();
    let mut far = KernelTls::new(server, secrets(), Peer::default()).unwrap();
    say(&mut near, b"pay 1").await;
    let mut record = [0; 5 + 5 + 17];
    relayed_client.read_exact(&mut record).await.unwrap();
    record[9] ^= 1;
    relayed_server.write_all(&record).await.unwrap();
    let error = end(&mut far).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADMSG), "{error}");
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn an_alert_is_heard_behind_data() {
    let (mut near, mut far) = tunnel_between(true, true).await.unwrap();
    say(&mut near, b"data").await;
    send_record(kernel(&mut near).socket.as_fd(), ALERT, &[2, 42]).unwrap();
    hear(&mut far, b"data").await;
    let error = end(&mut far).await.unwrap_err();
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    assert_eq!(alert, Some(&TlsError::AlertReceived(AlertDescription::BadCertificate)));
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn a_new_key_ends_the_tunnel_and_resets_the_application() {
    let (mut near, far) = tunnel_between(false, true).await.unwrap();
    let (mut application, server_side) = tcp_pair().await;
    let agent = server_agent(server_side, far);
    let mut open = Vec::new();
    Frame::Open(header()).encode(&mut open);
    say(&mut near, &[&open, &[3, 0, 3][..], b"old"].concat()).await;
    hear(&mut application, b"old").await;
    let Either::Left(stream) = &mut near else { panic!("this process does not encrypt it") };
    stream.wear_out();
    say(&mut near, &[&[3, 0, 3][..], b"new"].concat()).await;
    assert_reset(&mut application).await;
    let (outcome, _) = joined(agent).await;
    assert!(outcome.end.to_string().contains("a new key"), "{}", outcome.end);
    assert!(!outcome.reusable);
}

#[tokio::test]
#[ignore = "for kernels with TLS: `cargo xtask test --vm`"]
async fn a_key_is_not_used_for_ever() {
    let (mut near, _far) = tunnel_between(true, false).await.unwrap();
    assert!(!is_worn(&near));
    kernel(&mut near).blocks = WORN - 1;
    say(&mut near, b"one more").await;
    assert!(is_worn(&near));
    kernel(&mut near).blocks = BLOCKS;
    let error = near.write_all(b"one too many").await.unwrap_err();
    assert!(error.to_string().contains("used up the key"), "{error}");
}

#[test]
fn keys_are_used_no_longer_than_the_standard_allows() {
    assert_eq!(blocks(0), 0);
    assert_eq!(blocks(1), 3);
    assert_eq!(blocks(MAX_TEXT), 1024 + 2);
    assert_eq!(blocks(MAX_TEXT + 1), 1024 + 1 + 4);
    // 2^24.5 full records.
    assert!(u128::from(BLOCKS).pow(2) < 1 << (2 * 34 + 1));
}
