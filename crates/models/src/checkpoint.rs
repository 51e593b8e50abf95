//! Checkpoints: folders that are either whole or not there.
//!
//! A run's folder holds `step-00001000/` and its like, each with
//!
//! | file | what |
//! |---|---|
//! | `model.safetensors` | parameters by name (see [`crate::params`]) |
//! | `config.toml` | the model's configuration |
//! | `tokenizer.json` | absent if the model was trained on a synthetic task |
//! | `tokenizer_config.json` | the token between documents, if it is not one that is looked for anyway |
//! | `optimizer.bpk` | the optimizer's state, in Burn's format |
//! | `training.toml` | the step and the options of the run; the position in the data follows from them |
//! | `manifest.json` | size and hash of the others |
//!
//! Numbers that a run goes on with are in TOML, whose floats are read exactly as they were written. A checkpoint is written
//! to a folder with another name and renamed when all of it is on disk; if that fails, the folder is removed and the
//! checkpoints before it stay.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::optim::ModuleOptimizer;
use burn::tensor::{Bytes, DType, Device, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::{FNV_START, fnv1a};
use crate::error::{Error, Result};
use crate::params;
use crate::storage::{self, write_folder, write_synced};
use crate::tokenizer::TOKENIZER_CONFIG;
use crate::{Model, ModelConfig, Tokenizer};

/// The file with the parameters.
pub const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.toml";
const TOKENIZER: &str = "tokenizer.json";
const OPTIMIZER: &str = "optimizer.bpk";
const TRAINING: &str = "training.toml";
const MANIFEST: &str = "manifest.json";

/// Checkpoints of a run that are kept.
const KEPT: usize = 2;

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    fnv1a: String,
}

type Manifest = BTreeMap<String, Entry>;

/// The name of the folder of `step`.
pub fn folder_name(step: usize) -> String {
    format!("step-{step:08}")
}

/// The step of the folder that is called `name`.
fn step_of(name: &str) -> Option<usize> {
    name.strip_prefix("step-")?.parse().ok()
}

/// Removes what a run that was killed has left half written in its folder. The caller has the folder to itself.
pub(crate) fn clean(run: &Path) -> Result<()> {
    storage::clean(run, |name| step_of(name).is_some() || name == crate::metrics::METRICS)
}

/// The checkpoints in a run's folder, oldest first.
pub fn list(run: &Path) -> Vec<(usize, PathBuf)> {
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let step = step_of(entry.file_name().to_str()?)?;
            entry.path().is_dir().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// The checkpoint that `path` means: itself, or the newest one if it is a run's folder.
///
/// # Errors
/// If there is none.
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.join(MANIFEST).is_file() {
        return Ok(path.to_owned());
    }
    match list(path).pop() {
        Some((_, newest)) => Ok(newest),
        None if !path.exists() => Err(Error::checkpoint(path, "does not exist")),
        None => Err(Error::checkpoint(path, format!("holds no checkpoint (no {MANIFEST}, no step-* folder)"))),
    }
}

/// What a checkpoint holds besides what serves training alone.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// Its tokenizer, if it was trained on text.
    pub tokenizer: Option<Tokenizer>,
}

/// What is written.
pub(crate) struct Snapshot<'a> {
    pub model: &'a Model,
    pub tokenizer: Option<&'a Tokenizer>,
    pub optimizer: &'a ModuleOptimizer,
    pub training: String,
}

