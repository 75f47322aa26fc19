use super::*;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use tempfile::TempDir;

/// Far longer than anything here takes on a loaded machine.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(90);

/// Not as this program would write it.
const LIST: &str =
    "{\"name\":\"n\",  \"cniVersion\":\"1.0.0\",\n \"plugins\":[{\"type\":\"ptp\"}] }";
const LONE: &str = "{ \"type\": \"ptp\", \"name\": \"n\",\"cniVersion\": \"0.3.1\" }\n\n";

struct Node {
    root: TempDir,
    installation: Installation,
}

impl Node {
    fn new(networks: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for name in ["bin", "net.d", "account"] {
            fs::create_dir(path(name)).unwrap();
        }
        for (name, content) in [("token", "t1\n"), ("ca.crt", "CA\n"), ("namespace", "mesh")] {
            fs::write(path("account").join(name), content).unwrap();
        }
        let places =
            Places { bin_dir: path("bin"), conf_dir: path("net.d"), state_dir: path("state") };
        let installation = Installation {
            places,
            admin_socket: "/run/agent.sock".into(),
            api_server: Some("https://192.0.2.1:6443".to_owned()),
            service_account: path("account"),
            node: None,
            watch: false,
        };
        let node = Self { root, installation };
        networks.iter().for_each(|(name, text)| node.write(name, text));
        node
    }

    fn network(&self, name: &str) -> PathBuf {
        self.root.path().join("net.d").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.network(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.network(name)).unwrap()
    }

    /// The types of a network's plugins.
    fn plugins(&self, name: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.read(name)).unwrap();
        let plugins = list["plugins"].as_array().unwrap();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.path().join("net.d")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn kubeconfig(&self) -> Value {
        let text = fs::read(self.installation.places.kubeconfig()).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    async fn install(&self) -> Result<(), InstallError> {
        self.installation.install().await
    }

    fn uninstall(&self) {
        self.installation.places.uninstall().unwrap();
    }
}

#[tokio::test]
async fn the_plugin_comes_into_the_first_list_once_and_goes_without_a_trace() {
    let node = Node::new(&[("10-a.conflist", LIST), ("20-b.conflist", LIST), ("note.txt", "x")]);
    fs::set_permissions(node.network("10-a.conflist"), fs::Permissions::from_mode(0o640)).unwrap();
    node.install().await.unwrap();
    assert_eq!(node.plugins("10-a.conflist"), ["ptp", PLUGIN_NAME]);
    assert_eq!(node.read("20-b.conflist"), LIST);
    let installed: Value = serde_json::from_str(&node.read("10-a.conflist")).unwrap();
    let entry = &installed["plugins"][1];
    assert_eq!(entry["namespace"], "mesh");
    assert_eq!(entry["admin_socket"], "/run/agent.sock");

    let kubeconfig = node.kubeconfig();
    assert_eq!(kubeconfig["users"][0]["user"]["token"], "t1");
    assert_eq!(kubeconfig["clusters"][0]["cluster"]["server"], "https://192.0.2.1:6443");
    kube::config::Kubeconfig::read_from(node.installation.places.kubeconfig()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&node.installation.places.kubeconfig()), 0o600);
    assert_eq!(mode(&node.installation.places.state_dir), 0o700);
    assert_eq!(mode(&node.installation.places.binary()), 0o755);
    assert_eq!(mode(&node.network("10-a.conflist")), 0o640);

    let inode = || fs::metadata(node.network("10-a.conflist")).unwrap().ino();
    let before = inode();
    node.install().await.unwrap();
    assert_eq!(inode(), before, "there was nothing to do");

    node.uninstall();
    assert_eq!(node.read("10-a.conflist"), LIST);
    assert_eq!(mode(&node.network("10-a.conflist")), 0o640);
    assert_eq!(node.names(), ["10-a.conflist", "20-b.conflist", "note.txt"]);
    assert!(!node.installation.places.state_dir.exists());
    assert!(!node.installation.places.binary().exists());
    node.uninstall();
}

