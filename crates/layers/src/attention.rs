//! Causal softmax attention, full or over a sliding window (Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie
//! et al. 2023, arXiv:2305.13245).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{GluActivation, attention, attention_step};

use crate::error::{divide, even, positive, positive_number, shape_error};
use crate::gated::gated;
use crate::heads::{merge, split, token};
use crate::init::linear;
use crate::kv_cache::{AttentionState, aligned};
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{RmsNorm, RmsNormConfig};
use crate::projection::Projection;
use crate::rotary::{Positions, Rotary};
use crate::{ConfigError, Error};

/// Options of [`Attention`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionConfig {
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of keys and values; each serves `num_heads / num_kv_heads` query heads. As many as queries if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_kv_heads: Option<usize>,
    /// Features of a head; the model's width over `num_heads` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Tokens that a token sees, itself included; all before it if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Share of a head's features that are rotated; 0 for no position embedding.
    pub partial_rotary_factor: f64,
    /// Normalise queries and keys per head before the rotation.
    pub qk_norm: bool,
    /// Those norms scale by `1 + weight`.
    pub norm_unit_offset: bool,
    /// Gate the output with `sigmoid(x W_g)`; `q_proj` then holds each head's query and gate side by side.
    pub output_gate: bool,
    /// Biases of `q_proj`, `k_proj` and `v_proj`.
    pub qkv_bias: bool,
    /// Bias of `o_proj`.
    pub o_bias: bool,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            num_heads: 8,
            num_kv_heads: None,
            head_dim: None,
            window: None,
            rope_theta: 10_000.0,
            partial_rotary_factor: 1.0,
            qk_norm: false,
            norm_unit_offset: false,
            output_gate: false,
            qkv_bias: false,
            o_bias: false,
        }
    }
}

struct Sizes {
    kv_heads: usize,
    head_dim: usize,
    rotary: usize,
}

impl AttentionConfig {
    fn sizes(&self, site: &Site) -> Result<Sizes, ConfigError> {
        let kv_heads = self.num_kv_heads.unwrap_or(self.num_heads);
        divide("num_heads", self.num_heads, "num_kv_heads", kv_heads)?;
        let head_dim = match self.head_dim {
            Some(head_dim) => positive("head_dim", head_dim).map(|()| head_dim)?,
            None => divide("hidden_size", site.hidden_size, "num_heads", self.num_heads)?,
        };
        if !(0.0..=1.0).contains(&self.partial_rotary_factor) {
            return Err(ConfigError::new(
                "partial_rotary_factor",
                format!("must lie between 0 and 1, got {}", self.partial_rotary_factor),
            ));
        }
        let rotary = (head_dim as f64 * self.partial_rotary_factor) as usize;
        if self.partial_rotary_factor > 0.0 {
            even("partial_rotary_factor", rotary)?;
        }
        Ok(Sizes { kv_heads, head_dim, rotary })
    }
}

impl MixerOptions for AttentionConfig {
    type Layer = Attention;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        positive("num_heads", self.num_heads)?;
        self.sizes(site)?;
        if let Some(window) = self.window {
            positive("window", window)?;
        }
        positive_number("rope_theta", self.rope_theta)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Attention, ConfigError> {
        self.validate(site)?;
        let Sizes { kv_heads, head_dim, rotary } = self.sizes(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, self.qkv_bias, std, device);
        let queries = self.num_heads * head_dim;
        let norm = || {
            RmsNormConfig::new(head_dim).with_eps(site.norm_eps).with_unit_offset(self.norm_unit_offset).init(device)
        };
        Ok(Attention {
            q_proj: project(if self.output_gate { 2 * queries } else { queries }),
            k_proj: project(kv_heads * head_dim),
            v_proj: project(kv_heads * head_dim),
            o_proj: linear(queries, hidden, self.o_bias, std, device),
            q_norm: self.qk_norm.then(norm),
            k_norm: self.qk_norm.then(norm),
            rotary: (rotary > 0).then(|| Rotary::new(rotary, self.rope_theta)),
            output_gate: self.output_gate,
            window: self.window,
            hidden_size: hidden,
            heads: self.num_heads,
            kv_heads,
            head_dim,
        })
    }
}

