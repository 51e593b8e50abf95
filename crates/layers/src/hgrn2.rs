//! HGRN2 (Qin et al. 2024, arXiv:2404.07904).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{gla, gla_step};

use crate::error::{divide, positive};
use crate::gated::silu;
use crate::heads::{merge, split, token};
use crate::hgrn::forget_gate;
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{RmsNorm, RmsNormConfig};
use crate::projection::Projection;
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Epsilon of the output norm. The published checkpoints were trained with it whatever their `norm_eps` says.
const NORM_EPS: f64 = 1e-5;

/// Options of [`Hgrn2`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hgrn2Config {
    /// Heads; the model's width over `expand_ratio` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_heads: Option<usize>,
    /// Features of a key, that is how many numbers each channel's state is expanded to.
    pub expand_ratio: usize,
}

impl Default for Hgrn2Config {
    fn default() -> Self {
        Self { num_heads: None, expand_ratio: 128 }
    }
}

impl Hgrn2Config {
    fn heads(&self, site: &Site) -> Result<usize, ConfigError> {
        match self.num_heads {
            Some(heads) => {
                positive("expand_ratio", self.expand_ratio)?;
                divide("hidden_size", site.hidden_size, "num_heads", heads)?;
                Ok(heads)
            }
            None => divide("hidden_size", site.hidden_size, "expand_ratio", self.expand_ratio),
        }
    }

    /// Features of the forget gate, which are also those of a lower bound.
    ///
    /// # Errors
    /// If the options do not fit the model's width.
    pub fn features(&self, site: &Site) -> Result<usize, ConfigError> {
        Ok(self.heads(site)? * self.expand_ratio)
    }
}

impl MixerOptions for Hgrn2Config {
    type Layer = Hgrn2;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        self.heads(site).map(|_| ())
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Hgrn2, ConfigError> {
        let heads = self.heads(site)?;
        let features = self.features(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let project = |output| linear(hidden, output, false, std, device);
        let value_dim = hidden / heads;
        let spec = StateSpec::new::<Hgrn2State>(self, site)
            .option("num_heads", heads)
            .recurrent("s", [heads, self.expand_ratio, value_dim]);
        Ok(Hgrn2 {
            q_proj: project(features),
            f_proj: project(features),
            i_proj: project(hidden),
            o_proj: project(hidden),
            norm: RmsNormConfig::new(hidden).with_eps(NORM_EPS).init(device),
            spec,
            value_dim,
            heads,
            key_dim: self.expand_ratio,
        })
    }
}

/// `S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T`, `o_t = K^-0.5 q_t^T S_t` per head with `q = silu(x W_q)`, `v = x W_i` and
/// the forget gate `f = lb + (1 - lb) sigmoid(x W_f)`; the output is `W_o rms_norm(o)`, normalised over all heads.
#[derive(Module, Debug)]
pub struct Hgrn2 {
    /// `[D, H K]`.
    pub q_proj: Linear,
    /// `[D, H K]`, the forget gate.
    pub f_proj: Linear,
    /// `[D, D]`, the values.
    pub i_proj: Linear,
    /// `[D, D]`.
    pub o_proj: Linear,
    /// Over the features of all heads.
    pub norm: RmsNorm,
    #[module(skip)]
    spec: StateSpec,
    value_dim: usize,
    heads: usize,
    key_dim: usize,
}

/// What [`Hgrn2`] carries.
#[derive(Debug, Clone)]
pub struct Hgrn2State {
    /// `[B, H, K, V]`, f32.
    pub s: Tensor<4>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(Hgrn2State as "hgrn2" { s });

impl Hgrn2 {
    /// Queries, keys, values and log gates.
    fn project(&self, x: &Tensor<3>, context: &Context) -> Result<[Tensor<4>; 4], Error> {
        let q = silu(self.q_proj.project(x.clone()));
        let v = self.i_proj.project(x.clone());
        let logits = self.f_proj.project(x.clone());
        let (g, rest) = forget_gate(logits, context.lower_bound.as_ref())?;
        let k = rest.cast(q.dtype());
        Ok([q, k, v, g].map(|x| split(x, self.heads)))
    }

    fn output(&self, o: Tensor<4>) -> Tensor<3> {
        self.o_proj.project(self.norm.forward(merge(o)))
    }
}

impl SequenceMixer for Hgrn2 {
    type State = Hgrn2State;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> Hgrn2State {
        Hgrn2State {
            s: Tensor::zeros([batch, self.heads, self.key_dim, self.value_dim], device),
            spec: self.spec.clone(),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<Hgrn2State>,
        context: &Context,
    ) -> Result<(Tensor<3>, Hgrn2State), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let [q, k, v, g] = self.project(&x, context)?;
        let out = gla(q, k, v, g, context.matrix_options(state.map(|state| state.s)))?;
        Ok((self.output(out.o), Hgrn2State { s: out.final_state, spec: self.spec.clone() }))
    }

    fn step(&self, x: Tensor<2>, state: Hgrn2State, context: &Context) -> Result<(Tensor<2>, Hgrn2State), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let [q, k, v, g] = self.project(&x, context)?.map(token);
        let (o, s) = gla_step(q, k, v, g, state.s, context.step_options())?;
        Ok((token(self.output(o.unsqueeze_dim(1))), Hgrn2State { s, spec: self.spec.clone() }))
    }
}
