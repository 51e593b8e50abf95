//! AdamW: what a model's training does between the recurrences' gradients and their next forward pass.

use burn::Tensor;
use burn::tensor::{DType, TensorData};
use thalweg_kernels::adamw::{self, AdamWStep};

use crate::binding;
use crate::check::state_type;
use crate::{Error, Path, check};

/// Parameters and their moments after a step.
#[derive(Debug)]
pub struct AdamWOutput<const D: usize> {
    /// The parameters.
    pub p: Tensor<D>,
    /// First moment of the gradients, f32 for parameters of 16 bits.
    pub m: Tensor<D>,
    /// Second moment of the gradients, of the type of `m`.
    pub v: Tensor<D>,
}

/// One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), on tensors outside of any graph; `moments` are `m`
/// and `v` of the step before, `None` before the first.
///
/// On a CPU it is one pass over memory on all threads, in place for whatever nobody else holds. Parameters of 16 bits are
/// advanced in f32, with moments in f32: in f16 the square of a small gradient is 0, and so is `epsilon`.
///
/// # Errors
/// If shapes differ, `g` is not of the type of `p`, `step.time` is 0, or a decay rate is not in `[0, 1)`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{AdamWStep, Path, adamw};
///
/// let device = Device::default();
/// let (p, g) = (Tensor::<1>::from_floats([1.0], &device), Tensor::from_floats([-3.0], &device));
/// let step = AdamWStep { lr: 0.5, betas: (0.9, 0.99), epsilon: 0.0, weight_decay: 0.0, time: 1 };
/// let p = adamw(&step, p, g, None, Path::Auto)?.p;
/// assert_eq!(p.try_into_vec_as::<f32>().unwrap(), [1.5]); // whatever its length, the first step is as long as lr
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn adamw<const D: usize>(
    step: &AdamWStep,
    p: Tensor<D>,
    g: Tensor<D>,
    moments: Option<[Tensor<D>; 2]>,
    path: Path,
) -> Result<AdamWOutput<D>, Error> {
    check::positive("time", Some(step.time))?;
    adamw::check_betas(step.betas)?;
    check::like("g", &g, "p", &p)?;
    let (dtype, wide) = (p.dtype(), state_type(p.dtype()));
    let [m, v] = moments.unwrap_or_else(|| [p.zeros_like(), p.zeros_like()]).map(|x| x.cast(wide));
    let [p, g] = [p, g].map(|x| x.cast(wide));
    for (argument, x) in [("m", &m), ("v", &v)] {
        check::like(argument, x, "p", &p)?;
    }
    let AdamWOutput { p, m, v } = advance(step, p, g, [m, v], path)?;
    Ok(AdamWOutput { p: p.cast(dtype), m, v })
}

fn advance<const D: usize>(
    step: &AdamWStep,
    p: Tensor<D>,
    g: Tensor<D>,
    [m, v]: [Tensor<D>; 2],
    path: Path,
) -> Result<AdamWOutput<D>, Error> {
    if p.dtype() == DType::F32 && binding::on_cpu(path, &p) {
        let device = p.device();
        let [mut p, g, mut m, mut v] = [p, g, m, v].map(Tensor::into_data);
        adamw::step(step, floats(&mut p), g.as_slice().unwrap_or_default(), floats(&mut m), floats(&mut v))?;
        let [p, m, v] = [p, m, v].map(|data| Tensor::from_data(data, &device));
        return Ok(AdamWOutput { p, m, v });
    }
    let AdamWStep { lr, betas: (beta_1, beta_2), epsilon, weight_decay, time } = *step;
    let time = i32::try_from(time).unwrap_or(i32::MAX);
    let m = m * beta_1 + g.clone() * (1.0 - beta_1);
    let v = v * beta_2 + g.square() * (1.0 - beta_2);
    let (m_hat, v_hat) = (m.clone() / (1.0 - beta_1.powi(time)), v.clone() / (1.0 - beta_2.powi(time)));
    let p = p * (1.0 - lr * f64::from(weight_decay)) - m_hat / (v_hat.sqrt() + epsilon) * lr;
    Ok(AdamWOutput { p, m, v })
}

/// The elements; none if they are of another type, which the kernel refuses for their number.
fn floats(data: &mut TensorData) -> &mut [f32] {
    data.as_mut_slice().unwrap_or_default()
}
