use std::path::Path;

use proptest::prelude::*;

use super::*;

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let source = prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from),
    ];
    prop_oneof![
        (source, any::<u16>(), any::<[u8; 16]>())
            .prop_map(|(ip, port, id)| Frame::Open(Header::new((ip, port).into(), TraceId(id)))),
        (0_u8..=u8::MAX, ".{0,300}").prop_map(|(code, text)| Frame::Status(match code {
            0 => Status::Accepted,
            code => Status::Refused(Refusal::new(Reason::from_code(code), &text)),
        })),
        (1..=MAX_DATA).prop_map(|len| Frame::Data(u16::try_from(len).unwrap())),
        Just(Frame::Fin),
        Just(Frame::Reset),
        Just(Frame::GoAway),
        (1..=u32::MAX).prop_map(Frame::Credit),
        Just(Frame::Blocked),
    ]
}

proptest! {
    #[test]
    fn a_frame_survives_the_wire(frame in any_frame(), behind in any::<Vec<u8>>()) {
        let bytes = encoded(&frame);
        prop_assert!(bytes.len() <= MAX_CONTROL);
        for cut in 0..bytes.len() {
            prop_assert_eq!(Frame::parse(&bytes[..cut]), Ok(None), "cut at {}", cut);
        }
        let stream = [bytes.as_slice(), &behind].concat();
        prop_assert_eq!(Frame::parse(&stream), Ok(Some((frame, bytes.len()))));
    }

    #[test]
    fn every_frame_of_a_shared_tunnel_is_whose_it_was(
        frames in proptest::collection::vec((0..NUMBERS, any_frame()), 1..20),
        cuts in proptest::collection::vec(1_usize..50, 1..20),
    ) {
        let mut bytes = Vec::new();
        for (number, frame) in &frames {
            bytes.push(*number);
            frame.encode(&mut bytes);
            if let Frame::Data(len) = frame {
                bytes.extend(std::iter::repeat_n(*number, usize::from(*len)));
            }
        }
        let (mut decoder, mut found, mut payload) = (Numbered::default(), Vec::new(), 0);
        let (mut rest, mut cuts) = (bytes.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (mut piece, after) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            rest = after;
            while !piece.is_empty() {
                let (number, decoded) = decoder.decode(piece).unwrap();
                let used = match decoded {
                    Decoded::Partial(used) => used,
                    Decoded::Frame(used, frame) => {
                        found.push((number, frame));
                        used
                    }
                    Decoded::Payload(some) => {
                        let taken = some.len().div_ceil(2);
                        prop_assert!(some.iter().all(|byte| *byte == number));
                        payload += taken;
                        decoder.advance(taken);
                        taken
                    }
                };
                piece = &piece[used..];
            }
        }
        prop_assert!(decoder.at_boundary());
        let lengths = |(_, frame): &(u8, Frame)| if let Frame::Data(len) = frame { *len } else { 0 };
        prop_assert_eq!(payload, found.iter().map(|it| usize::from(lengths(it))).sum::<usize>());
        prop_assert_eq!(found, frames);
    }
}

#[test]
fn a_data_header_is_that_of_a_data_frame() {
    for len in [1, 255, 256, MAX_DATA] {
        let frame = Frame::Data(u16::try_from(len).unwrap());
        assert_eq!(Frame::data_header(len).to_vec(), encoded(&frame));
    }
}

#[test]
fn a_mapped_address_is_sent_as_what_it_is_and_not_accepted_as_what_it_is_not() {
    let mapped = "[::ffff:192.0.2.7]:80".parse().unwrap();
    let header = Header::new(mapped, TraceId([0; 16]));
    assert_eq!(header.source(), "192.0.2.7:80".parse().unwrap());
    let mut bytes = vec![1, 0, 35, 1];
    bytes.extend([0; 18]);
    bytes.extend("::ffff:192.0.2.7".parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(Frame::parse(&bytes), Err(Malformed::MappedSource));
    bytes[22] = 0x20;
    assert!(matches!(Frame::parse(&bytes), Ok(Some((Frame::Open(_), 38)))));
}

#[test]
fn a_refusal_fits_a_log_line_and_a_frame() {
    let long = Refusal::new(Reason::Failed, &"ä".repeat(200));
    assert_eq!(long.text().len(), MAX_TEXT);
    assert_eq!(Refusal::new(Reason::Failed, &format!("{}ä", "x".repeat(255))).text().len(), 255);
    assert_eq!(Refusal::new(Reason::Failed, "two\nlines\u{85}").text(), "two lines ");
    for text in [b"two\nlines".as_slice(), b"\x1b[2J", b"\xff", b"\xc2\x85"] {
        let len = u8::try_from(text.len() + 1).unwrap();
        let bytes = [&[2, 0, len, 1], text].concat();
        assert_eq!(Frame::parse(&bytes), Err(Malformed::Status), "{text:?}");
    }
    assert_eq!(Frame::parse(&[2, 0, 2, 0, b'x']), Err(Malformed::Status));
}

#[test]
fn reasons_keep_their_codes() {
    for code in 1..=u8::MAX {
        let reason = Reason::from_code(code);
        assert_eq!(reason.code(), code);
        assert_eq!(matches!(reason, Reason::Unknown(_)), code > 9, "{code}");
    }
    assert_eq!(Reason::from_code(99).words(), "unknown reason");
}

/// Every example in the specification is what it says, and every type of frame has one.
#[test]
fn the_specifications_examples_are_true() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tunnel.md");
    let text = std::fs::read_to_string(path).expect("the specification is part of the repository");
    let mut kinds = std::collections::BTreeSet::new();
    for block in text.split("```hex\n").skip(1) {
        let (block, _) = block.split_once("```").expect("the block ends");
        let bytes: Vec<u8> = block
            .lines()
            .map(|line| line.split_once('#').map_or(line, |(code, _)| code))
            .flat_map(str::split_ascii_whitespace)
            .map(|byte| u8::from_str_radix(byte, 16).expect("two hex digits"))
            .collect();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (frame, used) = Frame::parse(rest).expect("well-formed").expect("whole");
            assert_eq!(encoded(&frame), rest[..used], "{frame:?}");
            let payload = if let Frame::Data(len) = frame { usize::from(len) } else { 0 };
            rest = &rest[used + payload..];
            kinds.insert(frame.kind());
        }
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
    for (code, _, words) in Reason::KNOWN {
        assert!(text.contains(&format!("| {code} | {words} |")), "reason {code}: {words}");
    }
}
