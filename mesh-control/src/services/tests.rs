use std::time::{Duration, SystemTime};

use super::*;
use crate::files::Source;

fn source(file: &str, age: u64, text: impl Into<String>) -> Source {
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 - age);
    Source { file: file.to_owned(), modified, content: Ok(text.into()) }
}

fn text(name: &str, address: &str) -> String {
    format!(
        "namespace: shop\nname: {name}\naddresses: [{address}]\nports: [{{port: 80}}]\n\
         endpoints: [{{address: 10.0.0.1, ports: 8080}}]\n"
    )
}

const FULL: &str = "
namespace: shop
name: cart
addresses: [10.96.0.1, 'fd96::1', '::ffff:10.96.0.9']
ports: [{name: http, port: 80}, {name: admin, port: 81}]
client_ip_affinity: 10m
locality: same-node-first
endpoints:
  - {address: 10.0.0.1, ports: {http: 8080, admin: 9}, node: n1, zone: z1}
  - {address: 10.0.0.2, ports: {http: 8081}, ready: false}
  - {address: 'fd00::1', ports: {http: 8080, admin: 9}, node: n2, zone: z2}
";

fn resolved(sources: Vec<Source>, workloads: &[(&str, &str)]) -> (Services, Vec<Problem>) {
    let workload = |(uid, address): &(&str, &str)| {
        let text = format!(
            "uid: {uid}\nname: a\nnamespace: shop\nservice_account: a\nnode: n1\n\
             addresses: [{address}]\n"
        );
        source(uid, 1, text)
    };
    let registry = Registry::resolve(workloads.iter().map(workload).collect());
    assert_eq!(registry.workloads().len(), workloads.len(), "{:?}", registry.problems());
    let files = Files::read(sources);
    let (services, problems) = resolve(&files.claims, &files.nodes, &registry);
    (services, [files.problems, problems].concat())
}

fn names(services: &Services) -> Vec<(&str, Vec<&str>)> {
    services
        .services
        .iter()
        .map(|s| (s.name.as_str(), s.addresses.iter().map(String::as_str).collect()))
        .collect()
}

#[test]
fn a_file_is_a_service() {
    let (services, problems) = resolved(vec![source("a.yaml", 1, FULL)], &[]);
    assert!(problems.is_empty(), "{problems:?}");
    let [service] = &services.services[..] else { panic!("{services:?}") };
    assert_eq!(service.addresses, ["10.96.0.1", "fd96::1", "10.96.0.9"]);
    assert_eq!(service.client_ip_affinity_seconds, 600);
    assert_eq!(service.locality(), api::Locality::SameNodeFirst);
    let slices: Vec<_> = services
        .slices
        .iter()
        .map(|slice| {
            assert_eq!((&*slice.namespace, &*slice.service), ("shop", "cart"));
            let ports: Vec<_> = slice.ports.iter().map(|p| (&*p.name, p.port)).collect();
            let endpoints: Vec<_> =
                slice.endpoints.iter().map(|e| (&*e.address, e.ready, &*e.node)).collect();
            (&*slice.name, ports, endpoints)
        })
        .collect();
    let one = ("cart-0", vec![("http", 8081)], vec![("10.0.0.2", false, "")]);
    let both = vec![("10.0.0.1", true, "n1"), ("fd00::1", true, "n2")];
    let other = ("cart-1", vec![("admin", 9), ("http", 8080)], both);
    let mut expected = [one, other];
    if slices[0].1.len() == 2 {
        // The order of the slices is fixed, but nobody's business.
        expected.reverse();
        (expected[0].0, expected[1].0) = ("cart-0", "cart-1");
    }
    assert_eq!(slices, expected);
    let zones: Vec<_> = services.nodes.iter().map(|n| (&*n.name, &*n.zone)).collect();
    assert_eq!(zones, [("n1", "z1"), ("n2", "z2")]);
}

