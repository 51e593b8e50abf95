//! Multi-scale retention (Sun et al. 2023, arXiv:2307.08621).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use thalweg_scan::{retention, retention_step};

use crate::error::{divide, even, positive_number, scaled};
use crate::heads::{merge, split, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{GatedRmsNorm, OutputGate};
use crate::projection::Projection;
use crate::rotary::{Positions, Rotary, Rotation};
use crate::short_conv::{QkvConv, QkvConvState, convolve, validate_width};
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Options of [`Retnet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetnetConfig {
    /// Heads.
    pub num_heads: usize,
    /// Features of all queries over the model's width.
    pub expand_k: f64,
    /// Features of all values over the model's width.
    pub expand_v: f64,
    /// Base of the rotary embedding of queries and keys.
    pub rope_theta: f64,
    /// Convolve queries, keys and values first.
    pub use_short_conv: bool,
    /// Tokens that a convolution sees.
    pub conv_size: usize,
}

impl Default for RetnetConfig {
    fn default() -> Self {
        Self { num_heads: 8, expand_k: 1.0, expand_v: 2.0, rope_theta: 10_000.0, use_short_conv: false, conv_size: 4 }
    }
}

impl RetnetConfig {
    /// Features of a query head and of a value head.
    fn sizes(&self, site: &Site) -> Result<(usize, usize), ConfigError> {
        let keys = scaled("expand_k", site.hidden_size, self.expand_k)?;
        let values = scaled("expand_v", site.hidden_size, self.expand_v)?;
        let key_dim = divide("expand_k", keys, "num_heads", self.num_heads)?;
        even("expand_k", key_dim)?;
        let value_dim = divide("expand_v", values, "num_heads", self.num_heads)?;
        Ok((key_dim, value_dim))
    }
}

impl MixerOptions for RetnetConfig {
    type Layer = Retnet;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        self.sizes(site)?;
        positive_number("rope_theta", self.rope_theta)?;
        validate_width(self.conv_size)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Retnet, ConfigError> {
        self.validate(site)?;
        let (key_dim, value_dim) = self.sizes(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, false, std, device);
        let (keys, values) = (self.num_heads * key_dim, self.num_heads * value_dim);
        let conv = || QkvConv::new([keys, keys, values], self.conv_size, device);
        let spec = StateSpec::new::<RetnetState>(self, site)
            .recurrent("s", [self.num_heads, key_dim, value_dim])
            .qkv_conv(self.use_short_conv, [keys, keys, values], self.conv_size)
            .positions();
        Ok(Retnet {
            q_proj: project(keys),
            k_proj: project(keys),
            v_proj: project(values),
            g_proj: project(values),
            o_proj: linear(values, hidden, false, std, device),
            conv: self.use_short_conv.then(conv),
            norm: GatedRmsNorm::new(value_dim, site.norm_eps, OutputGate::Silu, device),
            rotary: Rotary::new(key_dim, self.rope_theta),
            spec,
            heads: self.num_heads,
            key_dim,
            value_dim,
        })
    }
}

/// `S_t = gamma_h S_{t-1} + k_t v_t^T`, `o_t = K^-0.5 q_t^T S_t` with `gamma_h = 1 - 2^(-5-h)` and rotary q and k; the
/// output is `W_o (rms_norm(o) * silu(x W_g))`, normalised per head.
#[derive(Module, Debug)]
pub struct Retnet {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, H K]`.
    pub k_proj: Linear,
    /// `[D, H V]`.
    pub v_proj: Linear,
    /// `[D, H V]`, the output gate.
    pub g_proj: Linear,
    /// `[H V, D]`.
    pub o_proj: Linear,
    /// Convolutions on q, k and v.
    pub conv: Option<QkvConv>,
    /// Norm over a head, with the output gate.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    rotary: Rotary,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
}

/// What [`Retnet`] carries.
#[derive(Debug, Clone)]
pub struct RetnetState {
    /// `[B, H, K, V]`, f32.
    pub s: Tensor<4>,
    /// Of the convolutions, if the layer has them.
    pub conv: Option<QkvConvState>,
    /// Tokens seen by each sequence, `[B]`.
    pub positions: Vec<usize>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(RetnetState as "retnet" { s, conv, positions });

impl Retnet {
    /// `log(1 - 2^(-5-h))`, `[H]`.
    fn gates(&self, device: &Device) -> Tensor<1> {
        let gamma = |head: usize| (-(2f64.powi(-5 - head as i32))).ln_1p() as f32;
        let gates: Vec<f32> = (0..self.heads).map(gamma).collect();
        Tensor::from_data(TensorData::new(gates, [self.heads]), device)
    }

    fn project(
        &self,
        x: &Tensor<3>,
        conv: Option<QkvConvState>,
        rotation: &Rotation,
        context: &Context,
    ) -> Result<([Tensor<4>; 3], Option<QkvConvState>), Error> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|p| p.project(x.clone()));
        let (qkv, conv) = convolve(self.conv.as_ref(), qkv, conv, false, context)?;
        let [q, k, v] = qkv.map(|x| split(x, self.heads));
        Ok(([rotation.apply(q), rotation.apply(k), v], conv))
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let gate = split(self.g_proj.project(x), self.heads);
        self.o_proj.project(merge(self.norm.forward(o, gate)))
    }
}

impl SequenceMixer for Retnet {
    type State = RetnetState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> RetnetState {
        RetnetState {
            s: Tensor::zeros([batch, self.heads, self.key_dim, self.value_dim], device),
            conv: self.conv.as_ref().map(|c| c.initial_state(batch, device)),
            positions: vec![0; batch],
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<RetnetState>,
        context: &Context,
    ) -> Result<(Tensor<3>, RetnetState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let device = x.device();
        let (s, conv, seen) = match state {
            Some(state) => (Some(state.s), state.conv, Some(state.positions)),
            None => (None, None, None),
        };
        let positions = Positions::of_forward(&x, seen, context)?;
        let rotation = positions.rotation(&self.rotary, &device);
        let ([q, k, v], conv) = self.project(&x, conv, &rotation, context)?;
        let out = retention(q, k, v, self.gates(&device), context.matrix_options(s))?;
        let state = RetnetState { s: out.final_state, conv, positions: positions.after(), spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(&self, x: Tensor<2>, state: RetnetState, context: &Context) -> Result<(Tensor<2>, RetnetState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let device = x.device();
        let positions = Positions::of_forward(&x, Some(state.positions), context)?;
        let rotation = positions.rotation(&self.rotary, &device);
        let (qkv, conv) = self.project(&x, state.conv, &rotation, context)?;
        let [q, k, v] = qkv.map(token);
        let options = context.step_options();
        let (o, s) = retention_step(q, k, v, self.gates(&device), state.s, options)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        let state = RetnetState { s, conv, positions: positions.after(), spec: self.spec.clone() };
        Ok((token(out), state))
    }
}
