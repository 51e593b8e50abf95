//! The real-gated linear recurrent unit inside Griffin's recurrent block (De et al. 2024, arXiv:2402.19427): the mixer
//! of Hawk, and two thirds of Griffin's.

use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Bool, Device, Distribution, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use thalweg_scan::{ConvActivation, GluActivation, Path, block_linear, rg_lru, rg_lru_step};

use crate::error::{divide, positive, positive_number};
use crate::gated::gated;
use crate::heads::token;
use crate::init::{linear, param};
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::projection::Projection;
use crate::rotary::Positions;
use crate::short_conv::{ShortConv, validate_width};
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Variance of the convolution's weights at the start, times the width of the convolution.
const CONV_VARIANCE: f64 = 0.01;

/// Options of [`RgLruBlock`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RgLruConfig {
    /// Channels of the recurrence; the model's width if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lru_width: Option<usize>,
    /// Diagonal blocks of the gates' projections.
    pub num_heads: usize,
    /// Tokens that the convolution sees.
    pub conv_size: usize,
    /// The radius `exp(-softplus(a_param))` starts uniform in area between `min_radius` and `max_radius`. A gate of 1/2
    /// makes the decay its fourth power.
    pub min_radius: f64,
    /// See `min_radius`.
    pub max_radius: f64,
}

impl Default for RgLruConfig {
    fn default() -> Self {
        Self { lru_width: None, num_heads: 8, conv_size: 4, min_radius: 0.9, max_radius: 0.999 }
    }
}

impl RgLruConfig {
    fn width(&self, site: &Site) -> usize {
        self.lru_width.unwrap_or(site.hidden_size)
    }
}

impl MixerOptions for RgLruConfig {
    type Layer = RgLruBlock;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        divide("lru_width", self.width(site), "num_heads", self.num_heads)?;
        validate_width(self.conv_size)?;
        positive_number("min_radius", self.min_radius)?;
        if self.max_radius.is_nan() || self.max_radius >= 1.0 || self.min_radius > self.max_radius {
            return Err(ConfigError::new(
                "max_radius",
                format!("must be below 1 and at least min_radius {}, got {}", self.min_radius, self.max_radius),
            ));
        }
        Ok(())
    }

    fn init(&self, site: &Site, device: &Device) -> Result<RgLruBlock, ConfigError> {
        self.validate(site)?;
        let (hidden, width) = (site.hidden_size, self.width(site));
        let std = (hidden as f64).powf(-0.5);
        // The residual branches of all layers together start with the variance of a fixed number of them.
        let out_std = (2.0 / (site.layers.max(1) as f64 * width as f64)).sqrt();
        let conv_std = (CONV_VARIANCE / self.conv_size as f64).sqrt();
        let spec = StateSpec::new::<RgLruState>(self, site)
            .option("lru_width", width)
            .recurrent("h", [width])
            .recurrent("conv", [width, self.conv_size - 1])
            .positions();
        Ok(RgLruBlock {
            linear_y: linear(hidden, width, true, std, device),
            linear_x: linear(hidden, width, true, std, device),
            conv_1d: ShortConv::new(width, self.conv_size, true, ConvActivation::None, Some(conv_std), device),
            rg_lru: RgLru::new(self, width, device),
            linear_out: linear(width, hidden, true, out_std, device),
            spec,
        })
    }
}

/// `r = sigmoid(BD_a x + b_a)`, `i = sigmoid(BD_x x + b_x)`, `log a = -8 r softplus(a_param)`,
/// `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)`, with block-diagonal `BD`. The first token of a sequence enters
/// unscaled.
#[derive(Module, Debug)]
pub struct RgLru {
    /// `[W]`.
    pub recurrent_param: Param<Tensor<1>>,
    /// `[heads, W / heads, W / heads]`.
    pub input_gate_weight: Param<Tensor<3>>,
    /// `[heads, W / heads]`.
    pub input_gate_bias: Param<Tensor<2>>,
    /// `[heads, W / heads, W / heads]`.
    pub recurrent_gate_weight: Param<Tensor<3>>,
    /// `[heads, W / heads]`.
    pub recurrent_gate_bias: Param<Tensor<2>>,
}

impl RgLru {
    fn new(config: &RgLruConfig, width: usize, device: &Device) -> Self {
        let (heads, block) = (config.num_heads, width / config.num_heads);
        let gate = Initializer::Normal { mean: 0.0, std: (block as f64).powf(-0.5) };
        let (low, high) = (config.min_radius.powi(2), config.max_radius.powi(2));
        let recurrent_param = move |device: &Device| {
            let area = Tensor::<1>::random([width], Distribution::Uniform(low, high), device);
            let radius = (area + 1e-8).sqrt();
            // softplus(a_param) = -log(radius), so exp(a_param) = 1 / radius - 1.
            ((-radius.clone() + 1.0) / radius).log()
        };
        Self {
            recurrent_param: param([width], device, recurrent_param),
            input_gate_weight: gate.init([heads, block, block], device),
            input_gate_bias: Initializer::Zeros.init([heads, block], device),
            recurrent_gate_weight: gate.init([heads, block, block], device),
            recurrent_gate_bias: Initializer::Zeros.init([heads, block], device),
        }
    }

