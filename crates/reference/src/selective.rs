//! Mamba's selective scan (Gu and Dao 2023, arXiv 2312.00752): a diagonal state per channel, never written out.
//!
//! `d = softplus(dt + dt_bias)`, `h_t[c, n] = exp(d A[c, n]) h_{t-1}[c, n] + d B_t[n] u_t[c]`,
//! `o_t[c] = (sum_n C_t[n] h_t[c, n] + D[c] u_t[c]) * silu(z_t[c])`.

use crate::{Shape, or_zeros, sigmoid, softplus};

/// Tensors of a selective scan.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[batch, time, channels]`.
    pub u: &'a [f64],
    /// Step size before softplus, `[batch, time, channels]`.
    pub dt: &'a [f64],
    /// Added to `dt`, `[channels]`; zero if absent.
    pub dt_bias: Option<&'a [f64]>,
    /// Negative rates, `[channels, state_dim]`.
    pub a: &'a [f64],
    /// `[batch, time, state_dim]`.
    pub b: &'a [f64],
    /// `[batch, time, state_dim]`.
    pub c: &'a [f64],
    /// Skip weights, `[channels]`; zero if absent.
    pub d: Option<&'a [f64]>,
    /// Output gate before SiLU, `[batch, time, channels]`; no gate if absent.
    pub z: Option<&'a [f64]>,
    /// `[sequences, channels, state_dim]`.
    pub initial_state: Option<&'a [f64]>,
}

/// Gradients of [`Inputs`], shaped like them; present also where the input is absent.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Gradients {
    pub u: Vec<f64>,
    pub dt: Vec<f64>,
    pub dt_bias: Vec<f64>,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub c: Vec<f64>,
    pub d: Vec<f64>,
    pub z: Vec<f64>,
    pub initial_state: Vec<f64>,
}

impl Inputs<'_> {
    fn step_size(&self, at: usize, channel: usize) -> f64 {
        softplus(self.dt[at] + self.dt_bias.map_or(0.0, |bias| bias[channel]))
    }

    fn skip(&self, channel: usize) -> f64 {
        self.d.map_or(0.0, |d| d[channel])
    }
}

/// Returns `o` and the final state `[sequences, channels, state_dim]`.
pub fn forward(shape: &Shape, x: &Inputs<'_>) -> (Vec<f64>, Vec<f64>) {
    let (channels, size) = (shape.channels, x.a.len() / shape.channels);
    let sequences = shape.sequences();
    let mut state = or_zeros(x.initial_state, sequences.len() * channels * size);
    let mut o = vec![0.0; x.u.len()];
    for (i, tokens) in sequences.into_iter().enumerate() {
        for t in tokens {
            for ch in 0..channels {
                let at = t * channels + ch;
                let h = &mut state[(i * channels + ch) * size..][..size];
                let step = x.step_size(at, ch);
                let mut y = x.skip(ch) * x.u[at];
                for (n, h) in h.iter_mut().enumerate() {
                    *h = (step * x.a[ch * size + n]).exp() * *h + step * x.b[t * size + n] * x.u[at];
                    y += x.c[t * size + n] * *h;
                }
                o[at] = x.z.map_or(y, |z| y * z[at] * sigmoid(z[at]));
            }
        }
    }
    (o, state)
}

/// Adjoint of [`forward`].
pub fn backward(shape: &Shape, x: &Inputs<'_>, d_o: &[f64], d_final_state: Option<&[f64]>) -> Gradients {
    let (channels, size) = (shape.channels, x.a.len() / shape.channels);
    let sequences = shape.sequences();
    let first = or_zeros(x.initial_state, sequences.len() * channels * size);
    let mut delta = or_zeros(d_final_state, first.len());
    let tokens_like = || vec![0.0; x.u.len()];
    let mut grad = Gradients {
        u: tokens_like(),
        dt: tokens_like(),
        dt_bias: vec![0.0; channels],
        a: vec![0.0; x.a.len()],
        b: vec![0.0; x.b.len()],
        c: vec![0.0; x.c.len()],
        d: vec![0.0; channels],
        z: tokens_like(),
        initial_state: Vec::new(),
    };
    for (i, tokens) in sequences.into_iter().enumerate() {
        for ch in 0..channels {
            let place = (i * channels + ch) * size;
            let mut states = vec![first[place..][..size].to_vec()];
            for (j, t) in tokens.clone().enumerate() {
                let step = x.step_size(t * channels + ch, ch);
                let next = (0..size).map(|n| {
                    (step * x.a[ch * size + n]).exp() * states[j][n] + step * x.b[t * size + n] * x.u[t * channels + ch]
                });
                let next = next.collect();
                states.push(next);
            }
            for (j, t) in tokens.clone().enumerate().rev() {
                let at = t * channels + ch;
                let (before, after) = (&states[j], &states[j + 1]);
                let step = x.step_size(at, ch);
                let y = x.skip(ch) * x.u[at] + crate::dot(&x.c[t * size..][..size], after);
                let mut dy = d_o[at];
                if let Some(z) = x.z {
                    let (z, s) = (z[at], sigmoid(z[at]));
                    grad.z[at] = dy * y * s * (1.0 + z * (1.0 - s));
                    dy *= z * s;
                }
                grad.d[ch] += dy * x.u[at];
                grad.u[at] += dy * x.skip(ch);
                let mut d_step = 0.0;
                for n in 0..size {
                    let (row, token) = (ch * size + n, t * size + n);
                    let factor = (step * x.a[row]).exp();
                    let delta = &mut delta[place + n];
                    grad.c[token] += dy * after[n];
                    *delta += dy * x.c[token];
                    let d_exponent = *delta * factor * before[n];
                    grad.a[row] += d_exponent * step;
                    grad.b[token] += *delta * step * x.u[at];
                    grad.u[at] += *delta * step * x.b[token];
                    d_step += d_exponent * x.a[row] + *delta * x.b[token] * x.u[at];
                    *delta *= factor;
                }
                // The derivative of softplus, at the argument that `step` came from.
                grad.dt[at] = d_step * -(-step).exp_m1();
                grad.dt_bias[ch] += grad.dt[at];
            }
        }
    }
    grad.initial_state = delta;
    grad
}
