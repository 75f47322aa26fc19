//! The CA's key in a Secret, and the roots in a ConfigMap.

use std::{
    io,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::StreamExt as _;

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use pem::{EncodeConfig, LineEnding, Pem};
use rustls::pki_types::CertificateDer;

use super::rotation::{self, Rules};
use crate::{
    ca::{self, Authority, CaError},
    config::{Config, Kubernetes, OperatorCa},
    control::Control,
    files,
};

/// Who the API server notes as the owner of what is applied.
const MANAGER: &str = "nodemesh-control";

/// The key of the ConfigMap under which the roots are, and of an operator's Secret under which its
/// root is.
const ROOTS: &str = "ca.crt";

/// The key of a Secret made here: the root's key and certificate, as in `ca/root.pem` of a state
/// directory, and the roots that are trusted beside it.
pub(super) const ROOT: &str = "root.pem";

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server did not answer as needed.
    #[error("the Secret {name} can be neither read nor written")]
    Api {
        /// Namespace and name.
        name: String,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// The Secret lacks a key.
    #[error(
        "the Secret {name} has no usable `{key}`: it must have tls.crt, tls.key and ca.crt in PEM, \
         or root.pem with key and certificate; correct it, or delete it to begin with a new CA"
    )]
    Content {
        /// Namespace and name.
        name: String,
        /// The key.
        key: &'static str,
    },
    /// What the Secret has cannot be used.
    #[error("the CA in the Secret {name} cannot be used")]
    Unusable {
        /// Namespace and name.
        name: String,
        /// What is wrong with it.
        source: CaError,
    },
    /// A new CA could not be made.
    #[error("making a new CA")]
    Make(#[source] CaError),
    /// The root's time has come, but it cannot be followed by another.
    #[error("the root in the Secret {name} cannot be followed by another")]
    Rotation {
        /// Namespace and name.
        name: String,
        /// What is wrong.
        source: rotation::RotationError,
    },
    /// It was there before.
    #[error(
        "the Secret {0} is gone: the mesh goes on with the CA it had, which ends when the control \
         plane restarts; restore the Secret from a backup"
    )]
    Gone(String),
    /// The key cannot be handed to the CA.
    #[error("cannot write {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How often it is asked whether the root is to be followed by another.
const ROTATION: Duration = Duration::from_secs(60);

/// Where the CA is, and what opens it.
#[derive(Clone)]
pub struct CaSecret {
    client: Client,
    kubernetes: Kubernetes,
    config: Config,
}

impl CaSecret {
    /// `config`: as the operator wrote it, without a CA of its own.
    pub const fn new(client: Client, kubernetes: Kubernetes, config: Config) -> Self {
        Self { client, kubernetes, config }
    }

    /// Reads the CA from its Secret, or makes one that every replica then reads. Says where
    /// [`ca::open`] finds it: 0600 files in `state_dir`, which should be in memory. Below a root
    /// made here each replica makes an issuing CA of its own, so that they need not agree when to
    /// renew it.
    ///
    /// # Errors
    ///
    /// Any [`SecretError`].
    pub async fn install(&self, now: SystemTime) -> Result<Config, SecretError> {
        self.open(&self.obtain(now).await?, now).map(|(config, _)| config)
    }

    /// Takes over what the Secret says whenever that changes, and has a root made here followed by
    /// another when its time has come, for ever.
    pub async fn follow(&self, control: &Arc<Control>) {
        let events = watch_object(self.api(), &self.kubernetes.ca_secret).default_backoff();
        let mut events = pin!(events);
        let mut present = None;
        loop {
            match tokio::time::timeout(ROTATION, events.next()).await {
                Ok(Some(Ok(Some(found)))) => {
                    let taken = self.take(control, &found).await;
                    note(control, taken);
                    present = Some(found);
                }
                Ok(Some(Ok(None))) => {
                    present = None;
                    note(control, Err(SecretError::Gone(self.name())));
                }
                Ok(Some(Err(error))) => {
                    tracing::warn!(secret = self.name(), %error, "watching the CA failed");
                }
                Ok(None) => return,
                Err(_) => {}
            }
            if let Some(present) = &present
                && let Err(error) = self.rotate(control, present, SystemTime::now()).await
            {
                note(control, Err(error));
            }
        }
    }

