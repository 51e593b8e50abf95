//! The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv 2402.19427, section 2.4).
//!
//! `r = sigmoid(recurrent logits)`, `i = sigmoid(input logits)`, `a = exp(-8 r softplus(param))`,
//! `h_t = a h_{t-1} + sqrt(1 - a^2) i x`; at a reset `a` is 0 and the factor of the input is `i` alone.

use crate::{Shape, add, or_zeros, sigmoid, softplus};

/// The paper's constant `c` in front of the recurrence gate.
pub const C: f64 = 8.0;

/// Largest derivative of the square root: `d sqrt(x) = 1 / sqrt(max(4 x, 1000^-2))`, as the published code has it.
pub const MAX_SQRT_GRADIENT: f64 = 1000.0;

/// Inputs of the fused unit.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[batch, time, channels]`.
    pub x: &'a [f64],
    /// Logits of the recurrence gate, shaped like `x`.
    pub recurrent_logits: &'a [f64],
    /// Logits of the input gate, shaped like `x`.
    pub input_logits: &'a [f64],
    /// `[channels]`.
    pub param: &'a [f64],
    /// `[batch, time]`, true where a document begins.
    pub reset: Option<&'a [bool]>,
    /// `[sequences, channels]`.
    pub initial_state: Option<&'a [f64]>,
}

/// Gradients of [`Inputs`], field by field.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of `x`.
    pub x: Vec<f64>,
    /// Of the recurrence gate's logits.
    pub recurrent_logits: Vec<f64>,
    /// Of the input gate's logits.
    pub input_logits: Vec<f64>,
    /// Of the parameter, `[channels]`.
    pub param: Vec<f64>,
    /// `[sequences, channels]`.
    pub initial_state: Vec<f64>,
}

impl Inputs<'_> {
    fn is_reset(&self, token: usize) -> bool {
        self.reset.is_some_and(|reset| reset[token])
    }

    /// `(r, i, a, 1 - a^2)` of one element; the last is formed by `expm1`, so that `a` near 1 loses nothing.
    fn gates(&self, at: usize, channel: usize) -> (f64, f64, f64, f64) {
        let r = sigmoid(self.recurrent_logits[at]);
        let log_a = -C * r * softplus(self.param[channel]);
        (r, sigmoid(self.input_logits[at]), log_a.exp(), -(2.0 * log_a).exp_m1())
    }
}

/// Returns `h` `[batch, time, channels]` and the final state `[sequences, channels]`.
pub fn forward(shape: &Shape, inputs: &Inputs<'_>) -> (Vec<f64>, Vec<f64>) {
    let channels = shape.channels;
    let sequences = shape.sequences();
    let mut state = or_zeros(inputs.initial_state, sequences.len() * channels);
    let mut h = vec![0.0; inputs.x.len()];
    for (n, tokens) in sequences.into_iter().enumerate() {
        for t in tokens {
            for d in 0..channels {
                let at = t * channels + d;
                let state = &mut state[n * channels + d];
                let (_, i, a, rest) = inputs.gates(at, d);
                *state =
                    if inputs.is_reset(t) { i * inputs.x[at] } else { a * *state + rest.sqrt() * i * inputs.x[at] };
                h[at] = *state;
            }
        }
    }
    (h, state)
}

/// Adjoint of [`forward`], with the bounded derivative of the square root.
pub fn backward(shape: &Shape, inputs: &Inputs<'_>, dh: &[f64], d_final_state: Option<&[f64]>) -> Gradients {
    let channels = shape.channels;
    let sequences = shape.sequences();
    let first = or_zeros(inputs.initial_state, sequences.len() * channels);
    let mut delta = or_zeros(d_final_state, sequences.len() * channels);
    let (h, _) = forward(shape, inputs);
    let zeros = || vec![0.0; inputs.x.len()];
    let (mut dx, mut dr_logits, mut di_logits) = (zeros(), zeros(), zeros());
    let mut d_param = vec![0.0; channels];
    for (n, tokens) in sequences.into_iter().enumerate() {
        for t in tokens.clone().rev() {
            for d in 0..channels {
                let at = t * channels + d;
                let before = if t == tokens.start { first[n * channels + d] } else { h[at - channels] };
                let (r, i, a, rest) = inputs.gates(at, d);
                let delta = &mut delta[n * channels + d];
                *delta += dh[at];
                let reset = inputs.is_reset(t);
                let factor = if reset { 1.0 } else { rest.sqrt() };
                dx[at] = *delta * factor * i;
                di_logits[at] = *delta * factor * inputs.x[at] * i * (1.0 - i);
                if reset {
                    *delta = 0.0;
                    continue;
                }
                let d_rest = *delta * i * inputs.x[at] / (4.0 * rest).max(MAX_SQRT_GRADIENT.powi(-2)).sqrt();
                let d_log_a = *delta * before * a - 2.0 * d_rest * a * a;
                dr_logits[at] = -C * softplus(inputs.param[d]) * d_log_a * r * (1.0 - r);
                d_param[d] += -C * r * sigmoid(inputs.param[d]) * d_log_a;
                *delta *= a;
            }
        }
    }
    Gradients { x: dx, recurrent_logits: dr_logits, input_logits: di_logits, param: d_param, initial_state: delta }
}

/// A block-diagonal linear map of the channels: `logits[b, j] = sum_i x[b, i] weight[b, i, j] + bias[b, j]`.
#[derive(Debug, Clone, Copy)]
pub struct BlockDiagonal<'a> {
    /// `[blocks, width, width]`, `blocks * width` = channels.
    pub weight: &'a [f64],
    /// `[blocks, width]`.
    pub bias: &'a [f64],
    /// Number of blocks.
    pub blocks: usize,
}

impl BlockDiagonal<'_> {
    /// Logits of every token of `x` `[tokens, channels]`.
    pub fn forward(&self, x: &[f64]) -> Vec<f64> {
        let (channels, width) = (self.bias.len(), self.bias.len() / self.blocks);
        let mut logits = vec![0.0; x.len()];
        for (x, logits) in x.chunks(channels).zip(logits.chunks_mut(channels)) {
            for (c, logit) in logits.iter_mut().enumerate() {
                let (block, j) = (c / width, c % width);
                let product = (0..width).map(|i| x[block * width + i] * self.weight[(block * width + i) * width + j]);
                *logit = self.bias[c] + product.sum::<f64>();
            }
        }
        logits
    }

    /// Gradients of `x`, `weight` and `bias`.
    pub fn backward(&self, x: &[f64], d_logits: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let (channels, width) = (self.bias.len(), self.bias.len() / self.blocks);
        let (mut dx, mut d_weight, mut d_bias) =
            (vec![0.0; x.len()], vec![0.0; self.weight.len()], vec![0.0; channels]);
        for ((x, dx), d_logits) in x.chunks(channels).zip(dx.chunks_mut(channels)).zip(d_logits.chunks(channels)) {
            add(&mut d_bias, d_logits);
            for (c, d_logit) in d_logits.iter().enumerate() {
                let (block, j) = (c / width, c % width);
                for i in 0..width {
                    let weight = (block * width + i) * width + j;
                    d_weight[weight] += x[block * width + i] * d_logit;
                    dx[block * width + i] += self.weight[weight] * d_logit;
                }
            }
        }
        (dx, d_weight, d_bias)
    }
}
