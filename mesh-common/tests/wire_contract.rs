//! Agents and control planes one version apart understand each other: what is said on the wire only
//! adds to what the last release said, and what a later one adds is passed over.

use std::iter;

use mesh_common::api;
use protox::{
    Compiler, Error,
    file::{File, FileResolver},
    prost::Message as _,
    prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Value},
};

const RELEASED: &str = include_str!("../proto/released/nodemesh.proto");
const PRESENT: &str = include_str!("../proto/nodemesh.proto");

/// The only file there is.
struct Source(String);

impl FileResolver for Source {
    fn open_file(&self, name: &str) -> Result<File, Error> {
        File::from_source(name, &self.0)
    }
}

fn parse(text: &str) -> DescriptorPool {
    let mut compiler = Compiler::with_file_resolver(Source(text.to_owned()));
    compiler.open_file("nodemesh.proto").unwrap_or_else(|error| panic!("{error}"));
    compiler.descriptor_pool()
}

/// What somebody who speaks `before` would miss, or misunderstand, in what somebody says who speaks
/// `after`, or the other way round.
fn breaks(before: &str, after: &str) -> Vec<String> {
    let (before, after) = (parse(before), parse(after));
    let mut broken = Vec::new();
    for service in before.services() {
        let now = after.get_service_by_name(service.full_name());
        for method in service.methods() {
            let same = now.iter().flat_map(|now| now.methods()).any(|now| {
                now.name() == method.name()
                    && now.input().full_name() == method.input().full_name()
                    && now.output().full_name() == method.output().full_name()
                    && now.is_client_streaming() == method.is_client_streaming()
                    && now.is_server_streaming() == method.is_server_streaming()
            });
            broken.extend((!same).then(|| method.full_name().to_owned()));
        }
    }
    for message in before.all_messages() {
        let now = after.get_message_by_name(message.full_name());
        broken.extend(now.is_none().then(|| message.full_name().to_owned()));
        for field in message.fields() {
            let now = now.as_ref().and_then(|now| now.get_field(field.number()));
            let same = now.is_some_and(|now| words(&now) == words(&field));
            broken.extend((!same).then(|| field.full_name().to_owned()));
        }
    }
    for known in before.all_enums() {
        let now = after.get_enum_by_name(known.full_name());
        for value in known.values() {
            let now = now.as_ref().and_then(|now| now.get_value(value.number()));
            let same = now.is_some_and(|now| now.name() == value.name());
            broken.extend((!same).then(|| value.full_name().to_owned()));
        }
    }
    broken
}

/// What must stay as it is of a field with a number. Its name, too: another one means something else.
fn words(field: &FieldDescriptor) -> String {
    let kind = field.kind();
    let kind = match (kind.as_message(), kind.as_enum()) {
        (Some(message), _) => message.full_name().to_owned(),
        (_, Some(known)) => known.full_name().to_owned(),
        (None, None) => format!("{kind:?}"),
    };
    let choice = field.containing_oneof().map(|choice| choice.name().to_owned());
    format!("{} {kind} {:?} {choice:?}", field.name(), field.cardinality())
}

#[test]
fn the_present_only_adds_to_what_the_last_release_said() {
    assert_eq!(breaks(RELEASED, PRESENT), [""; 0]);
}

#[test]
fn what_is_more_than_an_addition_is_found() {
    for (before, after, what) in [
        ("  rpc Report(ReportRequest) returns (ReportResponse);", "", "ControlPlane.Report"),
        ("returns (stream Snapshot)", "returns (Snapshot)", "ControlPlane.Watch"),
        ("rpc Join(JoinRequest)", "rpc Join(RenewNodeRequest)", "ControlPlane.Join"),
        ("service ControlPlane", "service Control", "ControlPlane.Join"),
        ("  string token = 1;", "", "JoinRequest.token"),
        ("  string token = 1;", "  bytes token = 1;", "JoinRequest.token"),
        ("  string token = 1;", "  string token = 9;", "JoinRequest.token"),
        ("  string token = 1;", "  string secret = 1;", "JoinRequest.token"),
        ("  repeated string addresses = 6;", "  string addresses = 6;", "Workload.addresses"),
        ("    Ack ack = 2;", "    Nack ack = 2;", "WatchRequest.ack"),
        ("oneof message", "oneof messages", "WatchRequest.hello"),
        ("SAME_NODE_FIRST = 2;", "SAME_NODE_FIRST = 4;", "SAME_NODE_FIRST"),
        ("package nodemesh.v1;", "package nodemesh.v2;", "nodemesh.v1.JoinRequest"),
    ] {
        let changed = RELEASED.replacen(before, after, 1);
        assert_ne!(changed, RELEASED, "{before} is not there");
        let broken = breaks(RELEASED, &changed);
        assert!(broken.iter().any(|name| name.ends_with(what)), "{after}: {broken:?}");
    }
}

/// What a later release may speak: another field in everything.
fn later() -> DescriptorPool {
    let lines = PRESENT.lines().flat_map(|line| {
        let more = line.starts_with("message ") && line.ends_with('{');
        iter::once(line).chain(more.then_some("  string later = 1000;"))
    });
    let text: Vec<_> = lines.collect();
    let text = text.join("\n");
    assert_eq!(breaks(PRESENT, &text), [""; 0]);
    parse(&text)
}

fn fill(message: &mut DynamicMessage) {
    message.set_field_by_number(1000, Value::String("later".to_owned()));
    for (_, value) in message.fields_mut() {
        if let Some(inner) = value.as_message_mut() {
            fill(inner);
        } else if let Some(all) = value.as_list_mut() {
            all.iter_mut().filter_map(Value::as_message_mut).for_each(fill);
        }
    }
}

#[test]
fn what_a_later_release_adds_is_passed_over() {
    let workload = api::Workload {
        uid: "u1".to_owned(),
        addresses: vec!["10.0.0.7".to_owned()],
        ..Default::default()
    };
    let service = api::Service {
        name: "cart".to_owned(),
        ports: vec![api::ServicePort { name: "http".to_owned(), port: 80 }],
        // A value that is not known here.
        locality: 9,
        ..Default::default()
    };
    let snapshot = api::Snapshot {
        version: 7,
        workloads: vec![workload],
        services: vec![service],
        settings: Some(api::Settings { svid_lifetime_seconds: 3600 }),
        ..Default::default()
    };
    let today = snapshot.encode_to_vec();
    let descriptor = later().get_message_by_name("nodemesh.v1.Snapshot").unwrap();
    let mut message = DynamicMessage::decode(descriptor, today.as_slice()).unwrap();
    fill(&mut message);
    let tomorrow = message.encode_to_vec();
    assert_eq!(tomorrow.windows(5).filter(|part| part == b"later").count(), 5, "in every message");
    let heard = api::Snapshot::decode(tomorrow.as_slice()).unwrap();
    assert_eq!(heard, snapshot);
    assert_eq!(heard.services[0].locality(), api::Locality::Anywhere);
}

#[test]
fn a_kind_of_message_that_is_not_known_here_is_none() {
    let descriptor = later().get_message_by_name("nodemesh.v1.WatchRequest").unwrap();
    let mut message = DynamicMessage::new(descriptor);
    fill(&mut message);
    let heard = api::WatchRequest::decode(message.encode_to_vec().as_slice()).unwrap();
    assert_eq!(heard.message, None);
}
