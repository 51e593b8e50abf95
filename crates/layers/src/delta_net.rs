//! DeltaNet (Yang et al. 2024, arXiv:2406.06484).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{delta_rule, delta_rule_step};

use crate::error::{divide, scaled};
use crate::heads::{full_precision, merge, split, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{GatedRmsNorm, OutputGate};
use crate::projection::Projection;
use crate::short_conv::{QkvConv, QkvConvState, convolve, validate_width};
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Options of [`DeltaNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeltaNetConfig {
    /// Heads.
    pub num_heads: usize,
    /// Features of all queries over the model's width.
    pub expand_k: f64,
    /// Features of all values over the model's width.
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

impl Default for DeltaNetConfig {
    fn default() -> Self {
        Self {
            num_heads: 4,
            expand_k: 1.0,
            expand_v: 1.0,
            use_gate: false,
            use_short_conv: true,
            conv_size: 4,
            allow_neg_eigval: false,
        }
    }
}

impl DeltaNetConfig {
    /// Features of a query head and of a value head.
    fn sizes(&self, site: &Site) -> Result<(usize, usize), ConfigError> {
        let keys = scaled("expand_k", site.hidden_size, self.expand_k)?;
        let values = scaled("expand_v", site.hidden_size, self.expand_v)?;
        Ok((
            divide("expand_k", keys, "num_heads", self.num_heads)?,
            divide("expand_v", values, "num_heads", self.num_heads)?,
        ))
    }
}

impl MixerOptions for DeltaNetConfig {
    type Layer = DeltaNet;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        self.sizes(site)?;
        validate_width(self.conv_size)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<DeltaNet, ConfigError> {
        self.validate(site)?;
        let (key_dim, value_dim) = self.sizes(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, false, std, device);
        let (keys, values) = (self.num_heads * key_dim, self.num_heads * value_dim);
        let conv = || QkvConv::new([keys, keys, values], self.conv_size, device);
        let spec = StateSpec::new::<DeltaNetState>(self, site)
            .recurrent("s", [self.num_heads, key_dim, value_dim])
            .qkv_conv(self.use_short_conv, [keys, keys, values], self.conv_size);
        Ok(DeltaNet {
            q_proj: project(keys),
            k_proj: project(keys),
            v_proj: project(values),
            b_proj: project(self.num_heads),
            g_proj: self.use_gate.then(|| project(values)),
            o_proj: linear(values, hidden, false, std, device),
            conv: self.use_short_conv.then(conv),
            norm: GatedRmsNorm::new(value_dim, site.norm_eps, OutputGate::Silu, device),
            spec,
            heads: self.num_heads,
            key_dim,
            value_dim,
            beta_scale: if self.allow_neg_eigval { 2.0 } else { 1.0 },
        })
    }
}

/// `S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T`, `o_t = K^-0.5 q_t^T S_t` with `q, k, v = silu(conv(x W))`,
/// q and k of length 1, `beta = sigmoid(x W_b)`; the output is `W_o rms_norm(o)`, normalised per head.
#[derive(Module, Debug)]
pub struct DeltaNet {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, H K]`.
    pub k_proj: Linear,
    /// `[D, H V]`.
    pub v_proj: Linear,
    /// `[D, H]`, the strength of the write.
    pub b_proj: Linear,
    /// `[D, H V]`, the output gate if there is one.
    pub g_proj: Option<Linear>,
    /// `[H V, D]`.
    pub o_proj: Linear,
    /// Convolutions on q, k and v.
    pub conv: Option<QkvConv>,
    /// Norm over a head, with the output gate if there is one.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    spec: StateSpec,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f64,
}

/// What [`DeltaNet`] carries.
#[derive(Debug, Clone)]
pub struct DeltaNetState {
    /// `[B, H, K, V]`, f32.
    pub s: Tensor<4>,
    /// Of the convolutions, if the layer has them.
    pub conv: Option<QkvConvState>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(DeltaNetState as "delta_net" { s, conv });

impl DeltaNet {
    fn project(
        &self,
        x: &Tensor<3>,
        conv: Option<QkvConvState>,
        context: &Context,
    ) -> Result<([Tensor<4>; 3], Tensor<3>, Option<QkvConvState>), Error> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|p| p.project(x.clone()));
        let (qkv, conv) = convolve(self.conv.as_ref(), qkv, conv, true, context)?;
        let beta = sigmoid(full_precision(self.b_proj.project(x.clone()))) * self.beta_scale;
        Ok((qkv.map(|x| split(x, self.heads)), beta, conv))
    }

    fn output(&self, o: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let o = match &self.g_proj {
            Some(gate) => self.norm.forward(o, split(gate.project(x), self.heads)),
            None => self.norm.normalize(o),
        };
        self.o_proj.project(merge(o))
    }
}

impl SequenceMixer for DeltaNet {
    type State = DeltaNetState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> DeltaNetState {
        DeltaNetState {
            s: Tensor::zeros([batch, self.heads, self.key_dim, self.value_dim], device),
            conv: self.conv.as_ref().map(|c| c.initial_state(batch, device)),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<DeltaNetState>,
        context: &Context,
    ) -> Result<(Tensor<3>, DeltaNetState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let (s, conv) = state.map_or((None, None), |state| (Some(state.s), state.conv));
        let ([q, k, v], beta, conv) = self.project(&x, conv, context)?;
        let options = context.matrix_options(s).with_qk_l2norm(true);
        let out = delta_rule(q, k, v, beta, options)?;
        let state = DeltaNetState { s: out.final_state, conv, spec: self.spec.clone() };
        Ok((self.output(out.o, x), state))
    }

    fn step(&self, x: Tensor<2>, state: DeltaNetState, context: &Context) -> Result<(Tensor<2>, DeltaNetState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let (qkv, beta, conv) = self.project(&x, state.conv, context)?;
        let [q, k, v] = qkv.map(token);
        let options = context.step_options().with_qk_l2norm(true);
        let (o, s) = delta_rule_step(q, k, v, token(beta), state.s, options)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), DeltaNetState { s, conv, spec: self.spec.clone() }))
    }
}
