//! The element-wise linear recurrence over complex numbers.

use burn::Tensor;
use burn::tensor::{FloatDType, TensorData};
use thalweg_kernels::ScanProblem;

use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
use crate::portable::scan::{Complex, forward};
use crate::{ComplexScanOptions, Error, check};

/// What [`complex_scan`] returns.
#[derive(Debug, Clone)]
pub struct ComplexScanOutput {
    /// Real part of the states of all tokens, `[B, T, D]`.
    pub re: Tensor<3>,
    /// Imaginary part of the states of all tokens, `[B, T, D]`.
    pub im: Tensor<3>,
    /// Real part of the state after the last token of each sequence, `[N, D]`.
    pub final_re: Tensor<2>,
    /// Imaginary part of the state after the last token of each sequence, `[N, D]`.
    pub final_im: Tensor<2>,
}

/// Complex element-wise recurrence (LRU, Orvieto et al. 2023, arXiv 2303.06349; S5; complex RG-LRU):
///
/// `h_t = lambda_t h_{t-1} + b_t`, `lambda_t = exp(log_a_t + i theta_t)`
///
/// | argument | shape | range |
/// |---|---|---|
/// | `log_a` | `[B, T, D]`, or `[1, 1, D]` if constant in time | at most 0 |
/// | `theta` | as `log_a`, radians | any finite angle |
/// | `b_re`, `b_im` | `[B, T, D]` | |
///
/// Gradients treat real and imaginary parts as separate real numbers.
///
/// # Errors
/// A shape, option or gate that does not fit; see [`Error`].
pub fn complex_scan(
    log_a: Tensor<3>,
    theta: Tensor<3>,
    b_re: Tensor<3>,
    b_im: Tensor<3>,
    options: ComplexScanOptions,
) -> Result<ComplexScanOutput, Error> {
    check::not_empty("b_re", &b_re)?;
    let [batch, time, channels] = b_re.dims();
    let axes = [("batch", batch), ("time", time), ("channels", channels)];
    check::shape("b_im", &b_im, axes)?;
    if log_a.dims() != [1, 1, channels] {
        check::shape("log_a", &log_a, axes)?;
    }
    let [gate_batch, gate_time, _] = log_a.dims();
    check::shape("theta", &theta, [("batch", gate_batch), ("time", gate_time), ("channels", channels)])?;
    let count = check::sequences(options.cu_seqlens.as_deref(), batch, time)?;
    if let Some((re, im)) = &options.initial_state {
        check::shape("initial_state.re", re, [("sequences", count), ("channels", channels)])?;
        check::shape("initial_state.im", im, [("sequences", count), ("channels", channels)])?;
    }

    if native::available(options.path, Written::ForCpuAndGpu, &b_re) {
        return kernel(log_a, theta, b_re, b_im, options);
    }
    let (dtype, float) = (b_re.dtype(), state_type(b_re.dtype()));
    let lambda = lambda(log_a.cast(float), theta.cast(float));
    let lambda =
        Complex { re: lambda.re.expand([batch, time, channels]), im: lambda.im.expand([batch, time, channels]) };
    let b = Complex { re: b_re.cast(float), im: b_im.cast(float) };
    let initial = options
        .initial_state
        .map(|(re, im)| Complex { re: re.cast(float).unsqueeze_dim(1), im: im.cast(float).unsqueeze_dim(1) });
    let (h, last) = forward(lambda, b, initial, options.cu_seqlens.as_deref());
    Ok(ComplexScanOutput {
        re: h.re.cast(dtype),
        im: h.im.cast(dtype),
        final_re: last.re.squeeze_dim(1),
        final_im: last.im.squeeze_dim(1),
    })
}

/// One token of [`complex_scan`]: all arguments `[B, D]`, `log_a` and `theta` also `[1, D]`. Returns the
/// new state's parts, which are the output.
///
/// # Errors
/// As [`complex_scan`].
pub fn complex_scan_step(
    log_a: Tensor<2>,
    theta: Tensor<2>,
    b_re: Tensor<2>,
    b_im: Tensor<2>,
    state: (Tensor<2>, Tensor<2>),
) -> Result<(Tensor<2>, Tensor<2>), Error> {
    let options = ComplexScanOptions::new().with_initial_state(state.0, state.1);
    let [log_a, theta, b_re, b_im] = [log_a, theta, b_re, b_im].map(|x| x.unsqueeze_dim(1));
    let out = complex_scan(log_a, theta, b_re, b_im, options)?;
    Ok((out.final_re, out.final_im))
}

/// The native scan. Where the element types differ all go to f32: an angle would lose its digits.
fn kernel(
    log_a: Tensor<3>,
    theta: Tensor<3>,
    b_re: Tensor<3>,
    b_im: Tensor<3>,
    options: ComplexScanOptions,
) -> Result<ComplexScanOutput, Error> {
    let [batch, time, channels] = b_re.dims();
    let dtype = b_re.dtype();
    let mut inputs = [log_a, theta, b_re, b_im];
    if inputs.iter().any(|x| x.dtype() != dtype) {
        inputs = inputs.map(|x| x.cast(FloatDType::F32));
    }
    let [log_a, theta, b_re, b_im] = inputs;
    let problem = ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens };
    let (h_re, h_im) = match options.initial_state {
        Some((re, im)) => (Some(re.cast(FloatDType::F32).into()), Some(im.cast(FloatDType::F32).into())),
        None => (None, None),
    };
    let rest = [Some(theta.into()), Some(b_re.into()), Some(b_im.into()), h_re, h_im, None];
    let (o, last) = native::run::<4, 4>(Operation::ComplexScan { problem }, log_a, rest)?;
    let [re, im] = [0, 1].map(|plane| o.clone().narrow(0, plane, 1).squeeze_dim::<3>(0).cast(dtype));
    let [final_re, final_im] = [0, 1].map(|plane| {
        let last = last.clone().narrow(0, plane, 1);
        last.squeeze_dims::<2>(&[0, 1])
    });
    Ok(ComplexScanOutput { re, im, final_re, final_im })
}

fn lambda(log_a: Tensor<3>, theta: Tensor<3>) -> Complex {
    let (radius, theta) = (log_a.exp(), within_a_turn(theta));
    Complex { re: radius.clone() * theta.clone().cos(), im: radius * theta.sin() }
}

/// Equal angles of at most a turn: beyond, the sines of devices are inaccurate, and not even bounded. Their reduction takes
/// more digits than tensors have, so that the host does it where it is needed.
fn within_a_turn(theta: Tensor<3>) -> Tensor<3> {
    let value = theta.clone().detach();
    if value.clone().abs().lower_equal_elem(std::f64::consts::TAU).all().into_scalar::<bool>() {
        return theta;
    }
    let (device, dtype) = (value.device(), value.dtype());
    let data = value.clone().into_data();
    let reduced: Vec<f64> = data.iter::<f64>().map(|x| x.sin().atan2(x.cos())).collect();
    let reduced = Tensor::from_data(TensorData::new(reduced, theta.dims()), (&device, dtype));
    // The difference is zero and carries the gradient.
    reduced + (theta - value)
}