#[tokio::test]
async fn a_lone_plugin_becomes_a_list_for_as_long_as_the_plugin_is_there() {
    for name in ["10-a.conf", "10-a.json"] {
        let node = Node::new(&[(name, LONE)]);
        node.install().await.unwrap();
        assert_eq!(node.names(), ["10-a.conflist"]);
        assert_eq!(node.plugins("10-a.conflist"), ["ptp", PLUGIN_NAME]);
        // Its owner writes it again, and it would come first.
        node.write(name, LONE);
        node.install().await.unwrap();
        assert_eq!(node.names(), ["10-a.conflist"]);
        node.uninstall();
        assert_eq!(node.names(), [name]);
        assert_eq!(node.read(name), LONE);
    }
}

#[tokio::test]
async fn what_cannot_be_used_is_named_and_stays_as_it_is() {
    for (text, word) in [
        ("{", "not JSON"),
        ("[]", "no name"),
        (r#"{"name":"n","cniVersion":"1.0.0","plugins":[]}"#, "no list of plugins"),
        (r#"{"name":"n","cniVersion":"1.0.0","plugins":[{}]}"#, "no list of plugins"),
        (r#"{"name":"n","cniVersion":"0.2.0","plugins":[{"type":"ptp"}]}"#, "0.2.0"),
    ] {
        let node = Node::new(&[("10-a.conflist", text), ("20-b.conflist", LIST)]);
        let error = node.install().await.unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("10-a.conflist"), "{error}");
        assert_eq!((node.read("10-a.conflist").as_str(), node.names().len()), (text, 2));
        assert_eq!(node.read("20-b.conflist"), LIST);
        node.uninstall();
        assert_eq!(node.read("10-a.conflist"), text);
    }
    let node = Node::new(&[]);
    let error = node.install().await.unwrap_err().to_string();
    assert!(error.contains("CNI plugin first"), "{error}");
    let node = Node::new(&[("10-a.conf", LONE), ("10-a.conflist", LIST)]);
    let error = node.install().await.unwrap_err().to_string();
    assert!(error.contains("two networks"), "{error}");
    assert_eq!((node.read("10-a.conf"), node.read("10-a.conflist")), (LONE.into(), LIST.into()));
    fs::write(node.root.path().join("account/token"), "\n").unwrap();
    let error = node.install().await.unwrap_err().to_string();
    assert!(error.contains("token is empty"), "{error}");
}

#[tokio::test]
async fn what_others_changed_meanwhile_stays_changed() {
    let mut node = Node::new(&[("10-a.conflist", LIST)]);
    node.install().await.unwrap();
    // Ours in a new form: the original is what it was.
    node.installation.admin_socket = "/run/other.sock".into();
    node.install().await.unwrap();
    assert_eq!(node.plugins("10-a.conflist"), ["ptp", PLUGIN_NAME]);
    assert!(node.read("10-a.conflist").contains("/run/other.sock"));
    node.uninstall();
    assert_eq!(node.read("10-a.conflist"), LIST);

    node.install().await.unwrap();
    let mut list: Value = serde_json::from_str(&node.read("10-a.conflist")).unwrap();
    list["plugins"].as_array_mut().unwrap().push(serde_json::json!({"type": "portmap"}));
    node.write("10-a.conflist", &list.to_string());
    node.install().await.unwrap();
    assert_eq!(node.plugins("10-a.conflist"), ["ptp", PLUGIN_NAME, "portmap"]);
    node.uninstall();
    assert_eq!(node.plugins("10-a.conflist"), ["ptp", "portmap"]);
}

#[tokio::test]
async fn the_plugin_follows_the_network_that_the_runtime_uses() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    node.install().await.unwrap();
    node.write("05-b.conf", LONE);
    node.install().await.unwrap();
    assert_eq!(node.plugins("05-b.conflist"), ["ptp", PLUGIN_NAME]);
    assert_eq!(node.read("10-a.conflist"), LIST);
    node.uninstall();
    assert_eq!(node.read("05-b.conf"), LONE);
    assert_eq!(node.names(), ["05-b.conf", "10-a.conflist"]);
}

#[tokio::test]
async fn the_binary_stays_for_as_long_as_a_network_names_it() {
    let other = "{ \"name\": \"m\", \"cniVersion\": \"1.0.0\", \"type\": \"multus\",\
                 \"delegates\": [{\"plugins\": [{\"type\": \"nodemesh-cni\"}]}] }";
    for (name, text) in [("20-m.conf", other), ("20-b.conflist", "{ \"nodemesh-cni\"")] {
        let node = Node::new(&[("10-a.conflist", LIST)]);
        fs::create_dir(node.network("00-directory.conf")).unwrap();
        node.install().await.unwrap();
        node.write(name, text);
        for _ in 0..2 {
            let error = node.installation.places.uninstall().unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("by hand"), "{error}");
            assert!(node.installation.places.binary().exists());
            assert!(node.installation.places.kubeconfig().exists());
            assert_eq!(
                (node.read("10-a.conflist").as_str(), node.read(name).as_str()),
                (LIST, text)
            );
        }
        fs::remove_file(node.network(name)).unwrap();
        node.uninstall();
        assert!(!node.installation.places.binary().exists());
    }
}

