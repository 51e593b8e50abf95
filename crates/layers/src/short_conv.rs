//! Depth-wise causal convolution over a few tokens, as a layer.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use thalweg_scan::{ConvActivation, ShortConvOptions, short_conv};

use crate::gated::silu;
use crate::state::state_parts;
use crate::{ConfigError, Context, Error};

/// `y_t = act(bias + sum_w weight[:, w] x_{t-W+1+w})` for every channel by itself. Its state is the last `W - 1` inputs,
/// `[B, D, W - 1]`, oldest first, f32.
#[derive(Module, Debug)]
pub struct ShortConv {
    /// `[D, W]`; checkpoints of other programs hold `[D, 1, W]`.
    pub weight: Param<Tensor<2>>,
    /// `[D]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    activation: ConvActivation,
}

impl ShortConv {
    /// A convolution over `width` tokens with weights of standard deviation `std`, or, without it, uniform in
    /// `+-1/sqrt(width)`.
    pub(crate) fn new(
        channels: usize,
        width: usize,
        bias: bool,
        activation: ConvActivation,
        std: Option<f64>,
        device: &Device,
    ) -> Self {
        let weight = match std {
            Some(std) => Initializer::Normal { mean: 0.0, std },
            None => {
                let bound = (width as f64).powf(-0.5);
                Initializer::Uniform { min: -bound, max: bound }
            }
        };
        Self {
            weight: weight.init([channels, width], device),
            bias: bias.then(|| Initializer::Zeros.init([channels], device)),
            activation,
        }
    }

    /// No inputs yet: zeros `[batch, D, W - 1]`.
    pub fn initial_state(&self, batch: usize, device: &Device) -> Tensor<3> {
        let [channels, width] = self.weight.shape().dims();
        Tensor::zeros([batch, channels, width - 1], device)
    }

    /// `x` and the output are `[B, T, D]`. Returns the output and the new state.
    ///
    /// # Errors
    /// If `x`, `state` or `cu_seqlens` do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<Tensor<3>>,
        context: &Context,
    ) -> Result<(Tensor<3>, Tensor<3>), Error> {
        let options = ShortConvOptions {
            activation: self.activation,
            initial_state: state,
            cu_seqlens: context.cu_seqlens.clone(),
            path: context.path,
        };
        let bias = self.bias.as_ref().map(Param::val);
        let out = short_conv(x, self.weight.val(), bias, options)?;
        Ok((out.o, out.final_state))
    }
}

/// Convolutions with SiLU on the queries, keys and values of a layer, or SiLU alone.
#[derive(Module, Debug)]
pub struct QkvConv {
    /// On the queries.
    pub q: ShortConv,
    /// On the keys.
    pub k: ShortConv,
    /// On the values.
    pub v: ShortConv,
}

/// What [`QkvConv`] carries: the last `W - 1` projected tokens, `[B, features, W - 1]` each, f32.
#[derive(Debug, Clone)]
pub struct QkvConvState {
    /// Of the queries.
    pub q: Tensor<3>,
    /// Of the keys.
    pub k: Tensor<3>,
    /// Of the values.
    pub v: Tensor<3>,
}
state_parts!(QkvConvState { q, k, v });

/// Queries, keys and values before they are cut into heads, `[B, T, features]`.
pub(crate) type Qkv = [Tensor<3>; 3];

impl QkvConv {
    /// Convolutions over `[queries, keys, values]` features.
    pub(crate) fn new(features: [usize; 3], width: usize, device: &Device) -> Self {
        let conv = |features| ShortConv::new(features, width, false, ConvActivation::Silu, None, device);
        let [q, k, v] = features.map(conv);
        Self { q, k, v }
    }

    pub(crate) fn initial_state(&self, batch: usize, device: &Device) -> QkvConvState {
        QkvConvState {
            q: self.q.initial_state(batch, device),
            k: self.k.initial_state(batch, device),
            v: self.v.initial_state(batch, device),
        }
    }

    pub(crate) fn forward(
        &self,
        [q, k, v]: Qkv,
        state: Option<QkvConvState>,
        context: &Context,
    ) -> Result<(Qkv, QkvConvState), Error> {
        let [sq, sk, sv] = match state {
            Some(state) => [state.q, state.k, state.v].map(Some),
            None => [None, None, None],
        };
        let (q, sq) = self.q.forward(q, sq, context)?;
        let (k, sk) = self.k.forward(k, sk, context)?;
        let (v, sv) = self.v.forward(v, sv, context)?;
        let state = QkvConvState { q: sq, k: sk, v: sv };
        Ok(([q, k, v], state))
    }
}

/// Convolves if the layer has convolutions; otherwise applies SiLU if `silu_alone`.
pub(crate) fn convolve(
    conv: Option<&QkvConv>,
    qkv: Qkv,
    state: Option<QkvConvState>,
    silu_alone: bool,
    context: &Context,
) -> Result<(Qkv, Option<QkvConvState>), Error> {
    match conv {
        Some(conv) => {
            let (qkv, state) = conv.forward(qkv, state, context)?;
            Ok((qkv, Some(state)))
        }
        None if silu_alone => Ok((qkv.map(silu), None)),
        None => Ok((qkv, None)),
    }
}

/// `Ok` if a convolution can be `width` tokens wide.
pub(crate) fn validate_width(width: usize) -> Result<(), ConfigError> {
    if width < 2 {
        return Err(ConfigError::new("conv_size", format!("must be at least 2, got {width}")));
    }
    Ok(())
}
