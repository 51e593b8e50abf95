//! The element-wise linear recurrence, with the gate as a factor or as its logarithm.

use burn::Tensor;
use burn::tensor::FloatDType;
use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::elementwise_scan::{self as kernel, ScanGate, ScanInputs};

use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
use crate::{Error, ScanOptions, check, portable};

/// What an element-wise recurrence returns.
#[derive(Debug, Clone)]
pub struct ScanOutput {
    /// States of all tokens, `[B, T, D]`, in the element type of the inputs.
    pub o: Tensor<3>,
    /// State after the last token of each sequence, `[N, D]`; f32 (f64 for f64 inputs).
    pub final_state: Tensor<2>,
}

/// Element-wise linear recurrence (HGRN, RG-LRU, minGRU, QRNN, ...): `h_t = a_t h_{t-1} + b_t`.
///
/// `a, b: [B, T, D]`; any `a`, also exactly 0 or above 1 in magnitude.
///
/// # Errors
/// A shape or option that does not fit; see [`Error`].
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{ScanOptions, linear_scan};
///
/// let device = Device::default();
/// let a = Tensor::<3>::full([1, 3, 1], 0.5, &device);
/// let out = linear_scan(a, Tensor::ones([1, 3, 1], &device), ScanOptions::new())?;
/// assert_eq!(out.final_state.into_scalar::<f32>(), 1.75);
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn linear_scan(a: Tensor<3>, b: Tensor<3>, options: ScanOptions) -> Result<ScanOutput, Error> {
    validate("a", &a, "b", &b, &options)?;
    let scan = Scan { problem: problem(&b, &options), log: false };
    if binding::available(&scan, options.path, &b) {
        return scan.run(a, b, options);
    }
    let float = state_type(b.dtype());
    Ok(run(a.cast(float), b, options))
}

/// One token of [`linear_scan`]: `a, b, state: [B, D]`. Returns the output and the new state, which are
/// equal but for their element type.
///
/// # Errors
/// As [`linear_scan`].
pub fn linear_scan_step(a: Tensor<2>, b: Tensor<2>, state: Tensor<2>) -> Result<(Tensor<2>, Tensor<2>), Error> {
    validate_step("a", &a, "b", &b, &state)?;
    let (dtype, float) = (b.dtype(), state_type(b.dtype()));
    let state = a.cast(float) * state.cast(float) + b.cast(float);
    Ok((state.clone().cast(dtype), state))
}

/// HGRN's recurrence (Qin et al. 2023, arXiv 2311.04823): `h_t = exp(g_t) h_{t-1} + x_t`.
///
/// `x, g: [B, T, D]` with `g` at most 0.
///
/// # Errors
/// A shape, option or gate that does not fit; see [`Error`].
pub fn hgrn(x: Tensor<3>, g: Tensor<3>, options: ScanOptions) -> Result<ScanOutput, Error> {
    validate("g", &g, "x", &x, &options)?;
    let scan = Scan { problem: problem(&x, &options), log: true };
    if binding::available(&scan, options.path, &x) {
        return scan.run(g, x, options);
    }
    let float = state_type(x.dtype());
    Ok(run(g.cast(float).exp(), x, options))
}

/// One token of [`hgrn`]: `x, g, state: [B, D]`. Returns the output and the new state.
///
/// # Errors
/// As [`hgrn`].
pub fn hgrn_step(x: Tensor<2>, g: Tensor<2>, state: Tensor<2>) -> Result<(Tensor<2>, Tensor<2>), Error> {
    validate_step("g", &g, "x", &x, &state)?;
    let float = state_type(x.dtype());
    linear_scan_step(g.cast(float).exp(), x, state)
}

/// The portable scan, with `a` in the accumulation type.
pub(crate) fn run(a: Tensor<3>, b: Tensor<3>, options: ScanOptions) -> ScanOutput {
    let (dtype, float) = (b.dtype(), state_type(b.dtype()));
    let initial = options.initial_state.map(|h| h.cast(float).unsqueeze_dim(1));
    let (h, last) = portable::scan::forward(a, b.cast(float), initial, options.cu_seqlens.as_deref());
    ScanOutput { o: h.cast(dtype), final_state: last.squeeze_dim(1) }
}

/// The sizes of a scan over `x`, as the kernels know them.
pub(crate) fn problem(x: &Tensor<3>, options: &ScanOptions) -> ScanProblem {
    let [batch, time, channels] = x.dims();
    ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens.clone() }
}