/// `o_i = sum_j softmax_j(K^-0.5 q_i . k_j) v_j` over the tokens up to `i`, or the last `window` of them; rotary q and k;
/// the output is `W_o o`, or `W_o (o * sigmoid(gate))`.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[D, H K]`, or `[D, H 2K]` with an output gate.
    pub q_proj: Linear,
    /// `[D, HK K]`.
    pub k_proj: Linear,
    /// `[D, HK K]`.
    pub v_proj: Linear,
    /// `[H K, D]`.
    pub o_proj: Linear,
    /// Over a head's query.
    pub q_norm: Option<RmsNorm>,
    /// Over a head's key.
    pub k_norm: Option<RmsNorm>,
    #[module(skip)]
    rotary: Option<Rotary>,
    output_gate: bool,
    window: Option<usize>,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Projected {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gate: Option<Tensor<4>>,
}

impl Attention {
    fn project(&self, x: Tensor<3>, positions: &Positions) -> Projected {
        let device = x.device();
        let mut q = split(self.q_proj.project(x.clone()), self.heads);
        let gate = self.output_gate.then(|| {
            let gate = q.clone().narrow(3, self.head_dim, self.head_dim);
            q = q.clone().narrow(3, 0, self.head_dim);
            gate
        });
        let mut k = split(self.k_proj.project(x.clone()), self.kv_heads);
        let v = split(self.v_proj.project(x), self.kv_heads);
        if let (Some(q_norm), Some(k_norm)) = (&self.q_norm, &self.k_norm) {
            q = q_norm.forward(q);
            k = k_norm.forward(k);
        }
        if let Some(rotary) = &self.rotary {
            let rotation = positions.rotation(rotary, &device);
            q = rotation.apply(q);
            k = rotation.apply(k);
        }
        Projected { q, k, v, gate }
    }

    fn output(&self, o: Tensor<4>, gate: Option<Tensor<4>>) -> Tensor<3> {
        let o = match gate {
            Some(gate) => gated(GluActivation::Sigmoid, gate, o),
            None => o,
        };
        self.o_proj.project(merge(o))
    }

    /// The queries of all sequences at once over the cache and their own tokens.
    fn together(
        &self,
        p: &Projected,
        cache: Option<&AttentionState>,
        positions: &Positions,
        context: &Context,
    ) -> Result<(Tensor<4>, AttentionState), Error> {
        let past = cache.and_then(|cache| cache.tokens(self.window));
        let (k, v) = match past {
            Some((k, v)) => (Tensor::cat(vec![k, p.k.clone()], 1), Tensor::cat(vec![v, p.v.clone()], 1)),
            None => (p.k.clone(), p.v.clone()),
        };
        let options = context.attention_options(self.window);
        let o = attention(p.q.clone(), k.clone(), v.clone(), options)?;
        let seen = positions.after().first().copied().unwrap_or(0);
        Ok((o, AttentionState::of_tokens(k, v, seen, self.window)))
    }

