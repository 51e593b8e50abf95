//! Cases and the files they come from.

use crate::Error;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor of a case; integers and low precision are exact in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Elements in row-major order.
    pub values: Vec<f64>,
}

/// One reference case.
#[derive(Debug, Clone)]
pub struct Case {
    /// The file's name without its extension; only for display.
    pub name: String,
    /// The operation, from the metadata.
    pub op: String,
    /// All metadata.
    pub metadata: BTreeMap<String, String>,
    /// All tensors, by their names in the file (`in.q`, `cot.o`, ...).
    pub tensors: BTreeMap<String, Tensor>,
}

/// What a folder holds.
#[derive(Debug, Default)]
pub struct Found {
    /// Files whose metadata name an operation, sorted by path; an error for a file that cannot be read, so that the
    /// others still run.
    pub cases: Vec<(String, Result<Case, Error>)>,
    /// Safetensors files that are something else.
    pub others: Vec<PathBuf>,
}

/// Loads every case under `folder`, or under its `ops` folder if it has one.
///
/// # Errors
/// If the folder cannot be read or holds no case.
pub fn load(folder: &Path) -> Result<Found, Error> {
    let ops = folder.join("ops");
    let mut files = Vec::new();
    walk(if ops.is_dir() { &ops } else { folder }, &mut files)?;
    files.sort();
    let mut found = Found::default();
    for path in files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source });
        match bytes.and_then(|bytes| Case::from_bytes(&name, &bytes)) {
            Ok(Some(case)) => found.cases.push((name, Ok(case))),
            Ok(None) => found.others.push(path),
            Err(error) => found.cases.push((name, Err(error))),
        }
    }
    if found.cases.is_empty() {
        return Err(Error::NoCases { path: folder.to_path_buf() });
    }
    Ok(found)
}

/// Collects safetensors files; links to folders are not followed, so that the walk ends.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let fail = |source| Error::Read { path: folder.to_path_buf(), source };
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let path = entry.path();
        if entry.file_type().map_err(fail)?.is_dir() {
            walk(&path, files)?;
        } else if path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            files.push(path);
        }
    }
    Ok(())
}

impl Case {
    /// Reads a file's content; `None` if its metadata name no operation.
    ///
    /// # Errors
    /// [`Error::Format`] for what is not safetensors, [`Error::Dtype`] for element types that cases do not use.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Option<Self>, Error> {
        let format = |e: safetensors::SafeTensorError| Error::Format { reason: e.to_string() };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let metadata: BTreeMap<_, _> = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let Some(op) = metadata.get("op").cloned() else { return Ok(None) };
        let file = SafeTensors::deserialize(bytes).map_err(format)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            // Tensors outside of the format are none of our business, whatever their type.
            if !["in.", "int.", "out.", "cot.", "grad."].iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let values = decode(view.dtype(), view.data())
                .ok_or_else(|| Error::Dtype { tensor: name.clone(), dtype: format!("{:?}", view.dtype()) })?;
            tensors.insert(name, Tensor { shape: view.shape().to_vec(), values });
        }
        Ok(Some(Self { name: name.to_string(), op, metadata, tensors }))
    }

    /// The cotangent of output `name`, if the file has one.
    pub(crate) fn cotangent(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("cot.{name}"))
    }

    /// Whether the file asks for the gradient of input `name`.
    pub(crate) fn wants_gradient(&self, name: &str) -> bool {
        self.tensors.contains_key(&format!("grad.{name}"))
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], one: impl Fn([u8; N]) -> f64) -> Option<Vec<f64>> {
        let (items, _) = bytes.as_chunks::<N>();
        Some(items.iter().map(|item| one(*item)).collect())
    }
    match dtype {
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f64()),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U8 | Dtype::BOOL => each(bytes, |[b]: [u8; 1]| f64::from(b)),
        _ => None,
    }
}
