//! Runs reference cases in safetensors files through any implementation and reports the error.
//!
//! A case is one file: inputs `in.X` (integers `int.X`), outputs `out.X`, cotangents `cot.X` and gradients `grad.X` of
//! `sum over X of sum(cot.X * out.X)`; its metadata names the operation (`op`) and options such as `scale` or `window`.
//!
//! | item | does |
//! |---|---|
//! | [`load`], [`Case`] | find the cases of a folder |
//! | [`CATALOGUE`], [`Operation`] | what cases may name: names, aliases, whether it is implemented, drawn samples ([`Draw`]) |
//! | [`Runner`]: [`Reference`], [`Engine`] | compute what a case asks for: by the f64 oracle, or by Burn on any path and device |
//! | [`check`], [`CaseReport`] | compare, tensor by tensor |
//!
//! ```
//! use std::collections::BTreeMap;
//! use thalweg_conform::{Case, Engine, Reference, Runner, Tensor, check};
//!
//! // h = exp(g) h + x, which halves the state at each token.
//! let tensor = |name: &str, values: [f64; 3]| (name.to_string(), Tensor { shape: vec![1, 3, 1], values: values.to_vec() });
//! let tensors = BTreeMap::from([
//!     tensor("in.x", [1.0; 3]),
//!     tensor("in.g", [-(2f64.ln()); 3]),
//!     tensor("out.o", [1.0, 1.5, 1.75]),
//!     tensor("cot.o", [1.0; 3]),
//!     tensor("grad.x", [1.75, 1.5, 1.0]),
//! ]);
//! let case = Case { name: "halved".into(), op: "hgrn".into(), metadata: BTreeMap::new(), tensors };
//! let runners: [&dyn Runner; 3] = [&Reference, &Engine::native(), &Engine::portable()];
//! for runner in runners {
//!     let report = check(runner, &case);
//!     assert!(report.passes(1e-6), "{report:?}");
//! }
//! ```

mod case;
mod catalogue;
mod engine;
mod error;
mod graph;
mod options;
mod parse;
mod reference;
mod report;
mod scale;

pub use case::{Case, Found, Tensor, load};
pub use catalogue::{CATALOGUE, Draw, Operation};
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
