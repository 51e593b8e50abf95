//! Norms over the last axis, with what follows them in a layer.

use burn::Tensor;
use thalweg_kernels::glu::Activation;
use thalweg_kernels::norm::NormProblem;

use super::glu;
use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
use crate::{Error, Path, check};

/// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) with its weight and an output gate:
/// `x / sqrt(mean(x^2) + eps) * (offset + weight) * f(z)`.
///
/// `x` and the gate's `z` are `[.., features]`, `weight` is `[features]`; what is absent is no factor. `offset` is 0, or 1
/// for weights that start at 0. The statistic is f32 whatever the type of `x`. One pass over memory on a CPU. Where the
/// element types differ, as in mixed precision, all is computed in f32; the result has the type of `x`.
///
/// # Errors
/// If the shapes do not fit or an element type is no float.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{Path, rms_norm};
///
/// let x = Tensor::<1>::from_floats([3.0, -3.0], &Device::default());
/// let y = rms_norm(x, None, 0.0, None, 0.0, Path::Auto)?;
/// assert_eq!(y.try_into_vec_as::<f32>().unwrap(), [1.0, -1.0]);
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn rms_norm<const D: usize>(
    x: Tensor<D>,
    weight: Option<Tensor<1>>,
    offset: f64,
    gate: Option<(Activation, Tensor<D>)>,
    eps: f64,
    path: Path,
) -> Result<Tensor<D>, Error> {
    let features = x.dims().last().copied().unwrap_or(0);
    if let Some(weight) = &weight {
        check::shape("weight", weight, [("features", features)])?;
        check::float("weight", weight)?;
    }
    if let Some((_, z)) = &gate {
        check::same_shape("z", z, "x", &x)?;
        check::float("z", z)?;
    }
    let dtype = x.dtype();
    let others = [weight.as_ref().map(Tensor::dtype), gate.as_ref().map(|(_, z)| z.dtype())];
    if others.into_iter().flatten().any(|other| other != dtype) {
        check::float("x", &x)?;
        let wide = state_type(dtype);
        let (weight, gate) = (weight.map(|w| w.cast(wide)), gate.map(|(f, z)| (f, z.cast(wide))));
        return Ok(rms_norm(x.cast(wide), weight, offset, gate, eps, path)?.cast(dtype));
    }
    let problem = NormProblem::rms(features, eps as f32).with_offset(offset as f32);
    if native::available(path, Written::ForCpu, &x) && x.shape().num_elements() > 0 {
        return run(problem, x, weight, gate);
    }
    let y = scaled(x, features as f64, eps);
    let y = match weight {
        Some(weight) if offset != 0.0 => y * (weight + offset).unsqueeze(),
        Some(weight) => y * weight.unsqueeze(),
        None => y,
    };
    match gate {
        Some((f, z)) => glu(f, z, Some(y), path),
        None => Ok(y),
    }
}

/// `x / sqrt(sum(x^2) + eps)` over the last axis. The delta rules' q and k use `eps` 1e-6.
///
/// # Errors
/// If the kernel fails; no shape makes it.
pub fn l2_norm<const D: usize>(x: Tensor<D>, eps: f64, path: Path) -> Result<Tensor<D>, Error> {
    let features = x.dims().last().copied().unwrap_or(0);
    if native::available(path, Written::ForCpu, &x) && x.shape().num_elements() > 0 {
        return run(NormProblem::l2(features, eps as f32), x, None, None);
    }
    Ok(scaled(x, 1.0, eps))
}

/// `x / sqrt(sum(x^2) / divisor + eps)`
fn scaled<const D: usize>(x: Tensor<D>, divisor: f64, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = x.cast(state_type(dtype));
    let square = (x.clone() * x.clone()).sum_dim(D - 1) / divisor;
    (x / (square + eps).sqrt()).cast(dtype)
}

fn run<const D: usize>(
    problem: NormProblem,
    x: Tensor<D>,
    weight: Option<Tensor<1>>,
    gate: Option<(Activation, Tensor<D>)>,
) -> Result<Tensor<D>, Error> {
    let (f, z) = gate.map_or((Activation::Sigmoid, None), |(f, z)| (f, Some(z.into())));
    let rest = [weight.map(Into::into), z, None, None, None, None];
    let (y, _) = native::run::<D, 1>(Operation::Norm { problem, gate: f }, x, rest)?;
    Ok(y)
}
