//! Lightning Attention as in MiniMax-01 (Li et al. 2025, arXiv:2501.08313; Qin et al. 2024, arXiv:2401.04658).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use thalweg_scan::{GluActivation, retention, retention_step};

use crate::error::{divide, positive};
use crate::gated::{gated, silu};
use crate::heads::{merge, split, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{RmsNorm, RmsNormConfig};
use crate::projection::Projection;
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Epsilon of the norm, which MiniMax does not take from its configuration.
const NORM_EPS: f64 = 1e-6;

/// Options of [`Lightning`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LightningConfig {
    /// Heads.
    pub num_heads: usize,
    /// Features of a head; the model's width over `num_heads` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
}

impl Default for LightningConfig {
    fn default() -> Self {
        Self { num_heads: 8, head_dim: None }
    }
}

impl LightningConfig {
    fn head_dim(&self, site: &Site) -> Result<usize, ConfigError> {
        positive("num_heads", self.num_heads)?;
        match self.head_dim {
            Some(head_dim) => positive("head_dim", head_dim).map(|()| head_dim),
            None => divide("hidden_size", site.hidden_size, "num_heads", self.num_heads),
        }
    }
}

impl MixerOptions for LightningConfig {
    type Layer = Lightning;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        self.head_dim(site)?;
        if site.layer >= site.layers {
            return Err(ConfigError::new("layer", format!("{} of {} layers does not exist", site.layer, site.layers)));
        }
        Ok(())
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Lightning, ConfigError> {
        self.validate(site)?;
        let head_dim = self.head_dim(site)?;
        let features = self.num_heads * head_dim;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let spec = StateSpec::new::<LightningState>(self, site)
            .option("head_dim", head_dim)
            .recurrent("s", [self.num_heads, head_dim, head_dim]);
        Ok(Lightning {
            qkv_proj: linear(hidden, 3 * features, false, std, device),
            output_gate: linear(hidden, features, false, std, device),
            out_proj: linear(features, hidden, false, std, device),
            norm: RmsNormConfig::new(features).with_eps(NORM_EPS).init(device),
            slopes: slopes(self.num_heads, site.layer, site.layers),
            spec,
            heads: self.num_heads,
            head_dim,
        })
    }
}

/// `s_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)` for heads `h` from 0 and layer `l` of `L`: steeper for
/// earlier heads, and for earlier layers.
pub fn slopes(heads: usize, layer: usize, layers: usize) -> Vec<f64> {
    let depth = 1.0 - layer as f64 / (layers as f64 - 1.0 + 1e-5) + 1e-5;
    let slope = |head: usize| (-8.0 * (head + 1) as f64 / heads as f64).exp2() * depth;
    (0..heads).map(slope).collect()
}

/// `S_t = exp(-s_h) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t` (no scale) with `q, k, v = silu(x W)`; the output is
/// `W_o (rms_norm(o) * sigmoid(x W_g))`, normalised over all heads together.
#[derive(Module, Debug)]
pub struct Lightning {
    /// `[D, 3 H K]`, cut into heads first: each has its q, k and v side by side.
    pub qkv_proj: Linear,
    /// `[D, H K]`.
    pub output_gate: Linear,
    /// `[H K, D]`.
    pub out_proj: Linear,
    /// Over the features of all heads.
    pub norm: RmsNorm,
    #[module(skip)]
    slopes: Vec<f64>,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    head_dim: usize,
}

/// What [`Lightning`] carries.
#[derive(Debug, Clone)]
pub struct LightningState {
    /// `[B, H, K, K]`, f32.
    pub s: Tensor<4>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(LightningState as "lightning" { s });

impl Lightning {
    fn gates(&self, device: &Device) -> Tensor<1> {
        let gates: Vec<f32> = self.slopes.iter().map(|slope| -slope as f32).collect();
        Tensor::from_data(TensorData::new(gates, [self.heads]), device)
    }

    fn project(&self, x: &Tensor<3>) -> [Tensor<4>; 3] {
        let qkv = split(silu(self.qkv_proj.project(x.clone())), self.heads);
        [0, 1, 2].map(|i| qkv.clone().narrow(3, i * self.head_dim, self.head_dim))
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let o = self.norm.forward(merge(o));
        let gate = self.output_gate.project(x);
        self.out_proj.project(gated(GluActivation::Sigmoid, gate, o))
    }
}

impl SequenceMixer for Lightning {
    type State = LightningState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> LightningState {
        LightningState {
            s: Tensor::zeros([batch, self.heads, self.head_dim, self.head_dim], device),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<LightningState>,
        context: &Context,
    ) -> Result<(Tensor<3>, LightningState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let [q, k, v] = self.project(&x);
        let gates = self.gates(&x.device());
        let options = context.matrix_options(state.map(|state| state.s)).with_scale(1.0);
        let out = retention(q, k, v, gates, options)?;
        let state = LightningState { s: out.final_state, spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(
        &self,
        x: Tensor<2>,
        state: LightningState,
        context: &Context,
    ) -> Result<(Tensor<2>, LightningState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let [q, k, v] = self.project(&x).map(token);
        let gates = self.gates(&x.device());
        let options = context.step_options().with_scale(1.0);
        let (o, s) = retention_step(q, k, v, gates, state.s, options)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), LightningState { s, spec: self.spec.clone() }))
    }
}