    /// Writes the step that is due. What was written comes back as a change.
    async fn rotate(
        &self,
        control: &Control,
        present: &Secret,
        now: SystemTime,
    ) -> Result<(), SecretError> {
        let config = &self.config;
        let settle = config.svid_lifetime.max(config.node_lifetime) + 2 * config.clock_skew;
        let rules = Rules { due: control.authority().root_validity().half(), settle };
        let next = rotation::step(present, rules, now, || ca::new_root(config, now))
            .map_err(|source| SecretError::Rotation { name: self.name(), source })?;
        let Some(next) = next else { return Ok(()) };
        let name = &self.kubernetes.ca_secret;
        match self.api().replace(name, &PostParams::default(), &next).await {
            Ok(_) => {
                tracing::info!(secret = self.name(), "the root's rotation went one step further");
                Ok(())
            }
            // Another replica was first.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(self.failed(error)),
        }
    }

    async fn take(&self, control: &Arc<Control>, secret: &Secret) -> Result<(), SecretError> {
        let now = SystemTime::now();
        let (_, authority) = self.open(secret, now)?;
        let name = self.name();
        let control = Arc::clone(control);
        let set = move || control.set_authority(authority, now);
        tokio::task::spawn_blocking(set)
            .await
            .unwrap_or_else(|error| Err(CaError::Unusable(error.to_string())))
            .map_err(|source| SecretError::Unusable { name, source })
    }

    /// Opened here and not only later: it is here that it is known to come from a Secret.
    fn open(&self, secret: &Secret, now: SystemTime) -> Result<(Config, Authority), SecretError> {
        let config = self.place(secret)?;
        ca::open(&config, now)
            .map(|authority| (config, authority))
            .map_err(|source| SecretError::Unusable { name: self.name(), source })
    }

    fn place(&self, secret: &Secret) -> Result<Config, SecretError> {
        let mut config = self.config.clone();
        let missing = |key| SecretError::Content { name: self.name(), key };
        let content = |key| secret.data.as_ref().and_then(|data| data.get(key));
        if let Some(ByteString(pem)) = content(ROOT) {
            let pem = std::str::from_utf8(pem).map_err(|_| missing(ROOT))?;
            ca::put_root(&config, pem)
                .map_err(|source| SecretError::Unusable { name: self.name(), source })?;
        } else {
            let dir = config.state_dir.join("ca-secret");
            files::private_dir(&dir)
                .map_err(|source| SecretError::File { path: dir.clone(), source })?;
            let put = |key| {
                let content = content(key).filter(|ByteString(bytes)| !bytes.is_empty());
                let ByteString(bytes) = content.ok_or_else(|| missing(key))?;
                let path = dir.join(key);
                files::replace(&path, bytes)
                    .map(|()| path.clone())
                    .map_err(|source| SecretError::File { path, source })
            };
            config.ca =
                Some(OperatorCa { cert: put("tls.crt")?, key: put("tls.key")?, root: put(ROOTS)? });
        }
        Ok(config)
    }