operands! {
    /// The tensors of an element-wise scan; `gate` is the factor or its logarithm.
    struct Operands { gate, x; initial_state: Option }
}

/// An element-wise scan.
#[derive(Debug, Clone)]
struct Scan {
    problem: ScanProblem,
    log: bool,
}

impl Scan {
    /// Runs the kernel. A gate of another type than `x` would lose its digits in `x`'s: both go to f32 then.
    fn run(self, gate: Tensor<3>, x: Tensor<3>, options: ScanOptions) -> Result<ScanOutput, Error> {
        let dtype = x.dtype();
        let (gate, x) = match gate.dtype() == dtype {
            true => (gate, x),
            false => (gate.cast(FloatDType::F32), x.cast(FloatDType::F32)),
        };
        let operands = Operands {
            gate: gate.into_dispatch(),
            x: x.into_dispatch(),
            initial_state: options.initial_state.map(|h| h.cast(FloatDType::F32).into_dispatch()),
        };
        let [o, final_state] = binding::run(self, operands)?;
        let (o, final_state) = (Tensor::<3>::from_dispatch(o), Tensor::from_dispatch(final_state));
        Ok(ScanOutput { o: o.cast(dtype), final_state })
    }

    fn gate<T>(&self, gate: T) -> ScanGate<T> {
        if self.log { ScanGate::Log(gate) } else { ScanGate::Linear(gate) }
    }

    fn cpu_inputs<'a, E: Number>(&self, x: &'a Operands<FlexTensor>) -> ScanInputs<'a, E> {
        ScanInputs { gate: self.gate(slice(&x.gate)), x: slice(&x.x), initial_state: optional(&x.initial_state) }
    }

    #[cfg(feature = "cube")]
    fn gpu_inputs<'a>(&self, x: &'a Operands<Buffer>) -> gpu::elementwise_scan::ScanInputs<'a> {
        let (gate, initial_state) = (self.gate(&x.gate), x.initial_state.as_ref());
        gpu::elementwise_scan::ScanInputs { gate, x: &x.x, initial_state }
    }
}

impl Operation for Scan {
    type Operands = Operands<()>;

    const SAVED: &'static [usize] = &[0];

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.problem.token_shape()), OutputSpec::f32(self.problem.state_shape())]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let out = kernel::forward::<E>(&self.problem, &self.cpu_inputs(&x))?;
        Ok(Forward::of([values(out.o), values(out.final_state)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let (o, d_o, d_state) = (slice::<E>(&saved[0]), slice(&d[0]), slice(&d[1]));
        let grads = kernel::backward(&self.problem, &self.cpu_inputs(&x), o, d_o, Some(d_state))?;
        Ok(Operands {
            gate: Some(values(grads.dgate)),
            x: Some(values(grads.dx)),
            initial_state: x.initial_state.map(|_| Some(values(grads.d_initial_state))),
        })
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::elementwise_scan::forward(client, &self.problem, &self.gpu_inputs(x))?;
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
        let inputs = self.gpu_inputs(x);
        let grads = gpu::elementwise_scan::backward(client, &self.problem, &inputs, &saved[0], &d[0], Some(&d[1]))?;
        Ok(Operands {
            gate: Some(grads.dgate),
            x: Some(grads.dx),
            initial_state: x.initial_state.as_ref().map(|_| Some(grads.d_initial_state)),
        })
    }
}

/// Checks two `[B, T, D]` tensors and the options.
pub(crate) fn validate(
    first: &'static str,
    a: &Tensor<3>,
    second: &'static str,
    b: &Tensor<3>,
    options: &ScanOptions,
) -> Result<(), Error> {
    check::not_empty(second, b)?;
    let [batch, time, channels] = b.dims();
    check::shape(first, a, [("batch", batch), ("time", time), ("channels", channels)])?;
    let count = check::sequences(options.cu_seqlens.as_deref(), batch, time)?;
    match &options.initial_state {
        Some(state) => check::shape("initial_state", state, [("sequences", count), ("channels", channels)]),
        None => Ok(()),
    }
}

fn validate_step(
    first: &'static str,
    a: &Tensor<2>,
    second: &'static str,
    b: &Tensor<2>,
    state: &Tensor<2>,
) -> Result<(), Error> {
    check::not_empty(second, b)?;
    let [batch, channels] = b.dims();
    check::shape(first, a, [("batch", batch), ("channels", channels)])?;
    check::shape("state", state, [("batch", batch), ("channels", channels)])
}
