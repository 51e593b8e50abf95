//! The real-gated linear recurrent unit of Griffin and Hawk.

use burn::Tensor;
use burn::tensor::activation::{sigmoid, softplus};
use burn::tensor::{Bool, FloatDType};
use thalweg_kernels::ScanProblem;

use super::linear_scan::{ScanOutput, run, validate};
use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
use crate::portable::one_minus_exp;
use crate::{Error, ScanOptions, check};

/// The constant `c` of the recurrence gate.
const C: f64 = 8.0;

/// Bound on the derivative of the root, squared and inverted: 1 / 1000^2.
const ROOT_FLOOR: f64 = 1e-6;

/// RG-LRU (De et al. 2024, arXiv 2402.19427, section 2.4):
///
/// `r_t = sigmoid(recurrent_gate_logits)`, `i_t = sigmoid(input_gate_logits)`,
/// `log a_t = -8 r_t softplus(a_param)`, `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)`
///
/// Where `reset` is true the state is forgotten and the input scale is 1, as at the start of a document.
/// The derivative of the root is bounded by 1000.
///
/// | argument | shape |
/// |---|---|
/// | `x`, `recurrent_gate_logits`, `input_gate_logits` | `[B, T, D]` |
/// | `a_param` | `[D]` |
/// | `reset` | `[B, T]` |
///
/// # Errors
/// A shape or option that does not fit; see [`Error`].
pub fn rg_lru(
    x: Tensor<3>,
    recurrent_gate_logits: Tensor<3>,
    input_gate_logits: Tensor<3>,
    a_param: Tensor<1>,
    reset: Option<Tensor<2, Bool>>,
    options: ScanOptions,
) -> Result<ScanOutput, Error> {
    validate("recurrent_gate_logits", &recurrent_gate_logits, "x", &x, &options)?;
    let [batch, time, channels] = x.dims();
    let axes = [("batch", batch), ("time", time), ("channels", channels)];
    check::shape("input_gate_logits", &input_gate_logits, axes)?;
    check::shape("a_param", &a_param, [("channels", channels)])?;
    if let Some(reset) = &reset {
        check::dims("reset", &reset.dims(), [("batch", batch), ("time", time)])?;
    }

    if native::available(options.path, Written::ForCpuAndGpu, &x) {
        return kernel([x, recurrent_gate_logits, input_gate_logits], a_param, reset, options);
    }
    let (dtype, float) = (x.dtype(), state_type(x.dtype()));
    let rate = softplus(a_param.cast(float), 1.0).mul_scalar(-C).reshape([1, 1, channels]);
    let log_a = sigmoid(recurrent_gate_logits.cast(float)) * rate;
    let mut a = log_a.clone().exp();
    let mut multiplier = bounded_sqrt(one_minus_exp(log_a.mul_scalar(2.0)));
    if let Some(reset) = reset {
        let reset = reset.unsqueeze_dim::<3>(2).expand([batch, time, channels]);
        a = a.mask_fill(reset.clone(), 0.0);
        multiplier = multiplier.mask_fill(reset, 1.0);
    }
    let input = sigmoid(input_gate_logits.cast(float)) * x.cast(float) * multiplier;
    let output = run(a, input, options);
    Ok(ScanOutput { o: output.o.cast(dtype), ..output })
}

/// One token of [`rg_lru`]: `x`, both gates and `state: [B, D]`, `reset: [B]`. Returns the output and
/// the new state.
///
/// # Errors
/// As [`rg_lru`].
pub fn rg_lru_step(
    x: Tensor<2>,
    recurrent_gate_logits: Tensor<2>,
    input_gate_logits: Tensor<2>,
    a_param: Tensor<1>,
    reset: Option<Tensor<1, Bool>>,
    state: Tensor<2>,
) -> Result<(Tensor<2>, Tensor<2>), Error> {
    let options = ScanOptions::new().with_initial_state(state);
    let [x, r, i] = [x, recurrent_gate_logits, input_gate_logits].map(|x| x.unsqueeze_dim(1));
    let out = rg_lru(x, r, i, a_param, reset.map(|r| r.unsqueeze_dim(1)), options)?;
    Ok((out.o.squeeze_dim(1), out.final_state))
}

/// The native unit. Where the element types of `x` and the gates differ all go to f32.
fn kernel(
    inputs: [Tensor<3>; 3],
    a_param: Tensor<1>,
    reset: Option<Tensor<2, Bool>>,
    options: ScanOptions,
) -> Result<ScanOutput, Error> {
    let [batch, time, channels] = inputs[0].dims();
    let dtype = inputs[0].dtype();
    let [x, r, i] = match inputs.iter().all(|x| x.dtype() == dtype) {
        true => inputs,
        false => inputs.map(|x| x.cast(FloatDType::F32)),
    };
    let problem = ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens };
    let reset = reset.map(|reset| reset.float().cast(FloatDType::F32).into());
    let initial = options.initial_state.map(|h| h.cast(FloatDType::F32).into());
    let a_param = a_param.cast(FloatDType::F32);
    let rest = [Some(r.into()), Some(i.into()), Some(a_param.into()), reset, initial, None];
    let (o, final_state) = native::run::<3, 2>(Operation::RgLru { problem }, x, rest)?;
    Ok(ScanOutput { o: o.cast(dtype), final_state })
}

/// `sqrt(x)` whose derivative is `1 / sqrt(max(4 x, 1e-6))`: near `a = 1` the true one is infinite.
fn bounded_sqrt(x: Tensor<3>) -> Tensor<3> {
    let value = x.clone().detach();
    let slope = value.clone().mul_scalar(4.0).clamp_min(ROOT_FLOOR).sqrt().recip();
    // The second term is zero; it carries the gradient.
    value.clone().sqrt() + (x - value) * slope
}
