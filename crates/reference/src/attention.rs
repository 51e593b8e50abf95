//! Causal softmax attention, optionally in a window and with grouped key/value heads.

use crate::{add, dot};
use std::ops::RangeInclusive;

/// Sizes of an attention problem.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub time: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` uses `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Features of `q` and `k`.
    pub key_dim: usize,
    /// Features of `v`.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f64,
    /// Token `i` sees `i - window + 1 ..= i`.
    pub window: Option<usize>,
    /// Boundaries of packed sequences.
    pub cu_seqlens: Option<Vec<usize>>,
}

/// Gradients of `q`, `k` and `v`.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// `[batch, time, heads, key_dim]`.
    pub q: Vec<f64>,
    /// `[batch, time, kv_heads, key_dim]`.
    pub k: Vec<f64>,
    /// `[batch, time, kv_heads, value_dim]`.
    pub v: Vec<f64>,
}

/// What one query of one head sees: its place in `q` and `o`, the tokens, the head to read, and their weights.
struct Row {
    query: usize,
    output: usize,
    tokens: RangeInclusive<usize>,
    kv_head: usize,
    weights: Vec<f64>,
}

impl Problem {
    fn key(&self, token: usize, kv_head: usize) -> std::ops::Range<usize> {
        let at = (token * self.kv_heads + kv_head) * self.key_dim;
        at..at + self.key_dim
    }

    fn value(&self, token: usize, kv_head: usize) -> std::ops::Range<usize> {
        let at = (token * self.kv_heads + kv_head) * self.value_dim;
        at..at + self.value_dim
    }

    fn rows<'a>(&'a self, q: &'a [f64], k: &'a [f64]) -> impl Iterator<Item = Row> + 'a {
        let sequences = crate::sequences(self.batch, self.time, self.cu_seqlens.as_deref());
        let tokens = sequences.into_iter().flat_map(|range| range.clone().map(move |i| (range.start, i)));
        tokens.flat_map(move |(start, i)| {
            (0..self.heads).map(move |head| {
                let from = self.window.map_or(start, |window| start.max((i + 1).saturating_sub(window)));
                let kv_head = head / (self.heads / self.kv_heads);
                let query = (i * self.heads + head) * self.key_dim;
                let scores: Vec<_> = (from..=i)
                    .map(|j| self.scale * dot(&q[query..][..self.key_dim], &k[self.key(j, kv_head)]))
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let weights = scores.iter().map(|s| (s - max).exp() / sum).collect();
                Row { query, output: (i * self.heads + head) * self.value_dim, tokens: from..=i, kv_head, weights }
            })
        })
    }
}

/// `o` `[batch, time, heads, value_dim]`.
pub fn forward(p: &Problem, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
    let mut o = vec![0.0; p.batch * p.time * p.heads * p.value_dim];
    for row in p.rows(q, k) {
        let o = &mut o[row.output..][..p.value_dim];
        for (j, weight) in row.tokens.zip(&row.weights) {
            o.iter_mut().zip(&v[p.value(j, row.kv_head)]).for_each(|(o, v)| *o += weight * v);
        }
    }
    o
}

/// Adjoint of [`forward`]: `dP = dO V^T`, `dS = P (dP - sum(P dP))`, `dQ = scale dS K`, `dK = scale dS^T Q`, `dV = P^T dO`.
pub fn backward(p: &Problem, q: &[f64], k: &[f64], v: &[f64], d_o: &[f64]) -> Gradients {
    let mut grad = Gradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    for row in p.rows(q, k) {
        let d_o = &d_o[row.output..][..p.value_dim];
        let query = row.query..row.query + p.key_dim;
        let d_weights: Vec<_> = row.tokens.clone().map(|j| dot(d_o, &v[p.value(j, row.kv_head)])).collect();
        let mean = dot(&row.weights, &d_weights);
        for ((j, weight), d_weight) in row.tokens.zip(&row.weights).zip(&d_weights) {
            let d_score = p.scale * weight * (d_weight - mean);
            let (key, value) = (p.key(j, row.kv_head), p.value(j, row.kv_head));
            let scaled = |x: &[f64], by: f64| x.iter().map(|x| x * by).collect::<Vec<_>>();
            add(&mut grad.q[query.clone()], &scaled(&k[key.clone()], d_score));
            add(&mut grad.k[key], &scaled(&q[query.clone()], d_score));
            add(&mut grad.v[value], &scaled(d_o, *weight));
        }
    }
    grad
}
