//! What published models put around the matrix recurrence: normalisers and tied keys.

use crate::matrix::{self, Gate, Gradients, Inputs, Outputs, Problem, Write};
use crate::{add, dot, or_zeros};

/// Added to the sum of squares by [`l2norm`].
pub const L2_EPSILON: f64 = 1e-6;

/// Added to the normaliser of [`linear_attention_norm`].
pub const NORMALISER_EPSILON: f64 = 1e-10;

/// `x / sqrt(sum(x^2) + 1e-6)` over rows of `width`.
pub fn l2norm(x: &[f64], width: usize) -> Vec<f64> {
    x.chunks(width)
        .flat_map(|row| {
            let r = (dot(row, row) + L2_EPSILON).sqrt().recip();
            row.iter().map(move |x| x * r)
        })
        .collect()
}

/// Adjoint of [`l2norm`].
pub fn l2norm_backward(x: &[f64], width: usize, dy: &[f64]) -> Vec<f64> {
    x.chunks(width)
        .zip(dy.chunks(width))
        .flat_map(|(x, dy)| {
            let r = (dot(x, x) + L2_EPSILON).sqrt().recip();
            let along = dot(x, dy) * r.powi(3);
            x.iter().zip(dy).map(move |(x, dy)| dy * r - x * along)
        })
        .collect()
}

/// HGRN2 (Qin et al. 2024, arXiv 2404.07904): the key is `1 - exp(g)`.
pub fn hgrn2_forward(p: &Problem, q: &[f64], v: &[f64], g: &[f64], initial_state: Option<&[f64]>) -> Outputs {
    let k: Vec<_> = g.iter().map(|g| -g.exp_m1()).collect();
    matrix::forward(p, &Inputs { q, k: &k, v, gate: Gate::Key(g), write: Write::Additive, initial_state })
}

/// Adjoint of [`hgrn2_forward`]; the gate's gradient includes its way through the key, the key's is left empty.
pub fn hgrn2_backward(
    p: &Problem,
    q: &[f64],
    v: &[f64],
    g: &[f64],
    initial_state: Option<&[f64]>,
    d_o: &[f64],
    d_final_state: Option<&[f64]>,
) -> Gradients {
    let k: Vec<_> = g.iter().map(|g| -g.exp_m1()).collect();
    let inputs = Inputs { q, k: &k, v, gate: Gate::Key(g), write: Write::Additive, initial_state };
    let mut grad = matrix::backward(p, &inputs, d_o, d_final_state);
    let through_k: Vec<_> = grad.k.iter().zip(g).map(|(dk, g)| -dk * g.exp()).collect();
    add(&mut grad.gate, &through_k);
    grad.k.clear();
    grad
}

/// Inputs of [`linear_attention_norm`].
#[derive(Debug, Clone, Copy)]
pub struct NormInputs<'a> {
    /// `[batch, time, heads, key_dim]`, positive features.
    pub q: &'a [f64],
    /// `[batch, time, heads, key_dim]`, positive features.
    pub k: &'a [f64],
    /// `[batch, time, value_heads, value_dim]`.
    pub v: &'a [f64],
    /// `[sequences, value_heads, key_dim, value_dim]`.
    pub initial_state: Option<&'a [f64]>,
    /// Sum of the keys before this call, `[sequences, heads, key_dim]`.
    pub initial_z: Option<&'a [f64]>,
}

/// Linear attention divided by its normaliser `(scale q) . z + 1e-10`, `z` the sum of the keys so far
/// (Katharopoulos et al. 2020, arXiv 2006.16236). Returns the outputs and the final `z`.
pub fn linear_attention_norm(p: &Problem, inputs: &NormInputs<'_>) -> (Outputs, Vec<f64>) {
    let mut out = matrix::forward(p, &inputs.plain());
    let (z, last) = inputs.sums(p);
    for (row, o) in out.o.chunks_mut(p.value_dim).enumerate() {
        let n = inputs.normaliser(p, &z, row);
        o.iter_mut().for_each(|o| *o /= n);
    }
    (out, last)
}

/// Adjoint of [`linear_attention_norm`]: the gradients, and that of `initial_z`.
pub fn linear_attention_norm_backward(
    p: &Problem,
    inputs: &NormInputs<'_>,
    d_o: &[f64],
    d_final_state: Option<&[f64]>,
    d_final_z: Option<&[f64]>,
) -> (Gradients, Vec<f64>) {
    let plain = matrix::forward(p, &inputs.plain()).o;
    let (z, _) = inputs.sums(p);
    let mut d_plain = d_o.to_vec();
    let mut dq = vec![0.0; inputs.q.len()];
    let mut dz = vec![0.0; inputs.k.len()];
    for (row, (d_o, o)) in d_plain.chunks_mut(p.value_dim).zip(plain.chunks(p.value_dim)).enumerate() {
        let n = inputs.normaliser(p, &z, row);
        let dn = -p.scale * dot(d_o, o) / (n * n);
        d_o.iter_mut().for_each(|x| *x /= n);
        for at in inputs.key_row(p, row) {
            dq[at] += dn * z[at];
            dz[at] += dn * inputs.q[at];
        }
    }
    let mut grad = matrix::backward(p, &inputs.plain(), &d_plain, d_final_state);
    add(&mut grad.q, &dq);
    let width = p.heads * p.key_dim;
    let mut suffix = or_zeros(d_final_z, p.sequences() * width);
    for (n, tokens) in crate::sequences(p.batch, p.time, p.cu_seqlens.as_deref()).into_iter().enumerate() {
        let suffix = &mut suffix[n * width..][..width];
        for t in tokens.rev() {
            add(suffix, &dz[t * width..][..width]);
            add(&mut grad.k[t * width..][..width], suffix);
        }
    }
    (grad, suffix)
}

impl NormInputs<'_> {
    fn plain(&self) -> Inputs<'_> {
        let Self { q, k, v, initial_state, .. } = *self;
        Inputs { q, k, v, gate: Gate::None, write: Write::Additive, initial_state }
    }

    /// `z_t` of every token, shaped like `k`, and the last one of every sequence.
    fn sums(&self, p: &Problem) -> (Vec<f64>, Vec<f64>) {
        let width = p.heads * p.key_dim;
        let mut last = or_zeros(self.initial_z, p.sequences() * width);
        let mut all = self.k.to_vec();
        for (n, tokens) in crate::sequences(p.batch, p.time, p.cu_seqlens.as_deref()).into_iter().enumerate() {
            let last = &mut last[n * width..][..width];
            for t in tokens {
                add(last, &self.k[t * width..][..width]);
                all[t * width..][..width].copy_from_slice(last);
            }
        }
        (all, last)
    }

    /// Elements of `q`, `k` and `z` that belong to row `row` of `o` (a token and a value head).
    fn key_row(&self, p: &Problem, row: usize) -> std::ops::Range<usize> {
        let (token, value_head) = (row / p.value_heads, row % p.value_heads);
        let at = (token * p.heads + value_head / (p.value_heads / p.heads)) * p.key_dim;
        at..at + p.key_dim
    }

    fn normaliser(&self, p: &Problem, z: &[f64], row: usize) -> f64 {
        let at = self.key_row(p, row);
        p.scale * dot(&self.q[at.clone()], &z[at]) + NORMALISER_EPSILON
    }
}
