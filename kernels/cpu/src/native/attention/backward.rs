//! Gradients: a task goes over the blocks of queries of all heads of a group, sums `dk` and `dv` over them, and owns
//! the `dq` of its blocks. Where there are too few heads for the threads, the blocks are dealt out to several tasks
//! and their sums are added in order.

use super::{KEYS, Part, QUERIES, Sequence, at, load, pack, scale, transposed};
use crate::{
    attention::{AttentionGradients, AttentionOutputs, AttentionProblem},
    element::Element,
    native::{
        ahead::Ahead,
        gemm::{Lhs, Mode, Rhs, gemm},
        matrix::rows::dot_rows,
        simd::{exp, vectorize},
        tile::{Shared, Tile},
    },
    sequences::Sequences,
};
use rayon::prelude::*;

/// A tile of keys in the orientations of the three products that read it.
struct KeyTile {
    k: Tile,
    k_transposed: Tile,
    v_transposed: Tile,
    /// Whether all of it is.
    finite: bool,
}

/// The sums of `dk` and `dv` over a tile.
type Sums = Vec<(Tile, Tile)>;

pub(crate) fn backward<E: Element>(
    p: &AttentionProblem,
    sequences: &Sequences,
    q: &[E],
    k: &[E],
    v: &[E],
    outputs: &AttentionOutputs<E>,
    do_: &[E],
) -> AttentionGradients<E> {
    let all = Sequence::all(p, sequences);
    let tiles = pack(p, &all, |token, rows, head| {
        let k = load(k, token, rows, head, p.kv_heads, p.key_dim);
        let v = load(v, token, rows, head, p.kv_heads, p.value_dim);
        let finite = k.is_finite(rows) && v.is_finite(rows);
        KeyTile { k_transposed: transposed(&k), v_transposed: transposed(&v), k, finite }
    });
    let (mut dq, mut dk, mut dv) =
        (vec![E::default(); q.len()], vec![E::default(); k.len()], vec![E::default(); v.len()]);
    let (dq_rows, dk_rows, dv_rows) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    let parts = parts(all.len() * p.kv_heads);
    let groups = (0..all.len() * p.kv_heads).into_par_iter().with_max_len(1);
    groups.for_each(|group| {
        let (sequence, kv_head) = (&all[group / p.kv_heads], group % p.kv_heads);
        let run = |part: usize| {
            let mut task = Task { p, sequence, kv_head, q, outputs, do_, tiles: &tiles, dq: &dq_rows, sums: vec![] };
            task.run(part, parts);
            task.sums
        };
        let mut sums = if parts == 1 {
            run(0)
        } else {
            let sums: Vec<Sums> = (0..parts).into_par_iter().with_max_len(1).map(run).collect();
            sums.into_iter().reduce(add).unwrap_or_default()
        };
        for (tile, (dk, dv)) in sums.iter_mut().enumerate() {
            let token = sequence.keys.start + tile * KEYS;
            dk.store(&dk_rows, at(token, kv_head, p.kv_heads, p.key_dim), dk.rows());
            dv.store(&dv_rows, at(token, kv_head, p.kv_heads, p.value_dim), dv.rows());
        }
    });
    AttentionGradients { dq, dk, dv }
}

/// Into how many tasks the blocks of a group are dealt: one, if the groups occupy the threads evenly.
fn parts(groups: usize) -> usize {
    let threads = rayon::current_num_threads();
    if groups.is_multiple_of(threads) || groups >= 4 * threads { 1 } else { (2 * threads).div_ceil(groups) }
}

fn add(mut into: Sums, from: Sums) -> Sums {
    for ((dk, dv), (other_dk, other_dv)) in into.iter_mut().zip(&from) {
        for (x, y) in [(dk, other_dk), (dv, other_dv)] {
            x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += y);
        }
    }
    into
}

struct Task<'a, E> {
    p: &'a AttentionProblem,
    sequence: &'a Sequence,
    kv_head: usize,
    q: &'a [E],
    outputs: &'a AttentionOutputs<E>,
    do_: &'a [E],
    tiles: &'a [KeyTile],
    dq: &'a Shared<E>,
    sums: Sums,
}