/// Writes the checkpoint of `step` into the run's folder and removes all but the newest [`KEPT`].
pub(crate) fn save(run: &Path, step: usize, snapshot: &Snapshot<'_>) -> Result<PathBuf> {
    let target = run.join(folder_name(step));
    if target.exists() {
        return Ok(target); // whole, as every folder of that name is
    }
    let mut files = vec![
        (WEIGHTS, weights(snapshot.model).map_err(|message| Error::checkpoint(&target, message))?),
        (CONFIG, snapshot.model.config().to_toml()?.into_bytes()),
        (TRAINING, snapshot.training.clone().into_bytes()),
    ];
    if let Some(tokenizer) = snapshot.tokenizer {
        files.push((TOKENIZER, tokenizer.to_json()?.into_bytes()));
        files.extend(tokenizer.config_json().map(|json| (TOKENIZER_CONFIG, json.into_bytes())));
    }
    let state = snapshot.optimizer.into_bytes().map_err(|error| Error::checkpoint(&target, error.to_string()))?;
    files.push((OPTIMIZER, state.to_vec()));
    let manifest: Manifest = files
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), Entry { bytes: bytes.len() as u64, fnv1a: hash(bytes) }))
        .collect();
    let manifest =
        serde_json::to_vec_pretty(&manifest).map_err(|error| Error::checkpoint(&target, error.to_string()))?;
    files.push((MANIFEST, manifest));
    fs::create_dir_all(run).map_err(Error::io(run))?;
    write_folder(&target, &files, write_synced)?;
    let mut all = list(run);
    all.retain(|(other, _)| *other != step);
    for (_, old) in all.iter().rev().skip(KEPT - 1) {
        storage::remove_folder(old)?;
    }
    Ok(target)
}

fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", fnv1a(FNV_START, bytes.iter().copied()))
}

fn weights(model: &Model) -> std::result::Result<Vec<u8>, String> {
    let values = params::values(model);
    let mut views = Vec::with_capacity(values.len());
    for (name, data) in &values {
        let dtype = match data.dtype() {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            other => return Err(format!("`{name}` has type {other:?}, which is not saved")),
        };
        let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes()).map_err(|error| error.to_string())?;
        views.push((name.as_str(), view));
    }
    let metadata = [("format".to_owned(), "thalweg".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).map_err(|error| error.to_string())
}

/// A checkpoint whose files are whole.
#[derive(Debug)]
pub(crate) struct Reader {
    folder: PathBuf,
    manifest: Manifest,
}

impl Reader {
    /// Opens the checkpoint that `path` means.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = find(path)?;
        let file = folder.join(MANIFEST);
        let bytes = fs::read(&file).map_err(|error| Error::checkpoint(&file, error.to_string()))?;
        let manifest = serde_json::from_slice(&bytes).map_err(|error| Error::checkpoint(&file, error.to_string()))?;
        Ok(Self { folder, manifest })
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.folder.join(name);
        let bad = |message: String| Error::checkpoint(&path, message);
        let entry = self.manifest.get(name).ok_or_else(|| bad(format!("is not listed in {MANIFEST}")))?;
        let bytes = fs::read(&path).map_err(|error| bad(error.to_string()))?;
        if bytes.len() as u64 != entry.bytes {
            return Err(bad(format!("is truncated: {} bytes, {} were written", bytes.len(), entry.bytes)));
        }
        if hash(&bytes) != entry.fnv1a {
            return Err(bad("is damaged: its hash is not that of what was written".to_owned()));
        }
        Ok(bytes)
    }

    fn text(&self, name: &str) -> Result<String> {
        String::from_utf8(self.read(name)?)
            .map_err(|error| Error::checkpoint(&self.folder.join(name), error.to_string()))
    }

    /// Step and options of the run.
    pub(crate) fn training<T: DeserializeOwned>(&self) -> Result<T> {
        let bad = |error: toml::de::Error| Error::checkpoint(&self.folder.join(TRAINING), error.message());
        toml::from_str(&self.text(TRAINING)?).map_err(bad)
    }

    /// The model's configuration.
    pub(crate) fn config(&self) -> Result<ModelConfig> {
        ModelConfig::from_toml(&self.text(CONFIG)?)
    }

    /// The tokenizer, if there is one.
    pub(crate) fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        if !self.manifest.contains_key(TOKENIZER) {
            return Ok(None);
        }
        self.read(TOKENIZER)?;
        if self.manifest.contains_key(TOKENIZER_CONFIG) {
            self.read(TOKENIZER_CONFIG)?;
        }
        Tokenizer::load(&self.folder.join(TOKENIZER)).map(Some)
    }

    /// The model.
    pub(crate) fn model(&self, device: &Device) -> Result<Model> {
        let bytes = self.read(WEIGHTS)?;
        let model = Model::lazy(&self.config()?, device)?;
        load_weights(model, &bytes).map_err(|message| Error::checkpoint(&self.folder.join(WEIGHTS), message))
    }

    /// The state of an optimizer of `model`.
    pub(crate) fn optimizer(&self, optimizer: ModuleOptimizer, parameters: usize) -> Result<ModuleOptimizer> {
        let path = self.folder.join(OPTIMIZER);
        let bytes = Bytes::from_bytes_vec(self.read(OPTIMIZER)?);
        let bad = |message: String| Error::checkpoint(&path, message);
        let record = burn::optim::OptimizerRecord::from_bytes(bytes).map_err(|error| bad(error.to_string()))?;
        // Two moments each; parameters that never had a gradient have none.
        if record.len() > 2 * parameters || record.is_empty() {
            return Err(bad(format!("has {} tensors for {parameters} parameters", record.len())));
        }
        Ok(optimizer.load_record(record))
    }
}

