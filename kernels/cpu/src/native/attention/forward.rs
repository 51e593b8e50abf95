//! One block of queries against the tiles of keys that it sees, with a running maximum and sum per row.

use super::{KEYS, Part, QUERIES, Sequence, at, load, origin, pack, scale, transposed};
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
use std::ops::Range;

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
        let values = load(v, token, rows, head, p.kv_heads, p.value_dim);
        KeyTile { k_transposed: transposed(&keys), finite: values.is_finite(rows), v: values }
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
                let KeyTile { k_transposed, v, .. } = &tiles[index(next)];
                ahead.slice(k_transposed.data());
                ahead.slice(v.data());
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

/// A tile of keys and values, as the two products read them.
struct KeyTile {
    k_transposed: Tile,
    v: Tile,
    /// Whether the values are.
    finite: bool,
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
            max: [f32::NEG_INFINITY; QUERIES],
            sum: [0.0; QUERIES],
        }
    }

    /// Another part of the keys and values for scaled queries.
    fn add(&mut self, part: &Part, q: Lhs, keys: &KeyTile, ahead: &Ahead) {
        let (key_dim, start) = (keys.k_transposed.rows(), part.start);
        for (rows, end) in part.runs() {
            let size = [rows.len(), end - start, key_dim];
            let k = Rhs::from((&keys.k_transposed, 0, start)).asking(ahead);
            gemm(Mode::Set, size, q.below(rows.start), k, (&mut self.scores, rows.start, start));
        }
        part.mask(&mut self.scores, f32::NEG_INFINITY);
        self.softmax(part);
        if keys.finite || part.all_seen() {
            part.runs().for_each(|(rows, end)| self.add_values(rows, start..end, &keys.v, ahead));
        } else {
            // A weight of 0 does not hide an infinite value: each row meets only what it sees.
            (0..part.rows()).for_each(|row| self.add_values(row..row + 1, part.seen(row), &keys.v, ahead));
        }
    }

    /// `o += weights v` for these rows and the keys in these columns.
    fn add_values(&mut self, rows: Range<usize>, cols: Range<usize>, v: &Tile, ahead: &Ahead) {
        let (size, weights) = ([rows.len(), v.cols(), cols.len()], Lhs::of(&self.scores, rows.start, cols.start));
        let values = Rhs::from((v, cols.start, 0)).asking(ahead);
        gemm(Mode::Add, size, weights, values, (&mut self.o, rows.start, 0));
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
                    let origin = origin(max);
                    let mut sums = [0.0; LINE];
                    for x in row {
                        for (s, x) in sums.iter_mut().zip(x) {
                            *x = exp(*x - origin);
                            *s += *x;
                        }
                    }
                    let fade = exp(self.max[i] - origin);
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
