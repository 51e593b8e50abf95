//! Channel mixers: the feed-forward half of a block.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::activation::{Activation, ActivationConfig};
use crate::error::positive;
use crate::init::linear;
use crate::projection::Projection;
use crate::{ConfigError, Site};

/// The form of a channel mixer. The gated forms differ only in the activation of the gate (Shazeer 2020,
/// arXiv:2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelMixerKind {
    /// Sigmoid gate.
    Glu,
    /// No activation: the product of two projections.
    Bilinear,
    /// ReLU gate.
    Reglu,
    /// GELU gate (exact).
    Geglu,
    /// SiLU gate.
    #[default]
    Swiglu,
    /// A gate with the activation of the `activation` option.
    Gated,
    /// No gate: `down(activation(up(x)))`.
    Mlp,
}

/// Options of [`ChannelMixer`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChannelMixerConfig {
    /// The form.
    #[serde(rename = "type")]
    pub kind: ChannelMixerKind,
    /// The activation of `gated` and `mlp`; the other forms name theirs. Default: `silu` and `gelu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation: Option<ActivationConfig>,
    /// Width inside. Default: 8/3 of the model's width rounded up to a multiple of 256 if gated, 4 times it if not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<usize>,
    /// Whether the projections have biases.
    pub bias: bool,
}

impl ChannelMixerConfig {
    /// Options of a form, with defaults for the rest.
    pub fn new(kind: ChannelMixerKind) -> Self {
        Self { kind, ..Self::default() }
    }

    /// Sets the activation.
    #[must_use]
    pub fn with_activation(self, activation: ActivationConfig) -> Self {
        Self { activation: Some(activation), ..self }
    }

    /// Sets the width inside.
    #[must_use]
    pub fn with_intermediate_size(self, size: usize) -> Self {
        Self { intermediate_size: Some(size), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// Names the first option that cannot be used.
    pub fn validate(&self, site: &Site) -> Result<(), ConfigError> {
        positive("hidden_size", site.hidden_size)?;
        positive("intermediate_size", self.width(site))?;
        let free = matches!(self.kind, ChannelMixerKind::Gated | ChannelMixerKind::Mlp);
        match &self.activation {
            Some(_) if !free => {
                Err(ConfigError::new("activation", "only the types `gated` and `mlp` have a free activation"))
            }
            Some(activation) => activation.validate(),
            None => Ok(()),
        }
    }

    /// The width inside at `site`.
    pub fn width(&self, site: &Site) -> usize {
        self.intermediate_size.unwrap_or(match self.kind {
            ChannelMixerKind::Mlp => 4 * site.hidden_size,
            _ => (site.hidden_size * 8 / 3).next_multiple_of(256),
        })
    }

    fn activation(&self) -> ActivationConfig {
        match self.kind {
            ChannelMixerKind::Glu => ActivationConfig::Sigmoid,
            ChannelMixerKind::Bilinear => ActivationConfig::Identity,
            ChannelMixerKind::Reglu => ActivationConfig::Relu,
            ChannelMixerKind::Geglu => ActivationConfig::Gelu,
            ChannelMixerKind::Swiglu => ActivationConfig::Silu,
            ChannelMixerKind::Gated => self.activation.unwrap_or(ActivationConfig::Silu),
            ChannelMixerKind::Mlp => self.activation.unwrap_or(ActivationConfig::Gelu),
        }
    }

    /// The channel mixer with fresh parameters.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn init(&self, site: &Site, device: &Device) -> Result<ChannelMixer, ConfigError> {
        self.validate(site)?;
        let (outer, inner) = (site.hidden_size, self.width(site));
        let up = || linear(outer, inner, self.bias, site.initializer_range, device);
        Ok(ChannelMixer {
            gate_proj: (self.kind != ChannelMixerKind::Mlp).then(up),
            up_proj: up(),
            down_proj: linear(inner, outer, self.bias, site.initializer_range, device),
            activation: self.activation().init(device),
        })
    }
}

/// `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.
#[derive(Module, Debug)]
pub struct ChannelMixer {
    /// `[hidden, intermediate]`; absent without a gate.
    pub gate_proj: Option<Linear>,
    /// `[hidden, intermediate]`.
    pub up_proj: Linear,
    /// `[intermediate, hidden]`.
    pub down_proj: Linear,
    /// The activation.
    pub activation: Activation,
}

impl ChannelMixer {
    /// Mixes the last axis of `x`, `[.., hidden]`; the output has the shape of `x`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let inner = match &self.gate_proj {
            Some(gate) => self.activation.gate(gate.project(x.clone()), self.up_proj.project(x)),
            None => self.activation.forward(self.up_proj.project(x)),
        };
        self.down_proj.project(inner)
    }
}
