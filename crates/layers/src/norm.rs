//! Root-mean-square norms over the last axis.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use thalweg_scan::{GluActivation, Path, rms_norm};

use crate::ConfigError;
use crate::error::{positive, positive_number};

/// Options of [`RmsNorm`].
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNormConfig {
    /// Features of the last axis.
    pub features: usize,
    /// Added to the mean square.
    pub eps: f64,
    /// Scale by `1 + weight` with `weight` starting at 0 (Gemma, Qwen3-Next) instead of `weight` starting at 1.
    pub unit_offset: bool,
}

impl RmsNormConfig {
    /// A plain norm over `features` with `eps` 1e-6.
    pub fn new(features: usize) -> Self {
        Self { features, eps: 1e-6, unit_offset: false }
    }

    /// Sets `eps`.
    #[must_use]
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    /// Sets `unit_offset`.
    #[must_use]
    pub fn with_unit_offset(self, unit_offset: bool) -> Self {
        Self { unit_offset, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// If `features` is 0 or `eps` not positive.
    pub fn validate(&self) -> Result<(), ConfigError> {
        positive("features", self.features)?;
        positive_number("norm_eps", self.eps)
    }

    /// The norm with weights that change nothing.
    pub fn init(&self, device: &Device) -> RmsNorm {
        let start = if self.unit_offset { Initializer::Zeros } else { Initializer::Ones };
        RmsNorm { weight: start.init([self.features], device), eps: self.eps, unit_offset: self.unit_offset }
    }
}

/// `y = x / sqrt(mean(x^2) + eps) * w`, or `* (1 + w)` (Zhang and Sennrich 2019, arXiv:1910.07467).
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[features]`.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
    /// Whether the scale is `1 + weight`.
    pub unit_offset: bool,
}

impl RmsNorm {
    /// Normalises the last axis of `x`, which must have as many features as the weight. The statistic is f32 whatever
    /// the type of `x`.
    #[track_caller]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let offset = if self.unit_offset { 1.0 } else { 0.0 };
        run(x, &self.weight, offset, None, self.eps)
    }
}

/// How the gate of a [`GatedRmsNorm`] is squashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    /// `z * sigmoid(z)`, also called swish.
    #[default]
    Silu,
    /// `sigmoid(z)`.
    Sigmoid,
}

impl OutputGate {
    fn function(self) -> GluActivation {
        match self {
            Self::Silu => GluActivation::Silu,
            Self::Sigmoid => GluActivation::Sigmoid,
        }
    }
}

/// `rms_norm(x) * gate(z)`: the norm first, then the gate.
#[derive(Module, Debug)]
pub struct GatedRmsNorm {
    /// `[features]`.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
    #[module(skip)]
    gate: OutputGate,
}

impl GatedRmsNorm {
    /// A norm over `features` with weight 1.
    pub fn new(features: usize, eps: f64, gate: OutputGate, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([features], device), eps, gate }
    }

    /// `x` and the gate's input `z` have the same shape.
    #[track_caller]
    pub fn forward<const D: usize>(&self, x: Tensor<D>, z: Tensor<D>) -> Tensor<D> {
        run(x, &self.weight, 0.0, Some((self.gate.function(), z)), self.eps)
    }

    /// The norm without the gate, for layers whose gate is an option.
    #[track_caller]
    pub fn normalize<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        run(x, &self.weight, 0.0, None, self.eps)
    }
}

/// Shapes that do not fit panic, as Burn's own layers do.
#[track_caller]
fn run<const D: usize>(
    x: Tensor<D>,
    weight: &Param<Tensor<1>>,
    offset: f64,
    gate: Option<(GluActivation, Tensor<D>)>,
    eps: f64,
) -> Tensor<D> {
    match rms_norm(x, Some(weight.val()), offset, gate, eps, Path::Auto) {
        Ok(y) => y,
        Err(error) => panic!("{error}"),
    }
}
