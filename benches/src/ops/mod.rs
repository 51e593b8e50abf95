//! The operations: on slices, and through Burn.

mod attention;
mod burn;
mod channels;
mod gated;
#[cfg(feature = "gpu")]
mod gpu;
mod matrix;

use ::burn::tensor::Device;

use crate::workload::{Expected, Workload};
use crate::{Case, Dtype, Entry, Error, Part, Pass, Path};
use thalweg_kernels::Element;
use thalweg_kernels::cost::{self, Cost};
use thalweg_scan as scan;

use self::burn::{Any, BurnOp};

const BOTH: &[Dtype] = &[Dtype::F32, Dtype::Bf16];
#[cfg(feature = "gpu")]
const ALL: &[Path] = &[Path::Native, Path::Burn, Path::Portable, Path::Gpu];
#[cfg(not(feature = "gpu"))]
const ALL: &[Path] = &[Path::Native, Path::Burn, Path::Portable];

type Shapes = &'static [&'static [usize]];

const fn channels(name: &'static str, shapes: Shapes, steps: Shapes) -> Entry {
    let axes = &["batch", "time", "channels"];
    Entry { part: Part::Ops, name, axes, shapes, steps, chunked: false, paths: ALL, dtypes: BOTH }
}

const fn matrix(name: &'static str) -> Entry {
    const SHAPES: Shapes = &[&[1, 2048, 4, 128, 128]];
    const STEPS: Shapes = &[&[1, 1, 4, 128, 128], &[8, 1, 4, 128, 128]];
    let axes = &["batch", "time", "heads", "key_dim", "value_dim"];
    Entry { part: Part::Ops, name, axes, shapes: SHAPES, steps: STEPS, chunked: true, paths: ALL, dtypes: BOTH }
}

/// Every operation; the shapes are those at which other implementations are known.
pub(crate) const ENTRIES: &[Entry] = &[
    channels("scan", &[&[4, 4096, 1024]], &[&[8, 1, 2560]]),
    channels("hgrn", &[&[4, 4096, 1024]], &[&[8, 1, 2560]]),
    channels("complex_scan", &[&[1, 2048, 2560]], &[]),
    channels("rg_lru", &[&[1, 2048, 2560]], &[&[8, 1, 2560]]),
    Entry {
        part: Part::Ops,
        name: "rg_lru_block",
        axes: &["batch", "time", "channels", "blocks"],
        shapes: &[&[1, 2048, 2560, 10]],
        steps: &[],
        chunked: false,
        paths: &[Path::Burn, Path::Portable],
        dtypes: &[Dtype::F32],
    },
    channels("short_conv", &[&[1, 2048, 2560]], &[&[8, 1, 2560]]),
    matrix("linear_attention"),
    matrix("retention"),
    matrix("simple_gla"),
    matrix("gla"),
    matrix("delta_rule"),
    matrix("gated_delta_rule"),
    matrix("kda"),
    matrix("dplr"),
    Entry {
        part: Part::Ops,
        name: "attention",
        axes: &["batch", "time", "heads", "head_dim"],
        shapes: &[&[1, 2048, 4, 128], &[1, 8192, 4, 128]],
        steps: &[&[1, 2048, 4, 128], &[8, 2048, 4, 128]],
        chunked: false,
        paths: ALL,
        dtypes: BOTH,
    },
];

/// A tensor that goes in.
pub(crate) struct Input {
    /// Name of its gradient in [`Op::expected`].
    pub gradient: &'static str,
    pub shape: Vec<usize>,
    /// Rounded to the element type, if it is stored in it.
    pub values: Vec<f32>,
    /// Whether it is stored in the element type of the case; else in f32.
    pub stored: bool,
}

/// An operation with its inputs, whatever runs it.
pub(crate) trait Op: Send {
    /// Inputs, in the order of the arguments.
    fn inputs(&self) -> Vec<Input>;
    /// The state of a step, `[batch, ...]`.
    fn state(&self) -> Option<Input>;
    /// Main output, final state, then gradients of the inputs for the cotangent `d_o` (and none of the final state).
    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)>;
    /// Shape of the main output.
    fn output(&self) -> Vec<usize>;
    /// Work of a pass.
    fn cost(&self, pass: Pass, element: usize) -> Cost;
    /// Tokens of a pass.
    fn tokens(&self) -> usize;
    /// The operation on Burn tensors: the main output.
    fn apply(&self, inputs: &[Any], path: scan::Path) -> Result<Any, scan::Error>;
    /// A step on Burn tensors: output and new state.
    fn apply_step(&self, inputs: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error>;
}

/// The work of a pass from that of its parts.
fn total(pass: Pass, cost: impl Fn(cost::Pass) -> Cost) -> Cost {
    match pass {
        Pass::Forward => cost(cost::Pass::Forward),
        Pass::Train => cost(cost::Pass::Forward) + cost(cost::Pass::Backward),
        Pass::Step => cost(cost::Pass::Step),
    }
}

pub(crate) fn narrow<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|&x| E::from_f32(x)).collect()
}

pub(crate) fn widen<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Makes a benchmark ready to run.
pub(crate) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    #[cfg(feature = "gpu")]
    if case.path == Path::Gpu {
        return gpu::build(case);
    }
    match case.name.as_str() {
        "scan" | "hgrn" | "short_conv" => channels::build(case, device),
        "complex_scan" | "rg_lru" | "rg_lru_block" => gated::build(case, device),
        "attention" => attention::build(case, device),
        _ => matrix::build(case, device),
    }
}

fn on_burn(op: impl Op + 'static, case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    Ok(Box::new(BurnOp::new(Box::new(op), case, device)))
}

/// The cotangent of the main output: through Burn that of a sum, which needs no operation of its own.
fn cotangent(case: &Case, shape: &[usize]) -> Vec<f32> {
    if matches!(case.path, Path::Native | Path::Gpu) {
        let sizes = [shape[0], shape[1], shape[2..].iter().product()];
        case.dtype.round(crate::noise::signed(99, sizes))
    } else {
        vec![1.0; shape.iter().product()]
    }
}

/// Attaches the tolerances.
fn with_tolerance(case: &Case, tensors: Vec<(&'static str, Vec<f64>)>) -> Vec<Expected> {
    use thalweg_reference::tolerance::Quantity;
    let expected = |(name, values): (&'static str, Vec<f64>)| {
        let quantity = if name.starts_with('d') { Quantity::Gradient } else { Quantity::Value };
        Expected { name, values, allowed: crate::workload::allowed(case.dtype, quantity) }
    };
    tensors.into_iter().map(expected).collect()
}

impl Dtype {
    /// Every element as this type can hold it.
    fn round(self, mut values: Vec<f32>) -> Vec<f32> {
        if self == Dtype::Bf16 {
            values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        }
        values
    }
}
