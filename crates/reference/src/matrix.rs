//! The matrix-state recurrences, one generic step for all of them.
//!
//! Per value head, with the state `S` `[key, value]` and `D = Diag(exp g_t) S_{t-1}`:
//!
//! | write | update | models |
//! |---|---|---|
//! | [`Write::Additive`] | `S_t = D + k v^T` | linear attention, RetNet, Lightning, GLA, HGRN2, SSD |
//! | [`Write::Delta`] | `S_t = D + k (beta (v - D^T k))^T` | DeltaNet, Gated DeltaNet, KDA |
//! | [`Write::LowRank`] | `S_t = D + b (a^T S_{t-1}) + k v^T` | DPLR, RWKV-7 |
//!
//! and `o_t = scale * S_t^T q_t`. Value head `hv` uses query/key head `hv / (value_heads / heads)`.

use crate::{add, dot, or_zeros};

/// Sizes of a matrix-state problem.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub time: usize,
    /// Heads of `q` and `k` (and of `a` and `b`).
    pub heads: usize,
    /// Heads of `v`, gate, `beta` and the state: a multiple of `heads`.
    pub value_heads: usize,
    /// Features of a key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
    /// Factor of `q`.
    pub scale: f64,
    /// Boundaries of packed sequences.
    pub cu_seqlens: Option<Vec<usize>>,
}

impl Problem {
    /// Number of sequences, the leading size of the states.
    pub fn sequences(&self) -> usize {
        crate::sequences(self.batch, self.time, self.cu_seqlens.as_deref()).len()
    }

    /// Elements of a state tensor `[sequences, value_heads, key_dim, value_dim]`.
    pub fn state_len(&self) -> usize {
        self.sequences() * self.value_heads * self.key_dim * self.value_dim
    }
}

/// Natural-log decay.
#[derive(Debug, Clone, Copy)]
pub enum Gate<'a> {
    /// No decay.
    None,
    /// `[value_heads]`, the same for all tokens.
    Constant(&'a [f64]),
    /// `[batch, time, value_heads]`.
    Head(&'a [f64]),
    /// `[batch, time, value_heads, key_dim]`.
    Key(&'a [f64]),
}

/// How a token enters the state.
#[derive(Debug, Clone, Copy)]
pub enum Write<'a> {
    /// `k v^T`.
    Additive,
    /// The delta rule; `beta` is `[batch, time, value_heads]`.
    Delta {
        /// Step size.
        beta: &'a [f64],
    },
    /// Diagonal plus low rank; `a` and `b` are shaped like `k`.
    LowRank {
        /// Reads the previous state.
        a: &'a [f64],
        /// Writes what was read.
        b: &'a [f64],
    },
}

/// Tensors of a matrix-state problem.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[batch, time, heads, key_dim]`.
    pub q: &'a [f64],
    /// `[batch, time, heads, key_dim]`.
    pub k: &'a [f64],
    /// `[batch, time, value_heads, value_dim]`.
    pub v: &'a [f64],
    /// Decay.
    pub gate: Gate<'a>,
    /// Update.
    pub write: Write<'a>,
    /// `[sequences, value_heads, key_dim, value_dim]`.
    pub initial_state: Option<&'a [f64]>,
}

/// Results of [`forward`].
#[derive(Debug, Clone)]
pub struct Outputs {
    /// `[batch, time, value_heads, value_dim]`.
    pub o: Vec<f64>,
    /// `[sequences, value_heads, key_dim, value_dim]`.
    pub final_state: Vec<f64>,
}

/// Gradients of [`Inputs`], shaped like them; empty where the problem has no such input.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of `q`.
    pub q: Vec<f64>,
    /// Of `k`.
    pub k: Vec<f64>,
    /// Of `v`.
    pub v: Vec<f64>,
    /// Of the gate, shaped like the gate that was given.
    pub gate: Vec<f64>,
    /// Of `beta`.
    pub beta: Vec<f64>,
    /// Of `a`.
    pub a: Vec<f64>,
    /// Of `b`.
    pub b: Vec<f64>,
    /// Of the initial state, given or not.
    pub initial_state: Vec<f64>,
}

/// Where one token of one head lies in the buffers.
struct Place {
    /// First element in `q`, `k`, `a`, `b`.
    key: usize,
    /// First element in `v`, `o`.
    value: usize,
    /// Token and value head: the element in per-head gates and `beta`.
    head: usize,
    value_head: usize,
}

impl Problem {
    fn place(&self, token: usize, value_head: usize) -> Place {
        let group = self.value_heads / self.heads;
        let head = token * self.value_heads + value_head;
        Place {
            key: (token * self.heads + value_head / group) * self.key_dim,
            value: head * self.value_dim,
            head,
            value_head,
        }
    }
}

