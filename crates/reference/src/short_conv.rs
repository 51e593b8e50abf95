//! Causal depth-wise convolution over time with a carried state.
//!
//! `y_t[d] = act(bias[d] + sum_j weight[d, j] x_{t - (W-1) + j}[d])`: the last weight meets the current token. The
//! state holds the last `W - 1` inputs, oldest first.

use crate::{Shape, or_zeros, sigmoid};

/// Tensors of a short convolution.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[batch, time, channels]`.
    pub x: &'a [f64],
    /// `[channels, width]`.
    pub weight: &'a [f64],
    /// `[channels]`.
    pub bias: Option<&'a [f64]>,
    /// Whether SiLU follows.
    pub silu: bool,
    /// `[sequences, channels, width - 1]`.
    pub state: Option<&'a [f64]>,
}

/// Gradients of [`Inputs`], shaped like them.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of `x`.
    pub x: Vec<f64>,
    /// Of `weight`.
    pub weight: Vec<f64>,
    /// `[channels]`, also when no bias was given.
    pub bias: Vec<f64>,
    /// `[sequences, channels, width - 1]`.
    pub state: Vec<f64>,
}

/// Returns `y` and the new state.
pub fn forward(shape: &Shape, inputs: &Inputs<'_>) -> (Vec<f64>, Vec<f64>) {
    let (channels, width) = (shape.channels, inputs.weight.len() / shape.channels);
    let sequences = shape.sequences();
    let mut state = or_zeros(inputs.state, sequences.len() * channels * (width - 1));
    let mut y = vec![0.0; inputs.x.len()];
    for (n, tokens) in sequences.into_iter().enumerate() {
        for d in 0..channels {
            let state = &mut state[(n * channels + d) * (width - 1)..][..width - 1];
            let past: Vec<_> =
                state.iter().copied().chain(tokens.clone().map(|t| inputs.x[t * channels + d])).collect();
            for (t, seen) in tokens.clone().zip(past.windows(width)) {
                let z = pre_activation(inputs, d, seen);
                y[t * channels + d] = if inputs.silu { z * sigmoid(z) } else { z };
            }
            state.copy_from_slice(&past[past.len() - (width - 1)..]);
        }
    }
    (y, state)
}

fn pre_activation(inputs: &Inputs<'_>, channel: usize, seen: &[f64]) -> f64 {
    let weight = &inputs.weight[channel * seen.len()..][..seen.len()];
    inputs.bias.map_or(0.0, |bias| bias[channel]) + crate::dot(weight, seen)
}

/// Adjoint of [`forward`].
pub fn backward(shape: &Shape, inputs: &Inputs<'_>, dy: &[f64], d_state: Option<&[f64]>) -> Gradients {
    let (channels, width) = (shape.channels, inputs.weight.len() / shape.channels);
    let sequences = shape.sequences();
    let state_len = sequences.len() * channels * (width - 1);
    let first = or_zeros(inputs.state, state_len);
    let d_last = or_zeros(d_state, state_len);
    let mut grad = Gradients {
        x: vec![0.0; inputs.x.len()],
        weight: vec![0.0; inputs.weight.len()],
        bias: vec![0.0; channels],
        state: vec![0.0; state_len],
    };
    for (n, tokens) in sequences.into_iter().enumerate() {
        for d in 0..channels {
            let place = (n * channels + d) * (width - 1)..(n * channels + d + 1) * (width - 1);
            let inputs_of_d = tokens.clone().map(|t| inputs.x[t * channels + d]);
            let past: Vec<_> = first[place.clone()].iter().copied().chain(inputs_of_d).collect();
            let mut d_past = vec![0.0; past.len()];
            d_past[past.len() - (width - 1)..].copy_from_slice(&d_last[place.clone()]);
            for (i, t) in tokens.clone().enumerate() {
                let z = pre_activation(inputs, d, &past[i..i + width]);
                let slope = if inputs.silu { sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z))) } else { 1.0 };
                let dz = dy[t * channels + d] * slope;
                grad.bias[d] += dz;
                for j in 0..width {
                    grad.weight[d * width + j] += dz * past[i + j];
                    d_past[i + j] += dz * inputs.weight[d * width + j];
                }
            }
            grad.state[place].copy_from_slice(&d_past[..width - 1]);
            for (t, dx) in tokens.clone().zip(&d_past[width - 1..]) {
                grad.x[t * channels + d] = *dx;
            }
        }
    }
    grad
}
