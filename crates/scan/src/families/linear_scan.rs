//! The element-wise linear recurrence, with the gate as a factor or as its logarithm.

use burn::Tensor;
use burn::tensor::FloatDType;
use thalweg_kernels::ScanProblem;

use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
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
    if native::available(options.path, Written::ForCpuAndGpu, &b) {
        return kernel(a, false, b, options);
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
    if native::available(options.path, Written::ForCpuAndGpu, &x) {
        return kernel(g, true, x, options);
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

/// The native scan. A gate of another type than `b` would lose its digits in `b`'s: both go to f32 then.
fn kernel(gate: Tensor<3>, log: bool, b: Tensor<3>, options: ScanOptions) -> Result<ScanOutput, Error> {
    let [batch, time, channels] = b.dims();
    let dtype = b.dtype();
    let (gate, b) = match gate.dtype() == dtype {
        true => (gate, b),
        false => (gate.cast(FloatDType::F32), b.cast(FloatDType::F32)),
    };
    let problem = ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens };
    let initial = options.initial_state.map(|h| h.cast(FloatDType::F32).into());
    let rest = [Some(b.into()), initial, None, None, None, None];
    let (o, final_state) = native::run::<3, 2>(Operation::Scan { problem, log }, gate, rest)?;
    Ok(ScanOutput { o: o.cast(dtype), final_state })
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
