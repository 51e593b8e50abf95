//! One token: the recurrence as it is written, bound by the bytes of the state.

use super::super::simd::{exp, vectorize};
use super::super::tile::Shared;
use crate::element::Element;
use crate::matrix::{Gate, MatrixInputs, MatrixProblem, Write};
use rayon::prelude::*;

/// States below this many floats in all are not worth waking other threads for.
const PARALLEL: usize = 1 << 16;

pub(crate) fn step<E: Element>(p: &MatrixProblem, x: &MatrixInputs<E>, state: &mut [f32]) -> Vec<E> {
    let size = p.key_dim * p.value_dim;
    let mut o = vec![E::default(); p.batch * p.value_heads * p.value_dim];
    let parallel = state.len() >= PARALLEL;
    let out = Shared::new(&mut o);
    let work = || Work::new(p);
    let run = |w: &mut Work, (task, state): (usize, &mut [f32])| {
        w.run(p, x, task, state);
        // Safety: each task writes its own head.
        E::from_f32_slice(&w.o, unsafe { out.slice_mut(task * p.value_dim, p.value_dim) });
    };
    if parallel {
        state.par_chunks_mut(size).enumerate().for_each_init(work, run);
    } else {
        let mut w = work();
        state.chunks_mut(size).enumerate().for_each(|task| run(&mut w, task));
    }
    o
}

struct Work {
    q: Vec<f32>,
    k: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    decay: Vec<f32>,
    v: Vec<f32>,
    u: Vec<f32>,
    o: Vec<f32>,
}

impl Work {
    fn new(p: &MatrixProblem) -> Self {
        let (key, value) = (|| vec![0.0; p.key_dim], || vec![0.0; p.value_dim]);
        Self { q: key(), k: key(), a: key(), b: key(), decay: key(), v: value(), u: value(), o: value() }
    }

    fn run<E: Element>(&mut self, p: &MatrixProblem, x: &MatrixInputs<E>, task: usize, state: &mut [f32]) {
        let (batch, value_head) = (task / p.value_heads, task % p.value_heads);
        let key_at = (batch * p.heads + value_head * p.heads / p.value_heads) * p.key_dim;
        let key = key_at..key_at + p.key_dim;
        E::to_f32_slice(&x.q[key.clone()], &mut self.q);
        E::to_f32_slice(&x.k[key.clone()], &mut self.k);
        E::to_f32_slice(&x.v[task * p.value_dim..][..p.value_dim], &mut self.v);
        match x.gate {
            Gate::None => self.decay.fill(1.0),
            Gate::Constant(g) => self.decay.fill(exp(g[value_head])),
            Gate::Head(g) => self.decay.fill(exp(g[task])),
            Gate::Key(g) => {
                let g = &g[task * p.key_dim..][..p.key_dim];
                self.decay.iter_mut().zip(g).for_each(|(d, g)| *d = exp(*g));
            }
        }
        let scale = p.scale;
        let Work { q, k, a, b, decay, v, u, o } = self;
        match x.write {
            Write::Additive => vectorize(
                #[inline(always)]
                || {
                    o.fill(0.0);
                    for (i, row) in state.chunks_exact_mut(p.value_dim).enumerate() {
                        let (d, k, q) = (decay[i], k[i], q[i] * scale);
                        for ((s, o), v) in row.iter_mut().zip(o.iter_mut()).zip(v.iter()) {
                            *s = *s * d + k * v;
                            *o += q * *s;
                        }
                    }
                },
            ),
            Write::Delta { beta } => {
                let beta = beta[task];
                vectorize(
                    #[inline(always)]
                    || {
                        // Reads the decayed state with k and q at once, then writes: two passes over the state.
                        // o = (q e^g)^T S + (q . k) u, as the write adds k u^T.
                        u.fill(0.0);
                        o.fill(0.0);
                        let mut qk = 0.0;
                        for (i, row) in state.chunks_exact(p.value_dim).enumerate() {
                            let (k, q) = (decay[i] * k[i], decay[i] * q[i] * scale);
                            for ((s, u), o) in row.iter().zip(u.iter_mut()).zip(o.iter_mut()) {
                                *u += k * s;
                                *o += q * s;
                            }
                        }
                        q.iter().zip(k.iter()).for_each(|(q, k)| qk += q * k);
                        for ((u, o), v) in u.iter_mut().zip(o.iter_mut()).zip(v.iter()) {
                            *u = beta * (v - *u);
                            *o += qk * scale * *u;
                        }
                        for (i, row) in state.chunks_exact_mut(p.value_dim).enumerate() {
                            let (d, k) = (decay[i], k[i]);
                            row.iter_mut().zip(u.iter()).for_each(|(s, u)| *s = *s * d + k * u);
                        }
                    },
                );
            }
            Write::LowRank { a: xa, b: xb } => {
                E::to_f32_slice(&xa[key.clone()], a);
                E::to_f32_slice(&xb[key], b);
                vectorize(
                    #[inline(always)]
                    || {
                        u.fill(0.0);
                        o.fill(0.0);
                        for (i, row) in state.chunks_exact(p.value_dim).enumerate() {
                            row.iter().zip(u.iter_mut()).for_each(|(s, u)| *u += a[i] * s);
                        }
                        for (i, row) in state.chunks_exact_mut(p.value_dim).enumerate() {
                            let (d, k, b, q) = (decay[i], k[i], b[i], q[i] * scale);
                            for (((s, o), v), u) in row.iter_mut().zip(o.iter_mut()).zip(v.iter()).zip(u.iter()) {
                                *s = *s * d + k * v + b * u;
                                *o += q * *s;
                            }
                        }
                    },
                );
            }
        }
    }
}
