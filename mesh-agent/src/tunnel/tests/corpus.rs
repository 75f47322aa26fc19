//! Replays the fuzzers' corpus, so that what they found stays found without a fuzzer.

use std::{fs, path::Path};

#[path = "../../../../fuzz/src/checks/mod.rs"]
#[expect(unreachable_pub, reason = "the fuzz targets are a crate of their own")]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for input in fs::read_dir(&corpus).expect("the corpus is part of the repository") {
        let path = input.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let failed = std::panic::catch_unwind(|| check(&bytes)).is_err();
        assert!(!failed, "{} fails", path.display());
        inputs += 1;
    }
    assert!(inputs >= 10, "{inputs} inputs in {}: is the corpus whole?", corpus.display());
}

#[test]
fn frames() {
    replay("frames", checks::frames);
}

#[test]
fn open() {
    replay("open", checks::open);
}

#[test]
fn status() {
    replay("status", checks::status);
}

#[test]
fn relay() {
    replay("relay", checks::relay);
}

#[test]
fn shared() {
    replay("shared", checks::shared);
}

proptest::proptest! {
    /// The same checks on bytes that no fuzzer chose.
    #[test]
    fn any_bytes(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600)) {
        checks::frames(&data);
        checks::open(&data);
        checks::status(&data);
        checks::relay(&data);
        checks::shared(&data);
    }

    /// And on bytes that look like a tunnel.
    #[test]
    fn any_frames(
        script in proptest::collection::vec((0_u8..8, 0_u16..40), 0..40),
        preface in proptest::array::uniform2(proptest::prelude::any::<u8>()),
        said in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..256),
    ) {
        let mut data = preface.to_vec();
        data.push(u8::try_from(said.len()).unwrap_or(u8::MAX));
        data.extend_from_slice(&said[..said.len().min(255)]);
        let frames = data.len();
        for (kind, len) in script {
            // An accepting STATUS often enough to get behind it.
            let (kind, len) = match kind {
                0 | 2 => (2, 1),
                3 | 7 => (3, len.max(1)),
                1 | 6 => (3, 1),
                other => (other, 0),
            };
            data.push(kind);
            data.extend_from_slice(&len.to_be_bytes());
            data.extend((0..len).map(|_| 0_u8));
        }
        checks::frames(&data[frames..]);
        checks::relay(&data);
    }

    /// And on bytes that look like one that connections share.
    #[test]
    fn any_numbered_frames(
        script in proptest::collection::vec((0_u8..3, 0_u8..12, 0_u16..60), 0..60),
        preface in proptest::array::uniform2(proptest::prelude::any::<u8>()),
        said in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..255),
    ) {
        let mut data = preface.to_vec();
        data.push(u8::try_from(said.len()).unwrap());
        data.extend_from_slice(&said);
        for (number, kind, len) in script {
            // The other agent's preface often enough to get behind it.
            let (kind, body) = match kind {
                0..=2 if preface[0] & 1 == 0 => (2, vec![0]),
                0..=2 => (1, [&[1][..], &[7; 22]].concat()),
                6 => (7, vec![0, 0, len.to_be_bytes()[1], 1]),
                4 | 5 | 8 => (kind, Vec::new()),
                _ => (3, (0..=len).map(|n| n.to_be_bytes()[1]).collect()),
            };
            data.extend_from_slice(&[number, kind]);
            data.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
            data.extend_from_slice(&body);
        }
        checks::shared(&data);
    }
}
