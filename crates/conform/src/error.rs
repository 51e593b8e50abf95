//! What can be wrong with a folder of cases, or with one case.

use std::path::PathBuf;

/// Why cases cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing to run.
    #[error("no safetensors file with an `op` in its metadata under {}", path.display())]
    NoCases {
        /// Where.
        path: PathBuf,
    },
    /// A file is not safetensors, or is cut off.
    #[error("not a readable safetensors file: {reason}")]
    Format {
        /// What the parser said.
        reason: String,
    },
    /// A tensor has an element type that cases do not use.
    #[error("tensor `{tensor}` has element type {dtype}, expected f32, f64, f16, bf16, i32, i64, u8 or bool")]
    Dtype {
        /// Its name.
        tensor: String,
        /// Its element type.
        dtype: String,
    },
    /// The runner does not have this operation.
    #[error("unsupported op `{op}`")]
    UnsupportedOp {
        /// Its name.
        op: String,
    },
    /// Only the oracle computes this operation so far.
    #[error("`{op}` is known to the oracle alone so far")]
    NotImplemented {
        /// Its name.
        op: String,
    },
    /// A tensor that the operation needs is not in the file.
    #[error("tensor `{tensor}` is missing")]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A tensor's shape does not fit the others.
    #[error("tensor `{tensor}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Its name.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the other tensors imply.
        expected: String,
    },
    /// A metadata entry or an integer tensor cannot be understood.
    #[error("`{name}` is {found}, expected {expected}")]
    Value {
        /// Its name.
        name: String,
        /// What it says.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The implementation refused the case.
    #[error("{0}")]
    Engine(String),
}
