//! The activations of the gating literature.
//!
//! | name | `f(x)` | trained | source |
//! |---|---|---|---|
//! | `identity` | `x` | | bilinear channel mixer |
//! | `sigmoid` | `s(x) = 1 / (1 + exp(-x))` | | GLU, arXiv:1612.08083 |
//! | `relu` | `max(x, 0)` | | |
//! | `prelu` | `max(x, 0) + a min(x, 0)` | `a` | arXiv:1502.01852 |
//! | `gelu` | `x P(x)`, `P(x) = (1 + erf(x / sqrt 2)) / 2` | | arXiv:1606.08415 |
//! | `gelu_tanh` | `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2` | | the same |
//! | `silu` | `x s(x)` | | arXiv:1702.03118 |
//! | `swish` | `x s(b x)` | `b`, if asked | arXiv:1710.05941 |
//! | `smelu` | 0, `(x + b)^2 / 4b` for `abs(x) <= b`, `x` | | arXiv:2202.06499 |
//! | `golu` | `x exp(-exp(-x))` | | arXiv:2502.03654 |
//! | `helu` | `max(x, 0)`, with the gradient of `x` wherever `x > -a` | | arXiv:2411.10573 |
//! | `xatlu`, `xgelu`, `xsilu` | `x (g (1 + 2a) - a)`, `g = atan(x) / pi + 1/2`, `P(x)`, `s(x)` | `a` from 0 | arXiv:2405.20768 |

use std::f64::consts::{FRAC_1_PI, FRAC_1_SQRT_2};
use std::fmt;

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thalweg_scan::{GluActivation, self_gated};

use crate::ConfigError;
use crate::error::positive_number;
use crate::gated::{gated, gelu_tanh, sigmoid, silu};

