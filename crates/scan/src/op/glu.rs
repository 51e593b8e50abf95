//! Gated units, the element-wise part of channel mixers and output gates.

use burn::Tensor;
use burn::tensor::Shape;
use burn::tensor::activation::sigmoid;
use burn_flex::FlexTensor;
use thalweg_kernels::glu::{self as kernel, Activation};

use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::{Error, Path, check};

/// Gated unit (Dauphin et al. 2017, arXiv 1612.08083; Shazeer 2020, arXiv 2002.05202): `f(x) z`, or `f(x)` alone.
///
/// `x` and `z` have the same shape. One pass over memory forward and one backward, where separate operations take four
/// and ten.
///
/// # Errors
/// If the shapes or the element types differ.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{GluActivation, Path, glu};
///
/// let x = Tensor::<1>::from_floats([0.0, 100.0], &Device::default());
/// let y = glu(GluActivation::Silu, x.clone(), Some(x.ones_like() * 2.0), Path::Auto)?;
/// assert_eq!(y.try_into_vec_as::<f32>().unwrap(), [0.0, 200.0]);
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn glu<const D: usize>(
    activation: Activation,
    x: Tensor<D>,
    z: Option<Tensor<D>>,
    path: Path,
) -> Result<Tensor<D>, Error> {
    if let Some(z) = &z {
        check::like("z", z, "x", &x)?;
    }
    let unit = Glu { activation, shape: x.shape() };
    if x.shape().num_elements() > 0 && binding::available(&unit, path, &x) {
        let operands = Operands { x: x.into_dispatch(), z: z.map(Tensor::into_dispatch) };
        let [y] = binding::run(unit, operands)?.map(Tensor::from_dispatch);
        return Ok(y);
    }
    let y = match activation {
        Activation::Sigmoid => sigmoid(x),
        Activation::Silu => silu(x),
        // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        Activation::GeluTanh => {
            let rate = 2.0 * std::f64::consts::FRAC_2_PI.sqrt();
            self_gated(x, [-12.0, 12.0], |x| sigmoid(x.clone() * (x.square() * (0.044715 * rate) + rate)))
        }
    };
    Ok(match z {
        Some(z) => y * z,
        None => y,
    })
}

/// `x gate(x)` in tensor operations, for a gate that is 0 up to `low` and 1 from `high` on, to rounding: with the limits `0`
/// and `x` and the slopes 0 and 1 there, for infinite `x` too. Neither an infinite factor nor a power of `x` that overflows
/// meets a gate of 0 or its slope.
pub fn self_gated<const D: usize>(
    x: Tensor<D>,
    [low, high]: [f64; 2],
    gate: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let off = x.clone().lower_elem(low);
    x.clone().mask_fill(off, 0.0) * gate(x.clamp(low, high))
}

/// `x sigmoid(x)` in tensor operations.
pub(crate) fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    self_gated(x, [-800.0, 800.0], sigmoid)
}

operands! {
    /// The tensors of a gated unit.
    struct Operands { x; z: Option }
}

/// A gated unit.
#[derive(Debug, Clone)]
struct Glu {
    activation: Activation,
    shape: Shape,
}

impl Operation for Glu {
    type Operands = Operands<()>;

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.shape.clone())]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        Ok(Forward::of([values(kernel::forward::<E>(self.activation, slice(&x.x), optional(&x.z))?)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        _: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let grads = kernel::backward::<E>(self.activation, slice(&x.x), optional(&x.z), slice(&d[0]))?;
        Ok(Operands { x: Some(values(grads.dx)), z: x.z.map(|_| grads.dz.map(values)) })
    }
}
