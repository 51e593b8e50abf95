//! What a model is made of, as it stands in a TOML or JSON file.

mod presets;

pub use presets::{preset, preset_names};

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thalweg_layers::channel_mixer::ChannelMixerConfig;
use thalweg_layers::error::positive_number;
use thalweg_layers::{MixerConfig, Site};

use crate::error::{Error, Result};

/// How a block adds what its halves compute to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// `x + f(norm(x))`.
    #[default]
    PreNorm,
    /// `x + a * f(x)` with a trained scalar `a` that starts at 0 (Bachlechner et al. 2020, arXiv:2003.04887).
    Rezero,
}

/// A hybrid stack: a pattern of sequence mixers, repeated, each followed by a channel mixer.
///
/// ```toml
/// hidden_size = 192
/// layers = 8
/// pattern = ["gated_delta_net", "gated_delta_net", "gated_delta_net", "attention"]
///
/// [mixers.gated_delta_net]
/// num_heads = 3
///
/// [mixers.attention]
/// num_heads = 6
/// ```
///
/// The entries of `pattern` are names of tables in `mixers`; a table without `type` is of the type that it is called
/// after, and a name without a table is the mixer of that type with its defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of token ids. Default: that of the tokenizer or task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks. Default: one pattern. The pattern is repeated and cut off as needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Names of the mixers of the blocks.
    pub pattern: Vec<String>,
    /// Options of the mixers by name.
    #[serde(default)]
    pub mixers: BTreeMap<String, MixerConfig>,
    /// The channel mixer of all blocks that have none of their own.
    #[serde(default)]
    pub channel_mixer: ChannelMixerConfig,
    /// Channel mixers of blocks by the name of their sequence mixer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub channel_mixers: BTreeMap<String, ChannelMixerConfig>,
    /// Form of the residual blocks.
    #[serde(default)]
    pub residual: Residual,
    /// Whether the head is the embedding.
    #[serde(default = "yes")]
    pub tie_embeddings: bool,
    /// What embeddings are multiplied with. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_scale: Option<f64>,
    /// Logits become `cap * tanh(logits / cap)`. Default: no cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits_soft_cap: Option<f64>,
    /// Epsilon of the norms.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Standard deviation of fresh projections and embeddings.
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
}

fn yes() -> bool {
    true
}

fn norm_eps() -> f64 {
    1e-6
}

fn initializer_range() -> f64 {
    0.02
}

impl ModelConfig {
    /// A stack of `pattern` at width `hidden_size` with defaults for the rest.
    pub fn new(hidden_size: usize, pattern: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            vocab_size: None,
            hidden_size,
            layers: None,
            pattern: pattern.into_iter().map(Into::into).collect(),
            mixers: BTreeMap::new(),
            channel_mixer: ChannelMixerConfig::default(),
            channel_mixers: BTreeMap::new(),
            residual: Residual::default(),
            tie_embeddings: true,
            embedding_scale: None,
            logits_soft_cap: None,
            norm_eps: norm_eps(),
            initializer_range: initializer_range(),
        }
    }

    /// Sets the number of token ids.
    #[must_use]
    pub fn with_vocab_size(self, vocab_size: usize) -> Self {
        Self { vocab_size: Some(vocab_size), ..self }
    }

    /// Sets the number of blocks.
    #[must_use]
    pub fn with_layers(self, layers: usize) -> Self {
        Self { layers: Some(layers), ..self }
    }

    /// Sets the options of the mixer that the pattern calls `name`.
    #[must_use]
    pub fn with_mixer(mut self, name: impl Into<String>, mixer: MixerConfig) -> Self {
        self.mixers.insert(name.into(), mixer);
        self
    }

    /// Reads a `.toml` or `.json` file and checks it.
    ///
    /// # Errors
    /// If the file cannot be read or a field is unknown, missing, of the wrong type, or has a value that cannot be used.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Self::from_toml(&text),
            Some("json") => Self::from_json(&text),
            _ => Err(Error::argument("config", format!("{} ends neither in .toml nor in .json", path.display()))),
        }
    }

    /// Reads TOML text. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_toml(text: &str) -> Result<Self> {
        let value: Value = toml::from_str(text)
            .map_err(|error| Error::argument("config", format!("is not TOML: {}", one_line(&error.to_string()))))?;
        Self::from_value(value)
    }

    /// Reads JSON text. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_json(text: &str) -> Result<Self> {
        let value =
            serde_json::from_str(text).map_err(|error| Error::argument("config", format!("is not JSON: {error}")))?;
        Self::from_value(value)
    }

    pub(crate) fn from_value(mut value: Value) -> Result<Self> {
        if let Some(Value::Object(mixers)) = value.get_mut("mixers") {
            for (name, options) in mixers {
                if let Value::Object(options) = options {
                    options.entry("type").or_insert_with(|| Value::String(name.clone()));
                }
            }
        }
        let config: Self = serde_path_to_error::deserialize(value).map_err(|error| {
            let path = match error.path().to_string() {
                path if path == "." => "top level".to_owned(),
                path => path,
            };
            Error::config(path, one_line(&error.inner().to_string()))
        })?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML.
    ///
    /// # Errors
    /// If a number cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::argument("config", error.to_string()))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in
            [("vocab_size", self.vocab_size), ("hidden_size", Some(self.hidden_size)), ("layers", self.layers)]
        {
            if value == Some(0) {
                return Err(Error::config(field, "must be at least 1, got 0"));
            }
        }
        for (field, value) in [
            ("embedding_scale", self.embedding_scale),
            ("logits_soft_cap", self.logits_soft_cap),
            ("norm_eps", Some(self.norm_eps)),
            ("initializer_range", Some(self.initializer_range)),
        ] {
            if let Some(value) = value {
                positive_number(field, value)?;
            }
        }
        if self.pattern.is_empty() {
            return Err(Error::config("pattern", "names no mixer"));
        }
        for (table, names) in [
            ("mixers", self.mixers.keys().collect::<Vec<_>>()),
            ("channel_mixers", self.channel_mixers.keys().collect()),
        ] {
            if let Some(name) = names.into_iter().find(|name| !self.pattern.contains(name)) {
                return Err(Error::config(format!("{table}.{name}"), "is not in the pattern"));
            }
        }
        for layer in 0..self.layers() {
            let (name, site) = (self.name(layer), self.site(layer));
            self.mixer(layer)?.validate(&site).map_err(|error| error.within(&format!("mixers.{name}")))?;
            let table = if self.channel_mixers.contains_key(name) {
                format!("channel_mixers.{name}")
            } else {
                "channel_mixer".to_owned()
            };
            self.channel_mixer(layer).validate(&site).map_err(|error| error.within(&table))?;
        }
        self.lower_bound_features()?;
        Ok(())
    }

    /// Features of the lower bounds that HGRN and HGRN2 share over all layers; `None` without such layers.
    pub(crate) fn lower_bound_features(&self) -> Result<Option<usize>> {
        let mut shared = None;
        for layer in 0..self.layers() {
            let Some(features) = self.mixer(layer)?.lower_bound_features(&self.site(layer)) else { continue };
            if let Some(other) = shared.replace(features)
                && other != features
            {
                let message =
                    format!("has {features} forget gates, a layer before it {other}; they share lower bounds");
                return Err(Error::config(format!("mixers.{}.expand_ratio", self.name(layer)), message));
            }
        }
        Ok(shared)
    }

    /// Number of blocks.
    pub fn layers(&self) -> usize {
        self.layers.unwrap_or(self.pattern.len())
    }

    /// Name of the mixer of block `layer`.
    fn name(&self, layer: usize) -> &str {
        &self.pattern[layer % self.pattern.len()]
    }

    /// Where block `layer` stands.
    pub fn site(&self, layer: usize) -> Site {
        Site::new(self.hidden_size)
            .at(layer, self.layers())
            .with_initializer_range(self.initializer_range)
            .with_norm_eps(self.norm_eps)
    }

    /// Options of the sequence mixer of block `layer`.
    ///
    /// # Errors
    /// If the pattern names a mixer that has no table and is not a type.
    pub fn mixer(&self, layer: usize) -> Result<MixerConfig> {
        let name = self.name(layer);
        if let Some(mixer) = self.mixers.get(name) {
            return Ok(mixer.clone());
        }
        MixerConfig::from_kind(name).map_err(|error| {
            let field = format!("pattern[{}]", layer % self.pattern.len());
            Error::config(field, format!("`{name}` is neither a table in `mixers` nor a type: {}", error.message))
        })
    }

    /// Options of the channel mixer of block `layer`.
    pub fn channel_mixer(&self, layer: usize) -> &ChannelMixerConfig {
        self.channel_mixers.get(self.name(layer)).unwrap_or(&self.channel_mixer)
    }
}

