//! One block of queries against the tiles of keys that it sees, with a running maximum and sum per row.

use super::{KEYS, Part, QUERIES, Sequence, at, load, pack, scale, transposed};
use crate::{
    attention::{AttentionOutputs, AttentionProblem},
    element::Element,
    native::{
        ahead::Ahead,
        gemm::{Lhs, Mode, Rhs, gemm},
        simd::{exp, reduce, vectorize},
        tile::{LINE, Shared, Tile},
    },
    sequences::Sequences,
};
use rayon::prelude::*;

/// Below any score, and finite: a row that has seen nothing yet has no NaN in `exp(max - max)`.
const NO_SCORE: f32 = -1e30;

pub(crate) fn forward<E: Element>(
    p: &AttentionProblem,
    sequences: &Sequences,
    q: &[E],
    k: &[E],
    v: &[E],
) -> AttentionOutputs<E> {
    let all = Sequence::all(p, sequences);
    let tiles = pack(p, &all, |token, rows, head| {
        let keys = load(k, token, rows, head, p.kv_heads, p.key_dim);
        (transposed(&keys), load(v, token, rows, head, p.kv_heads, p.value_dim))
    });
    let mut o = vec![E::default(); p.batch * p.time * p.heads * p.value_dim];
    let mut lse = vec![0.0; p.batch * p.heads * p.time];
    let (o_rows, lse_rows) = (Shared::new(&mut o), Shared::new(&mut lse));
    // The longest first: late blocks see the most keys.
    let mut tasks: Vec<_> = all
        .iter()
        .flat_map(|s| (0..s.blocks()).flat_map(move |block| (0..p.heads).map(move |head| (s, s.block(block), head))))
        .collect();
    tasks.sort_by_key(|(s, block, _)| std::cmp::Reverse(s.seen(block.end - 1, p.window).len()));
    let tasks = tasks.into_par_iter().with_max_len(1);
    tasks.for_each(|(sequence, block, head)| {
        let (rows, token) = (block.len(), sequence.queries.start + block.start);
        let (mut q, mut buffer) = (load(q, token, rows, head, p.heads, p.key_dim), Vec::new());
        scale(&mut q, p.scale);
        let q = Lhs::of(&q, 0, 0).packed(rows, p.key_dim, &mut buffer);
        let (mut state, mut ahead) = (Rows::new(rows, p.value_dim), Ahead::default());
        let index = |tile| (sequence.first_tile + tile) * p.kv_heads + head / (p.heads / p.kv_heads);
        let mut parts = Part::all(sequence, p.window, block).peekable();
        while let Some((tile, part)) = parts.next() {
            ahead.clear();
            if let Some(&(next, _)) = parts.peek() {
                let (keys, values) = &tiles[index(next)];
                ahead.slice(keys.data());
                ahead.slice(values.data());
            }
            state.add(&part, q, &tiles[index(tile)], &ahead);
        }
        state.normalise(rows);
        state.o.store(&o_rows, at(token, head, p.heads, p.value_dim), rows);
        let first = (token / p.time * p.heads + head) * p.time + token % p.time;
        // Safety: each block of a head is one task, and writes its own rows.
        let out = unsafe { lse_rows.slice_mut(first, rows) };
        for ((out, max), sum) in out.iter_mut().zip(state.max).zip(state.sum) {
            *out = max + sum.ln();
        }
    });
    AttentionOutputs { o, lse }
}

/// The running softmax of a block of queries.
struct Rows {
    scores: Tile,
    /// The sum of `exp(score - max) v` so far.
    o: Tile,
    max: [f32; QUERIES],
    sum: [f32; QUERIES],
}

impl Rows {
    fn new(rows: usize, value_dim: usize) -> Self {
        Self {
            scores: Tile::new(rows, KEYS),
            o: Tile::new(rows, value_dim),
            max: [NO_SCORE; QUERIES],
            sum: [0.0; QUERIES],
        }
    }

    /// Another part of the keys and values for scaled queries.
    fn add(&mut self, part: &Part, q: Lhs, (keys, values): &(Tile, Tile), ahead: &Ahead) {
        let (key_dim, value_dim, start) = (keys.rows(), self.o.cols(), part.start);
        for (rows, end) in part.runs() {
            let size = [rows.len(), end - start, key_dim];
            let keys = Rhs::from((keys, 0, start)).asking(ahead);
            gemm(Mode::Set, size, q.below(rows.start), keys, (&mut self.scores, rows.start, start));
        }
        part.mask(&mut self.scores);
        self.softmax(part);
        for (rows, end) in part.runs() {
            let (size, weights) = ([rows.len(), value_dim, end - start], Lhs::of(&self.scores, rows.start, start));
            let values = Rhs::from((values, start, 0)).asking(ahead);
            gemm(Mode::Add, size, weights, values, (&mut self.o, rows.start, 0));
        }
    }

    /// Turns scores into weights relative to the new maximum, and the earlier sums to it.
    fn softmax(&mut self, part: &Part) {
        vectorize(
            #[inline(always)]
            || {
                for i in 0..part.rows() {
                    let row = self.scores.row_mut(i);
                    let (row, _) = row[part.padded()].as_chunks_mut::<LINE>();
                    let mut lanes = [self.max[i]; LINE];
                    for x in row.iter() {
                        for (m, &x) in lanes.iter_mut().zip(x) {
                            *m = if x > *m { x } else { *m };
                        }
                    }
                    let max = reduce(lanes, |a, b| if b > a { b } else { a });
                    let mut sums = [0.0; LINE];
                    for x in row {
                        for (s, x) in sums.iter_mut().zip(x) {
                            *x = exp(*x - max);
                            *s += *x;
                        }
                    }
                    let fade = exp(self.max[i] - max);
                    self.sum[i] = self.sum[i] * fade + reduce(sums, |x, y| x + y);
                    self.max[i] = max;
                    if fade != 1.0 {
                        self.o.row_mut(i).iter_mut().for_each(|x| *x *= fade);
                    }
                }
            },
        );
    }

    fn normalise(&mut self, rows: usize) {
        for i in 0..rows {
            let factor = 1.0 / self.sum[i];
            self.o.row_mut(i).iter_mut().for_each(|x| *x *= factor);
        }
    }
}