impl Gate<'_> {
    /// Element of the gate (and of its gradient) that decays key feature `feature`.
    fn index(&self, at: &Place, key_dim: usize, feature: usize) -> usize {
        match self {
            Gate::None => 0,
            Gate::Constant(_) => at.value_head,
            Gate::Head(_) => at.head,
            Gate::Key(_) => at.head * key_dim + feature,
        }
    }

    fn factor(&self, at: &Place, key_dim: usize, feature: usize) -> f64 {
        match self {
            Gate::None => 1.0,
            Gate::Constant(g) | Gate::Head(g) | Gate::Key(g) => g[self.index(at, key_dim, feature)].exp(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Gate::None => 0,
            Gate::Constant(g) | Gate::Head(g) | Gate::Key(g) => g.len(),
        }
    }
}

/// `x^T S` for `S` `[x.len(), width]`.
fn read(state: &[f64], x: &[f64], width: usize) -> Vec<f64> {
    let mut out = vec![0.0; width];
    for (row, x) in state.chunks(width).zip(x) {
        out.iter_mut().zip(row).for_each(|(o, s)| *o += x * s);
    }
    out
}

/// `S y` for `S` `[_, y.len()]`.
fn apply(state: &[f64], y: &[f64]) -> Vec<f64> {
    state.chunks(y.len()).map(|row| dot(row, y)).collect()
}

/// `S += x y^T`.
fn outer(state: &mut [f64], x: &[f64], y: &[f64]) {
    for (row, x) in state.chunks_mut(y.len()).zip(x) {
        row.iter_mut().zip(y).for_each(|(s, y)| *s += x * y);
    }
}

fn scaled(x: &[f64], by: f64) -> Vec<f64> {
    x.iter().map(|x| x * by).collect()
}

impl Inputs<'_> {
    /// `Diag(exp g) S`.
    fn decayed(&self, p: &Problem, at: &Place, state: &[f64]) -> Vec<f64> {
        let mut decayed = state.to_vec();
        for (feature, row) in decayed.chunks_mut(p.value_dim).enumerate() {
            let factor = self.gate.factor(at, p.key_dim, feature);
            row.iter_mut().for_each(|s| *s *= factor);
        }
        decayed
    }

    /// `beta (v - D^T k)`, and `v - D^T k` itself.
    fn correction(&self, p: &Problem, at: &Place, decayed: &[f64], beta: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let seen = read(decayed, &self.k[at.key..][..p.key_dim], p.value_dim);
        let miss: Vec<_> = self.v[at.value..][..p.value_dim].iter().zip(seen).map(|(v, r)| v - r).collect();
        (scaled(&miss, beta[at.head]), miss)
    }

    /// The state after one token.
    fn advance(&self, p: &Problem, at: &Place, state: &[f64]) -> Vec<f64> {
        let (k, v) = (&self.k[at.key..][..p.key_dim], &self.v[at.value..][..p.value_dim]);
        let mut next = self.decayed(p, at, state);
        match self.write {
            Write::Additive => outer(&mut next, k, v),
            Write::Delta { beta } => {
                let (u, _) = self.correction(p, at, &next, beta);
                outer(&mut next, k, &u);
            }
            Write::LowRank { a, b } => {
                let w = read(state, &a[at.key..][..p.key_dim], p.value_dim);
                outer(&mut next, &b[at.key..][..p.key_dim], &w);
                outer(&mut next, k, v);
            }
        }
        next
    }
}

/// One token after the other.
pub fn forward(p: &Problem, inputs: &Inputs<'_>) -> Outputs {
    let size = p.key_dim * p.value_dim;
    let mut states = or_zeros(inputs.initial_state, p.state_len());
    let mut o = vec![0.0; inputs.v.len()];
    for (n, tokens) in crate::sequences(p.batch, p.time, p.cu_seqlens.as_deref()).into_iter().enumerate() {
        for hv in 0..p.value_heads {
            let state = &mut states[(n * p.value_heads + hv) * size..][..size];
            for t in tokens.clone() {
                let at = p.place(t, hv);
                let next = inputs.advance(p, &at, state);
                state.copy_from_slice(&next);
                let q = scaled(&inputs.q[at.key..][..p.key_dim], p.scale);
                o[at.value..][..p.value_dim].copy_from_slice(&read(state, &q, p.value_dim));
            }
        }
    }
    Outputs { o, final_state: states }
}

