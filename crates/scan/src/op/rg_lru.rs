//! The real-gated linear recurrent unit of Griffin and Hawk.

use burn::Tensor;
use burn::tensor::activation::{sigmoid, softplus};
use burn::tensor::{Bool, FloatDType};
use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::rg_lru::{self as kernel, RgLruInputs};

use super::linear_scan::{ScanOutput, problem, run, validate};
use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
use crate::portable::one_minus_exp;
use crate::{Error, Path, ScanOptions, check};

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

    let unit = RgLru(problem(&x, &options));
    if binding::available(&unit, options.path, &x) {
        return unit.run([x, recurrent_gate_logits, input_gate_logits], a_param, reset, options);
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
    path: Path,
) -> Result<(Tensor<2>, Tensor<2>), Error> {
    let options = ScanOptions::new().with_initial_state(state).with_path(path);
    let [x, r, i] = [x, recurrent_gate_logits, input_gate_logits].map(|x| x.unsqueeze_dim(1));
    let out = rg_lru(x, r, i, a_param, reset.map(|r| r.unsqueeze_dim(1)), options)?;
    Ok((out.o.squeeze_dim(1), out.final_state))
}

operands! {
    /// The tensors of the unit; the gates before their sigmoid, `reset` 0 or 1 in f32.
    struct Operands { x, recurrent_gate, input_gate, a_param; reset: Option, initial_state: Option }
}

/// The unit.
#[derive(Debug, Clone)]
struct RgLru(ScanProblem);

impl RgLru {
    /// Runs the kernel. Where the element types of `x` and the gates differ all go to f32.
    fn run(
        self,
        inputs: [Tensor<3>; 3],
        a_param: Tensor<1>,
        reset: Option<Tensor<2, Bool>>,
        options: ScanOptions,
    ) -> Result<ScanOutput, Error> {
        let dtype = inputs[0].dtype();
        let inputs = match inputs.iter().all(|x| x.dtype() == dtype) {
            true => inputs,
            false => inputs.map(|x| x.cast(FloatDType::F32)),
        };
        let [x, recurrent_gate, input_gate] = inputs.map(Tensor::into_dispatch);
        let operands = Operands {
            x,
            recurrent_gate,
            input_gate,
            a_param: a_param.cast(FloatDType::F32).into_dispatch(),
            reset: reset.map(|reset| reset.float().cast(FloatDType::F32).into_dispatch()),
            initial_state: options.initial_state.map(|h| h.cast(FloatDType::F32).into_dispatch()),
        };
        let [o, final_state] = binding::run(self, operands)?;
        let (o, final_state) = (Tensor::<3>::from_dispatch(o), Tensor::from_dispatch(final_state));
        Ok(ScanOutput { o: o.cast(dtype), final_state })
    }
}

/// The resets as the CPU kernel wants them: one byte per token, few beside the channels.
fn resets(x: &Operands<FlexTensor>) -> Option<Vec<bool>> {
    optional::<f32>(&x.reset).map(|reset| reset.iter().map(|&x| x != 0.0).collect())
}

fn cpu_inputs<'a, E: Number>(x: &'a Operands<FlexTensor>, reset: Option<&'a [bool]>) -> RgLruInputs<'a, E> {
    RgLruInputs {
        x: slice(&x.x),
        recurrent_gate: slice(&x.recurrent_gate),
        input_gate: slice(&x.input_gate),
        a_param: slice(&x.a_param),
        reset,
        initial_state: optional(&x.initial_state),
    }
}

#[cfg(feature = "cube")]
fn gpu_inputs(x: &Operands<Buffer>) -> gpu::rg_lru::RgLruInputs<'_> {
    gpu::rg_lru::RgLruInputs {
        x: &x.x,
        recurrent_gate: &x.recurrent_gate,
        input_gate: &x.input_gate,
        a_param: &x.a_param,
        reset: x.reset.as_ref(),
        initial_state: x.initial_state.as_ref(),
    }
}

impl Operation for RgLru {
    type Operands = Operands<()>;

    const SAVED: &'static [usize] = &[0];
    const CONSTANTS: &'static [&'static str] = &["reset"];

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.0.token_shape()), OutputSpec::f32(self.0.state_shape())]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let reset = resets(&x);
        let out = kernel::forward::<E>(&self.0, &cpu_inputs(&x, reset.as_deref()))?;
        Ok(Forward::of([values(out.o), values(out.final_state)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let reset = resets(&x);
        let (o, d_o, d_state) = (slice::<E>(&saved[0]), slice(&d[0]), slice(&d[1]));
        let grads = kernel::backward(&self.0, &cpu_inputs(&x, reset.as_deref()), o, d_o, Some(d_state))?;
        Ok(Operands {
            x: Some(values(grads.dx)),
            recurrent_gate: Some(values(grads.d_recurrent_gate)),
            input_gate: Some(values(grads.d_input_gate)),
            a_param: Some(values(grads.d_a_param)),
            reset: x.reset.map(|_| None),
            initial_state: x.initial_state.map(|_| Some(values(grads.d_initial_state))),
        })
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::rg_lru::forward(client, &self.0, &gpu_inputs(x))?;
        Ok(vec![out.o, out.final_state])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        saved: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        let grads = gpu::rg_lru::backward(client, &self.0, &gpu_inputs(x), &saved[0], &d[0], Some(&d[1]))?;
        Ok(Operands {
            x: Some(grads.dx),
            recurrent_gate: Some(grads.d_recurrent_gate),
            input_gate: Some(grads.d_input_gate),
            a_param: Some(grads.d_a_param),
            reset: x.reset.as_ref().map(|_| None),
            initial_state: x.initial_state.as_ref().map(|_| Some(grads.d_initial_state)),
        })
    }
}

/// `sqrt(x)` whose derivative is `1 / sqrt(max(4 x, 1e-6))`: near `a = 1` the true one is infinite.
fn bounded_sqrt(x: Tensor<3>) -> Tensor<3> {
    let value = x.clone().detach();
    let slope = value.clone().mul_scalar(4.0).clamp_min(ROOT_FLOOR).sqrt().recip();
    // The second term is zero; it carries the gradient.
    value.clone().sqrt() + (x - value) * slope
}