    async fn obtain(&self, now: SystemTime) -> Result<Secret, SecretError> {
        let (api, secret_name) = (self.api(), &self.kubernetes.ca_secret);
        let failed = |error| self.failed(error);
        if let Some(found) = api.get_opt(secret_name).await.map_err(failed)? {
            return Ok(found);
        }
        let pem = ca::new_root(&self.config, now).map_err(SecretError::Make)?;
        let secret = Secret {
            metadata: ObjectMeta { name: Some(secret_name.clone()), ..ObjectMeta::default() },
            data: Some([(ROOT.to_owned(), ByteString(pem.into_bytes()))].into()),
            ..Secret::default()
        };
        match api.create(&PostParams::default(), &secret).await {
            Ok(created) => {
                let secret = self.name();
                tracing::info!(secret, "made the root of a new mesh: keep a backup of it");
                Ok(created)
            }
            // Another replica was first: its CA is the one.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                api.get(secret_name).await.map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn api(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.kubernetes.namespace)
    }

    fn name(&self) -> String {
        format!("{}/{}", self.kubernetes.namespace, self.kubernetes.ca_secret)
    }

    fn failed(&self, source: kube::Error) -> SecretError {
        SecretError::Api { name: self.name(), source: Box::new(source) }
    }
}

/// For the log, and for `status` until it is right again.
fn note(control: &Control, result: Result<(), SecretError>) {
    let trouble = result.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
    if let Some(trouble) = &trouble {
        tracing::error!("{trouble}");
    }
    control.set_secret_trouble(trouble);
}

/// Tells agents which roots to trust before they join.
///
/// # Errors
///
/// What the API server says.
pub async fn publish_roots(
    client: &Client,
    kubernetes: &Kubernetes,
    roots: &[CertificateDer<'static>],
) -> Result<(), kube::Error> {
    let pem: Vec<_> = roots.iter().map(|root| Pem::new("CERTIFICATE", root.to_vec())).collect();
    let pem = pem::encode_many_config(&pem, EncodeConfig::new().set_line_ending(LineEnding::LF));
    let name = &kubernetes.bundle_config_map;
    let map = ConfigMap {
        metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
        data: Some([(ROOTS.to_owned(), pem)].into()),
        ..ConfigMap::default()
    };
    let api = Api::<ConfigMap>::namespaced(client.clone(), &kubernetes.namespace);
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::{Arc, Mutex},
    };

    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::scripted::scripted;

    const PATH: &str = "/api/v1/namespaces/nodemesh-system/secrets";

    fn config(dir: &tempfile::TempDir) -> Config {
        let path = dir.path().join("config.yaml");
        let state = dir.path().join("state");
        files::private_dir(&state).unwrap();
        let text = format!("trust_domain: mesh.example\nstate_dir: {}", state.display());
        fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    }

    async fn ca(client: &Client, dir: &tempfile::TempDir) -> Result<Vec<u8>, String> {
        let now = SystemTime::now();
        let secret = CaSecret::new(client.clone(), Kubernetes::default(), config(dir));
        // As it is shown to the operator.
        let config = secret
            .install(now)
            .await
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        let authority = ca::open(&config, now).map_err(|error| error.to_string())?;
        Ok(authority.root().to_vec())
    }

    #[tokio::test]
    async fn replicas_that_race_have_one_ca() {
        let stored = Arc::new(Mutex::new((None::<Value>, 0, 0)));
        let script = Arc::clone(&stored);
        let client = scripted(move |method, path, body| {
            let mut state = script.lock().unwrap();
            match method {
                // The first two see nothing: both want to create it.
                "GET" if state.1 < 2 => {
                    assert_eq!(path, format!("{PATH}/nodemesh-ca"));
                    state.1 += 1;
                    (404, json!({"status": "Failure", "code": 404, "reason": "NotFound"}))
                }
                "GET" => (200, state.0.clone().unwrap()),
                "POST" if state.0.is_none() => {
                    assert_eq!((path, &body["metadata"]["name"]), (PATH, &json!("nodemesh-ca")));
                    state.0 = Some(body.clone());
                    (201, body.clone())
                }
                "POST" => {
                    state.2 += 1;
                    (409, json!({"status": "Failure", "code": 409, "reason": "AlreadyExists"}))
                }
                other => panic!("unexpected: {other}"),
            }
        });
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (a, b) = tokio::join!(ca(&client, &dirs[0]), ca(&client, &dirs[1]));
        assert_eq!(a.unwrap(), b.unwrap());
        assert_eq!(stored.lock().unwrap().2, 1, "one of them was told of the conflict");
    }

    /// A Secret with these texts.
    fn secret(data: &[(&str, &str)]) -> Client {
        let data = data.iter().map(|(key, text)| {
            let bytes = ByteString(text.as_bytes().to_vec());
            ((*key).to_owned(), serde_json::to_value(bytes).unwrap())
        });
        let answer = json!({"data": data.collect::<serde_json::Map<_, _>>()});
        scripted(move |method, _, _| {
            assert_eq!(method, "GET");
            (200, answer.clone())
        })
    }

    #[tokio::test]
    async fn a_root_made_here_signs_by_an_issuing_ca_that_renews_itself() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let pems = [0, 1].map(|_| ca::new_root(&config(&dir), now).unwrap());
        let mut roots = Vec::new();
        // The second one finds the issuer that the first one left.
        for pem in &pems {
            roots.push(ca(&secret(&[("root.pem", pem)]), &dir).await.unwrap());
            let authority = ca::open(&config(&dir), now).unwrap();
            assert!(authority.renews_itself());
            assert_eq!(&authority.root().to_vec(), roots.last().unwrap());
        }
        assert_ne!(roots[0], roots[1]);
    }

