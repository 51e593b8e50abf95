//! Published recurrences that are one of [`crate::matrix`]'s behind other names: SSD, RWKV-6 and RWKV-7.

use crate::matrix::{self, Gate, Inputs, Problem, Write};
use crate::{add, dot, softplus};

/// Mamba-2's state-space dual (Dao and Gu 2024, arXiv 2405.21060): with `d = softplus(dt + dt_bias)` per head,
/// `S = exp(d A) S + (d x) B^T`, `o = S C + D x`.
///
/// It is the additive recurrence with a gate per head: key `B`, query `C`, value `d x`, gate `d A`, scale 1. The problem's
/// `heads` are the groups of `B` and `C`. States are `[sequences, value_heads, value_dim, key_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Ssd<'a> {
    /// `[batch, time, value_heads, value_dim]`.
    pub x: &'a [f64],
    /// `[batch, time, value_heads]`, before softplus.
    pub dt: &'a [f64],
    /// `[value_heads]`.
    pub dt_bias: &'a [f64],
    /// Negative rates, `[value_heads]`.
    pub a: &'a [f64],
    /// `[batch, time, groups, key_dim]`.
    pub b: &'a [f64],
    /// `[batch, time, groups, key_dim]`.
    pub c: &'a [f64],
    /// Skip weights, `[value_heads]`.
    pub d: &'a [f64],
    /// `[sequences, value_heads, value_dim, key_dim]`.
    pub initial_state: Option<&'a [f64]>,
}

/// Gradients of [`Ssd`], field by field.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct SsdGradients {
    pub x: Vec<f64>,
    pub dt: Vec<f64>,
    pub dt_bias: Vec<f64>,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub c: Vec<f64>,
    pub d: Vec<f64>,
    pub initial_state: Vec<f64>,
}

/// Swaps the two axes of every `[rows, columns]` matrix.
fn transposed(matrices: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let one = |m: &[f64]| (0..rows * columns).map(|i| m[i % rows * columns + i / rows]).collect::<Vec<_>>();
    matrices.chunks(rows * columns).flat_map(one).collect()
}

impl Ssd<'_> {
    /// Runs `with` on the equivalent additive problem: step sizes per row of `dt`, values, gates, initial state.
    fn with<R>(&self, p: &Problem, with: impl FnOnce(&[f64], &Inputs<'_>) -> R) -> R {
        let heads = p.value_heads;
        let steps: Vec<_> = self.dt.iter().enumerate().map(|(i, dt)| softplus(dt + self.dt_bias[i % heads])).collect();
        let v: Vec<_> = self.x.iter().enumerate().map(|(i, x)| x * steps[i / p.value_dim]).collect();
        let g: Vec<_> = steps.iter().enumerate().map(|(i, step)| step * self.a[i % heads]).collect();
        let state = self.initial_state.map(|s| transposed(s, p.value_dim, p.key_dim));
        let inputs = Inputs {
            q: self.c,
            k: self.b,
            v: &v,
            gate: Gate::Head(&g),
            write: Write::Additive,
            initial_state: state.as_deref(),
        };
        with(&steps, &inputs)
    }
}

/// Returns `o` `[batch, time, value_heads, value_dim]` and the final state.
pub fn ssd_forward(p: &Problem, ssd: &Ssd<'_>) -> (Vec<f64>, Vec<f64>) {
    let mut out = ssd.with(p, |_, inputs| matrix::forward(p, inputs));
    for (i, (o, x)) in out.o.iter_mut().zip(ssd.x).enumerate() {
        *o += ssd.d[i / p.value_dim % p.value_heads] * x;
    }
    (out.o, transposed(&out.final_state, p.key_dim, p.value_dim))
}

