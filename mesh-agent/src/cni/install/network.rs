//! Network configurations with the plugin in them, and without.

use serde_json::{Value, json};

use super::super::{PLUGIN_NAME, protocol::VERSIONS};

/// Why a file is no network configuration that the plugin can be added to.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It does not parse.
    #[error("it is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// It parses.
    #[error("it is no network configuration of CNI: {0}")]
    Content(&'static str),
    /// The plugin would refuse each pod.
    #[error(
        "its cniVersion {0:?} is none of those that nodemesh-cni supports: {versions}",
        versions = VERSIONS.join(", ")
    )]
    Version(String),
}

/// A list of plugins, as a `.conflist` has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Network(Value);

impl Network {
    /// Reads a list, or makes one of a lone plugin as runtimes do.
    pub(super) fn parse(text: &[u8]) -> Result<Self, NetworkError> {
        let read: Value = serde_json::from_slice(text)?;
        if !read["name"].is_string() {
            return Err(NetworkError::Content("it has no name"));
        }
        let list = if read.get("plugins").is_some() {
            read
        } else {
            json!({ "cniVersion": read["cniVersion"], "name": read["name"], "plugins": [read] })
        };
        let plugins = list["plugins"].as_array().map_or(&[][..], Vec::as_slice);
        if plugins.is_empty() || !plugins.iter().all(|plugin| plugin["type"].is_string()) {
            return Err(NetworkError::Content("it has no list of plugins with a type each"));
        }
        let version = list["cniVersion"].as_str().unwrap_or_default();
        if !VERSIONS.contains(&version) {
            return Err(NetworkError::Version(version.to_owned()));
        }
        Ok(Self(list))
    }

    pub(super) fn has_plugin(&self) -> bool {
        self.plugins().iter().any(is_ours)
    }

    /// With one entry of the plugin: where it was, or at the end.
    pub(super) fn with_plugin(&self, entry: &Value) -> Self {
        let mut plugins = self.plugins().to_vec();
        match plugins.iter().position(is_ours) {
            Some(place) => plugins[place] = entry.clone(),
            None => plugins.push(entry.clone()),
        }
        self.with(plugins)
    }

    pub(super) fn without_plugin(&self) -> Self {
        self.with(self.plugins().iter().filter(|plugin| !is_ours(plugin)).cloned().collect())
    }

    /// What is written.
    pub(super) fn to_text(&self) -> String {
        format!("{:#}\n", self.0)
    }

    fn with(&self, plugins: Vec<Value>) -> Self {
        let mut list = self.0.clone();
        list["plugins"] = plugins.into();
        Self(list)
    }

    fn plugins(&self) -> &[Value] {
        self.0["plugins"].as_array().map_or(&[], Vec::as_slice)
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN_NAME
}