    #[tokio::test]
    async fn the_operator_s_own_ca_is_used_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let pem = ca::new_root(&config(&dir), SystemTime::now()).unwrap();
        let (key, certificate) = pem.split_at(pem.find("-----BEGIN CERTIFICATE").unwrap());
        let data = [("tls.crt", certificate), ("tls.key", key), ("ca.crt", certificate)];
        let root = ca(&secret(&data), &dir).await.unwrap();
        assert_eq!(root, crate::bundle::certificates(certificate).unwrap()[0].to_vec());
        assert!(!dir.path().join("state/ca").exists(), "no CA of our own");
    }

    #[tokio::test]
    async fn a_secret_that_is_no_ca_is_one_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let pem = ca::new_root(&config(&dir), SystemTime::now()).unwrap();
        for (data, reason) in [
            (&[("tls.crt", "x")][..], "no usable `tls.key`"),
            (&[("tls.crt", "x"), ("tls.key", ""), ("ca.crt", "x")], "no usable `tls.key`"),
            (&[("tls.crt", &pem), ("tls.key", &pem)], "no usable `ca.crt`"),
            (&[("tls.crt", "x"), ("tls.key", &pem), ("ca.crt", &pem)], "no certificate in it"),
            (&[("root.pem", "x")], "no certificate in it"),
            (&[], "no usable `tls.crt`"),
        ] {
            let error = ca(&secret(data), &dir).await.unwrap_err();
            assert!(error.contains("Secret nodemesh-system/nodemesh-ca"), "{error}");
            assert!(error.contains(reason), "{reason}: {error}");
        }
    }

    #[tokio::test]
    async fn a_forbidden_secret_makes_no_new_ca() {
        let dir = tempfile::tempdir().unwrap();
        let client = scripted(|method, _, _| {
            assert_eq!(method, "GET");
            (403, json!({"status": "Failure", "code": 403, "reason": "Forbidden"}))
        });
        ca(&client, &dir).await.unwrap_err();
    }

    /// The Secret, its resource version, and how many writes were refused for a stale one.
    #[derive(Default)]
    struct Stored {
        secret: Value,
        version: u64,
        refused: u64,
    }

    /// An API server that keeps one Secret as a real one does.
    fn keeping(stored: &Arc<Mutex<Stored>>) -> Client {
        let stored = Arc::clone(stored);
        scripted(move |method, path, body| {
            let mut stored = stored.lock().unwrap();
            let version = stored.version;
            match method {
                "GET" if path.contains("watch=") => {
                    let seen = path.contains(&format!("resourceVersion={version}"));
                    let event = json!({"type": "MODIFIED", "object": stored.secret});
                    (200, Value::Array(if seen { Vec::new() } else { vec![event] }))
                }
                "GET" if path.ends_with("/secrets") => {
                    let metadata = json!({"resourceVersion": version.to_string()});
                    (200, json!({"metadata": metadata, "items": [stored.secret]}))
                }
                "PUT" if body["metadata"]["resourceVersion"] != *version.to_string() => {
                    stored.refused += 1;
                    (409, json!({"status": "Failure", "code": 409, "reason": "Conflict"}))
                }
                "PUT" => {
                    stored.put(body.clone());
                    (200, body.clone())
                }
                "GET" => (200, stored.secret.clone()),
                other => panic!("unexpected: {other}"),
            }
        })
    }

    impl Stored {
        fn put(&mut self, secret: Value) {
            self.version += 1;
            self.secret = secret;
            self.secret["metadata"]["resourceVersion"] = json!(self.version.to_string());
        }
    }

    async fn replica(client: &Client, dir: &tempfile::TempDir) -> (CaSecret, Arc<Control>) {
        let ca = CaSecret::new(client.clone(), Kubernetes::default(), config(dir));
        let now = SystemTime::now();
        let control = Arc::new(Control::open(ca.install(now).await.unwrap(), now).unwrap());
        let (following, followed) = (ca.clone(), Arc::clone(&control));
        tokio::spawn(async move { following.follow(&followed).await });
        (ca, control)
    }

    async fn until(what: impl Fn() -> bool) {
        let reached = async {
            while !what() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached).await.unwrap();
    }

    #[tokio::test]
    async fn replicas_follow_one_root_by_another() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut now = SystemTime::now();
        let pem = ca::new_root(&config(&dirs[0]), now).unwrap();
        let annotations = json!({"nodemesh.io/rotate-root": ""});
        let metadata = json!({"name": "nodemesh-ca", "annotations": annotations});
        let data = json!({ROOT: ByteString(pem.into_bytes())});
        let stored = Arc::new(Mutex::new(Stored::default()));
        stored.lock().unwrap().put(json!({"metadata": metadata, "data": data}));
        let client = keeping(&stored);
        let replicas = [replica(&client, &dirs[0]).await, replica(&client, &dirs[1]).await];
        let roots = || replicas.each_ref().map(|(_, control)| control.view().bundle.roots.clone());
        let old = replicas[0].1.authority().root().clone();
        until(|| roots().iter().all(|roots| roots.len() == 2)).await;
        let new = roots()[0][1].clone();
        assert_eq!(roots()[0], [old.clone(), new.clone()], "the old one still signs");
        assert_eq!(roots()[1], roots()[0], "both replicas trust what one has made");

        for expected in [vec![new.clone(), old], vec![new]] {
            now += Duration::from_secs(3 * 24 * 60 * 60);
            let secret: Secret =
                serde_json::from_value(stored.lock().unwrap().secret.clone()).unwrap();
            let before = stored.lock().unwrap().refused;
            // Both have read the same; one of them is first.
            for (ca, control) in &replicas {
                ca.rotate(control, &secret, now).await.unwrap();
            }
            assert_eq!(stored.lock().unwrap().refused, before + 1);
            until(|| roots().iter().all(|roots| *roots == expected)).await;
            for (_, control) in &replicas {
                assert_eq!(*control.authority().root(), expected[0]);
                assert_eq!(control.identity().cert.last(), Some(&expected[0]));
            }
        }
    }

    #[tokio::test]
    async fn a_secret_that_is_damaged_later_changes_nothing_and_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let pem = ca::new_root(&config(&dir), SystemTime::now()).unwrap();
        let secret = |pem: &str| {
            let data = json!({ROOT: ByteString(pem.as_bytes().to_vec())});
            json!({"metadata": {"name": "nodemesh-ca"}, "data": data})
        };
        let stored = Arc::new(Mutex::new(Stored::default()));
        stored.lock().unwrap().put(secret(&pem));
        let (_, control) = replica(&keeping(&stored), &dir).await;
        let root = control.authority().root().clone();
        stored.lock().unwrap().put(secret("x"));
        until(|| !control.ca_trouble().is_empty()).await;
        assert!(control.ca_trouble()[0].contains("nodemesh-system/nodemesh-ca"));
        assert_eq!(*control.authority().root(), root);
        stored.lock().unwrap().put(secret(&pem));
        until(|| control.ca_trouble().is_empty()).await;
    }

    #[tokio::test]
    async fn roots_are_applied() {
        let client = scripted(|method, path, body| {
            let expected = "/api/v1/namespaces/nodemesh-system/configmaps/nodemesh-bundle";
            assert_eq!((method, path), ("PATCH", expected));
            let published = body["data"]["ca.crt"].as_str().unwrap();
            let found = crate::bundle::certificates(published).unwrap();
            assert_eq!(found, [vec![1; 99].into(), vec![2; 99].into()]);
            (200, body.clone())
        });
        let roots = [vec![1; 99].into(), vec![2; 99].into()];
        publish_roots(&client, &Kubernetes::default(), &roots).await.unwrap();
    }
}