#[tokio::test]
async fn what_a_crash_left_unfinished_goes() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    node.install().await.unwrap();
    for directory in ["bin", "net.d", "state"] {
        fs::write(node.root.path().join(directory).join(".nodemesh-cni-x"), "").unwrap();
    }
    node.uninstall();
    assert_eq!(node.names(), ["10-a.conflist"]);
    assert!(!node.installation.places.state_dir.exists());
    assert_eq!(fs::read_dir(node.root.path().join("bin")).unwrap().count(), 0);
}

/// An installation that goes on, until dropped.
struct Keeping(tokio::task::JoinHandle<Result<(), InstallError>>);

impl Keeping {
    fn start(node: &mut Node) -> Self {
        node.installation.watch = true;
        let installation = node.installation.clone();
        Self(tokio::spawn(async move { installation.install().await }))
    }

    async fn end(self) {
        assert!(!self.0.is_finished());
        self.0.abort();
        assert!(self.0.await.unwrap_err().is_cancelled());
    }
}

async fn until(holds: impl Fn() -> bool) {
    let polling = async {
        while !holds() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, polling).await.expect("it should have happened");
}

#[tokio::test]
async fn what_is_overwritten_comes_back() {
    let mut node = Node::new(&[]);
    let keeping = Keeping::start(&mut node);
    // Its network comes late, as when a cluster is made.
    until(|| node.installation.places.kubeconfig().exists()).await;
    node.write("10-a.conflist", LIST);
    until(|| node.read("10-a.conflist").contains(PLUGIN_NAME)).await;

    let newer = LIST.replace("ptp", "bridge");
    node.write("10-a.conflist", &newer);
    until(|| node.read("10-a.conflist").contains(PLUGIN_NAME)).await;
    assert_eq!(node.plugins("10-a.conflist"), ["bridge", PLUGIN_NAME]);

    let binary = node.installation.places.binary();
    let is_there = || fs::metadata(&binary).is_ok_and(|found| found.mode() & 0o777 == 0o755);
    fs::remove_file(&binary).unwrap();
    until(is_there).await;
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o600)).unwrap();
    until(is_there).await;
    keeping.end().await;
    node.uninstall();
    assert_eq!(node.read("10-a.conflist"), newer);
}

#[tokio::test]
async fn nobody_uninstalls_what_is_being_kept() {
    let mut node = Node::new(&[("10-a.conflist", LIST)]);
    let keeping = Keeping::start(&mut node);
    until(|| node.read("10-a.conflist").contains(PLUGIN_NAME)).await;
    let installed = node.read("10-a.conflist");
    for refused in [node.installation.places.uninstall(), {
        let once = Installation { watch: false, ..node.installation.clone() };
        once.install().await
    }] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("end it first"), "{error}");
    }
    assert!(node.installation.places.binary().exists());
    assert_eq!(node.read("10-a.conflist"), installed);
    keeping.end().await;
    node.uninstall();
}

