//! Puts TCP streams together from captured segments, whatever their order and overlaps.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::packet::{FIN, RST, SYN, Segment};

/// One direction of a TCP connection as it was on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Who sent it.
    pub source: SocketAddr,
    /// Whom it is for.
    pub destination: SocketAddr,
    /// The bytes, in runs without a gap. More than one run means that something in between was
    /// not seen.
    pub runs: Vec<Vec<u8>>,
    /// Whether the capture saw it from its first byte on.
    pub from_start: bool,
    /// Whether it ended with FIN.
    pub fin: bool,
    /// Whether it was reset by its sender.
    pub reset: bool,
    /// Whether its sender opened the connection.
    pub opener: bool,
}

/// Puts every stream together, in the order in which they began.
pub fn assemble<'a>(segments: impl IntoIterator<Item = Segment<'a>>) -> Vec<Stream> {
    let mut streams: Vec<Assembly> = Vec::new();
    let mut current: BTreeMap<(SocketAddr, SocketAddr), usize> = BTreeMap::new();
    for segment in segments {
        let key = (segment.source, segment.destination);
        let syn = segment.flags & SYN != 0;
        let known = current.get(&key).copied().filter(|&index| {
            // A SYN with another sequence number is the next connection between the same ports.
            !syn || streams[index].first == segment.sequence.wrapping_add(1)
        });
        let index = known.unwrap_or_else(|| {
            streams.push(Assembly::new(&segment));
            streams.len() - 1
        });
        current.insert(key, index);
        streams[index].add(&segment);
    }
    streams.into_iter().map(Assembly::finish).collect()
}

struct Assembly {
    stream: Stream,
    /// The sequence number of the first byte.
    first: u32,
    /// How far the stream has come, in bytes; sequence numbers are near it.
    reached: i64,
    /// Payloads by their distance from the first byte.
    parts: BTreeMap<i64, Vec<u8>>,
}

impl Assembly {
    fn new(segment: &Segment<'_>) -> Self {
        const ACK: u8 = 0x10;
        let syn = segment.flags & SYN != 0;
        let stream = Stream {
            source: segment.source,
            destination: segment.destination,
            runs: Vec::new(),
            from_start: syn,
            fin: false,
            reset: false,
            opener: syn && segment.flags & ACK == 0,
        };
        let first = segment.sequence.wrapping_add(syn.into());
        Self { stream, first, reached: 0, parts: BTreeMap::new() }
    }

    fn add(&mut self, segment: &Segment<'_>) {
        self.stream.fin |= segment.flags & FIN != 0;
        self.stream.reset |= segment.flags & RST != 0;
        if segment.payload.is_empty() {
            return;
        }
        let syn = u32::from(segment.flags & SYN != 0);
        let expected = self.first.wrapping_add((self.reached & 0xffff_ffff) as u32);
        let sequence = segment.sequence.wrapping_add(syn);
        let at = self.reached + i64::from(sequence.wrapping_sub(expected).cast_signed());
        // Of two payloads at one place the longer is kept: the other is a part of it.
        let part = self.parts.entry(at).or_default();
        if part.len() < segment.payload.len() {
            *part = segment.payload.to_vec();
        }
        self.reached = self.reached.max(at + segment.payload.len() as i64);
    }

    fn finish(mut self) -> Stream {
        let mut end = i64::MIN;
        for (at, part) in self.parts {
            let overlap = usize::try_from(end.saturating_sub(at)).unwrap_or(0);
            match self.stream.runs.last_mut() {
                Some(run) if end >= at => run.extend(part.iter().skip(overlap)),
                Some(_) | None => self.stream.runs.push(part.clone()),
            }
            end = end.max(at + part.len() as i64);
        }
        self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(sequence: u32, flags: u8, payload: &[u8]) -> Segment<'_> {
        Segment {
            source: "10.0.0.1:40000".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
            sequence,
            flags,
            payload,
        }
    }

    fn runs(segments: &[Segment<'_>]) -> Vec<Vec<Vec<u8>>> {
        assemble(segments.iter().copied()).into_iter().map(|stream| stream.runs).collect()
    }

    #[test]
    fn order_repetition_and_overlap_do_not_matter() {
        let segments = [
            segment(99, SYN, b""),
            segment(104, 0, b"efgh"),
            segment(100, 0, b"abcd"),
            segment(100, 0, b"ab"),
            segment(102, 0, b"cdefghij"),
            segment(110, FIN, b""),
        ];
        assert_eq!(runs(&segments), [[b"abcdefghij".to_vec()]]);
        let stream = &assemble(segments)[0];
        assert!(stream.from_start && stream.opener && stream.fin && !stream.reset);
    }

    #[test]
    fn sequence_numbers_wrap() {
        let segments =
            [segment(u32::MAX - 1, SYN, b""), segment(u32::MAX, 0, b"ab"), segment(1, 0, b"cd")];
        assert_eq!(runs(&segments), [[b"abcd".to_vec()]]);
    }

    #[test]
    fn a_gap_splits_the_stream() {
        let segments = [segment(0, 0, b"ab"), segment(3, 0, b"d")];
        assert_eq!(runs(&segments), [[b"ab".to_vec(), b"d".to_vec()]]);
        assert!(!assemble(segments)[0].from_start);
    }

    #[test]
    fn the_same_ports_again_are_another_stream() {
        let segments = [
            segment(10, SYN, b""),
            segment(11, 0, b"one"),
            segment(500, SYN, b""),
            segment(501, RST, b"two"),
        ];
        assert_eq!(runs(&segments), [[b"one".to_vec()], [b"two".to_vec()]]);
        assert!(assemble(segments)[1].reset);
    }
}