/// Adjoint of [`forward`]: all states of one head are stored, then the loop runs backwards.
pub fn backward(p: &Problem, inputs: &Inputs<'_>, d_o: &[f64], d_final_state: Option<&[f64]>) -> Gradients {
    let size = p.key_dim * p.value_dim;
    let first = or_zeros(inputs.initial_state, p.state_len());
    let mut d_states = or_zeros(d_final_state, p.state_len());
    let low_rank = matches!(inputs.write, Write::LowRank { .. });
    let mut grad = Gradients {
        q: vec![0.0; inputs.q.len()],
        k: vec![0.0; inputs.k.len()],
        v: vec![0.0; inputs.v.len()],
        gate: vec![0.0; inputs.gate.len()],
        beta: if let Write::Delta { beta } = inputs.write { vec![0.0; beta.len()] } else { Vec::new() },
        a: vec![0.0; if low_rank { inputs.k.len() } else { 0 }],
        b: vec![0.0; if low_rank { inputs.k.len() } else { 0 }],
        initial_state: Vec::new(),
    };
    for (n, tokens) in crate::sequences(p.batch, p.time, p.cu_seqlens.as_deref()).into_iter().enumerate() {
        for hv in 0..p.value_heads {
            let place = (n * p.value_heads + hv) * size;
            let mut states = vec![first[place..][..size].to_vec()];
            for (i, t) in tokens.clone().enumerate() {
                states.push(inputs.advance(p, &p.place(t, hv), &states[i]));
            }
            let d_state = &mut d_states[place..][..size];
            for (i, t) in tokens.clone().enumerate().rev() {
                let d_o = scaled(&d_o[p.place(t, hv).value..][..p.value_dim], p.scale);
                retreat(p, inputs, &p.place(t, hv), &states[i], &states[i + 1], &d_o, d_state, &mut grad);
            }
        }
    }
    grad.initial_state = d_states;
    grad
}

/// One token of the adjoint: `d_state` comes in as the cotangent of the state after the token (without this token's
/// output) and leaves as that of the state before it. `d_o` already carries the scale.
fn retreat(
    p: &Problem,
    inputs: &Inputs<'_>,
    at: &Place,
    before: &[f64],
    after: &[f64],
    d_o: &[f64],
    d_state: &mut [f64],
    grad: &mut Gradients,
) {
    let (keys, values) = (at.key..at.key + p.key_dim, at.value..at.value + p.value_dim);
    let (q, k, v) = (&inputs.q[keys.clone()], &inputs.k[keys.clone()], &inputs.v[values.clone()]);
    add(&mut grad.q[keys.clone()], &apply(after, d_o));
    outer(d_state, q, d_o);

    // Cotangent of D, then what reaches the previous state by another way than the decay.
    let mut d_decayed = d_state.to_vec();
    let mut d_before = vec![0.0; before.len()];
    match inputs.write {
        Write::Additive => {
            add(&mut grad.k[keys], &apply(d_state, v));
            add(&mut grad.v[values], &read(d_state, k, p.value_dim));
        }
        Write::Delta { beta } => {
            let decayed = inputs.decayed(p, at, before);
            let (u, miss) = inputs.correction(p, at, &decayed, beta);
            let du = read(d_state, k, p.value_dim);
            let d_miss = scaled(&du, beta[at.head]);
            let d_seen = scaled(&d_miss, -1.0);
            grad.beta[at.head] += dot(&du, &miss);
            add(&mut grad.v[values], &d_miss);
            add(&mut grad.k[keys.clone()], &apply(d_state, &u));
            add(&mut grad.k[keys], &apply(&decayed, &d_seen));
            outer(&mut d_decayed, k, &d_seen);
        }
        Write::LowRank { a, b } => {
            let (a, b) = (&a[keys.clone()], &b[keys.clone()]);
            let w = read(before, a, p.value_dim);
            let dw = read(d_state, b, p.value_dim);
            add(&mut grad.k[keys.clone()], &apply(d_state, v));
            add(&mut grad.v[values], &read(d_state, k, p.value_dim));
            add(&mut grad.b[keys.clone()], &apply(d_state, &w));
            add(&mut grad.a[keys], &apply(before, &dw));
            outer(&mut d_before, a, &dw);
        }
    }
    for feature in 0..p.key_dim {
        let row = feature * p.value_dim..(feature + 1) * p.value_dim;
        let factor = inputs.gate.factor(at, p.key_dim, feature);
        if inputs.gate.len() > 0 {
            let index = inputs.gate.index(at, p.key_dim, feature);
            grad.gate[index] += factor * dot(&d_decayed[row.clone()], &before[row.clone()]);
        }
        add(&mut d_before[row.clone()], &scaled(&d_decayed[row], factor));
    }
    d_state.copy_from_slice(&d_before);
}
