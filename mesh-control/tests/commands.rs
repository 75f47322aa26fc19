//! The real binary, as an operator uses it.
#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mesh-control");

struct Server {
    dir: tempfile::TempDir,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn config(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("config.yaml");
    let base = dir.path().display();
    let text = format!(
        "trust_domain: mesh.example\nstate_dir: {base}/state\nadmin_socket: {base}/run/admin.sock\n\
         listen: 127.0.0.1:0\nhttp_listen: 127.0.0.1:0\n"
    );
    fs::write(&path, text).unwrap();
    path
}

fn run(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("run").arg("--config").arg(config(dir)).stderr(Stdio::piped());
    command
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = run(&dir).stderr(Stdio::null()).spawn().unwrap();
        let mut server = Self { dir, child };
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.command(&["status"]).status.code() == Some(2) {
            assert!(server.child.try_wait().unwrap().is_none(), "the server ended");
            assert!(Instant::now() < deadline, "the server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn command(&self, arguments: &[&str]) -> Output {
        let socket = self.dir.path().join("run/admin.sock");
        let mut command = Command::new(PROGRAM);
        command.args(arguments).arg("--admin-socket").arg(socket).output().unwrap()
    }

    fn register(&self, uid: &str, address: &str) -> Output {
        self.command(&[
            "register",
            "--uid",
            uid,
            "--name",
            "cart-0",
            "--namespace",
            "shop",
            "--service-account",
            "cart",
            "--node",
            "n1",
            "--address",
            address,
        ])
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn an_operator_registers_and_deregisters() {
    let server = Server::start();
    let status = server.command(&["status"]);
    assert_eq!(status.status.code(), Some(0), "{}", text(&status.stdout));
    assert!(server.register("u1", "10.0.0.1").status.success());
    let conflict = server.register("u2", "10.0.0.1");
    assert_eq!(conflict.status.code(), Some(1));
    assert!(text(&conflict.stderr).contains("u1"), "{}", text(&conflict.stderr));

    let status = server.command(&["status", "--json"]);
    assert_eq!(status.status.code(), Some(1), "no agent for that workload");
    let json: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&json["workloads"], &json["nodes_without_agent"][0]), (&1.into(), &"n1".into()));

    assert!(server.command(&["deregister", "u1"]).status.success());
    assert_eq!(server.command(&["deregister", "u1"]).status.code(), Some(1));
    assert_eq!(server.command(&["status"]).status.code(), Some(0));
}

#[test]
fn a_workload_may_come_from_a_file() {
    let server = Server::start();
    let path = server.dir.path().join("cart.yaml");
    let good =
        "uid: u1\nname: a\nnamespace: b\nservice_account: c\nnode: n1\naddresses: [fd00::1]\n";
    fs::write(&path, good).unwrap();
    let register = || server.command(&["register", "--file", path.to_str().unwrap()]);
    assert!(register().status.success());
    fs::write(&path, good.replace("node: n1\n", "")).unwrap();
    let refused = register();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("node"), "{}", text(&refused.stderr));
    let file = path.to_str().unwrap();
    let both = server.command(&["register", "--file", file, "--uid", "u2"]);
    assert_eq!(both.status.code(), Some(64));
}

#[test]
fn tokens_are_printed_alone() {
    let server = Server::start();
    let created = server.command(&["token", "create", "--node", "n1", "--ttl", "5m"]);
    assert!(created.status.success());
    let token: mesh_common::join::JoinToken = text(&created.stdout).parse().unwrap();
    assert_eq!(token.node, "n1");
    assert_eq!(text(&created.stdout).lines().count(), 1);
    let bad = server.command(&["token", "create", "--node", "../n1"]);
    assert_eq!(bad.status.code(), Some(1));
}

#[test]
fn the_socket_is_root_s() {
    let server = Server::start();
    let socket = server.dir.path().join("run/admin.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    // Also when the permissions are opened by mistake.
    assert!(nix::unistd::geteuid().is_root(), "run the tests as root");
    let program = server.dir.path().join("mesh-control");
    // By another process: what this one has open for writing, a child of another test could still
    // have open when it is to be run.
    let copied = Command::new("cp").arg(PROGRAM).arg(&program).status().unwrap();
    assert!(copied.success());
    for (path, mode) in [(server.dir.path(), 0o755), (&socket, 0o666), (&program, 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let as_user = |uid| {
        let mut command = Command::new(&program);
        command.args(["status", "--admin-socket"]).arg(&socket).uid(uid).gid(uid);
        command.output().unwrap().status.code()
    };
    assert_eq!((as_user(65534), as_user(0)), (Some(2), Some(0)));
}

#[test]
fn a_server_that_was_killed_starts_again_and_two_never_run_at_once() {
    let mut server = Server::start();
    server.register("u1", "10.0.0.1");
    let second = run(&server.dir).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("another mesh-control"), "{}", text(&second.stderr));

    server.child.kill().unwrap();
    server.child.wait().unwrap();
    assert_eq!(server.command(&["status"]).status.code(), Some(2));
    server.child = run(&server.dir).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !server.command(&["deregister", "u1"]).status.success() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = nix::unistd::Pid::from_raw(server.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn a_bad_configuration_is_one_line_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(&dir);
    let content = fs::read_to_string(&path).unwrap() + "colour: red\n";
    fs::write(&path, content).unwrap();
    let output = Command::new(PROGRAM).arg("run").arg("--config").arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let error = text(&output.stderr);
    assert!(error.contains("colour") && error.contains("line 6"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let nothing = Command::new(PROGRAM).output().unwrap();
    assert_eq!(nothing.status.code(), Some(64));
    assert!(Command::new(PROGRAM).arg("--help").output().unwrap().status.success());
}
