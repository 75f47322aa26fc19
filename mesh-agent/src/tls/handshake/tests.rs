use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, ClientConfig, ServerConfig};
use tokio::io::{DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::tunnel::tests::lab::{tls_configs, within};

fn client(config: Arc<ClientConfig>) -> UnbufferedClientConnection {
    UnbufferedClientConnection::new(config, "tunnel.test".try_into().unwrap()).unwrap()
}

fn server(config: Arc<ServerConfig>) -> UnbufferedServerConnection {
    UnbufferedServerConnection::new(config).unwrap()
}

/// Ours at both ends.
async fn between(
    configs: (Arc<ClientConfig>, Arc<ServerConfig>),
) -> (io::Result<Established>, io::Result<Established>) {
    let (mut near, mut far) = duplex(1 << 20);
    let accepted = async {
        let accepted = establish(server(configs.1), &mut far).await;
        drop(far);
        accepted
    };
    let connected = async {
        let connected = establish(client(configs.0), &mut near).await;
        // Nothing is lost that comes behind the handshake.
        (connected, near)
    };
    let ((connected, _near), accepted) =
        within("a handshake", async { tokio::join!(connected, accepted) }).await;
    (connected, accepted)
}

fn tls_error(result: io::Result<Established>) -> TlsError {
    let error = result.map(|_| ()).unwrap_err();
    error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()).unwrap().clone()
}

#[tokio::test]
async fn both_sides_have_the_same_keys() {
    let (near, far) = between(tls_configs()).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.suite, far.suite);
    assert_eq!((near.secrets.tx.0, near.secrets.rx.0), (far.secrets.rx.0, far.secrets.tx.0));
}

#[tokio::test]
async fn messages_may_be_spread_over_records() {
    let (mut client_config, mut server_config) = tls_configs();
    Arc::make_mut(&mut client_config).max_fragment_size = Some(64);
    Arc::make_mut(&mut server_config).max_fragment_size = Some(64);
    let (near, far) = between((client_config, server_config)).await;
    assert!(near.is_ok() && far.is_ok());
}

#[tokio::test]
async fn what_is_no_tls_is_refused_by_its_first_bytes() {
    for said in [&b"GET / HTTP/1.1\r\n"[..], &[22, 3, 1, 0xff, 0xff], &[23, 3, 3, 0, 1, 0]] {
        let (mut near, mut far) = duplex(1 << 10);
        near.write_all(said).await.unwrap();
        let accepted = establish(server(tls_configs().1), &mut far);
        tls_error(within("a refusal", accepted).await);
    }
}

#[tokio::test]
async fn a_peer_that_goes_is_no_tls_error() {
    let (near, mut far) = duplex(1 << 10);
    drop(near);
    let accepted = within("the end", establish(server(tls_configs().1), &mut far)).await;
    assert_eq!(accepted.map(|_| ()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_peer_without_the_protocol_gets_no_tunnel() {
    let (mut client_config, server_config) = tls_configs();
    Arc::make_mut(&mut client_config).alpn_protocols.clear();
    let (near, far) = between((client_config, server_config)).await;
    assert_eq!(tls_error(near), TlsError::NoApplicationProtocol);
    assert_eq!(tls_error(far), TlsError::NoApplicationProtocol);
}

/// What rustls's own end of a connection says.
fn said<T>(result: io::Result<T>) -> TlsError {
    let error = result.map(|_| ()).unwrap_err();
    error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()).unwrap().clone()
}

#[tokio::test]
async fn the_peer_is_told_why_not() {
    let (client_config, _) = tls_configs();
    let (_, server_config) = tls_configs();
    let refused = TlsError::InvalidCertificate(CertificateError::BadSignature);
    let told = TlsError::AlertReceived(AlertDescription::DecryptError);

    let (mut near, far): (DuplexStream, _) = duplex(1 << 20);
    let accept = TlsAcceptor::from(Arc::clone(&server_config)).accept(far);
    let (ours, theirs) =
        tokio::join!(establish(client(Arc::clone(&client_config)), &mut near), accept);
    assert_eq!((tls_error(ours), said(theirs)), (refused.clone(), told.clone()));

    let (near, mut far) = duplex(1 << 20);
    let name = "tunnel.test".try_into().unwrap();
    let connect = TlsConnector::from(client_config).connect(name, near);
    let (ours, theirs) = tokio::join!(establish(server(server_config), &mut far), connect);
    assert_eq!((tls_error(ours), said(theirs)), (told, refused));
}