#[test]
fn a_bad_file_harms_no_other() {
    let good = text("good", "10.96.0.9");
    let bad = [
        ("", "end of input"),
        (&*FULL.replace("name: cart\n", ""), "name"),
        (&*(FULL.to_owned() + "colour: red\n"), "colour"),
        (&*FULL.replace("namespace: shop", "namespace: sh/op"), "sh/op"),
        (&*FULL.replace("10.96.0.1,", "10.96.0.256,"), "10.96.0.256"),
        (&*FULL.replace("10.96.0.1,", "127.0.0.1,"), "127.0.0.1"),
        (&*FULL.replace("10.0.0.2", "'::'"), "connect to ::"),
        (&*FULL.replace("10.0.0.2", "10.0.0.1"), "two endpoints"),
        (&*FULL.replace("port: 81", "port: 80"), "two ports"),
        (&*FULL.replace("name: admin, port", "name: http, port"), "names of ports"),
        (&*FULL.replace("port: 81", "port: 0"), "zero"),
        (&*FULL.replace("port: 81", "port: 65536"), "65536"),
        (&*FULL.replace("{http: 8081}", "{https: 8081}"), "no port \"https\""),
        (&*FULL.replace("{http: 8081}", "8081"), "name them"),
        (&*FULL.replace("{http: 8081}", "often"), "`ports` of an endpoint"),
        (&*FULL.replace("10m", "10"), "client_ip_affinity"),
        (&*FULL.replace("10m", "0s"), "whole seconds"),
        (&*FULL.replace("same-node-first", "near"), "near"),
        (&*FULL.replace("node: n1", "node: n/1"), "n/1"),
        (&*text("bad", ""), "at least one"),
    ];
    for (bad, why) in bad {
        let (services, problems) =
            resolved(vec![source("bad.yaml", 9, bad), source("good.yaml", 1, &*good)], &[]);
        assert_eq!(names(&services), [("good", vec!["10.96.0.9"])], "{bad}");
        let [problem] = &problems[..] else { panic!("{bad}: {problems:?}") };
        assert_eq!(problem.file, "bad.yaml");
        assert!(problem.reason.contains(why), "{why:?} is not in {:?}", problem.reason);
    }
}

#[test]
fn whoever_was_first_keeps_name_and_address() {
    let sources = vec![
        source("d.yaml", 1, text("other", "10.96.0.2, 10.96.0.1")),
        source("b.yaml", 2, text("cart", "10.96.0.3")),
        source("c.yaml", 9, text("cart", "10.96.0.1, 10.96.0.1")),
        source("a.yaml", 1, text("admin", "10.96.0.1").replace("port: 80", "port: 81")),
    ];
    let (services, problems) = resolved(sources.clone(), &[]);
    let expected =
        [("admin", vec!["10.96.0.1"]), ("cart", vec!["10.96.0.1"]), ("other", vec!["10.96.0.2"])];
    assert_eq!(names(&services), expected, "one address may be two services', at other ports");
    let found: Vec<_> = problems.iter().map(|p| (&*p.file, &*p.reason)).collect();
    let reasons = [
        ("b.yaml", "there is a service shop/cart already"),
        ("d.yaml", "10.96.0.1:80 is taken by c.yaml already"),
    ];
    assert_eq!(found, reasons);
    let (without, problems) = resolved(sources[..2].to_vec(), &[]);
    assert_eq!(
        names(&without),
        [("cart", vec!["10.96.0.3"]), ("other", vec!["10.96.0.2", "10.96.0.1"])]
    );
    assert!(problems.is_empty());
}

#[test]
fn a_workload_keeps_its_address() {
    let sources = vec![source("a.yaml", 9, text("cart", "10.96.0.1, '::ffff:10.0.0.7'"))];
    let (services, problems) = resolved(sources.clone(), &[("u1", "10.0.0.7")]);
    assert_eq!(names(&services), [("cart", vec!["10.96.0.1"])]);
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(problem.reason.contains("10.0.0.7") && problem.reason.contains("u1"), "{problem}");
    let (services, problems) = resolved(sources, &[("u1", "10.0.0.8")]);
    assert_eq!((names(&services)[0].1.len(), problems.len()), (2, 0));
}

#[test]
fn the_order_of_a_directory_is_nobody_s_decision() {
    let mut sources: Vec<_> = (0..6)
        .map(|n| source(&format!("{n}.yaml"), 1, text(&format!("s{n}"), "10.96.0.1")))
        .collect();
    sources.push(source("full.yaml", 1, FULL.replace("10.96.0.1", "10.96.0.2")));
    let first = resolved(sources.clone(), &[]);
    sources.reverse();
    assert_eq!(first, resolved(sources, &[]));
    assert_eq!(first.1.len(), 5);
}
