use super::*;

const MINIMAL: &str = "control_plane: [mesh-control:9464]\ncluster_ranges: [10.0.0.0/8]\n";

fn load(text: &str) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Config::load(file.path())
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
