//! The catalogue of operations: for each its names, the parser of its cases, the oracle, the engine, and a sample. All that
//! lists operations iterates over it.

mod attention;
mod complex_scan;
mod linear_attention;
mod matrix;
mod rg_lru;
mod rwkv;
mod sample;
mod scan;
mod selective_scan;
mod short_conv;
mod ssd;

pub use sample::Draw;

pub(crate) use crate::graph::Graph;
use crate::{Case, Error, Results, Tensor};
use thalweg_scan::kernels::matrix::{GateKind, WriteKind};

/// A case's tensors as the problem of its operation, all shapes checked.
pub(crate) trait Problem {
    /// Outputs and gradients by the oracle.
    fn reference(&self, case: &Case) -> Results;
    /// Records outputs and leaves through the Burn operation; nothing for one that is not [`Operation::implemented`].
    fn run(&self, graph: &mut Graph<'_>) -> Result<(), thalweg_scan::Error>;
    /// Magnitude of the terms whose difference the gradient of `input` is, if they are larger than what is left.
    fn cancelling_terms(&self, _case: &Case, _input: &str) -> Option<f64> {
        None
    }
}

/// An operation.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// Its name, that of the function of `thalweg-scan` as a rule.
    pub name: &'static str,
    /// Other names that files give it.
    pub aliases: &'static [&'static str],
    /// Whether `thalweg-scan` has it; the oracle has every one.
    pub implemented: bool,
    /// Whether several value heads may share a query head.
    pub grouped: bool,
    pub(crate) parse: for<'a> fn(&'a Case) -> Result<Box<dyn Problem + 'a>, Error>,
    sample: Option<fn(&str, &Draw) -> Case>,
}

/// Who computes an operation, and whether its value heads may share query heads.
enum Status {
    Grouped,
    Equal,
    OracleAlone,
}

/// Rows of the catalogue: `name | aliases: status, parser of a case, sample`.
macro_rules! operations {
    ($($name:literal $(| $alias:literal)*: $status:ident, |$case:ident| $parse:expr, $sample:expr;)+) => {
        /// Every operation that cases may name.
        pub const CATALOGUE: &[Operation] = &[$(Operation {
            name: $name,
            aliases: &[$($alias),*],
            implemented: !matches!(Status::$status, Status::OracleAlone),
            grouped: matches!(Status::$status, Status::Grouped),
            parse: |$case| Ok(Box::new($parse)),
            sample: $sample,
        },)+];
    };
}

use attention::Attention;
use complex_scan::ComplexScan;
use linear_attention::Normalised;
use matrix::Matrix;
use rg_lru::RgLru;
use rwkv::Rwkv;
use scan::Scan;
use selective_scan::Selective;
use short_conv::ShortConv;
use ssd::Ssd;

operations! {
    "linear_attention" | "linear_attn": Grouped, |case| Matrix::parse(case, GateKind::None, WriteKind::Additive)?, Some(matrix::sample);
    "normalized_linear_attention" | "linear_attn_norm": Grouped, |case| Normalised::parse(case)?, Some(linear_attention::sample);
    "retention" | "lightning": Equal, |case| Matrix::parse(case, GateKind::CONSTANT, WriteKind::Additive)?, Some(matrix::sample);
    "simple_gla": Grouped, |case| Matrix::parse(case, GateKind::HEAD, WriteKind::Additive)?, Some(matrix::sample);
    "gla": Grouped, |case| Matrix::parse(case, GateKind::KEY, WriteKind::Additive)?, Some(matrix::sample);
    "hgrn2": Equal, |case| Matrix::parse(case, GateKind::KEY, WriteKind::Additive)?, Some(matrix::sample);
    "delta_rule": Grouped, |case| Matrix::parse(case, GateKind::None, WriteKind::DELTA)?, Some(matrix::sample);
    "gated_delta_rule": Grouped, |case| Matrix::parse(case, GateKind::HEAD, WriteKind::DELTA)?, Some(matrix::sample);
    "gated_delta_rule_l2norm": Grouped, |case| Matrix::parse(case, GateKind::HEAD, WriteKind::DELTA)?, Some(matrix::sample);
    "kda": Grouped, |case| Matrix::parse(case, GateKind::KEY, WriteKind::DELTA)?, Some(matrix::sample);
    "dplr": Equal, |case| Matrix::parse(case, GateKind::KEY, WriteKind::LOW_RANK)?, Some(matrix::sample);
    "rwkv7": Equal, |case| Rwkv::parse(case)?, None;
    "hgrn": Grouped, |case| Scan::parse(case)?, Some(scan::sample);
    "complex_scan": Grouped, |case| ComplexScan::parse(case)?, Some(complex_scan::sample);
    "rg_lru": Grouped, |case| RgLru::parse(case)?, Some(rg_lru::sample);
    "short_conv": Grouped, |case| ShortConv::parse(case)?, Some(short_conv::sample);
    "attention": Grouped, |case| Attention::parse(case)?, Some(attention::sample);
    "rwkv6": OracleAlone, |case| Rwkv::parse(case)?, None;
    "ssd": OracleAlone, |case| Ssd::parse(case)?, None;
    "selective_scan": OracleAlone, |case| Selective::parse(case)?, None;
}

impl Operation {
    /// Whether [`sample`](Self::sample) gives a case.
    pub fn has_sample(&self) -> bool {
        self.sample.is_some()
    }

    /// A case of the drawn sizes; `None` for an operation that is sampled through another one.
    pub fn sample(&self, draw: &Draw) -> Option<Case> {
        self.sample.map(|sample| sample(self.name, draw))
    }
}

impl Case {
    /// The operation that the case names.
    ///
    /// # Errors
    /// [`Error::UnsupportedOp`] if there is none of that name.
    pub fn operation(&self) -> Result<&'static Operation, Error> {
        // One package's files tell the two forms of linear attention apart by an option.
        let name = if self.op == "linear_attn" && self.normalize() { "linear_attn_norm" } else { &self.op };
        let found = CATALOGUE.iter().find(|x| x.name == name || x.aliases.contains(&name));
        found.ok_or_else(|| Error::UnsupportedOp { op: self.op.clone() })
    }
}

pub(crate) fn results<const N: usize>(named: [(&str, Vec<f64>); N]) -> Results {
    named.into_iter().map(|(name, values)| (name.to_string(), values)).collect()
}

pub(crate) fn values(tensor: Option<&Tensor>) -> Option<&[f64]> {
    tensor.map(|tensor| tensor.values.as_slice())
}

/// The cotangent of an output of `len` elements; an output without one does not enter the loss.
pub(crate) fn cotangent(case: &Case, name: &str, len: usize) -> Vec<f64> {
    case.cotangent(name).map_or_else(|| vec![0.0; len], |tensor| tensor.values.clone())
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
