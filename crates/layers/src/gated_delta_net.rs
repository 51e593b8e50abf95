//! Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{gated_delta_rule, gated_delta_rule_step};

use crate::decay::Decay;
use crate::error::{divide, positive, scaled};
use crate::heads::{full_precision, merge, split, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{GatedRmsNorm, OutputGate};
use crate::projection::Projection;
use crate::short_conv::{QkvConv, QkvConvState, convolve, validate_width};
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Options of [`GatedDeltaNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatedDeltaNetConfig {
    /// Heads of queries and keys.
    pub num_heads: usize,
    /// Heads of values, a multiple of `num_heads`; as many if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_v_heads: Option<usize>,
    /// Features of a query head.
    pub head_dim: usize,
    /// Features of a value head over those of a query head.
    pub expand_v: f64,
    /// Gate the output with `silu(x W_g)`.
    pub use_gate: bool,
    /// Convolve queries, keys and values first.
    pub use_short_conv: bool,
    /// Tokens that a convolution sees.
    pub conv_size: usize,
    /// `beta` in (0, 2) instead of (0, 1), so that the transition can have negative eigenvalues (arXiv:2411.12537).
    pub allow_neg_eigval: bool,
}

impl Default for GatedDeltaNetConfig {
    fn default() -> Self {
        Self {
            num_heads: 6,
            num_v_heads: None,
            head_dim: 256,
            expand_v: 2.0,
            use_gate: true,
            use_short_conv: true,
            conv_size: 4,
            allow_neg_eigval: false,
        }
    }
}

impl GatedDeltaNetConfig {
    fn value_heads(&self) -> usize {
        self.num_v_heads.unwrap_or(self.num_heads)
    }
}

impl MixerOptions for GatedDeltaNetConfig {
    type Layer = GatedDeltaNet;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        divide("num_v_heads", self.value_heads(), "num_heads", self.num_heads)?;
        positive("head_dim", self.head_dim)?;
        scaled("expand_v", self.head_dim, self.expand_v)?;
        validate_width(self.conv_size)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<GatedDeltaNet, ConfigError> {
        self.validate(site)?;
        let value_heads = self.value_heads();
        let value_dim = scaled("expand_v", self.head_dim, self.expand_v)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, false, std, device);
        let (keys, values) = (self.num_heads * self.head_dim, value_heads * value_dim);
        let conv = || QkvConv::new([keys, keys, values], self.conv_size, device);
        let spec = StateSpec::new::<GatedDeltaNetState>(self, site)
            .option("num_v_heads", value_heads)
            .recurrent("s", [value_heads, self.head_dim, value_dim])
            .qkv_conv(self.use_short_conv, [keys, keys, values], self.conv_size);
        Ok(GatedDeltaNet {
            q_proj: project(keys),
            k_proj: project(keys),
            v_proj: project(values),
            a_proj: project(value_heads),
            b_proj: project(value_heads),
            g_proj: self.use_gate.then(|| project(values)),
            o_proj: linear(values, hidden, false, std, device),
            decay: Decay::new(value_heads, value_heads, (0.0, 16.0), device),
            conv: self.use_short_conv.then(conv),
            norm: GatedRmsNorm::new(value_dim, site.norm_eps, OutputGate::Silu, device),
            spec,
            heads: self.num_heads,
            value_heads,
            key_dim: self.head_dim,
            value_dim,
            beta_scale: if self.allow_neg_eigval { 2.0 } else { 1.0 },
        })
    }
}

/// `S <- exp(g_t) S`, then `S <- S + k_t (beta_t (v_t - S^T k_t))^T`, `o_t = K^-0.5 q_t^T S` with
/// `q, k, v = silu(conv(x W))`, q and k of length 1, `g = -exp(A_log) softplus(x W_a + dt_bias)`,
/// `beta = sigmoid(x W_b)`; the output is `W_o (rms_norm(o) * silu(x W_g))`, normalised per head.
#[derive(Module, Debug)]
pub struct GatedDeltaNet {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, H K]`.
    pub k_proj: Linear,
    /// `[D, HV V]`.
    pub v_proj: Linear,
    /// `[D, HV]`, the decay.
    pub a_proj: Linear,
    /// `[D, HV]`, the strength of the write.
    pub b_proj: Linear,
    /// `[D, HV V]`, the output gate if there is one.
    pub g_proj: Option<Linear>,
    /// `[HV V, D]`.
    pub o_proj: Linear,
    /// `A_log` and `dt_bias`.
    pub decay: Decay,
    /// Convolutions on q, k and v.
    pub conv: Option<QkvConv>,
    /// Norm over a head, with the output gate if there is one.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f64,
}

/// What [`GatedDeltaNet`] carries.
#[derive(Debug, Clone)]
pub struct GatedDeltaNetState {
    /// `[B, HV, K, V]`, f32.
    pub s: Tensor<4>,
    /// Of the convolutions, if the layer has them.
    pub conv: Option<QkvConvState>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(GatedDeltaNetState as "gated_delta_net" { s, conv });

struct Projected {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<3>,
    beta: Tensor<3>,
    conv: Option<QkvConvState>,
}

impl GatedDeltaNet {
    fn project(&self, x: &Tensor<3>, conv: Option<QkvConvState>, context: &Context) -> Result<Projected, Error> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|p| p.project(x.clone()));
        let ([q, k, v], conv) = convolve(self.conv.as_ref(), qkv, conv, true, context)?;
        let beta = sigmoid(full_precision(self.b_proj.project(x.clone()))) * self.beta_scale;
        Ok(Projected {
            q: split(q, self.heads),
            k: split(k, self.heads),
            v: split(v, self.value_heads),
            g: self.decay.per_head(self.a_proj.project(x.clone())),
            beta,
            conv,
        })
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let o = match &self.g_proj {
            Some(gate) => self.norm.forward(o, split(gate.project(x), self.value_heads)),
            None => self.norm.normalize(o),
        };
        self.o_proj.project(merge(o))
    }
}

impl SequenceMixer for GatedDeltaNet {
    type State = GatedDeltaNetState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> GatedDeltaNetState {
        let shape = [batch, self.value_heads, self.key_dim, self.value_dim];
        GatedDeltaNetState {
            s: Tensor::zeros(shape, device),
            conv: self.conv.as_ref().map(|c| c.initial_state(batch, device)),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<GatedDeltaNetState>,
        context: &Context,
    ) -> Result<(Tensor<3>, GatedDeltaNetState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let (s, conv) = state.map_or((None, None), |state| (Some(state.s), state.conv));
        let p = self.project(&x, conv, context)?;
        let options = context.matrix_options(s).with_qk_l2norm(true);
        let out = gated_delta_rule(p.q, p.k, p.v, p.g, p.beta, options)?;
        let state = GatedDeltaNetState { s: out.final_state, conv: p.conv, spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(
        &self,
        x: Tensor<2>,
        state: GatedDeltaNetState,
        context: &Context,
    ) -> Result<(Tensor<2>, GatedDeltaNetState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let p = self.project(&x, state.conv, context)?;
        let [q, k, v] = [p.q, p.k, p.v].map(token);
        let [g, beta] = [p.g, p.beta].map(token);
        let options = context.step_options().with_qk_l2norm(true);
        let (o, s) = gated_delta_rule_step(q, k, v, g, beta, state.s, options)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), GatedDeltaNetState { s, conv: p.conv, spec: self.spec.clone() }))
    }
}
