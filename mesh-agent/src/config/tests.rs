use super::*;

const MINIMAL: &str = "control_plane: [mesh-control:9464]\ncluster_ranges: [10.0.0.0/8]\n";

fn load(text: &str) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Config::load(file.path())
}

/// With these variables and no others.
fn load_in(text: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let find = |name: &str| environment.iter().find(|(found, _)| *found == name);
    let environment = |name: &str| find(name).map(|(_, value)| (*value).to_owned());
    Config::load_in(file.path(), &environment).map_err(|error| error.to_string())
}

/// What the operator reads when `extra` is added to a configuration that is fine without it.
fn refusal(extra: &str) -> String {
    load(MINIMAL).unwrap();
    let error = load(&format!("{MINIMAL}{extra}")).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn the_example_is_valid_and_its_comments_are_the_defaults() {
    let example = include_str!("../../config.example.yaml");
    let as_shipped = load(example).unwrap();
    let mut spelled_out: String = example
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            // A commented-out key or a line of its block, as opposed to prose.
            Some(code) if code.starts_with(' ') || is_key(code) => format!("{code}\n"),
            Some(_) | None => format!("{line}\n"),
        })
        .collect();
    let spelled = load(&spelled_out).unwrap();
    assert_eq!(spelled.limits, as_shipped.limits);
    assert_eq!(spelled.timeouts, as_shipped.timeouts);
    assert_eq!(spelled.log, as_shipped.log);
    assert_eq!(spelled.admin_socket(), as_shipped.admin_socket());
    // The keys whose default depends on the machine or is "none" are shown with an example.
    let expected = Config {
        node: "node-1".to_owned(),
        admin_socket: Some(DEFAULT_ADMIN_SOCKET.into()),
        cgroup: Some("/sys/fs/cgroup".into()),
        workers: NonZeroUsize::new(4),
        ingress: spelled.ingress.clone(),
        kubernetes: Some(Kubernetes::default()),
        ..as_shipped
    };
    assert_eq!(spelled, expected);
    assert_eq!(spelled.ingress.plaintext.len(), 1);
    assert_eq!(spelled.ingress.host_probes, as_shipped.ingress.host_probes);
    spelled_out.push_str("nodes: x\n");
    assert!(load(&spelled_out).is_err());
}

fn is_key(line: &str) -> bool {
    line.split_once(':').is_some_and(|(key, _)| {
        !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    })
}