/// Adjoint of [`ssd_forward`].
pub fn ssd_backward(p: &Problem, ssd: &Ssd<'_>, d_o: &[f64], d_final_state: Option<&[f64]>) -> SsdGradients {
    let d_last = d_final_state.map(|s| transposed(s, p.value_dim, p.key_dim));
    let (steps, inner) =
        ssd.with(p, |steps, inputs| (steps.to_vec(), matrix::backward(p, inputs, d_o, d_last.as_deref())));
    let heads = p.value_heads;
    let mut grad = SsdGradients {
        x: vec![0.0; ssd.x.len()],
        dt: vec![0.0; ssd.dt.len()],
        dt_bias: vec![0.0; heads],
        a: vec![0.0; heads],
        b: inner.k,
        c: inner.q,
        d: vec![0.0; heads],
        initial_state: transposed(&inner.initial_state, p.key_dim, p.value_dim),
    };
    for (row, &step) in steps.iter().enumerate() {
        let (head, values) = (row % heads, row * p.value_dim..(row + 1) * p.value_dim);
        for i in values.clone() {
            grad.x[i] = inner.v[i] * step + d_o[i] * ssd.d[head];
        }
        grad.d[head] += dot(&d_o[values.clone()], &ssd.x[values.clone()]);
        grad.a[head] += inner.gate[row] * step;
        let d_step = dot(&inner.v[values.clone()], &ssd.x[values]) + inner.gate[row] * ssd.a[head];
        grad.dt[row] = d_step * -(-step).exp_m1();
        grad.dt_bias[head] += grad.dt[row];
    }
    grad
}

/// RWKV-7 (Peng et al. 2025, arXiv 2503.14456): the low-rank write with `a = -kk`, `b = kk * a`, decay `w` per key
/// feature and `r` as query.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Rwkv7<'a> {
    pub r: &'a [f64],
    pub w: &'a [f64],
    pub k: &'a [f64],
    pub v: &'a [f64],
    pub kk: &'a [f64],
    pub a: &'a [f64],
    pub initial_state: Option<&'a [f64]>,
}

impl Rwkv7<'_> {
    /// Runs `with` on the equivalent low-rank problem.
    fn with<R>(&self, with: impl FnOnce(&Inputs<'_>) -> R) -> R {
        let a: Vec<_> = self.kk.iter().map(|kk| -kk).collect();
        let b: Vec<_> = self.kk.iter().zip(self.a).map(|(kk, a)| kk * a).collect();
        let Self { r: q, w, k, v, initial_state, .. } = *self;
        with(&Inputs { q, k, v, gate: Gate::Key(w), write: Write::LowRank { a: &a, b: &b }, initial_state })
    }
}

/// Outputs of RWKV-7.
pub fn rwkv7_forward(p: &Problem, x: &Rwkv7<'_>) -> matrix::Outputs {
    x.with(|inputs| matrix::forward(p, inputs))
}

/// Adjoint of [`rwkv7_forward`]: in the result `q` is `r`'s gradient, `gate` that of `w`, `b` that of `kk`, `a` that of
/// `a`.
pub fn rwkv7_backward(p: &Problem, x: &Rwkv7<'_>, d_o: &[f64], d_final_state: Option<&[f64]>) -> matrix::Gradients {
    let mut grad = x.with(|inputs| matrix::backward(p, inputs, d_o, d_final_state));
    let kk = grad.b.iter().zip(x.a).zip(&grad.a).map(|((db, a), da)| db * a - da).collect();
    grad.a = grad.b.iter().zip(x.kk).map(|(db, kk)| db * kk).collect();
    grad.b = kk;
    grad
}

/// RWKV-6 (Peng et al. 2024, arXiv 2404.05892): `o_t = r^T (S_{t-1} + (u * k) v^T)`, then
/// `S_t = exp(w) S_{t-1} + k v^T`. The state is read before the token is written, the bonus `u` stands in for it.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Rwkv6<'a> {
    pub r: &'a [f64],
    pub w: &'a [f64],
    pub k: &'a [f64],
    pub v: &'a [f64],
    /// `[heads, key_dim]`.
    pub u: &'a [f64],
    pub initial_state: Option<&'a [f64]>,
}

