//! The decay gate that Mamba-2, Gated DeltaNet and KDA share: `g = -exp(A_log) softplus(a + dt_bias)`.

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};

use crate::gated::log_sigmoid;
use crate::heads::full_precision;
use crate::init::param;

/// Bounds of the time step at the start.
const TIME_STEP: (f64, f64) = (1e-3, 1e-1);
/// The time step does not start lower than this.
const TIME_STEP_FLOOR: f64 = 1e-4;

/// `g = -exp(A_log) softplus(a + dt_bias)`, a natural-log decay per head or per feature of a head. Neither parameter
/// takes weight decay.
#[derive(Module, Debug)]
pub struct Decay {
    /// `[H]`.
    pub a_log: Param<Tensor<1>>,
    /// `[H]`, or `[H K]` if every key feature has a gate of its own.
    pub dt_bias: Param<Tensor<1>>,
}

impl Decay {
    /// `A` is drawn uniformly from `a_range`, the time step `softplus(dt_bias)` log-uniformly from 0.001 to 0.1.
    pub(crate) fn new(heads: usize, features: usize, a_range: (f64, f64), device: &Device) -> Self {
        let uniform = Distribution::Uniform(a_range.0, a_range.1);
        // An A of exactly 0 would make A_log infinite.
        let a_log = move |device: &Device| Tensor::random([heads], uniform, device).clamp_min(1e-30).log();
        let log_step = Distribution::Uniform(TIME_STEP.0.ln(), TIME_STEP.1.ln());
        let dt_bias = move |device: &Device| {
            let step = Tensor::<1>::random([features], log_step, device).exp().clamp_min(TIME_STEP_FLOOR);
            // The inverse of softplus: step + log(1 - exp(-step)).
            let correction = (-(-step.clone()).exp() + 1.0).log();
            step + correction
        };
        Self { a_log: param([heads], device, a_log), dt_bias: param([features], device, dt_bias) }
    }

    /// One gate per head: `a` and the result are `[B, T, H]`, the latter in f32.
    pub(crate) fn per_head(&self, a: Tensor<3>) -> Tensor<3> {
        let (gate, rate) = self.gate_and_rate(a);
        gate * rate.unsqueeze()
    }

    /// One gate per key feature: `a` is `[B, T, H K]`, the result `[B, T, H, K]`, in f32.
    pub(crate) fn per_feature(&self, a: Tensor<3>) -> Tensor<4> {
        let [batch, time, features] = a.dims();
        let [heads] = self.a_log.shape().dims();
        let (gate, rate) = self.gate_and_rate(a);
        gate.reshape([batch, time, heads, features / heads]) * rate.reshape([1, 1, heads, 1])
    }

    /// `-softplus(a + dt_bias)` and `exp(A_log)`, f32 whatever the types of `a` and of the parameters.
    fn gate_and_rate(&self, a: Tensor<3>) -> (Tensor<3>, Tensor<1>) {
        let a = full_precision(a);
        let [dt_bias, a_log] = [&self.dt_bias, &self.a_log].map(|parameter| parameter.val().cast(a.dtype()));
        // -softplus(x) = log_sigmoid(-x), which is stable on both sides and never above 0.
        (log_sigmoid(-(a + dt_bias.unsqueeze())), a_log.exp())
    }
}
