//! What each connection, and each frame, costs in decisions: no sockets, no TLS.
//!
//! `cargo bench --package mesh-agent`; `cargo xtask bench` measures the whole.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mesh_agent::identity::Snapshot;
use mesh_agent::policy::{Egress, Policy, Verdict};
use mesh_agent::tunnel::frame::{Decoded, Decoder, Frame, MAX_DATA};
use mesh_agent::tunnel::{Header, TraceId};
use mesh_common::api;

/// A large cluster.
const WORKLOADS: u16 = 10_000;

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame");
    let source = SocketAddr::from(([10, 77, 1, 2], 40_000));
    let open = Frame::Open(Header::new(source, TraceId([7; 16])));
    let mut bytes = Vec::new();
    open.encode(&mut bytes);
    group.bench_function("encode open", |bencher| {
        let mut out = Vec::with_capacity(bytes.len());
        bencher.iter(|| {
            out.clear();
            black_box(&open).encode(&mut out);
        });
    });
    group.bench_function("parse open", |bencher| bencher.iter(|| Frame::parse(black_box(&bytes))));

    let mut stream = Vec::new();
    Frame::Data(u16::try_from(MAX_DATA).expect("a length fits")).encode(&mut stream);
    stream.resize(stream.len() + MAX_DATA, 0x5a);
    let stream = stream.repeat(16);
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("decode data", |bencher| {
        bencher.iter(|| decode(black_box(&stream)));
    });
    group.finish();
}

/// Goes through a stream as a relay does.
fn decode(mut stream: &[u8]) -> usize {
    let (mut decoder, mut payload) = (Decoder::default(), 0);
    while !stream.is_empty() {
        match decoder.decode(stream).expect("the stream is well-formed") {
            Decoded::Payload(bytes) => {
                payload += bytes.len();
                let taken = bytes.len();
                decoder.advance(taken);
                stream = &stream[taken..];
            }
            Decoded::Partial(taken) | Decoded::Frame(taken, _) => stream = &stream[taken..],
        }
    }
    payload
}

fn decisions(criterion: &mut Criterion) {
    let registry = Snapshot::try_from(snapshot()).expect("the snapshot is valid");
    let policy = Policy {
        cluster: vec!["10.0.0.0/8".parse().expect("a range")].try_into().expect("ranges"),
        egress: Egress::Allow,
        plaintext_ingress: Vec::new(),
    };
    let (client, server) = (address(0), SocketAddr::new(address(WORKLOADS - 1), 80));
    let outside = SocketAddr::from(([192, 0, 2, 1], 443));
    let decide = |to| policy.egress("uid-0", client, black_box(to), &registry);
    assert!(
        matches!(decide(server), Verdict::Mesh(_))
            && matches!(decide(outside), Verdict::Plaintext(_))
    );
    criterion.bench_function("policy/egress to a pod", |bencher| bencher.iter(|| decide(server)));
    criterion.bench_function("policy/egress outside", |bencher| bencher.iter(|| decide(outside)));
    criterion.bench_function("registry/by address", |bencher| {
        bencher.iter(|| registry.by_address(black_box(server.ip())));
    });
    criterion.bench_function("registry/by uid", |bencher| {
        bencher.iter(|| registry.by_uid(black_box("uid-5000")));
    });
    criterion.bench_function("registry/from the wire", |bencher| {
        bencher.iter_batched(snapshot, Snapshot::try_from, BatchSize::LargeInput);
    });
}

fn address(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 1, high, low).into()
}

fn snapshot() -> api::Snapshot {
    let workload = |number| api::Workload {
        uid: format!("uid-{number}"),
        namespace: "shop".into(),
        service_account: "cart".into(),
        name: format!("cart-{number}"),
        node: format!("node-{}", number % 100),
        addresses: vec![address(number).to_string()],
        owner: String::new(),
    };
    api::Snapshot {
        version: 1,
        bundle: Some(api::TrustBundle { trust_domain: "bench".into(), roots: vec![root()] }),
        workloads: (0..WORKLOADS).map(workload).collect(),
        settings: Some(api::Settings { svid_lifetime_seconds: 14_400 }),
        ..Default::default()
    }
}

fn root() -> Vec<u8> {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = rcgen::KeyPair::generate().expect("a key");
    params.self_signed(&key).expect("a certificate").der().to_vec()
}

criterion_group!(benches, frames, decisions);
criterion_main!(benches);
