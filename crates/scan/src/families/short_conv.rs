//! Depth-wise causal convolution over a few tokens, with state.

use burn::Tensor;

use thalweg_kernels::ScanProblem;
pub use thalweg_kernels::short_conv::Activation as ConvActivation;
use thalweg_kernels::short_conv::ConvProblem;

use super::glu::silu;
use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
use crate::{Error, ShortConvOptions, check, portable};

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
    if native::available(options.path, Written::ForCpuAndGpu, &x) && KERNEL_WIDTHS.contains(&width) {
        let shape = ScanProblem { batch, time, channels, cu_seqlens: options.cu_seqlens };
        let problem = ConvProblem { shape, width, activation: options.activation };
        let (bias, state) = (bias.map(Into::into), state.map(Into::into));
        let rest = [Some(weight.into()), bias, state, None, None, None];
        let (o, final_state) = native::run(Operation::ShortConv { problem }, x, rest)?;
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
) -> Result<(Tensor<2>, Tensor<3>), Error> {
    let options = ShortConvOptions::new().with_activation(activation).with_initial_state(state);
    let out = short_conv(x.unsqueeze_dim(1), weight, bias, options)?;
    Ok((out.o.squeeze_dim(1), out.final_state))
}