/// Outputs of RWKV-6 and the gradients of its loss: `(outputs, gradients, gradient of u)`; `q` is `r`, `gate` is `w`.
/// The problem has as many value heads as heads.
///
/// The part that reads the state is the additive recurrence one token late: a sequence of one more token, whose first
/// gate and key are zero and whose query is that of the next token.
pub fn rwkv6(
    p: &Problem,
    x: &Rwkv6<'_>,
    d_o: &[f64],
    d_final_state: Option<&[f64]>,
) -> (matrix::Outputs, matrix::Gradients, Vec<f64>) {
    let (keys, values) = (p.heads * p.key_dim, p.heads * p.value_dim);
    let sequences = crate::sequences(p.batch, p.time, p.cu_seqlens.as_deref());
    let mut bounds = vec![0];
    sequences.iter().for_each(|s| bounds.push(bounds[bounds.len() - 1] + s.len() + 1));
    let late = Problem { batch: 1, time: bounds[bounds.len() - 1], cu_seqlens: Some(bounds), ..p.clone() };
    // A blank row before (`late`) or after (`early`) the rows of every sequence.
    let padded = |rows: &[f64], width: usize, early: bool| {
        let blank = vec![0.0; width];
        let one = |s: &std::ops::Range<usize>| {
            let rows = rows[s.start * width..s.end * width].to_vec();
            if early { [rows, blank.clone()].concat() } else { [blank.clone(), rows].concat() }
        };
        sequences.iter().flat_map(one).collect::<Vec<_>>()
    };
    let trimmed = |rows: &[f64], width: usize, early: bool| {
        let one = |(i, s): (usize, &std::ops::Range<usize>)| {
            let start = s.start + i + usize::from(!early);
            rows[start * width..(start + s.len()) * width].to_vec()
        };
        sequences.iter().enumerate().flat_map(one).collect::<Vec<_>>()
    };
    let (q, k, v, g) =
        (padded(x.r, keys, true), padded(x.k, keys, false), padded(x.v, values, false), padded(x.w, keys, false));
    let inputs =
        Inputs { q: &q, k: &k, v: &v, gate: Gate::Key(&g), write: Write::Additive, initial_state: x.initial_state };
    let out = matrix::forward(&late, &inputs);
    let inner = matrix::backward(&late, &inputs, &padded(d_o, values, true), d_final_state);
    let mut o = trimmed(&out.o, values, true);
    let mut grad = matrix::Gradients {
        q: trimmed(&inner.q, keys, true),
        k: trimmed(&inner.k, keys, false),
        v: trimmed(&inner.v, values, false),
        gate: trimmed(&inner.gate, keys, false),
        ..inner
    };
    let mut du = vec![0.0; x.u.len()];
    for row in 0..p.batch * p.time * p.heads {
        let (key, value) = (row * p.key_dim, row * p.value_dim..(row + 1) * p.value_dim);
        let u = &x.u[row % p.heads * p.key_dim..][..p.key_dim];
        let bonus: f64 = p.scale * (0..p.key_dim).map(|i| x.r[key + i] * u[i] * x.k[key + i]).sum::<f64>();
        let v = &x.v[value.clone()];
        let d_bonus = p.scale * dot(&d_o[value.clone()], v);
        add(&mut o[value.clone()], &v.iter().map(|v| bonus * v).collect::<Vec<_>>());
        add(&mut grad.v[value.clone()], &d_o[value].iter().map(|d| bonus * d).collect::<Vec<_>>());
        for i in 0..p.key_dim {
            let (r, k) = (x.r[key + i], x.k[key + i]);
            grad.q[key + i] += d_bonus * u[i] * k;
            grad.k[key + i] += d_bonus * u[i] * r;
            du[row % p.heads * p.key_dim + i] += d_bonus * r * k;
        }
    }
    (matrix::Outputs { o, final_state: out.final_state }, grad, du)
}