/// Reads a model and its tokenizer. `path` is a checkpoint or a run's folder, which stands for its newest checkpoint.
///
/// # Errors
/// If there is no checkpoint, or one of its files is truncated, damaged, or does not fit the others.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    let reader = Reader::open(path)?;
    Ok(Loaded { model: reader.model(device)?, tokenizer: reader.tokenizer()? })
}

/// Reads the tokenizer of a checkpoint, if it has one.
///
/// # Errors
/// As [`load`].
pub fn tokenizer(path: &Path) -> Result<Option<Tokenizer>> {
    Reader::open(path)?.tokenizer()
}

fn load_weights(model: Model, bytes: &[u8]) -> std::result::Result<Model, String> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let expected = params::names(&model);
    let mut values = BTreeMap::new();
    for named in &expected {
        let view = tensors.tensor(&named.name).map_err(|_| format!("parameter `{}` is missing", named.name))?;
        if view.shape() != named.shape {
            return Err(format!(
                "parameter `{}` has shape {:?}, the configuration says {:?}",
                named.name,
                view.shape(),
                named.shape
            ));
        }
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => return Err(format!("parameter `{}` has type {other:?}", named.name)),
        };
        let data = TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype);
        values.insert(named.name.clone(), data);
    }
    if let Some(extra) = tensors.names().into_iter().find(|name| !values.contains_key(*name)) {
        return Err(format!("parameter `{extra}` is not one of this configuration"));
    }
    Ok(params::settle(params::with_values(model, values)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::tests::{corpus, trainer};
    use crate::{DataOrigin, Trainer};

    /// A run with one checkpoint, at step 1.
    fn run() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let mut trainer = trainer(&corpus, &tokenizer, 1).with_output(folder.path(), DataOrigin::default()).unwrap();
        trainer.step().unwrap();
        let path = trainer.save().unwrap().unwrap();
        (folder, path)
    }

    fn resume(run: &Path) -> Result<usize> {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        Trainer::resume(run, &corpus, Some(&tokenizer), None, &Device::flex()).map(|trainer| trainer.steps_done())
    }

    #[test]
    fn what_is_loaded_is_what_was_saved() {
        let (folder, path) = run();
        let first = load(folder.path(), &Device::flex()).unwrap();
        let second = load(&path, &Device::flex()).unwrap();
        assert_eq!(params::values(&first.model), params::values(&second.model));
        assert!(first.tokenizer.is_some());
        assert_eq!(resume(folder.path()).unwrap(), 1);
    }

    #[test]
    fn truncated_and_damaged_files_are_told_and_left_alone() {
        for name in [WEIGHTS, OPTIMIZER, TRAINING, CONFIG] {
            for damage in ["truncate", "flip", "remove"] {
                let (folder, path) = run();
                let file = path.join(name);
                let mut bytes = fs::read(&file).unwrap();
                match damage {
                    "truncate" => bytes.truncate(bytes.len() / 2),
                    "flip" => bytes[10] ^= 1,
                    _ => fs::remove_file(&file).unwrap(),
                }
                if damage != "remove" {
                    fs::write(&file, &bytes).unwrap();
                }
                let error = resume(folder.path()).unwrap_err();
                assert!(matches!(error, Error::Checkpoint { .. }), "{name} {damage}: {error}");
                assert!(error.to_string().contains(name), "{name} {damage}: {error}");
                assert!(damage == "remove" || fs::read(&file).unwrap() == bytes, "the file was touched");
            }
        }
    }

    #[test]
    fn weights_of_another_configuration_are_refused() {
        let (_folder, path) = run();
        let bytes = fs::read(path.join(WEIGHTS)).unwrap();
        let config = ModelConfig::load(&path.join(CONFIG)).unwrap();
        for (change, message) in [
            (config.clone().with_vocab_size(300), "`embeddings` has shape [257, 32], the configuration says [300, 32]"),
            (config.clone().with_layers(3), "`blocks.2.mixer_norm.weight` is missing"),
            (config.with_layers(1), "is not one of this configuration"),
        ] {
            let model = Model::lazy(&change, &Device::flex()).unwrap();
            let error = load_weights(model, &bytes).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn what_a_killed_run_left_half_written_is_removed() {
        let (folder, _) = run();
        let half = folder.path().join(".writing-step-00000002");
        fs::create_dir(&half).unwrap();
        fs::write(half.join(WEIGHTS), b"half").unwrap();
        fs::write(folder.path().join(".writing-metrics.jsonl"), b"half").unwrap();
        assert_eq!(find(folder.path()).unwrap(), folder.path().join("step-00000001"), "it is not a checkpoint");
        assert_eq!(resume(folder.path()).unwrap(), 1);
        let left = fs::read_dir(folder.path()).unwrap().flatten();
        let mut left: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, [".lock", "step-00000001"]);
    }

    #[test]
    fn two_runs_in_one_folder_are_refused() {
        let (folder, _) = run();
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let resumed = Trainer::resume(folder.path(), &corpus, Some(&tokenizer), None, &Device::flex()).unwrap();
        let error = resume(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::Locked { path } if path == folder.path()), "{error}");
        drop(resumed);
        resume(folder.path()).unwrap();

        let fresh = tempfile::tempdir().unwrap();
        let new = || trainer(&corpus, &tokenizer, 1).with_output(fresh.path(), DataOrigin::default());
        let first = new().unwrap();
        assert!(matches!(new().unwrap_err(), Error::Locked { .. }));
        drop(first);
        new().unwrap();
    }

    #[test]
    fn missing_checkpoints_and_used_folders_are_refused() {
        let (folder, _) = run();
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let error = trainer(&corpus, &tokenizer, 1).with_output(folder.path(), DataOrigin::default()).unwrap_err();
        assert!(error.to_string().starts_with("out: "), "{error}");
        let empty = tempfile::tempdir().unwrap();
        for path in [empty.path().to_owned(), empty.path().join("none")] {
            assert!(matches!(load(&path, &Device::flex()), Err(Error::Checkpoint { .. })));
        }
    }

    #[test]
    fn a_run_goes_on_with_its_own_data_only() {
        let (folder, _) = run();
        let task = crate::data::TaskOptions::new(crate::data::Task::Parity, 16, 0);
        let error = Trainer::resume(folder.path(), &task, None, None, &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("other data"), "{error}");
    }
}
