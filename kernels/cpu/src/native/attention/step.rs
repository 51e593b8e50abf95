//! One query per sequence against a cache: bound by reading the cache, so plain dot products on its rows.

use super::{at, origin};
use crate::native::simd::dot;
use crate::{
    attention::StepProblem,
    element::Element,
    native::{
        simd::{exp, vectorize},
        tile::{Rows, Tile},
    },
};
use rayon::prelude::*;

/// Tokens of a tile, and of a task: long caches of one sequence are shared by the threads.
const TOKENS: usize = 64;
const RUN: usize = 1024;
/// Below this many elements of the cache the threads are not woken.
const SERIAL: usize = 32 << 10;

/// A running softmax over part of a cache, for each query head of a group: maximum, sum, weighted values.
type Partial = Vec<(f32, f32, Vec<f32>)>;

pub(crate) fn step<E: Element>(p: &StepProblem, q: &[E], k: &[E], v: &[E], lengths: &[usize]) -> Vec<E> {
    let runs = lengths.iter().copied().max().unwrap_or(1).div_ceil(RUN);
    let task = |i: usize| {
        let (n, kv_head, from) = (i / runs / p.kv_heads, i / runs % p.kv_heads, i % runs * RUN);
        attend(p, q, k, v, n, kv_head, from..(from + RUN).min(lengths[n]))
    };
    let tasks = p.batch * p.kv_heads * runs;
    let cache = lengths.iter().sum::<usize>() * p.kv_heads * p.key_dim;
    let partials: Vec<Partial> = if cache < SERIAL {
        (0..tasks).map(task).collect()
    } else {
        (0..tasks).into_par_iter().with_max_len(1).map(task).collect()
    };
    let mut o = Vec::with_capacity(p.batch * p.heads * p.value_dim);
    for runs in partials.chunks(runs) {
        for head in 0..p.heads / p.kv_heads {
            let max = origin(runs.iter().map(|run| run[head].0).fold(f32::NEG_INFINITY, f32::max));
            let (mut sum, mut row) = (0.0, vec![0.0; p.value_dim]);
            for (m, s, values) in runs.iter().map(|run| &run[head]) {
                let weight = exp(m - max);
                sum += weight * s;
                row.iter_mut().zip(values).for_each(|(o, v)| *o += weight * v);
            }
            o.extend(row.into_iter().map(|x| E::from_f32(x / sum)));
        }
    }
    o
}

fn attend<E: Element>(
    p: &StepProblem,
    q: &[E],
    k: &[E],
    v: &[E],
    n: usize,
    kv_head: usize,
    slots: std::ops::Range<usize>,
) -> Partial {
    let group = p.heads / p.kv_heads;
    let mut queries = Tile::new(group, p.key_dim);
    queries.load(q, Rows { offset: (n * p.heads + kv_head * group) * p.key_dim, stride: p.key_dim }, group);
    let mut out = vec![(f32::NEG_INFINITY, 0.0, vec![0.0; p.value_dim]); group];
    let (mut keys, mut values) = (Tile::new(TOKENS, p.key_dim), Tile::new(TOKENS, p.value_dim));
    for from in slots.clone().step_by(TOKENS) {
        let rows = TOKENS.min(slots.end - from);
        let token = n * p.capacity + from;
        keys.load(k, at(token, kv_head, p.kv_heads, p.key_dim), rows);
        values.load(v, at(token, kv_head, p.kv_heads, p.value_dim), rows);
        vectorize(
            #[inline(always)]
            || {
                for (i, (max, sum, o)) in out.iter_mut().enumerate() {
                    let mut scores = [f32::NEG_INFINITY; TOKENS];
                    for (j, score) in scores[..rows].iter_mut().enumerate() {
                        *score = p.scale * dot(queries.row(i), keys.row(j));
                    }
                    let new_max = scores.iter().fold(*max, |a, &b| if b > a { b } else { a });
                    let origin = origin(new_max);
                    let fade = exp(*max - origin);
                    for score in &mut scores {
                        *score = exp(*score - origin);
                    }
                    *sum = *sum * fade + scores.iter().sum::<f32>();
                    *max = new_max;
                    o.iter_mut().for_each(|o| *o *= fade);
                    for (j, &weight) in scores[..rows].iter().enumerate() {
                        o.iter_mut().zip(values.row(j)).for_each(|(o, v)| *o += weight * v);
                    }
                }
            },
        );
    }
    out
}
