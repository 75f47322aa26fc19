//! Just enough of HTTP/2 (RFC 9113) and gRPC to be what the kubelet's gRPC probe asks: every
//! request is answered with `grpc.health.v1.HealthCheckResponse`, `SERVING`.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

const PREFACE: usize = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// `:status: 200` and `content-type: application/grpc`, without dynamic table (RFC 7541).
const RESPONSE: &[u8] = b"\x88\x0f\x10\x10application/grpc";
/// `grpc-status: 0`.
const TRAILERS: &[u8] = b"\x00\x0bgrpc-status\x010";
/// Uncompressed, 2 bytes long: field 1 is 1.
const SERVING: &[u8] = b"\x00\x00\x00\x00\x02\x08\x01";

/// Serves a connection until the client closes it.
pub(super) fn serve(mut stream: &TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0; PREFACE])?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[]))?;
    let mut header = [0; 9];
    while stream.read_exact(&mut header).is_ok() {
        let [high, middle, low, kind, flags, ..] = header;
        let on = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
        stream.read_exact(&mut payload)?;
        let answer = match kind {
            SETTINGS if flags & ACK == 0 => frame(SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => frame(PING, ACK, 0, &payload),
            DATA | HEADERS if flags & END_STREAM != 0 => [
                frame(HEADERS, END_HEADERS, on, RESPONSE),
                frame(DATA, 0, on, SERVING),
                frame(HEADERS, END_HEADERS | END_STREAM, on, TRAILERS),
            ]
            .concat(),
            _ => continue,
        };
        stream.write_all(&answer)?;
    }
    Ok(())
}

fn frame(kind: u8, flags: u8, on: u32, payload: &[u8]) -> Vec<u8> {
    // All of them are short.
    let mut frame = vec![0, 0, payload.len() as u8, kind, flags];
    frame.extend(on.to_be_bytes());
    frame.extend(payload);
    frame
}
