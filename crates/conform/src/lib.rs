//! Runs reference cases in safetensors files through any implementation and reports the error.
//!
//! A case is one file: inputs `in.X` (integers `int.X`), outputs `out.X`, cotangents `cot.X` and gradients `grad.X` of
//! `sum over X of sum(cot.X * out.X)`; its metadata names the operation (`op`) and options such as `scale` or
//! `window`. [`load`] finds the cases of a folder, a [`Runner`] computes what they ask for, [`check`] compares.

mod case;
mod engine;
mod error;
mod options;
mod parse;
mod parse_models;
mod reference;
mod reference_models;
mod report;
mod scale;

pub use case::{Case, Found, Tensor, load};
pub use engine::Engine;
pub use error::Error;
pub use reference::Reference;
pub use report::{CaseReport, TensorError, check};

use std::collections::BTreeMap;

/// Tensors by name, as in the files: `out.o`, `grad.q`.
pub type Results = BTreeMap<String, Vec<f64>>;

/// An implementation under test.
///
/// Law: the results hold every `out.X` and `grad.X` of the operation that the case's file has, in row-major order, and
/// depend on nothing but the case.
pub trait Runner {
    /// Computes the outputs of `case` and the gradients of its loss.
    ///
    /// # Errors
    /// [`Error::UnsupportedOp`] for an operation that this implementation lacks; other errors for tensors or metadata
    /// that do not fit the operation.
    fn run(&self, case: &Case) -> Result<Results, Error>;
}
