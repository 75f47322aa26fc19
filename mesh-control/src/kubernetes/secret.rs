//! The CA's key in a Secret, and the roots in a ConfigMap.

use std::{io, path::PathBuf, time::SystemTime};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use pem::{EncodeConfig, LineEnding, Pem};
use rustls::pki_types::CertificateDer;

use crate::{
    ca::{self, CaError},
    config::{Config, Kubernetes, OperatorCa},
    files,
};

/// Who the API server notes as the owner of what is applied.
const MANAGER: &str = "nodemesh-control";

/// The key of the ConfigMap under which the roots are, and of an operator's Secret under which its
/// root is.
const ROOTS: &str = "ca.crt";

/// The key of a Secret made here: the root's key and certificate, as in `ca/root.pem` of a state
/// directory.
const ROOT: &str = "root.pem";

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server did not answer as needed.
    #[error("the Secret {name} can be neither read nor made")]
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
    /// The key cannot be handed to the CA.
    #[error("cannot write {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Reads the CA from its Secret, or makes one that every replica then reads, and puts it where
/// [`ca::open`] finds it: 0600 files in `state_dir`, which should be in memory. Below a root made
/// here each replica makes an issuing CA of its own, so that they need not agree when to renew it.
///
/// # Errors
///
/// Any [`SecretError`].
pub async fn install(
    client: &Client,
    kubernetes: &Kubernetes,
    config: &mut Config,
    now: SystemTime,
) -> Result<(), SecretError> {
    let name = format!("{}/{}", kubernetes.namespace, kubernetes.ca_secret);
    let secret = obtain(client, kubernetes, config, now, &name).await?;
    let data = secret.data.unwrap_or_default();
    let unusable = |source| SecretError::Unusable { name: name.clone(), source };
    if let Some(ByteString(pem)) = data.get(ROOT) {
        let pem = std::str::from_utf8(pem)
            .map_err(|_| SecretError::Content { name: name.clone(), key: ROOT })?;
        ca::put_root(config, pem).map_err(unusable)?;
    } else {
        let dir = config.state_dir.join("ca-secret");
        files::private_dir(&dir)
            .map_err(|source| SecretError::File { path: dir.clone(), source })?;
        let put = |key| {
            let content = data.get(key).filter(|ByteString(bytes)| !bytes.is_empty());
            let ByteString(bytes) =
                content.ok_or_else(|| SecretError::Content { name: name.clone(), key })?;
            let path = dir.join(key);
            files::replace(&path, bytes)
                .map(|()| path.clone())
                .map_err(|source| SecretError::File { path, source })
        };
        config.ca =
            Some(OperatorCa { cert: put("tls.crt")?, key: put("tls.key")?, root: put(ROOTS)? });
    }
    // Opened once more later: only here is it known that it came from a Secret.
    ca::open(config, now).map(drop).map_err(unusable)
}

async fn obtain(
    client: &Client,
    kubernetes: &Kubernetes,
    config: &Config,
    now: SystemTime,
    name: &str,
) -> Result<Secret, SecretError> {
    let api = Api::<Secret>::namespaced(client.clone(), &kubernetes.namespace);
    let failed =
        |source: kube::Error| SecretError::Api { name: name.to_owned(), source: Box::new(source) };
    if let Some(found) = api.get_opt(&kubernetes.ca_secret).await.map_err(failed)? {
        return Ok(found);
    }
    let pem = ca::new_root(config, now).map_err(SecretError::Make)?;
    let secret = Secret {
        metadata: ObjectMeta { name: Some(kubernetes.ca_secret.clone()), ..ObjectMeta::default() },
        data: Some([(ROOT.to_owned(), ByteString(pem.into_bytes()))].into()),
        ..Secret::default()
    };
    match api.create(&PostParams::default(), &secret).await {
        Ok(created) => {
            tracing::info!(secret = name, "made the root of a new mesh: keep a backup of it");
            Ok(created)
        }
        // Another replica was first: its CA is the one.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            api.get(&kubernetes.ca_secret).await.map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
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
        fs::create_dir_all(&state).unwrap();
        let text = format!("trust_domain: mesh.example\nstate_dir: {}", state.display());
        fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    }

    async fn ca(client: &Client, dir: &tempfile::TempDir) -> Result<Vec<u8>, String> {
        let (mut config, now) = (config(dir), SystemTime::now());
        let installed = install(client, &Kubernetes::default(), &mut config, now).await;
        // As it is shown to the operator.
        installed.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
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