/// Which activation. In a config file either a name, `"silu"`, or a table, `{ type = "swish", beta = 1.5 }`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", rename_all = "snake_case")]
pub enum ActivationConfig {
    /// `x`.
    Identity,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0) + a min(x, 0)`, `a` trained.
    Prelu {
        /// The slope to start from.
        #[serde(default = "quarter")]
        slope: f64,
    },
    /// The exact Gaussian error linear unit.
    Gelu,
    /// Its approximation by `tanh`.
    GeluTanh,
    /// `x sigmoid(x)`.
    #[default]
    Silu,
    /// `x sigmoid(beta x)`.
    Swish {
        /// Sharpness.
        #[serde(default = "one")]
        beta: f64,
        /// Whether `beta` is trained.
        #[serde(default)]
        trainable: bool,
    },
    /// The smooth rectifier with a quadratic piece on `[-beta, beta]`.
    Smelu {
        /// Half the width of the quadratic piece.
        #[serde(default = "one")]
        beta: f64,
    },
    /// `x exp(-exp(-x))`.
    Golu,
    /// `max(x, 0)` forward; backward the gradient passes wherever `x > -alpha`, so that a unit that has just switched
    /// off can come back.
    Helu {
        /// How far below 0 the gradient still passes.
        #[serde(default = "twentieth")]
        alpha: f64,
    },
    /// Arctangent gate with a trained range.
    Xatlu,
    /// Gaussian gate with a trained range.
    Xgelu,
    /// Sigmoid gate with a trained range.
    Xsilu,
}

fn one() -> f64 {
    1.0
}

fn quarter() -> f64 {
    0.25
}

fn twentieth() -> f64 {
    0.05
}

impl Serialize for ActivationConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for ActivationConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrTable;
        impl<'de> Visitor<'de> for NameOrTable {
            type Value = ActivationConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an activation or a table with its `type`")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                ActivationConfig::deserialize(MapDeserializer::new([("type", name)].into_iter()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                ActivationConfig::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(NameOrTable)
    }
}

impl ActivationConfig {
    /// Checks the constants.
    ///
    /// # Errors
    /// If a width is not a positive number or a slope is not finite.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match *self {
            Self::Prelu { slope } if !slope.is_finite() => {
                Err(ConfigError::new("activation.slope", format!("must be finite, got {slope}")))
            }
            Self::Swish { beta, .. } | Self::Smelu { beta } => positive_number("activation.beta", beta),
            Self::Helu { alpha } => positive_number("activation.alpha", alpha),
            _ => Ok(()),
        }
    }

    /// The activation with its trained scalar, if it has one, at its start.
    pub fn init(&self, device: &Device) -> Activation {
        let scalar = match *self {
            Self::Prelu { slope } => Some(slope),
            Self::Swish { beta, trainable: true } => Some(beta),
            Self::Xatlu | Self::Xgelu | Self::Xsilu => Some(0.0),
            _ => None,
        };
        Activation { alpha: scalar.map(|value| Initializer::Constant { value }.init([1], device)), config: *self }
    }
}

/// An activation, applied element by element.
#[derive(Module, Debug)]
pub struct Activation {
    /// The trained scalar `[1]` of those that have one (`a` or `b` in the table of this module).
    pub alpha: Option<Param<Tensor<1>>>,
    #[module(skip)]
    config: ActivationConfig,
}

impl Activation {
    /// `f(x) z`, in one pass for the activations that are common as gates. `x` and `z` have the same shape.
    pub fn gate<const D: usize>(&self, x: Tensor<D>, z: Tensor<D>) -> Tensor<D> {
        match self.config {
            ActivationConfig::Sigmoid => gated(GluActivation::Sigmoid, x, z),
            ActivationConfig::Silu => gated(GluActivation::Silu, x, z),
            ActivationConfig::GeluTanh => gated(GluActivation::GeluTanh, x, z),
            _ => self.forward(x) * z,
        }
    }

    /// `f(x)`, of the shape of `x`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let alpha = |fixed: f64| match &self.alpha {
            Some(alpha) => alpha.val().cast(x.dtype()).reshape([1; D]),
            None => Tensor::full([1; D], fixed, (&x.device(), x.dtype())),
        };
        match self.config {
            ActivationConfig::Identity => x,
            ActivationConfig::Sigmoid => sigmoid(x),
            ActivationConfig::Relu => relu(x),
            ActivationConfig::Prelu { slope } => {
                let alpha = alpha(slope);
                relu(x.clone()) - relu(-x) * alpha
            }
            ActivationConfig::Gelu => self_gated(x, NORMAL, normal_gate),
            ActivationConfig::GeluTanh => gelu_tanh(x),
            ActivationConfig::Silu => silu(x),
            ActivationConfig::Swish { beta, trainable } => {
                // Of either sign, as a trained one may be, and 0: an infinite `x` enters the gate as the largest number.
                let largest = largest(&x);
                let scaled = x.clone().clamp(-largest, largest);
                let scaled = if trainable { scaled * alpha(beta) } else { scaled * beta };
                let off = scaled.clone().lower_elem(LOGISTIC[0]);
                x.mask_fill(off, 0.0) * sigmoid(scaled.clamp(LOGISTIC[0], LOGISTIC[1]))
            }
            ActivationConfig::Smelu { beta } => {
                let blend = x.clone().clamp(-beta, beta) + beta;
                blend.square() / (4.0 * beta) + relu(x - beta)
            }
            ActivationConfig::Golu => {
                // At -10 the gate is 0 in f32 and f64 alike, and exp(-x), a factor of its slope, still finite in f16.
                self_gated(x, [-10.0, LOGISTIC[1]], |x| x.neg().exp().neg().exp())
            }
            ActivationConfig::Helu { alpha } => {
                // Of the values between, only the gradient: the difference is 0.
                let between = x.clone().greater_elem(-alpha).bool_and(x.clone().lower_equal_elem(0.0));
                let through = x.clone().mask_fill(between.bool_not(), 0.0);
                relu(x) + (through.clone() - through.detach())
            }
            ActivationConfig::Xatlu => {
                let bound = far_out(&x);
                expanded(x.clone(), arctangent_gate(x.clone().clamp(-bound, bound)), alpha(0.0))
            }
            ActivationConfig::Xgelu => {
                expanded(x.clone(), normal_gate(x.clone().clamp(NORMAL[0], NORMAL[1])), alpha(0.0))
            }
            ActivationConfig::Xsilu => {
                expanded(x.clone(), sigmoid(x.clone().clamp(LOGISTIC[0], LOGISTIC[1])), alpha(0.0))
            }
        }
    }
}

/// Where the logistic function, and the normal distribution function, have reached 0 and 1 in f64.
const LOGISTIC: [f64; 2] = [-800.0, 800.0];
const NORMAL: [f64; 2] = [-40.0, 40.0];

/// The largest finite number of the type of `x`.
fn largest<const D: usize>(x: &Tensor<D>) -> f64 {
    x.dtype().finfo().map_or(f64::MAX, |info| info.max)
}

/// The same, or a number whose reciprocal is not too small for the type.
fn far_out<const D: usize>(x: &Tensor<D>) -> f64 {
    largest(x).min(1e30)
}

/// `(1 + erf(x / sqrt 2)) / 2`
fn normal_gate<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    ((x * FRAC_1_SQRT_2).erf() + 1.0) * 0.5
}

/// `atan(x) / pi + 1/2`, for `abs(x) > 1` by `1 / x`: for very negative `x`, where the sum would leave nothing but rounding,
/// it is `1 / (pi abs(x))`.
fn arctangent_gate<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let far = x.clone().abs().greater_elem(1.0);
    // Of the reciprocal that is not taken neither value nor slope may be infinite.
    let reciprocal = x.clone().mask_fill(far.clone().bool_not(), 1.0).recip().neg();
    let above = x.clone().greater_elem(1.0);
    let base = Tensor::full(x.shape(), 0.5, (&x.device(), x.dtype())).mask_fill(far.clone(), 0.0).mask_fill(above, 1.0);
    x.mask_where(far, reciprocal).atan() * FRAC_1_PI + base
}

/// `x (g (1 + 2a) - a)`: the gate's range `(0, 1)` stretched to `(-a, 1 + a)`. At minus infinity its value is that at the most
/// negative number (or -1e30), as `a` is 0 when training begins, and its slope 0.
fn expanded<const D: usize>(x: Tensor<D>, gate: Tensor<D>, alpha: Tensor<D>) -> Tensor<D> {
    let bound = far_out(&x);
    x.clamp_min(-bound) * (gate * (alpha.clone() * 2.0 + 1.0) - alpha)
}
