//! Gated units in one pass over memory.

use burn::tensor::Tensor;
use thalweg_scan::{GluActivation, Path, glu};

/// `f(x) z`, of two tensors of one shape.
///
/// # Panics
/// If the shapes or the element types differ, as Burn's own operations do.
#[track_caller]
pub(crate) fn gated<const D: usize>(f: GluActivation, x: Tensor<D>, z: Tensor<D>) -> Tensor<D> {
    run(f, x, Some(z))
}

/// `x sigmoid(x)`.
pub(crate) fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    run(GluActivation::Silu, x, None)
}

/// `1 / (1 + exp(-x))`.
pub(crate) fn sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    run(GluActivation::Sigmoid, x, None)
}

/// The approximation of GELU by `tanh`.
pub(crate) fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    run(GluActivation::GeluTanh, x, None)
}

#[track_caller]
fn run<const D: usize>(f: GluActivation, x: Tensor<D>, z: Option<Tensor<D>>) -> Tensor<D> {
    match glu(f, x, z, Path::Auto) {
        Ok(y) => y,
        Err(error) => panic!("{error}"),
    }
}
