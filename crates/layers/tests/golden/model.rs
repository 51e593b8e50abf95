//! A language model around the layers, just enough for the checkpoints of the peers.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor};
use thalweg_layers::channel_mixer::{ChannelMixer, ChannelMixerConfig};
use thalweg_layers::hgrn::LowerBounds;
use thalweg_layers::norm::{RmsNorm, RmsNormConfig};
use thalweg_layers::{Context, Mixer, MixerConfig, MixerState, Site};

const HIDDEN: usize = 32;
const VOCABULARY: usize = 64;

/// One peer's model, in our words.
pub(crate) struct Peer {
    pub(crate) folder: &'static str,
    /// Options of the mixer of every layer.
    pub(crate) mixers: Vec<&'static str>,
    pub(crate) channel_mixer: &'static str,
    pub(crate) norm_eps: f64,
    pub(crate) unit_offset: bool,
    /// The residual stream is the normalised input (MiniMax), and the channel mixer one of three experts.
    pub(crate) post_norm_experts: bool,
    pub(crate) embedding_scale: f64,
    pub(crate) soft_cap: Option<f64>,
    pub(crate) tied: bool,
    /// Allowed difference of a parameter's gradient, over its largest entry.
    pub(crate) gradient_tolerance: f32,
    /// Replacements that turn our parameters' paths into the checkpoint's names.
    pub(crate) names: &'static [(&'static str, &'static str)],
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub(crate) enum Channels {
    Dense(ChannelMixer),
    Experts(Experts),
}

/// The two likelier of three experts, weighted by their probabilities.
#[derive(Module, Debug)]
pub(crate) struct Experts {
    router_proj: Linear,
    experts: Vec<ChannelMixer>,
}

impl Channels {
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let experts = match self {
            Self::Dense(mixer) => return mixer.forward(x),
            Self::Experts(experts) => experts,
        };
        let p = softmax(experts.router_proj.forward(x.clone()), 2);
        let least = p.clone().min_dim(2);
        let chosen = p.clone().mask_fill(p.clone().equal(least.expand(p.dims())), 0.0);
        let weights = chosen.clone() / chosen.sum_dim(2);
        let terms = experts
            .experts
            .iter()
            .enumerate()
            .map(|(n, expert)| expert.forward(x.clone()) * weights.clone().narrow(2, n, 1));
        terms.reduce(|a, b| a + b).expect("three experts")
    }
}

#[derive(Module, Debug)]
pub(crate) struct Block {
    norm1: RmsNorm,
    mixer: Mixer,
    norm2: RmsNorm,
    channels: Channels,
}

#[derive(Module, Debug)]
pub(crate) struct Model {
    embed: Param<Tensor<2>>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head_proj: Option<Param<Tensor<2>>>,
    lower_bounds: Option<LowerBounds>,
    post_norm: bool,
    embedding_scale: f64,
    soft_cap: Option<f64>,
}

impl Model {
    pub(crate) fn new(peer: &Peer, device: &Device) -> Self {
        let norm =
            || RmsNormConfig::new(HIDDEN).with_eps(peer.norm_eps).with_unit_offset(peer.unit_offset).init(device);
        let matrix = |shape| Param::from_tensor(Tensor::zeros(shape, device));
        let layers = peer.mixers.len();
        let mut bounded = None;
        let block = |(layer, json): (usize, &&str)| {
            let site = Site::new(HIDDEN).at(layer, layers).with_norm_eps(peer.norm_eps);
            let config: MixerConfig = serde_json::from_str(json).expect(json);
            bounded = bounded.or(config.lower_bound_features(&site));
            let channels: ChannelMixerConfig = serde_json::from_str(peer.channel_mixer).expect("options");
            let mixer = || channels.init(&site, device).expect("valid");
            Block {
                norm1: norm(),
                mixer: config.init(&site, device).expect("valid"),
                norm2: norm(),
                channels: if peer.post_norm_experts {
                    let router_proj = Linear { weight: matrix([HIDDEN, 3]), bias: None };
                    Channels::Experts(Experts { router_proj, experts: vec![mixer(), mixer(), mixer()] })
                } else {
                    Channels::Dense(mixer())
                },
            }
        };
        let blocks = peer.mixers.iter().enumerate().map(block).collect();
        Self {
            embed: matrix([VOCABULARY, HIDDEN]),
            blocks,
            norm: norm(),
            head_proj: (!peer.tied).then(|| matrix([HIDDEN, VOCABULARY])),
            lower_bounds: bounded.map(|features| LowerBounds::new(layers, features, device)),
            post_norm: peer.post_norm_experts,
            embedding_scale: peer.embedding_scale,
            soft_cap: peer.soft_cap,
        }
    }

    /// Logits `[B, T, vocabulary]` of `ids` after `states`; one token goes through the step.
    pub(crate) fn forward(&self, ids: Tensor<2, Int>, states: Option<Vec<MixerState>>) -> (Tensor<3>, Vec<MixerState>) {
        let [batch, time] = ids.dims();
        let rows = self.embed.val().select(0, ids.reshape([batch * time]));
        let mut x = rows.reshape([batch, time, HIDDEN]) * self.embedding_scale;
        let bounds = self.lower_bounds.as_ref().map(LowerBounds::forward);
        let mut states = states.map(Vec::into_iter);
        let mut ends = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let bound = bounds.as_ref().and_then(|bounds| bounds[layer].clone());
            let context = Context::default().with_lower_bound(bound);
            let input = block.norm1.forward(x.clone());
            let state = states.as_mut().and_then(Iterator::next);
            let (y, state) = match state {
                Some(state) if time == 1 => {
                    let (y, state) = block.mixer.step(input.clone().squeeze_dim(1), state, &context).expect("a step");
                    (y.unsqueeze_dim(1), state)
                }
                state => block.mixer.forward(input.clone(), state, &context).expect("a sequence"),
            };
            ends.push(state);
            x = if self.post_norm { input } else { x } + y;
            let input = block.norm2.forward(x.clone());
            let y = block.channels.forward(input.clone());
            x = if self.post_norm { input } else { x } + y;
        }
        let x = self.norm.forward(x);
        let head = match &self.head_proj {
            Some(head) => head.val(),
            None => self.embed.val().transpose(),
        };
        let logits = x.matmul(head.unsqueeze());
        let logits = match self.soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        };
        (logits, ends)
    }
}