#[test]
fn what_has_no_default_is_required() {
    for key in ["control_plane", "cluster_ranges"] {
        let text: String = MINIMAL
            .lines()
            .filter(|line| !line.starts_with(key))
            .map(|l| format!("{l}\n"))
            .collect();
        let error = load(&text).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn unknown_keys_are_named_with_their_place() {
    for (extra, key, place) in [
        ("egres: allow\n", "egres", "line 3"),
        ("timeouts: {dail: 1s}\n", "dail", "line 3"),
        ("ingress:\n  plaintext:\n    - ranges: [10.0.0.0/8]\n      port: 1\n", "port", "line 6"),
    ] {
        let error = refusal(extra);
        assert!(error.contains(key) && error.contains(place), "{error}");
    }
}

#[test]
fn bad_values_are_refused_with_their_place() {
    for (extra, word) in [
        ("node: a/b\n", "a/b"),
        ("runtime_dir: run\n", "absolute"),
        ("http_listen: localhost\n", "socket address"),
        ("egress: maybe\n", "maybe"),
        ("udp: 1\n", "1"),
        ("workers: 0\n", "0"),
        ("limits: {connections_per_pod: 0}\n", "0"),
        ("timeouts: {handshake: 0s}\n", "zero"),
        ("timeouts: {handshake: 5}\n", "5"),
        ("log: {level: \"mesh=loud\"}\n", "loud"),
        ("node: ''\n", "is no name"),
        ("kubernetes: {namespace: a/b}\n", "a/b"),
        ("kubernetes: {bundle_file: ca.crt}\n", "absolute"),
        ("kubernetes: {audience: x}\n", "audience"),
        ("ingress: {plaintext: [{ranges: [10.0.0.0/8], ports: []}]}\n", "empty"),
        ("ingress: {plaintext: [{ranges: [], ports: [1]}]}\n", "empty"),
        ("ingress: {plaintext: [{ranges: [10.0.0.1/8], ports: [1]}]}\n", "10.0.0.0/8"),
        ("ingress: {plaintext: [{ranges: ['::ffff:a00:0/104'], ports: [1]}]}\n", "IPv4"),
        ("ingress: {plaintext: [{ranges: [10.0.0.0/8], ports: [0]}]}\n", "0"),
    ] {
        let error = refusal(extra);
        assert!(error.contains(word) && error.contains("line 3"), "{extra}: {error}");
    }
}

#[test]
fn endpoints_are_parsed_once() {
    for (text, host, port) in [
        ("mesh-control.example:9464", "mesh-control.example", 9464),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("[2001:db8::1]:9464", "2001:db8::1", 9464),
    ] {
        let endpoint: Endpoint = text.parse().unwrap();
        assert_eq!((endpoint.host(), endpoint.port()), (host, port));
        assert_eq!(endpoint.to_string(), text);
    }
    for text in ["", "host", "host:", ":1", "host:0", "host:65536", "2001:db8::1:1", "[x]:1", "1:2"]
    {
        assert!(text.parse::<Endpoint>().is_err(), "{text}");
    }
}

const IN_A_POD: &str = "kubernetes: {}\ncluster_ranges: [10.0.0.0/8]\n";
const HOST: &str = "NODEMESH_CONTROL_SERVICE_HOST";
const PORT: &str = "NODEMESH_CONTROL_SERVICE_PORT";

#[test]
fn in_a_cluster_the_kubelet_says_where_the_control_plane_is() {
    for (host, expected) in [("10.96.0.7", "10.96.0.7:8443"), ("fd00:96::7", "[fd00:96::7]:8443")] {
        let config = load_in(IN_A_POD, &[(HOST, host), (PORT, "8443")]).unwrap();
        assert_eq!(config.control_plane, [expected.parse().unwrap()]);
        assert_eq!(config.kubernetes, Some(Kubernetes::default()));
    }
    let named = format!("{IN_A_POD}control_plane: [other:1]\n");
    let config = load_in(&named, &[(HOST, "10.96.0.7"), (PORT, "8443")]).unwrap();
    assert_eq!(config.control_plane, ["other:1".parse().unwrap()]);

    for (environment, word) in [
        (&[][..], "is there a Service nodemesh-control"),
        (&[(HOST, "10.96.0.7")], "is there a Service nodemesh-control"),
        (&[(HOST, "10.96.0.7"), (PORT, "tcp://10.96.0.7:8443")], HOST),
    ] {
        let error = load_in(IN_A_POD, environment).unwrap_err();
        assert!(error.contains("`control_plane`") && error.contains(word), "{error}");
    }
    let elsewhere = "cluster_ranges: [10.0.0.0/8]\n";
    let error = load_in(elsewhere, &[(HOST, "10.96.0.7"), (PORT, "8443")]).unwrap_err();
    assert!(error.contains("host:port"), "{error}");
}

#[test]
fn the_node_s_name_is_the_configuration_s_the_cluster_s_or_the_host_s() {
    let in_a_pod = |more: &str| format!("{MINIMAL}kubernetes: {{}}\n{more}");
    let node = |text: &str, name: &str| load_in(text, &[("NODE_NAME", name)]).map(|c| c.node);
    assert_eq!(node(&in_a_pod(""), "n1").unwrap(), "n1");
    assert_eq!(node(&in_a_pod("node: n2\n"), "n1").unwrap(), "n2");
    let host = load_in(MINIMAL, &[]).unwrap().node;
    assert_eq!(node(MINIMAL, "n1").unwrap(), host, "outside of a cluster it is nobody's word");
    assert_eq!(load_in(&in_a_pod(""), &[]).unwrap().node, host);
    let error = node(&in_a_pod(""), "n/1").unwrap_err();
    assert!(error.contains("NODE_NAME") && error.contains("n/1"), "{error}");
}

#[test]
fn the_runtime_directory_is_private_or_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let root = tempfile::tempdir().unwrap();
    let mut config = load(MINIMAL).unwrap();
    config.runtime_dir = root.path().join("a/b");
    config.prepare_runtime_dir().unwrap();
    assert_eq!(fs::metadata(&config.runtime_dir).unwrap().mode() & 0o7777, 0o700);
    config.prepare_runtime_dir().unwrap();

    fs::set_permissions(&config.runtime_dir, fs::Permissions::from_mode(0o750)).unwrap();
    let error = config.prepare_runtime_dir().unwrap_err().to_string();
    assert!(error.contains("0750") && error.contains("0700"), "{error}");

    let link = root.path().join("link");
    fs::set_permissions(&config.runtime_dir, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(&config.runtime_dir, &link).unwrap();
    config.runtime_dir = link;
    config.prepare_runtime_dir().unwrap_err();
}