    /// Sequence by sequence, for packed or unequally long ones that go on from a cache.
    fn one_by_one(
        &self,
        p: &Projected,
        cache: &AttentionState,
        positions: &Positions,
        context: &Context,
    ) -> Result<(Tensor<4>, AttentionState), Error> {
        let options = context.attention_options(self.window);
        let (mut outputs, mut caches) = (Vec::new(), Vec::new());
        for (n, seen) in positions.after().into_iter().enumerate() {
            let own = |x: &Tensor<4>| match &context.cu_seqlens {
                Some(cu) => x.clone().narrow(1, cu[n], cu[n + 1] - cu[n]),
                None => x.clone().narrow(0, n, 1),
            };
            let (mut k, mut v) = (own(&p.k), own(&p.v));
            if let Some((past_k, past_v)) = cache.tokens_of(n, self.window) {
                k = Tensor::cat(vec![past_k, k], 1);
                v = Tensor::cat(vec![past_v, v], 1);
            }
            outputs.push(attention(own(&p.q), k.clone(), v.clone(), options.clone())?);
            caches.push(AttentionState::of_tokens(k, v, seen, self.window));
        }
        let axis = if context.cu_seqlens.is_some() { 1 } else { 0 };
        Ok((Tensor::cat(outputs, axis), AttentionState::stack(caches)))
    }

    fn check_state(&self, state: &AttentionState) -> Result<(), Error> {
        let dims = state.k.dims();
        let rows = if state.packed.is_empty() { state.positions.len() } else { 1 };
        if dims[0] != rows || dims[2..] != [self.kv_heads, self.head_dim] || state.v.dims() != dims {
            let expected = format!("[{rows}, slots, {}, {}]", self.kv_heads, self.head_dim);
            return Err(shape_error("state.k", &dims, expected));
        }
        Ok(())
    }
}

impl SequenceMixer for Attention {
    type State = AttentionState;

    fn initial_state(&self, batch: usize, device: &Device) -> AttentionState {
        AttentionState::empty(batch, self.kv_heads, self.head_dim, self.window, device)
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<AttentionState>,
        context: &Context,
    ) -> Result<(Tensor<3>, AttentionState), Error> {
        context.check_input(&x, self.hidden_size)?;
        if let Some(state) = &state {
            self.check_state(state)?;
        }
        let state = state.map(|state| state.cast(x.dtype()));
        let seen = state.as_ref().map(|state| state.positions.clone());
        let positions = Positions::of_forward(&x, seen, context)?;
        let mut p = self.project(x, &positions);
        let gate = p.gate.take();
        let (o, state) = match (state, &context.cu_seqlens) {
            (None, Some(cu_seqlens)) => {
                let mut options = context.attention_options(self.window);
                options.cu_seqlens = Some(cu_seqlens.clone());
                let o = attention(p.q, p.k.clone(), p.v.clone(), options)?;
                let state = AttentionState { k: p.k, v: p.v, positions: positions.after(), packed: cu_seqlens.clone() };
                (o, state)
            }
            (None, None) => self.together(&p, None, &positions, context)?,
            (Some(state), None) if positions.aligned() => {
                let state = state.into_rows(self.window);
                self.together(&p, Some(&state), &positions, context)?
            }
            (Some(state), _) => self.one_by_one(&p, &state, &positions, context)?,
        };
        Ok((self.output(o, gate), state))
    }

    fn step(
        &self,
        x: Tensor<2>,
        state: AttentionState,
        context: &Context,
    ) -> Result<(Tensor<2>, AttentionState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = context.of_step();
        context.check_input(&x, self.hidden_size)?;
        self.check_state(&state)?;
        let state = state.cast(x.dtype());
        let positions = Positions::of_forward(&x, Some(state.positions.clone()), &context)?;
        let p = self.project(x, &positions);
        let state = state.into_rows(self.window).push(p.k, p.v, self.window);
        let options = || context.attention_options(self.window);
        let q: Tensor<3> = token(p.q);
        let o = if aligned(&state.positions) {
            let (k, v) = state.filled(None, self.window);
            attention_step(q, k, v, options())?
        } else {
            let mut rows = Vec::with_capacity(state.positions.len());
            for n in 0..state.positions.len() {
                let (k, v) = state.filled(Some(n), self.window);
                rows.push(attention_step(q.clone().narrow(0, n, 1), k, v, options())?);
            }
            Tensor::cat(rows, 0)
        };
        Ok((token(self.output(o.unsqueeze_dim(1), p.gate)), state))
    }
}