impl<E: Element> Task<'_, E> {
    /// Every `parts`-th block of queries, from `part` on, of all heads of the group.
    fn run(&mut self, part: usize, parts: usize) {
        let (p, sequence) = (self.p, self.sequence);
        self.sums = (0..sequence.tiles())
            .map(|tile| {
                let rows = KEYS.min(sequence.keys.len() - tile * KEYS);
                (Tile::new(rows, p.key_dim), Tile::new(rows, p.value_dim))
            })
            .collect();
        let group = p.heads / p.kv_heads;
        let (mut weights, mut d_scores) = (Tile::new(QUERIES, KEYS), Tile::new(QUERIES, KEYS));
        for item in (part..group * sequence.blocks()).step_by(parts) {
            self.block(self.kv_head * group + item % group, item / group, &mut weights, &mut d_scores);
        }
    }

    fn block(&mut self, head: usize, block: usize, weights: &mut Tile, d_scores: &mut Tile) {
        let (p, sequence) = (self.p, self.sequence);
        let block = sequence.block(block);
        let (rows, token) = (block.len(), sequence.queries.start + block.start);
        let mut q = load(self.q, token, rows, head, p.heads, p.key_dim);
        scale(&mut q, p.scale);
        let do_ = load(self.do_, token, rows, head, p.heads, p.value_dim);
        let o = load(&self.outputs.o, token, rows, head, p.heads, p.value_dim);
        let first = (token / p.time * p.heads + head) * p.time + token % p.time;
        let lse = &self.outputs.lse[first..first + rows];
        let mut mean = [0.0; QUERIES];
        dot_rows(&o, &do_, &mut mean[..rows]);
        let finite = lse.iter().chain(&mean[..rows]).all(|x| x.is_finite()) && q.is_finite(rows) && do_.is_finite(rows);
        let mut dq = Tile::new(rows, p.key_dim);
        let (mut q_buffer, mut do_buffer) = (Vec::new(), Vec::new());
        let q_rows = Lhs::of(&q, 0, 0).packed(rows, p.key_dim, &mut q_buffer);
        let do_rows = Lhs::of(&do_, 0, 0).packed(rows, p.value_dim, &mut do_buffer);
        let mut ahead = Ahead::default();
        let index = |tile| (sequence.first_tile + tile) * p.kv_heads + self.kv_head;
        let mut parts = Part::all(sequence, p.window, block).peekable();
        while let Some((tile, part)) = parts.next() {
            ahead.clear();
            if let Some(&(next, _)) = parts.peek() {
                let (keys, (dk, dv)) = (&self.tiles[index(next)], &self.sums[next]);
                for tile in [&keys.k_transposed, &keys.v_transposed, dv, dk, &keys.k] {
                    ahead.slice(tile.data());
                }
            }
            let (keys, (dk, dv)) = (&self.tiles[index(tile)], &mut self.sums[tile]);
            let start = part.start;
            for (rows, end) in part.runs() {
                let (scores, row) = ([rows.len(), end - start, p.key_dim], rows.start);
                let k = Rhs::from((&keys.k_transposed, 0, start)).asking(&ahead);
                gemm(Mode::Set, scores, q_rows.below(row), k, (&mut *weights, row, start));
                let products = [rows.len(), end - start, p.value_dim];
                let out = (&mut *d_scores, row, start);
                let v = Rhs::from((&keys.v_transposed, 0, start)).asking(&ahead);
                gemm(Mode::Set, products, do_rows.below(row), v, out);
            }
            part.mask(weights, f32::NEG_INFINITY);
            part.mask(d_scores, 0.0);
            softmax(&part, lse, &mean, weights, d_scores);
            if !(part.all_seen() || finite && keys.finite) {
                // A weight of 0 hides nothing that is not finite: each row meets only what it sees.
                for row in 0..rows {
                    let seen = part.seen(row);
                    for (left, right, sum) in [(&*weights, &do_, &mut *dv), (&*d_scores, &q, &mut *dk)] {
                        let (size, left) = ([seen.len(), right.cols(), 1], Lhs::transposed(left, row, seen.start));
                        gemm(Mode::Add, size, left, (right, row, 0), (sum, seen.start, 0));
                    }
                    let (size, d_scores) = ([1, p.key_dim, seen.len()], Lhs::of(d_scores, row, seen.start));
                    gemm(Mode::Add, size, d_scores, (&keys.k, seen.start, 0), (&mut dq, row, 0));
                }
                continue;
            }
            for (cols, row) in part.column_runs() {
                for (left, right, sum) in [(&*weights, &do_, &mut *dv), (&*d_scores, &q, &mut *dk)] {
                    let (size, left) = ([cols.len(), right.cols(), rows - row], Lhs::transposed(left, row, cols.start));
                    gemm(Mode::Add, size, left, Rhs::from((right, row, 0)).asking(&ahead), (sum, cols.start, 0));
                }
            }
            for (rows, end) in part.runs() {
                let d_scores = Lhs::of(d_scores, rows.start, start);
                let size = [rows.len(), p.key_dim, end - start];
                let k = Rhs::from((&keys.k, start, 0)).asking(&ahead);
                gemm(Mode::Add, size, d_scores, k, (&mut dq, rows.start, 0));
            }
        }
        scale(&mut dq, p.scale);
        dq.store(self.dq, at(token, head, p.heads, p.key_dim), rows);
    }
}

/// `P = exp(S - lse)` in place of the scores, `dS = P (dP - sum(P dP))` in place of `dP`.
fn softmax(part: &Part, lse: &[f32], mean: &[f32], weights: &mut Tile, d_scores: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..part.rows() {
                let w = &mut weights.row_mut(i)[part.padded()];
                let d = &mut d_scores.row_mut(i)[part.padded()];
                let (lse, mean) = (lse[i], mean[i]);
                for (w, d) in w.iter_mut().zip(d) {
                    *w = exp(*w - lse);
                    *d = *w * (*d - mean);
                }
            }
        },
    );
}
