//! Norms over the last axis, with what follows them in a layer.

use burn::Tensor;
use burn::tensor::Shape;
use burn_flex::FlexTensor;
use thalweg_kernels::glu::Activation;
use thalweg_kernels::norm::{self as kernel, NormInputs, NormProblem};

use super::glu;
use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
use crate::{Error, Path, check};

/// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) with its weight and an output gate:
/// `x / sqrt(mean(x^2) + eps) * (offset + weight) * f(z)`.
///
/// `x` and the gate's `z` are `[.., features]`, `weight` is `[features]`; what is absent is no factor. `offset` is 0, or 1
/// for weights that start at 0. The statistic is f32 whatever the type of `x`. One pass over memory on a CPU. Where the
/// element types differ, as in mixed precision, all is computed in f32; the result has the type of `x`.
///
/// # Errors
/// If the shapes do not fit, an element type is no float, or `eps` is negative or not finite.
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
    let eps = epsilon(eps)?;
    let norm = Norm {
        problem: NormProblem::rms(features, eps as f32).with_offset(offset as f32),
        gate: gate.as_ref().map_or(Activation::Sigmoid, |(f, _)| *f),
        shape: x.shape(),
    };
    if x.shape().num_elements() > 0 && binding::available(&norm, path, &x) {
        return norm.run(x, weight, gate.map(|(_, z)| z));
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
/// If `eps` is negative or not finite.
pub fn l2_norm<const D: usize>(x: Tensor<D>, eps: f64, path: Path) -> Result<Tensor<D>, Error> {
    let features = x.dims().last().copied().unwrap_or(0);
    let eps = epsilon(eps)?;
    let problem = NormProblem::l2(features, eps as f32);
    let norm = Norm { problem, gate: Activation::Sigmoid, shape: x.shape() };
    if x.shape().num_elements() > 0 && binding::available(&norm, path, &x) {
        return norm.run(x, None, None);
    }
    Ok(scaled(x, 1.0, eps))
}

/// `eps`, and one above 0 large enough not to be 0 in f32: rows of zeros are normalised to zeros.
fn epsilon(eps: f64) -> Result<f64, Error> {
    if !(eps >= 0.0 && (eps as f32).is_finite()) {
        return Err(Error::Value { argument: "eps", found: eps.to_string(), expected: "0 or more and finite in f32" });
    }
    Ok(if eps > 0.0 { eps.max(f32::MIN_POSITIVE.into()) } else { 0.0 })
}

/// `x / sqrt(sum(x^2) / divisor + eps)`
fn scaled<const D: usize>(x: Tensor<D>, divisor: f64, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = x.cast(state_type(dtype));
    let square = (x.clone() * x.clone()).sum_dim(D - 1) / divisor;
    (x / (square + eps).sqrt()).cast(dtype)
}

operands! {
    /// The tensors of a norm.
    struct Operands { x; weight: Option, z: Option }
}

/// A norm with the activation of its gate, which is of no matter where there is no `z`.
#[derive(Debug, Clone)]
struct Norm {
    problem: NormProblem,
    gate: Activation,
    shape: Shape,
}

impl Norm {
    fn run<const D: usize>(
        self,
        x: Tensor<D>,
        weight: Option<Tensor<1>>,
        z: Option<Tensor<D>>,
    ) -> Result<Tensor<D>, Error> {
        let (weight, z) = (weight.map(Tensor::into_dispatch), z.map(Tensor::into_dispatch));
        let [y] = binding::run(self, Operands { x: x.into_dispatch(), weight, z })?;
        Ok(Tensor::from_dispatch(y))
    }

    fn inputs<'a, E: Number>(&self, x: &'a Operands<FlexTensor>) -> NormInputs<'a, E> {
        let gate = x.z.as_ref().map(|z| (self.gate, slice(z)));
        NormInputs { x: slice(&x.x), weight: optional(&x.weight), gate }
    }
}

impl Operation for Norm {
    type Operands = Operands<()>;

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.shape.clone())]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        Ok(Forward::of([values(kernel::forward::<E>(&self.problem, &self.inputs(&x))?)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        _: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let grads = kernel::backward::<E>(&self.problem, &self.inputs(&x), slice(&d[0]))?;
        Ok(Operands {
            x: Some(values(grads.dx)),
            weight: x.weight.map(|_| grads.d_weight.map(values)),
            z: x.z.map(|_| grads.dz.map(values)),
        })
    }
}
