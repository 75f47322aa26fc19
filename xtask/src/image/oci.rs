//! Container images as values, and the archive that carries them: the OCI image layout (image-spec
//! 1.1) in a tar. The same images make the same bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// One image, of one layer.
#[derive(Debug)]
pub(super) struct Image {
    /// Repository and tag.
    pub(super) name: String,
    /// What it runs.
    pub(super) entrypoint: PathBuf,
    /// `uid:gid` that runs it.
    pub(super) user: String,
    /// All that is in it.
    pub(super) files: Vec<File>,
}

/// An executable file, or a library.
#[derive(Debug)]
pub(super) struct File {
    /// Its absolute path in the image.
    pub(super) place: PathBuf,
    /// Its bytes.
    pub(super) content: Vec<u8>,
}

/// The archive with these images.
pub(super) fn archive(images: &[Image]) -> Result<Vec<u8>> {
    let mut blobs = Blobs::default();
    let manifests = images.iter().map(|image| image.add_to(&mut blobs));
    let manifests = manifests.collect::<Result<Vec<_>>>()?;
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    blobs.tar.file(Path::new("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    blobs.tar.file(Path::new("index.json"), index.to_string().as_bytes(), 0o644)?;
    blobs.tar.finish()
}

impl Image {
    /// Adds the blobs of this image, and returns its entry in the index.
    fn add_to(&self, blobs: &mut Blobs) -> Result<Value> {
        let mut layer = Tar::default();
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by(|a, b| a.place.cmp(&b.place));
        for File { place, content } in files {
            let place = place.strip_prefix("/").context("a file's place is absolute")?;
            layer.file(place, content, 0o755)?;
        }
        let layer = layer.finish()?;
        // Uncompressed: the layer is its own diff.
        let diff = digest(&layer);
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "User": self.user, "Entrypoint": [self.entrypoint] },
            "rootfs": { "type": "layers", "diff_ids": [diff] },
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blobs.add(CONFIG, config.to_string().as_bytes())?,
            "layers": [blobs.add(LAYER, &layer)?],
        });
        let mut entry = blobs.add(MANIFEST, manifest.to_string().as_bytes())?;
        // containerd takes an image's name from the first, other tools from the second.
        let name = |key| (String::from(key), Value::from(self.name.as_str()));
        let names = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
        entry["annotations"] = Value::Object(names.into_iter().map(name).collect());
        entry["platform"] = json!({ "architecture": architecture(), "os": "linux" });
        Ok(entry)
    }
}

/// This machine's architecture, as Go calls it and so the OCI does.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What is stored by its digest, once.
#[derive(Default)]
struct Blobs {
    tar: Tar,
    known: BTreeSet<String>,
}

impl Blobs {
    fn add(&mut self, media_type: &str, content: &[u8]) -> Result<Value> {
        let digest = digest(content);
        if self.known.insert(digest.clone()) {
            let place = PathBuf::from("blobs").join(digest.replace(':', "/"));
            self.tar.file(&place, content, 0o644)?;
        }
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": content.len() }))
    }
}

fn digest(content: &[u8]) -> String {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A tar that says nothing about when, where and by whom it was made.
#[derive(Default)]
struct Tar {
    builder: Option<Builder<Vec<u8>>>,
    directories: BTreeSet<PathBuf>,
}

impl Tar {
    fn file(&mut self, place: &Path, content: &[u8], mode: u32) -> Result<()> {
        let mut above: Vec<_> =
            place.ancestors().skip(1).filter(|d| !d.as_os_str().is_empty()).collect();
        above.reverse();
        for directory in above {
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, EntryType::Directory, 0o755, &[])?;
            }
        }
        self.entry(place, EntryType::Regular, mode, content)
    }

    fn entry(&mut self, place: &Path, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        self.builder
            .get_or_insert_with(|| Builder::new(Vec::new()))
            .append_data(&mut header, place, content)
            .with_context(|| format!("adding {}", place.display()))
    }

    fn finish(self) -> Result<Vec<u8>> {
        let builder = self.builder.unwrap_or_else(|| Builder::new(Vec::new()));
        builder.into_inner().context("finishing a tar")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    fn image(name: &str, program: &[u8]) -> Image {
        let file =
            |place: &str, content: &[u8]| File { place: place.into(), content: content.to_vec() };
        Image {
            name: format!("nodemesh.io/{name}:1"),
            entrypoint: "/bin/program".into(),
            user: "1:2".to_owned(),
            files: vec![file("/lib64/ld.so", b"linker"), file("/bin/program", program)],
        }
    }

    fn entries(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut tar = tar::Archive::new(archive);
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        };
        tar.entries().unwrap().map(read).collect()
    }

    fn json(entries: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Value {
        serde_json::from_slice(blob(entries, descriptor)).unwrap()
    }

    fn blob<'a>(entries: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> &'a [u8] {
        let digest_named = descriptor["digest"].as_str().unwrap();
        let content = &entries[&format!("blobs/{}", digest_named.replace(':', "/"))];
        assert_eq!(digest(content), digest_named);
        assert_eq!(descriptor["size"], content.len());
        content
    }

    #[test]
    fn everything_is_found_by_its_digest_from_the_index_on() {
        let archive = archive(&[image("one", b"1"), image("two", b"2")]).unwrap();
        let found = entries(&archive);
        let index: Value = serde_json::from_slice(&found["index.json"]).unwrap();
        let [one, two] = index["manifests"].as_array().unwrap().as_slice() else {
            panic!("two images");
        };
        assert_eq!(one["annotations"]["io.containerd.image.name"], "nodemesh.io/one:1");
        for (descriptor, program) in [(one, b"1"), (two, b"2")] {
            let manifest = json(&found, descriptor);
            let config = json(&found, &manifest["config"]);
            assert_eq!(config["config"]["User"], "1:2");
            assert_eq!(config["config"]["Entrypoint"], json!(["/bin/program"]));
            let layer = blob(&found, &manifest["layers"][0]);
            assert_eq!(config["rootfs"]["diff_ids"], json!([digest(layer)]));
            let files = entries(layer);
            let names: Vec<_> = files.keys().map(String::as_str).collect();
            assert_eq!(names, ["bin", "bin/program", "lib64", "lib64/ld.so"]);
            assert_eq!(files["bin/program"], program);
        }
    }

    #[test]
    fn the_same_images_make_the_same_bytes_in_whatever_order_their_files_come() {
        let mut turned = image("one", b"1");
        turned.files.reverse();
        assert_eq!(archive(&[image("one", b"1")]).unwrap(), archive(&[turned]).unwrap());
        let other = archive(&[image("one", b"2")]).unwrap();
        assert_ne!(archive(&[image("one", b"1")]).unwrap(), other);
    }
}
