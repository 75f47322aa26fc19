use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;

fn source(file: &str, age: u64, text: impl Into<String>) -> Source {
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 - age);
    Source { file: file.to_owned(), modified, content: Ok(text.into()) }
}

fn text(uid: &str, address: &str) -> String {
    format!(
        "uid: {uid}\nname: cart-0\nnamespace: shop\nservice_account: cart\nnode: n1\n\
         addresses: [{address}]\n"
    )
}

fn uids(registry: &Registry) -> Vec<&str> {
    registry.workloads().map(|workload| workload.uid.as_str()).collect()
}

fn files(registry: &Registry) -> Vec<&str> {
    registry.problems().iter().map(|problem| problem.file.as_str()).collect()
}

#[test]
fn a_file_is_a_workload() {
    let registry = Registry::resolve(vec![source("a.yaml", 1, text("u1", "10.0.0.1, 'fd00::1'"))]);
    let workload = registry.get("u1").unwrap();
    let td = "mesh.example".parse().unwrap();
    assert_eq!(workload.id(&td).unwrap().to_string(), "spiffe://mesh.example/ns/shop/sa/cart");
    assert_eq!(workload.to_api().addresses, ["10.0.0.1", "fd00::1"]);
    assert_eq!(registry.file("u1"), Some("a.yaml"));
    let again = serde_saphyr::to_string(workload).unwrap();
    assert_eq!(&parse(&again).unwrap(), workload);
}

#[test]
fn a_bad_file_harms_no_other() {
    let good = text("u1", "10.0.0.1");
    let bad = [
        String::new(),
        "{".to_owned(),
        "- a".to_owned(),
        good.replace("node: n1\n", ""),
        good.clone() + "colour: red\n",
        good.clone() + "node: n2\n",
        text("../u2", "10.0.0.2"),
        text(".u2", "10.0.0.2"),
        text(&"u".repeat(129), "10.0.0.2"),
        text("u2", ""),
        text("u2", "10.0.0.256"),
        text("u2", "10.0.0.2/32"),
        text("u2", "127.0.0.1"),
        text("u2", "'::'"),
        text("u2", "224.0.0.1"),
        text(
            "u2",
            "10.0.1.1,10.0.1.2,10.0.1.3,10.0.1.4,10.0.1.5,10.0.1.6,10.0.1.7,10.0.1.8,10.0.1.9",
        ),
        text("u2", "10.0.0.2").replace("shop", "sh/op"),
    ];
    for bad in bad {
        let registry = Registry::resolve(vec![
            source("bad.yaml", 9, bad.clone()),
            source("good.yaml", 1, good.clone()),
        ]);
        assert_eq!((uids(&registry), files(&registry)), (vec!["u1"], vec!["bad.yaml"]), "{bad}");
    }
}

#[test]
fn unreadable_is_not_registered() {
    let unreadable = Source { content: Err("denied".to_owned()), ..source("a.yaml", 1, "") };
    let registry = Registry::resolve(vec![unreadable]);
    assert_eq!((uids(&registry), files(&registry)), (vec![], vec!["a.yaml"]));
}

#[test]
fn the_first_written_keeps_its_uid_and_addresses() {
    let old = source("z.yaml", 9, text("u1", "10.0.0.1"));
    let same_uid = source("a.yaml", 1, text("u1", "10.0.0.9"));
    let same_address = source("b.yaml", 1, text("u2", "10.0.0.8, '::ffff:10.0.0.1'"));
    let registry = Registry::resolve(vec![same_uid, same_address, old]);
    assert_eq!(registry.get("u1").unwrap().addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!((uids(&registry), files(&registry)), (vec!["u1"], vec!["a.yaml", "b.yaml"]));
    assert!(registry.problems()[1].reason.contains("z.yaml"), "{:?}", registry.problems());
}

#[test]
fn a_refused_file_takes_the_place_when_it_is_free() {
    let first = source("a.yaml", 9, text("u1", "10.0.0.1"));
    let second = source("b.yaml", 1, text("u2", "10.0.0.1"));
    let before = Registry::resolve(vec![first, second.clone()]);
    let after = Registry::resolve(vec![second]);
    assert_eq!(uids(&after), ["u2"]);
    let changes = before.changes(&after);
    assert_eq!((changes.added.len(), changes.removed.len()), (1, 1));
    assert_eq!((changes.changed.len(), changes.problems.len()), (0, 0));
}

#[test]
fn changes_name_what_changed() {
    let before = Registry::resolve(vec![source("a.yaml", 9, text("u1", "10.0.0.1"))]);
    let after = Registry::resolve(vec![
        source("a.yaml", 9, text("u1", "10.0.0.2")),
        source("b.yaml", 9, "?"),
    ]);
    let changes = before.changes(&after);
    assert_eq!((changes.changed.len(), changes.problems.len()), (1, 1));
    assert_eq!((changes.added.len(), changes.removed.len()), (0, 0));
}

#[test]
fn registration_is_refused_before_it_is_written() {
    let registry = Registry::resolve(vec![source("a.yaml", 9, text("u1", "10.0.0.1"))]);
    let workload = |uid, address| parse(&text(uid, address)).unwrap();
    registry.admits(&workload("u2", "10.0.0.2"), "u2.yaml").unwrap();
    registry.admits(&workload("u1", "10.0.0.2"), "a.yaml").unwrap();
    registry.admits(&workload("u1", "10.0.0.2"), "u1.yaml").unwrap_err();
    registry.admits(&workload("u2", "10.0.0.1"), "u2.yaml").unwrap_err();
}

proptest! {
    /// The order in which a directory is listed is nobody's decision.
    #[test]
    fn resolving_is_deterministic_and_never_doubles_an_address(
        claims in prop::collection::vec((0u8..4, 0u8..4, 0u64..3), 0..8),
        seed in any::<u64>(),
    ) {
        let sources: Vec<_> = claims.iter().enumerate().map(|(i, (uid, address, age))| {
            source(&format!("f{i}.yaml"), *age, text(&format!("u{uid}"), &format!("10.0.0.{address}")))
        }).collect();
        let mut shuffled = sources.clone();
        shuffled.sort_by_key(|s| (s.file.len() as u64).wrapping_mul(seed) ^ seed.rotate_left(s.file.as_bytes()[1].into()));
        let registry = Registry::resolve(sources);
        prop_assert_eq!(&registry, &Registry::resolve(shuffled));
        let mut all: Vec<_> = registry.workloads().flat_map(|w| w.addresses.clone()).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        prop_assert_eq!(all.len(), count);
        prop_assert_eq!(registry.workloads().len() + registry.problems().len(), claims.len());
    }
}
