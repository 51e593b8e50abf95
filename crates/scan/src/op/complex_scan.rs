//! The element-wise linear recurrence over complex numbers.

use burn::Tensor;
use burn::tensor::{FloatDType, TensorData};
use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::complex_scan::{self as kernel, ComplexInputs};

use crate::binding::cpu::{Number, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
use crate::portable::scan::{Complex, forward};
use crate::{ComplexScanOptions, Error, Path, check};

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

    let scan = ComplexScan(ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens.clone() });
    if binding::available(&scan, options.path, &b_re) {
        return scan.run([log_a, theta, b_re, b_im], options);
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
    path: Path,
) -> Result<(Tensor<2>, Tensor<2>), Error> {
    let options = ComplexScanOptions::new().with_initial_state(state.0, state.1).with_path(path);
    let [log_a, theta, b_re, b_im] = [log_a, theta, b_re, b_im].map(|x| x.unsqueeze_dim(1));
    let out = complex_scan(log_a, theta, b_re, b_im, options)?;
    Ok((out.final_re, out.final_im))
}

/// A pair of planes that may be absent.
type State<T> = Option<kernel::Complex<T>>;

operands! {
    /// The tensors of the complex scan.
    struct Operands { log_a, theta, b_re, b_im; initial_re: Option, initial_im: Option }
}

/// The complex scan.
#[derive(Debug, Clone)]
struct ComplexScan(ScanProblem);

impl ComplexScan {
    /// Runs the kernel. Where the element types differ all go to f32: an angle would lose its digits.
    fn run(self, mut inputs: [Tensor<3>; 4], options: ComplexScanOptions) -> Result<ComplexScanOutput, Error> {
        let dtype = inputs[2].dtype();
        if inputs.iter().any(|x| x.dtype() != dtype) {
            inputs = inputs.map(|x| x.cast(FloatDType::F32));
        }
        let [log_a, theta, b_re, b_im] = inputs.map(Tensor::into_dispatch);
        let (initial_re, initial_im) = options.initial_state.unzip();
        let [initial_re, initial_im] =
            [initial_re, initial_im].map(|h| h.map(|h| h.cast(FloatDType::F32).into_dispatch()));
        let operands = Operands { log_a, theta, b_re, b_im, initial_re, initial_im };
        let [re, im, final_re, final_im] = binding::run(self, operands)?;
        let [re, im] = [re, im].map(|o| Tensor::<3>::from_dispatch(o).cast(dtype));
        let [final_re, final_im] = [final_re, final_im].map(Tensor::from_dispatch);
        Ok(ComplexScanOutput { re, im, final_re, final_im })
    }
}

fn planes<T>(re: T, im: T) -> kernel::Complex<T> {
    kernel::Complex { re, im }
}

/// Both planes of the initial state.
fn state<T>(x: &Operands<T>) -> State<&T> {
    Some(planes(x.initial_re.as_ref()?, x.initial_im.as_ref()?))
}

fn cpu_inputs<E: Number>(x: &Operands<FlexTensor>) -> ComplexInputs<'_, E> {
    ComplexInputs {
        log_a: slice(&x.log_a),
        theta: slice(&x.theta),
        b: planes(slice(&x.b_re), slice(&x.b_im)),
        initial_state: state(x).map(|h| planes(slice(h.re), slice(h.im))),
    }
}

#[cfg(feature = "cube")]
fn gpu_inputs(x: &Operands<Buffer>) -> gpu::complex_scan::ComplexInputs<'_> {
    let b = planes(&x.b_re, &x.b_im);
    gpu::complex_scan::ComplexInputs { log_a: &x.log_a, theta: &x.theta, b, initial_state: state(x) }
}

impl Operation for ComplexScan {
    type Operands = Operands<()>;

    const SAVED: &'static [usize] = &[0, 1];

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.b_re
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        let (o, state) = (OutputSpec::typed(self.0.token_shape()), OutputSpec::f32(self.0.state_shape()));
        vec![o.clone(), o, state.clone(), state]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let out = kernel::forward::<E>(&self.0, &cpu_inputs(&x))?;
        let [re, im] = [out.o.re, out.o.im].map(values);
        let [final_re, final_im] = [out.final_state.re, out.final_state.im].map(values);
        Ok(Forward::of([re, im, final_re, final_im]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let o = planes(slice::<E>(&saved[0]), slice(&saved[1]));
        let (d_o, d_state) = (planes(slice(&d[0]), slice(&d[1])), planes(slice(&d[2]), slice(&d[3])));
        let grads = kernel::backward(&self.0, &cpu_inputs(&x), o, d_o, Some(d_state))?;
        Ok(Operands {
            log_a: Some(values(grads.dlog_a)),
            theta: Some(values(grads.dtheta)),
            b_re: Some(values(grads.db.re)),
            b_im: Some(values(grads.db.im)),
            initial_re: x.initial_re.map(|_| Some(values(grads.d_initial_state.re))),
            initial_im: x.initial_im.map(|_| Some(values(grads.d_initial_state.im))),
        })
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::complex_scan::forward(client, &self.0, &gpu_inputs(x))?;
        Ok(vec![out.o.re, out.o.im, out.final_state.re, out.final_state.im])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        saved: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        let (o, d_o, d_state) = (planes(&saved[0], &saved[1]), planes(&d[0], &d[1]), planes(&d[2], &d[3]));
        let grads = gpu::complex_scan::backward(client, &self.0, &gpu_inputs(x), o, d_o, Some(d_state))?;
        Ok(Operands {
            log_a: Some(grads.dlog_a),
            theta: Some(grads.dtheta),
            b_re: Some(grads.db.re),
            b_im: Some(grads.db.im),
            initial_re: x.initial_re.as_ref().map(|_| Some(grads.d_initial_state.re)),
            initial_im: x.initial_im.as_ref().map(|_| Some(grads.d_initial_state.im)),
        })
    }
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
