//! Gated units in one pass over memory.

use burn::tensor::{Tensor, activation};
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

/// `log(sigmoid(x))`; where that is `x` to rounding, down to minus infinity, the slope is 1.
pub(crate) fn log_sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    const LINEAR: f64 = -100.0;
    let below = (x.clone() - LINEAR).clamp_max(0.0);
    activation::log_sigmoid(x.clamp_min(LINEAR)) + below
}

#[track_caller]
fn run<const D: usize>(f: GluActivation, x: Tensor<D>, z: Option<Tensor<D>>) -> Tensor<D> {
    match glu(f, x, z, Path::Auto) {
        Ok(y) => y,
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn the_logarithm_of_a_gate_has_its_limits() {
        let device = Device::flex().autodiff();
        let ends = [f32::NEG_INFINITY, f32::MIN, -1e3, -100.5, -30.0, 0.0, 30.0, f32::MAX, f32::INFINITY];
        let x = Tensor::<1>::from_floats(ends, &device).require_grad();
        let y = log_sigmoid(x.clone());
        let dx = x.grad(&y.clone().sum().backward()).unwrap();
        let [y, dx] = [y, dx].map(|t| t.try_into_vec_as::<f32>().unwrap());
        let half = -std::f32::consts::LN_2;
        for (i, want) in [ends[0], ends[1], ends[2], ends[3], ends[4], half, 0.0, 0.0, 0.0].into_iter().enumerate() {
            assert!(y[i] == want || (y[i] - want).abs() < 1e-5, "{}: {}", ends[i], y[i]);
        }
        for (i, want) in [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0].into_iter().enumerate() {
            assert!((dx[i] - want).abs() < 1e-6, "slope at {}: {}", ends[i], dx[i]);
        }
    }
}
