//! Depth-wise causal convolution over a few tokens, with state.

use burn::Tensor;

use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::ScanProblem;
pub use thalweg_kernels::short_conv::Activation as ConvActivation;
use thalweg_kernels::short_conv::{self as kernel, ConvInputs, ConvProblem};

use super::glu::silu;
use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
use crate::{Error, Path, ShortConvOptions, check, portable};

/// Widths that the native kernel has.
const KERNEL_WIDTHS: std::ops::RangeInclusive<usize> = 2..=8;

/// What [`short_conv`] returns.
#[derive(Debug, Clone)]
pub struct ShortConvOutput {
    /// Outputs per token, `[B, T, D]`, in the element type of `x`.
    pub o: Tensor<3>,
    /// The last `W - 1` inputs of each sequence, oldest first, `[N, D, W - 1]`; f32 (f64 for f64 inputs).
    pub final_state: Tensor<3>,
}

/// Depth-wise causal convolution: `o_t = act(bias + sum_w weight[:, w] x_{t - W + 1 + w})`, so that
/// `weight[:, W - 1]` meets the current token. What precedes a sequence is its initial state.
///
/// `x: [B, T, D]`, `weight: [D, W]` with `W` at least 2, `bias: [D]`.
///
/// # Errors
/// A shape or option that does not fit; see [`Error`].
pub fn short_conv(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: ShortConvOptions,
) -> Result<ShortConvOutput, Error> {
    check::not_empty("x", &x)?;
    let [batch, time, channels] = x.dims();
    let width = weight.dims()[1];
    check::shape("weight", &weight, [("channels", channels), ("width", width)])?;
    if width < 2 {
        return Err(Error::Value { argument: "width", found: width.to_string(), expected: "at least 2" });
    }
    if let Some(bias) = &bias {
        check::shape("bias", bias, [("channels", channels)])?;
    }
    let count = check::sequences(options.cu_seqlens.as_deref(), batch, time)?;
    if let Some(state) = &options.initial_state {
        let axes = [("sequences", count), ("channels", channels), ("width - 1", width - 1)];
        check::shape("initial_state", state, axes)?;
    }

    let (dtype, float) = (x.dtype(), state_type(x.dtype()));
    let (weight, bias) = (weight.cast(float), bias.map(|b| b.cast(float)));
    let state = options.initial_state.map(|s| s.cast(float));
    let shape = ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens.clone() };
    let conv = ShortConv(ConvProblem { shape, width, activation: options.activation });
    if KERNEL_WIDTHS.contains(&width) && binding::available(&conv, options.path, &x) {
        let operands = Operands {
            x: x.into_dispatch(),
            weight: weight.into_dispatch(),
            bias: bias.map(Tensor::into_dispatch),
            state: state.map(Tensor::into_dispatch),
        };
        let [o, final_state] = binding::run(conv, operands)?.map(Tensor::from_dispatch);
        return Ok(ShortConvOutput { o, final_state });
    }
    let (y, final_state) = portable::conv::forward(x.cast(float), weight, bias, state, options.cu_seqlens.as_deref());
    let y = match options.activation {
        ConvActivation::None => y,
        ConvActivation::Silu => silu(y),
    };
    Ok(ShortConvOutput { o: y.cast(dtype), final_state })
}

/// One token of [`short_conv`]: `x: [B, D]`, `state: [B, D, W - 1]`. Returns the output `[B, D]` and the
/// new state.
///
/// # Errors
/// As [`short_conv`].
pub fn short_conv_step(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: ConvActivation,
    state: Tensor<3>,
    path: Path,
) -> Result<(Tensor<2>, Tensor<3>), Error> {
    let options = ShortConvOptions::new().with_activation(activation).with_initial_state(state).with_path(path);
    let out = short_conv(x.unsqueeze_dim(1), weight, bias, options)?;
    Ok((out.o.squeeze_dim(1), out.final_state))
}

operands! {
    /// The tensors of the convolution; all but `x` in f32.
    struct Operands { x, weight; bias: Option, state: Option }
}

/// The convolution.
#[derive(Debug, Clone)]
struct ShortConv(ConvProblem);

fn cpu_inputs<E: Number>(x: &Operands<FlexTensor>) -> ConvInputs<'_, E> {
    ConvInputs { x: slice(&x.x), weight: slice(&x.weight), bias: optional(&x.bias), state: optional(&x.state) }
}

#[cfg(feature = "cube")]
fn gpu_inputs(x: &Operands<Buffer>) -> gpu::short_conv::Inputs<'_> {
    gpu::short_conv::Inputs { x: &x.x, weight: &x.weight, bias: x.bias.as_ref(), state: x.state.as_ref() }
}

impl Operation for ShortConv {
    type Operands = Operands<()>;

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        let ConvProblem { shape, width, .. } = &self.0;
        let [sequences, channels] = shape.state_shape();
        vec![OutputSpec::typed(shape.token_shape()), OutputSpec::f32([sequences, channels, width - 1])]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let out = kernel::forward::<E>(&self.0, &cpu_inputs(&x))?;
        Ok(Forward::of([values(out.y), values(out.state)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        _: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let grads = kernel::backward::<E>(&self.0, &cpu_inputs(&x), slice(&d[0]), Some(slice(&d[1])))?;
        Ok(Operands {
            x: Some(values(grads.dx)),
            weight: Some(values(grads.dweight)),
            bias: x.bias.map(|_| Some(values(grads.dbias))),
            state: x.state.map(|_| Some(values(grads.dstate))),
        })
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::short_conv::forward(client, &self.0, &gpu_inputs(x))?;
        Ok(vec![out.y, out.state])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        _: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        let grads = gpu::short_conv::backward(client, &self.0, &gpu_inputs(x), &d[0], Some(&d[1]))?;
        Ok(Operands {
            x: Some(grads.dx),
            weight: Some(grads.dweight),
            bias: x.bias.as_ref().map(|_| Some(grads.dbias)),
            state: x.state.as_ref().map(|_| Some(grads.dstate)),
        })
    }
}