#[tokio::test]
async fn without_an_answer_the_plugin_keeps_its_token_and_its_place() {
    let mut node = Node::new(&[("10-a.conflist", LIST)]);
    let turn = || Turn::take(&node.installation.places.bin_dir).unwrap();
    node.installation.apply(&mut turn(), None).unwrap();
    assert_eq!(node.read("10-a.conflist"), LIST, "nobody is named who cannot ask");

    node.installation.apply(&mut turn(), Some("bound to the node")).unwrap();
    node.write("10-a.conflist", LIST);
    node.installation.apply(&mut turn(), None).unwrap();
    assert_eq!(node.plugins("10-a.conflist"), ["ptp", PLUGIN_NAME]);
    assert_eq!(node.kubeconfig()["users"][0]["user"]["token"], "bound to the node");

    // The pod's own token is not for the plugin then.
    node.installation.node = Some("n1".to_owned());
    node.installation.api_server = Some("https://127.0.0.1:1".to_owned());
    let root = rcgen::generate_simple_self_signed(Vec::new()).unwrap().cert.pem();
    fs::write(node.root.path().join("account/ca.crt"), root).unwrap();
    let error = node.install().await.unwrap_err().to_string();
    assert!(error.contains("nodemesh-cni"), "{error}");
    assert_eq!(node.kubeconfig()["users"][0]["user"]["token"], "bound to the node");
}

/// As the kubelet does it: `token` is a link through `..data`, which is replaced by renaming.
fn rotate(account: &Path, generation: &str) {
    use std::os::unix::fs::symlink;
    let directory = account.join(generation);
    fs::create_dir(&directory).unwrap();
    for (name, content) in [("token", generation), ("ca.crt", "CA"), ("namespace", "mesh")] {
        fs::write(directory.join(name), content).unwrap();
        let link = account.join(name);
        if !link.is_symlink() {
            drop(fs::remove_file(&link));
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    symlink(generation, account.join("..data_tmp")).unwrap();
    fs::rename(account.join("..data_tmp"), account.join("..data")).unwrap();
}

#[tokio::test]
async fn a_new_token_is_used() {
    let mut node = Node::new(&[("10-a.conflist", LIST)]);
    let account = node.root.path().join("account");
    rotate(&account, "..1");
    let keeping = Keeping::start(&mut node);
    let token = || node.kubeconfig()["users"][0]["user"]["token"].clone();
    until(|| node.installation.places.kubeconfig().exists()).await;
    assert_eq!(token(), "..1");
    rotate(&account, "..2");
    until(|| token() == "..2").await;
    keeping.end().await;
}

/// The directory's own path leads elsewhere, of which inotify says nothing. Time is simulated, and
/// goes on when everybody waits.
#[tokio::test(start_paused = true)]
async fn a_new_token_is_used_within_a_minute_if_inotify_is_silent() {
    use std::os::unix::fs::symlink;
    let mut node = Node::new(&[("10-a.conflist", LIST)]);
    let path = |name: &str| node.root.path().join(name);
    for name in ["before", "after"] {
        fs::create_dir(path(name)).unwrap();
        rotate(&path(name), name);
    }
    symlink("before", path("link")).unwrap();
    let account = path("link");
    node.installation.service_account = account;
    let keeping = Keeping::start(&mut node);
    until(|| node.installation.places.kubeconfig().exists()).await;
    let token = || node.kubeconfig()["users"][0]["user"]["token"].clone();
    // Whatever inotify had to say of the installation itself has been heard.
    until(|| node.read("10-a.conflist").contains(PLUGIN_NAME)).await;
    assert_eq!(token(), "before");

    let (new, link) = (node.root.path().join("new"), node.root.path().join("link"));
    symlink("after", &new).unwrap();
    fs::rename(new, link).unwrap();
    let start = tokio::time::Instant::now();
    until(|| token() == "after").await;
    assert!(start.elapsed() <= std::time::Duration::from_secs(60), "{:?}", start.elapsed());
    keeping.end().await;
}
