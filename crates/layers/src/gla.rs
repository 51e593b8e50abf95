//! Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{gla, gla_step};

use crate::error::{divide, positive, positive_number, scaled};
use crate::gated::log_sigmoid;
use crate::heads::{full_precision, merge, repeat, split, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{GatedRmsNorm, OutputGate};
use crate::projection::Projection;
use crate::short_conv::{QkvConv, QkvConvState, convolve, validate_width};
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Options of [`Gla`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GlaConfig {
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of keys, values and gates; each serves `num_heads / num_kv_heads` query heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_kv_heads: Option<usize>,
    /// Features of all queries over the model's width.
    pub expand_k: f64,
    /// Features of all values over the model's width.
    pub expand_v: f64,
    /// Rank of the gate's projection.
    pub gate_low_rank_dim: usize,
    /// Temperature: the log gate is divided by it, which keeps gates near 1.
    pub gate_logit_normalizer: f64,
    /// Convolve queries, keys and values first.
    pub use_short_conv: bool,
    /// Tokens that a convolution sees.
    pub conv_size: usize,
}

impl Default for GlaConfig {
    fn default() -> Self {
        Self {
            num_heads: 4,
            num_kv_heads: None,
            expand_k: 0.5,
            expand_v: 1.0,
            gate_low_rank_dim: 16,
            gate_logit_normalizer: 16.0,
            use_short_conv: false,
            conv_size: 4,
        }
    }
}

struct Sizes {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
}

impl GlaConfig {
    fn sizes(&self, site: &Site) -> Result<Sizes, ConfigError> {
        positive("num_heads", self.num_heads)?;
        let keys = scaled("expand_k", site.hidden_size, self.expand_k)?;
        let values = scaled("expand_v", site.hidden_size, self.expand_v)?;
        let kv_heads = self.num_kv_heads.unwrap_or(self.num_heads);
        divide("num_heads", self.num_heads, "num_kv_heads", kv_heads)?;
        Ok(Sizes {
            kv_heads,
            key_dim: divide("expand_k", keys, "num_heads", self.num_heads)?,
            value_dim: divide("expand_v", values, "num_heads", self.num_heads)?,
        })
    }
}

impl MixerOptions for GlaConfig {
    type Layer = Gla;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        self.sizes(site)?;
        positive("gate_low_rank_dim", self.gate_low_rank_dim)?;
        positive_number("gate_logit_normalizer", self.gate_logit_normalizer)?;
        validate_width(self.conv_size)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Gla, ConfigError> {
        self.validate(site)?;
        let Sizes { kv_heads, key_dim, value_dim } = self.sizes(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, false, std, device);
        let (queries, values) = (self.num_heads * key_dim, self.num_heads * value_dim);
        let (keys, kv_values) = (kv_heads * key_dim, kv_heads * value_dim);
        let rank = self.gate_low_rank_dim;
        let conv = || QkvConv::new([queries, keys, kv_values], self.conv_size, device);
        let spec = StateSpec::new::<GlaState>(self, site)
            .option("num_kv_heads", kv_heads)
            .recurrent("s", [self.num_heads, key_dim, value_dim])
            .qkv_conv(self.use_short_conv, [queries, keys, kv_values], self.conv_size);
        Ok(Gla {
            q_proj: project(queries),
            k_proj: project(keys),
            v_proj: project(kv_values),
            g_proj: project(values),
            gk_proj: (project(rank), linear(rank, keys, true, std, device)),
            o_proj: linear(values, hidden, false, std, device),
            conv: self.use_short_conv.then(conv),
            norm: GatedRmsNorm::new(value_dim, site.norm_eps, OutputGate::Silu, device),
            spec,
            heads: self.num_heads,
            kv_heads,
            key_dim,
            value_dim,
            gate_normalizer: self.gate_logit_normalizer,
        })
    }
}

/// `S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = K^-0.5 q_t^T S_t` per head, with the gate
/// `g_t = logsigmoid(x_t W_1 W_2 + b) / 16` per key feature; the output is `W_o (rms_norm(o) * silu(x W_g))`, normalised
/// per head.
#[derive(Module, Debug)]
pub struct Gla {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, HK K]`.
    pub k_proj: Linear,
    /// `[D, HK V]`.
    pub v_proj: Linear,
    /// `[D, H V]`, the output gate.
    pub g_proj: Linear,
    /// `[D, rank]` and `[rank, HK K]` with bias, the decay.
    pub gk_proj: (Linear, Linear),
    /// `[H V, D]`.
    pub o_proj: Linear,
    /// Convolutions on q, k and v.
    pub conv: Option<QkvConv>,
    /// Norm over a head, with the output gate.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    gate_normalizer: f64,
}

/// What [`Gla`] carries.
#[derive(Debug, Clone)]
pub struct GlaState {
    /// `[B, H, K, V]`, f32.
    pub s: Tensor<4>,
    /// Of the convolutions, if the layer has them.
    pub conv: Option<QkvConvState>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(GlaState as "gla" { s, conv });

struct Projected {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    conv: Option<QkvConvState>,
}

impl Gla {
    fn project(&self, x: &Tensor<3>, conv: Option<QkvConvState>, context: &Context) -> Result<Projected, Error> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|p| p.project(x.clone()));
        let ([q, k, v], conv) = convolve(self.conv.as_ref(), qkv, conv, false, context)?;
        let gate = self.gk_proj.1.project(self.gk_proj.0.project(x.clone()));
        let g = log_sigmoid(full_precision(gate)) / self.gate_normalizer;
        let groups = self.heads / self.kv_heads;
        let shared = |x| repeat(split(x, self.kv_heads), groups);
        Ok(Projected { q: split(q, self.heads), k: shared(k), v: shared(v), g: shared(g), conv })
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let gate = split(self.g_proj.project(x), self.heads);
        self.o_proj.project(merge(self.norm.forward(o, gate)))
    }
}

impl SequenceMixer for Gla {
    type State = GlaState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> GlaState {
        GlaState {
            s: Tensor::zeros([batch, self.heads, self.key_dim, self.value_dim], device),
            conv: self.conv.as_ref().map(|c| c.initial_state(batch, device)),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<GlaState>,
        context: &Context,
    ) -> Result<(Tensor<3>, GlaState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let (s, conv) = state.map_or((None, None), |state| (Some(state.s), state.conv));
        let p = self.project(&x, conv, context)?;
        let out = gla(p.q, p.k, p.v, p.g, context.matrix_options(s))?;
        let state = GlaState { s: out.final_state, conv: p.conv, spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(&self, x: Tensor<2>, state: GlaState, context: &Context) -> Result<(Tensor<2>, GlaState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let p = self.project(&x, state.conv, context)?;
        let [q, k, v, g] = [p.q, p.k, p.v, p.g].map(token);
        let (o, s) = gla_step(q, k, v, g, state.s, context.step_options())?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), GlaState { s, conv: p.conv, spec: self.spec.clone() }))
    }
}