/// Messages of parsers, which point into the text over several lines, as one line.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        hidden_size = 64
        layers = 4
        pattern = ["gated_delta_net", "local"]
        residual = "rezero"
        tie_embeddings = false
        logits_soft_cap = 30.0
        [mixers.gated_delta_net]
        [mixers.local]
        type = "attention"
        window = 16
        [channel_mixers.local]
        type = "geglu"
    "#;

    #[test]
    fn toml_and_json_round_trip() {
        let config = ModelConfig::from_toml(TEXT).unwrap();
        assert_eq!(config.layers(), 4);
        assert_eq!(config.mixer(1).unwrap(), config.mixer(3).unwrap());
        assert_ne!(config.mixer(0).unwrap(), config.mixer(1).unwrap());
        assert_ne!(config.channel_mixer(0), config.channel_mixer(1));
        assert_eq!(ModelConfig::from_toml(&config.to_toml().unwrap()).unwrap(), config);
        assert_eq!(ModelConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn errors_name_the_field() {
        for (from, to, field) in [
            ("layers = 4", "layres = 4", "layres"),
            ("layers = 4", "layers = \"4\"", "layers"),
            ("layers = 4", "layers = 0", "layers"),
            ("hidden_size = 64", "", "hidden_size"),
            ("window = 16", "windw = 16", "mixers.local"),
            ("window = 16", "window = 0", "mixers.local.window"),
            ("\"gated_delta_net\", \"local\"", "\"local\", \"global\", \"gated_delta_net\"", "pattern[1]"),
            ("\"gated_delta_net\", \"local\"", "\"local\"", "mixers.gated_delta_net"),
            ("type = \"geglu\"", "type = \"gelu\"", "channel_mixers.local"),
            ("logits_soft_cap = 30.0", "logits_soft_cap = -1.0", "logits_soft_cap"),
            ("logits_soft_cap = 30.0", "logits_soft_cap = 1e-50", "logits_soft_cap"),
            ("logits_soft_cap = 30.0", "norm_eps = 1e-50", "norm_eps"),
        ] {
            assert!(TEXT.contains(from), "{from}");
            let error = ModelConfig::from_toml(&TEXT.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(field) && !error.contains('\n'), "{field}: {error}");
        }
    }

    #[test]
    fn files_are_told_apart_by_their_ending() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.yaml");
        std::fs::write(&path, TEXT).unwrap();
        assert!(ModelConfig::load(&path).unwrap_err().to_string().contains(".toml"));
        let path = folder.path().join("model.toml");
        std::fs::write(&path, TEXT).unwrap();
        assert_eq!(ModelConfig::load(&path).unwrap(), ModelConfig::from_toml(TEXT).unwrap());
    }
}
