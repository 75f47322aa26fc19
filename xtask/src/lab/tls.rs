//! Tells TLS from everything else, and which version was negotiated (RFC 8446).

use anyhow::{Context as _, Result, bail, ensure};

/// The version number of TLS 1.3.
pub const TLS13: u16 = 0x0304;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;
/// RFC 8446, section 5.2.
const MAX_RECORD: usize = (1 << 14) + 256;
const RECORD_HEADER: usize = 5;

/// What a stream of TLS records began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hello {
    /// A client speaks.
    Client,
    /// A server speaks, and this is the version it chose.
    Server(u16),
    /// A server refused before it chose a version.
    Alert,
}

/// Checks that one direction of a connection, from its first byte, is TLS records and nothing
/// else. The last record may be cut off.
pub fn inspect(stream: &[u8]) -> Result<Hello> {
    let first = record(stream).context("the first record")?;
    let hello = hello(first)?;
    let mut at = 0;
    while at < stream.len() {
        let body = record(&stream[at..]).with_context(|| format!("the record at byte {at}"))?;
        at += RECORD_HEADER + body.length;
    }
    Ok(hello)
}

struct Record<'a> {
    kind: u8,
    length: usize,
    body: &'a [u8],
}

fn record(bytes: &[u8]) -> Result<Record<'_>> {
    let Some(header) = bytes.first_chunk::<RECORD_HEADER>() else {
        // Cut off within a header: what there is must still be the beginning of one.
        ensure!(matches!(bytes[0], 20..=23), "byte {:#04x} begins no TLS record", bytes[0]);
        return Ok(Record { kind: bytes[0], length: bytes.len(), body: &[] });
    };
    let [kind, major, minor, high, low] = *header;
    let length = usize::from(u16::from_be_bytes([high, low]));
    ensure!(
        matches!(kind, 20..=23) && major == 3 && matches!(minor, 1 | 3) && length <= MAX_RECORD,
        "{header:02x?} is no header of a TLS record"
    );
    let end = bytes.len().min(RECORD_HEADER + length);
    Ok(Record { kind, length, body: &bytes[RECORD_HEADER..end] })
}

fn hello(first: Record<'_>) -> Result<Hello> {
    const ALERT: u8 = 21;
    match (first.kind, first.body.first()) {
        (HANDSHAKE, Some(&CLIENT_HELLO)) => Ok(Hello::Client),
        (HANDSHAKE, Some(&SERVER_HELLO)) => {
            let version = selected_version(first.body).context("the ServerHello is cut off")?;
            Ok(Hello::Server(version))
        }
        (ALERT, _) => Ok(Hello::Alert),
        (kind, message) => bail!("begins with a record of type {kind}, message {message:?}"),
    }
}

/// The version in the extension `supported_versions`, else the legacy one.
fn selected_version(hello: &[u8]) -> Option<u16> {
    let be16 = |at: usize| Some(u16::from_be_bytes(*hello.get(at..at + 2)?.first_chunk()?));
    // Type, length, version, random, session id, cipher suite, compression, extensions.
    let legacy_version = be16(4)?;
    let session_id = usize::from(*hello.get(38)?);
    let mut at = 39 + session_id + 2 + 1 + 2;
    while at < hello.len() {
        let (kind, length) = (be16(at)?, usize::from(be16(at + 2)?));
        if kind == SUPPORTED_VERSIONS {
            return be16(at + 4);
        }
        at += 4 + length;
    }
    Some(legacy_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record_of(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&[kind, 3, 3], &length[..], body].concat()
    }

    fn server_hello(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![SERVER_HELLO, 0, 0, 0, 3, 3];
        body.extend([7; 32]);
        body.extend([2, 1, 1, 0x13, 0x02, 0]);
        body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend(extensions);
        record_of(HANDSHAKE, &body)
    }

    #[test]
    fn versions_are_told_apart() {
        let modern = server_hello(&[0, 51, 0, 1, 9, 0, 43, 0, 2, 3, 4]);
        assert_eq!(inspect(&modern).unwrap(), Hello::Server(TLS13));
        let old = server_hello(&[0, 51, 0, 1, 9]);
        assert_eq!(inspect(&old).unwrap(), Hello::Server(0x0303));
    }

    #[test]
    fn a_client_with_a_record_cut_off() {
        let mut stream = record_of(HANDSHAKE, &[CLIENT_HELLO, 0, 0, 0]);
        let data = record_of(23, &[0xaa; 100]);
        for cut in 0..data.len() {
            stream.extend(&data[..cut]);
            assert_eq!(inspect(&stream).unwrap(), Hello::Client, "{cut} bytes");
            stream.truncate(stream.len() - cut);
        }
    }

    #[test]
    fn plaintext_anywhere_is_found() {
        assert!(inspect(b"GET / HTTP/1.1\r\n").is_err());
        assert!(inspect(b"G").is_err());
        let mut stream = record_of(HANDSHAKE, &[CLIENT_HELLO, 0, 0, 0]);
        stream.extend(b"GET / HTTP/1.1\r\n");
        assert!(inspect(&stream).is_err());
        let oversized = [record_of(HANDSHAKE, &[CLIENT_HELLO]), vec![23, 3, 3, 0xff, 0xff]];
        assert!(inspect(&oversized.concat()).is_err());
        assert!(inspect(&record_of(23, b"application data first")).is_err());
    }
}