    /// Logits of the recurrent and of the input gate, `[B, T, W]`.
    fn gates(&self, x: Tensor<3>) -> Result<[Tensor<3>; 2], Error> {
        let gate = |weight: &Param<Tensor<3>>, bias: &Param<Tensor<2>>| {
            block_linear(x.clone(), weight.val(), Some(bias.val()), Path::Auto)
        };
        Ok([
            gate(&self.recurrent_gate_weight, &self.recurrent_gate_bias)?,
            gate(&self.input_gate_weight, &self.input_gate_bias)?,
        ])
    }
}

/// Griffin's recurrent block: `W_out (gelu(W_y x) * rg_lru(conv(W_x x)))`, all projections with biases.
#[derive(Module, Debug)]
pub struct RgLruBlock {
    /// `[D, W]`, the gate of the output.
    pub linear_y: Linear,
    /// `[D, W]`.
    pub linear_x: Linear,
    /// Over the channels, with bias and without activation.
    pub conv_1d: ShortConv,
    /// The recurrence.
    pub rg_lru: RgLru,
    /// `[W, D]`.
    pub linear_out: Linear,
    #[module(skip)]
    spec: StateSpec,
}

/// What [`RgLruBlock`] carries.
#[derive(Debug, Clone)]
pub struct RgLruState {
    /// `[B, W]`, f32.
    pub h: Tensor<2>,
    /// The last `conv_size - 1` inputs of the convolution, `[B, W, conv_size - 1]`, f32.
    pub conv: Tensor<3>,
    /// Tokens seen by each sequence, `[B]`: the first is treated differently.
    pub positions: Vec<usize>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(RgLruState as "rg_lru" { h, conv, positions });

impl RgLruBlock {
    fn output(&self, h: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
        let gate = self.linear_y.project(x);
        self.linear_out.project(gated(GluActivation::GeluTanh, gate, h))
    }
}

impl SequenceMixer for RgLruBlock {
    type State = RgLruState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> RgLruState {
        let [width] = self.rg_lru.recurrent_param.shape().dims();
        RgLruState {
            h: Tensor::zeros([batch, width], device),
            conv: self.conv_1d.initial_state(batch, device),
            positions: vec![0; batch],
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<RgLruState>,
        context: &Context,
    ) -> Result<(Tensor<3>, RgLruState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let (h, conv, seen) = match state {
            Some(state) => (Some(state.h), Some(state.conv), Some(state.positions)),
            None => (None, None, None),
        };
        let positions = Positions::of_forward(&x, seen, context)?;
        let input = self.linear_x.project(x.clone());
        let (input, conv) = self.conv_1d.forward(input, conv, context)?;
        let [recurrent, gate] = self.rg_lru.gates(input.clone())?;
        let rows = if context.cu_seqlens.is_some() { 1 } else { x.dims()[0] };
        let reset = positions.first_tokens().map(|first| {
            let shape = [rows, first.len() / rows];
            Tensor::<2, Bool>::from_data(TensorData::new(first, shape), &x.device())
        });
        let a_param = self.rg_lru.recurrent_param.val();
        let out = rg_lru(input, recurrent, gate, a_param, reset, context.scan_options(h))?;
        let state = RgLruState { h: out.final_state, conv, positions: positions.after(), spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(&self, x: Tensor<2>, state: RgLruState, context: &Context) -> Result<(Tensor<2>, RgLruState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let positions = Positions::of_forward(&x, Some(state.positions), context)?;
        let input = self.linear_x.project(x.clone());
        let (input, conv) = self.conv_1d.forward(input, Some(state.conv), context)?;
        let [recurrent, gate] = self.rg_lru.gates(input.clone())?;
        let reset = positions.first_tokens().map(|first| {
            let shape = [first.len()];
            Tensor::<1, Bool>::from_data(TensorData::new(first, shape), &x.device())
        });
        let a_param = self.rg_lru.recurrent_param.val();
        let [input, recurrent, gate] = [input, recurrent, gate].map(token);
        let (o, h) = rg_lru_step(input, recurrent, gate, a_param, reset, state.h, context.path)?;
        let state = RgLruState { h, conv, positions: positions.after(), spec: self.spec.clone() };
        Ok((token(self.output(o.unsqueeze_dim(1), x)), state))
    }
}
