//! HGRN (Qin et al. 2023, arXiv:2311.04823), and the lower bounds that it shares with HGRN2.

use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{GluActivation, hgrn, hgrn_step};

use crate::error::{positive, shape_error};
use crate::gated::{gated, log_sigmoid, sigmoid};
use crate::heads::{full_precision, token};
use crate::init::linear;
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::norm::{GatedRmsNorm, OutputGate};
use crate::projection::Projection;
use crate::state::state_parts;
use crate::{ConfigError, Error, StateSpec};

/// Largest `1 - forget` whose logarithm is taken: the f32 below 1.
const ALMOST_ONE: f64 = 0.999_999_94;

/// Lower bounds of the forget gates, one parameter for all layers of a model: `lb = cumsum(softmax(w)) - softmax(w)_0`
/// over the layers, so that upper layers forget more slowly and the first is not bounded.
#[derive(Module, Debug)]
pub struct LowerBounds {
    /// `[layers, features]`, from 0.
    pub weight: Param<Tensor<2>>,
}

impl LowerBounds {
    /// Equally spaced bounds for `layers` layers of `features` gates.
    pub fn new(layers: usize, features: usize, device: &Device) -> Self {
        Self { weight: Initializer::Zeros.init([layers, features], device) }
    }

    /// The bound `[features]` of every layer, f32; `None` for the first. Goes into [`Context::lower_bound`].
    pub fn forward(&self) -> Vec<Option<Tensor<1>>> {
        let share = softmax(full_precision(self.weight.val()), 0);
        let [layers, features] = share.dims();
        let bounds = share.clone().cumsum(0) - share.narrow(0, 0, 1);
        let row = |layer| bounds.clone().narrow(0, layer, 1).reshape([features]);
        (0..layers).map(|layer| (layer > 0).then(|| row(layer))).collect()
    }
}

/// The log of the forget gate and what it leaves, `(log f, 1 - f)`, of `f = lb + (1 - lb) sigmoid(logits)`. Both come
/// from `1 - f`, which is exact for gates near 1, so that the log cannot come out above 0.
pub(crate) fn forget_gate(logits: Tensor<3>, lower_bound: Option<&Tensor<1>>) -> Result<(Tensor<3>, Tensor<3>), Error> {
    let logits = full_precision(logits);
    let Some(bound) = lower_bound else {
        return Ok((log_sigmoid(logits.clone()), sigmoid(-logits)));
    };
    let features = logits.dims()[2];
    if bound.dims() != [features] {
        let expected = format!("[features] = [{features}]");
        return Err(shape_error("lower_bound", &bound.dims(), expected));
    }
    let room: Tensor<3> = (-bound.clone().cast(logits.dtype()) + 1.0).unsqueeze();
    let rest = sigmoid(-logits) * room;
    let log = rest.clone().clamp_max(ALMOST_ONE).neg().log1p();
    Ok((log, rest))
}

/// Options of [`Hgrn`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HgrnConfig {
    /// Channels of the recurrence over the model's width.
    pub expand_ratio: usize,
}

impl Default for HgrnConfig {
    fn default() -> Self {
        Self { expand_ratio: 1 }
    }
}

impl HgrnConfig {
    /// Channels of the recurrence, which are also the features of a lower bound.
    pub fn channels(&self, site: &Site) -> usize {
        site.hidden_size * self.expand_ratio
    }
}

impl MixerOptions for HgrnConfig {
    type Layer = Hgrn;

    fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        positive("expand_ratio", self.expand_ratio)
    }

    fn init(&self, site: &Site, device: &Device) -> Result<Hgrn, ConfigError> {
        self.validate(site)?;
        let (hidden, std) = (site.hidden_size, site.initializer_range);
        let channels = self.channels(site);
        let project = || linear(hidden, channels, false, std, device);
        let spec = StateSpec::new::<HgrnState>(self, site).recurrent("h", [channels]);
        Ok(Hgrn {
            i_proj: project(),
            f_proj: project(),
            g_proj: project(),
            o_proj: linear(channels, hidden, false, std, device),
            norm: GatedRmsNorm::new(channels, site.norm_eps, OutputGate::Silu, device),
            spec,
            channels,
        })
    }
}

/// `h_t = f_t h_{t-1} + (1 - f_t) silu(x W_i)`, element by element, with the forget gate
/// `f = lb + (1 - lb) sigmoid(x W_f)`; the output is `W_o (rms_norm(h) * silu(x W_g))`.
#[derive(Module, Debug)]
pub struct Hgrn {
    /// `[D, channels]`.
    pub i_proj: Linear,
    /// `[D, channels]`, the forget gate.
    pub f_proj: Linear,
    /// `[D, channels]`, the output gate.
    pub g_proj: Linear,
    /// `[channels, D]`.
    pub o_proj: Linear,
    /// Norm over all channels, with the output gate.
    pub norm: GatedRmsNorm,
    #[module(skip)]
    spec: StateSpec,
    channels: usize,
}

/// What [`Hgrn`] carries.
#[derive(Debug, Clone)]
pub struct HgrnState {
    /// `[B, channels]`, f32.
    pub h: Tensor<2>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(HgrnState as "hgrn" { h });

impl Hgrn {
    /// The input of the recurrence and the log of its gate, `[B, T, channels]`.
    fn project(&self, x: &Tensor<3>, context: &Context) -> Result<[Tensor<3>; 2], Error> {
        let logits = self.f_proj.project(x.clone());
        let (g, rest) = forget_gate(logits, context.lower_bound.as_ref())?;
        let input = self.i_proj.project(x.clone());
        let dtype = input.dtype();
        let input = gated(GluActivation::Silu, full_precision(input), rest).cast(dtype);
        Ok([input, g])
    }

    fn output(&self, h: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
        self.o_proj.project(self.norm.forward(h, self.g_proj.project(x)))
    }
}

impl SequenceMixer for Hgrn {
    type State = HgrnState;

    fn state_spec(&self) -> &StateSpec {
        &self.spec
    }

    fn initial_state(&self, batch: usize, device: &Device) -> HgrnState {
        HgrnState { h: Tensor::zeros([batch, self.channels], device), spec: self.spec.clone() }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<HgrnState>,
        context: &Context,
    ) -> Result<(Tensor<3>, HgrnState), Error> {
        self.spec.check_call(&x, state.as_ref(), context)?;
        let [input, g] = self.project(&x, context)?;
        let out = hgrn(input, g, context.scan_options(state.map(|state| state.h)))?;
        Ok((self.output(out.o, x), HgrnState { h: out.final_state, spec: self.spec.clone() }))
    }

    fn step(&self, x: Tensor<2>, state: HgrnState, context: &Context) -> Result<(Tensor<2>, HgrnState), Error> {
        let x = x.unsqueeze_dim(1);
        let context = &context.of_step();
        self.spec.check_call(&x, Some(&state), context)?;
        let [input, g] = self.project(&x, context)?.map(token);
        let (o, h) = hgrn_step(input, g, state.h)?;
        let out = self.output(o.unsqueeze_dim(1), x);
        Ok((token(out), HgrnState { h, spec: self.spec.clone() }))
    }
}
