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
//! Numbers that a run goes on with are in TOML, whose floats are read exactly as they were written. A checkpoint is written to a folder with another name and renamed when all of it is on disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::optim::ModuleOptimizer;
use burn::tensor::{Bytes, DType, Device, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::{FNV_START, fnv1a};
use crate::error::{Error, Result};
use crate::params;
use crate::tokenizer::TOKENIZER_CONFIG;
use crate::{Model, ModelConfig, Tokenizer};

/// The file with the parameters.
pub const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.toml";
const TOKENIZER: &str = "tokenizer.json";
const OPTIMIZER: &str = "optimizer.bpk";
const TRAINING: &str = "training.toml";
const MANIFEST: &str = "manifest.json";
const TEMPORARY: &str = ".writing-";

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

/// The checkpoints in a run's folder, oldest first.
pub fn list(run: &Path) -> Vec<(usize, PathBuf)> {
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
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
    let temporary = run.join(format!("{TEMPORARY}{}", folder_name(step)));
    if target.exists() {
        return Ok(target); // whole, as every folder of that name is
    }
    fs::create_dir_all(run).map_err(Error::io(run))?;
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(Error::io(&temporary))?; // left by a process that was killed
    }
    fs::create_dir(&temporary).map_err(Error::io(&temporary))?;

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
    for (name, bytes) in &files {
        write_synced(&temporary.join(name), bytes)?;
    }
    fs::rename(&temporary, &target).map_err(Error::io(&target))?;
    // The rename itself must be on disk before older checkpoints go.
    if let Ok(folder) = File::open(run) {
        let _ = folder.sync_all();
    }
    let mut all = list(run);
    all.retain(|(other, _)| *other != step);
    for (_, old) in all.iter().rev().skip(KEPT - 1) {
        fs::remove_dir_all(old).map_err(Error::io(old))?;
    }
    Ok(target)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io(path))
}

/// Replaces a file as a whole.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = std::ffi::OsString::from(TEMPORARY);
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, path).map_err(Error::io(path))
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
    fn a_half_written_checkpoint_is_not_one() {
        let (folder, _) = run();
        let half = folder.path().join(format!("{TEMPORARY}{}", folder_name(2)));
        fs::create_dir(&half).unwrap();
        fs::write(half.join(WEIGHTS), b"half").unwrap();
        assert_eq!(resume(folder.path()).unwrap(), 1);
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let mut trainer = Trainer::resume(folder.path(), &corpus, Some(&tokenizer), Some(2), &Device::flex()).unwrap();
        trainer.step().unwrap();
        trainer.save().unwrap();
        assert!(!half.exists());
        assert_eq!(resume(folder.path()).unwrap(), 2);
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
