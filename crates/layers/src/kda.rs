//! Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{kda, kda_step};

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

/// Options of [`Kda`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KdaConfig {
    /// Heads of queries and keys.
    pub num_heads: usize,
    /// Heads of values, a multiple of `num_heads`; as many if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_v_heads: Option<usize>,
    /// Features of a query head.
    pub head_dim: usize,
    /// Features of a value head over those of a query head.
    pub expand_v: f64,
    /// Convolve queries, keys and values first.
    pub use_short_conv: bool,
    /// Tokens that a convolution sees.
    pub conv_size: usize,
    /// `beta` in (0, 2) instead of (0, 1), so that the transition can have negative eigenvalues (arXiv:2411.12537).
    pub allow_neg_eigval: bool,
}

impl Default for KdaConfig {
    fn default() -> Self {
        Self {
            num_heads: 16,
            num_v_heads: None,
            head_dim: 128,
            expand_v: 1.0,
            use_short_conv: true,
            conv_size: 4,
            allow_neg_eigval: false,
        }
    }
}

impl KdaConfig {
    fn value_heads(&self) -> usize {
        self.num_v_heads.unwrap_or(self.num_heads)
    }
}

impl MixerOptions for KdaConfig {
    type Layer = Kda;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        divide("num_v_heads", self.value_heads(), "num_heads", self.num_heads)?;
        positive("head_dim", self.head_dim)?;
        scaled("expand_v", self.head_dim, self.expand_v)?;
        validate_width(self.conv_size)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Kda, ConfigError> {
        self.validate(site)?;
        let value_heads = self.value_heads();
        let value_dim = scaled("expand_v", self.head_dim, self.expand_v)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |input, output, bias| linear(input, output, bias, std, device);
        let (keys, values) = (self.num_heads * self.head_dim, value_heads * value_dim);
        let gates = value_heads * self.head_dim;
        let conv = || QkvConv::new([keys, keys, values], self.conv_size, device);
        let spec = StateSpec::new::<KdaState>(self, site)
            .option("num_v_heads", value_heads)
            .recurrent("s", [value_heads, self.head_dim, value_dim])
            .qkv_conv(self.use_short_conv, [keys, keys, values], self.conv_size);
        Ok(Kda {
            q_proj: project(hidden, keys, false),
            k_proj: project(hidden, keys, false),
            v_proj: project(hidden, values, false),
            f_proj: (project(hidden, value_dim, false), project(value_dim, gates, false)),
            b_proj: project(hidden, value_heads, false),
            g_proj: (project(hidden, value_dim, false), project(value_dim, values, true)),
            o_proj: project(values, hidden, false),
            decay: Decay::new(value_heads, gates, (1.0, 16.0), device),
            conv: self.use_short_conv.then(conv),
            norm: GatedRmsNorm::new(value_dim, site.norm_eps, OutputGate::Sigmoid, device),
            spec,
            heads: self.num_heads,
            value_heads,
            key_dim: self.head_dim,
            value_dim,
            beta_scale: if self.allow_neg_eigval { 2.0 } else { 1.0 },
        })
    }
}

/// Gated DeltaNet with a decay for every key feature: `S <- Diag(exp g_t) S`, then
/// `S <- S + k_t (beta_t (v_t - S^T k_t))^T`, `o_t = K^-0.5 q_t^T S` with `g = -exp(A_log) softplus(f(x) + dt_bias)`,
/// `f` of the rank of a value head; the output is `W_o (rms_norm(o) * sigmoid(g(x)))` with a gate of the same rank.
#[derive(Module, Debug)]
pub struct Kda {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, H K]`.
    pub k_proj: Linear,
    /// `[D, HV V]`.
    pub v_proj: Linear,
    /// `[D, V]` and `[V, HV K]`, the decay.
    pub f_proj: (Linear, Linear),
    /// `[D, HV]`, the strength of the write.
    pub b_proj: Linear,
    /// `[D, V]` and `[V, HV V]` with bias, the output gate.
    pub g_proj: (Linear, Linear),
    /// `[HV V, D]`.
    pub o_proj: Linear,
    /// `A_log` and `dt_bias`.
    pub decay: Decay,
    /// Convolutions on q, k and v.
    pub conv: Option<QkvConv>,
    /// Norm over a head, with the output gate.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f64,
}

/// What [`Kda`] carries.
#[derive(Debug, Clone)]
pub struct KdaState {
    /// `[B, HV, K, V]`, f32.
    pub s: Tensor<4>,
    /// Of the convolutions, if the layer has them.
    pub conv: Option<QkvConvState>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(KdaState as "kda" { s, conv });

struct Projected {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    beta: Tensor<3>,
    conv: Option<QkvConvState>,
}

impl Kda {
    fn project(&self, x: &Tensor<3>, conv: Option<QkvConvState>, context: &Context) -> Result<Projected, Error> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|p| p.project(x.clone()));
        let ([q, k, v], conv) = convolve(self.conv.as_ref(), qkv, conv, true, context)?;
        let gate = self.f_proj.1.project(self.f_proj.0.project(x.clone()));
        let beta = sigmoid(full_precision(self.b_proj.project(x.clone()))) * self.beta_scale;
        Ok(Projected {
            q: split(q, self.heads),
            k: split(k, self.heads),
            v: split(v, self.value_heads),
            g: self.decay.per_feature(gate),
            beta,
            conv,
        })
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let gate = self.g_proj.1.project(self.g_proj.0.project(x));
        let o = self.norm.forward(o, split(gate, self.value_heads));
        self.o_proj.project(merge(o))
    }
}

impl SequenceMixer for Kda {
    type State = KdaState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> KdaState {
        let shape = [batch, self.value_heads, self.key_dim, self.value_dim];
        KdaState {
            s: Tensor::zeros(shape, device),
            conv: self.conv.as_ref().map(|c| c.initial_state(batch, device)),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<KdaState>,
        context: &Context,
    ) -> Result<(Tensor<3>, KdaState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let (s, conv) = state.map_or((None, None), |state| (Some(state.s), state.conv));
        let p = self.project(&x, conv, context)?;
        let options = context.matrix_options(s).with_qk_l2norm(true);
        let out = kda(p.q, p.k, p.v, p.g, p.beta, options)?;
        let state = KdaState { s: out.final_state, conv: p.conv, spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(&self, x: Tensor<2>, state: KdaState, context: &Context) -> Result<(Tensor<2>, KdaState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let p = self.project(&x, state.conv, context)?;
        let [q, k, v, g] = [p.q, p.k, p.v, p.g].map(token);
        let options = context.step_options().with_qk_l2norm(true);
        let (o, s) = kda_step(q, k, v, g, token(p.beta), state.s, options)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), KdaState { s, conv: p.conv, spec: self.spec.clone() }))
    }
}
