//! Rows of scores and their exponentials, block of keys by block of keys: with every block the maximum so far grows, and what
//! was summed shrinks.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::place::{Block, Sizes, all_see, sees};
use crate::tile::{Sums, Tile, exp2, exponential, unit};

/// The largest score of a row that has seen none: no score but minus infinity is below it, and differences from it are numbers.
pub(crate) const LOWEST: f32 = f32::MIN;

/// Scales products of queries and keys, and hides pairs that do not meet: those of few blocks.
#[cube]
pub(crate) fn scale_scores(scores: &mut Sums, queries: usize, keys: usize, sizes: &Sizes, #[comptime] b: Blueprint) {
    if all_see(queries, keys, sizes, b.chunk) {
        scale_pairs(scores, queries, keys, sizes, false, b);
    } else {
        scale_pairs(scores, queries, keys, sizes, true, b);
    }
}

#[cube]
fn scale_pairs(
    scores: &mut Sums,
    queries: usize,
    keys: usize,
    sizes: &Sizes,
    #[comptime] hide: bool,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    let factor = sizes.scale * comptime!(b.engine.log_scale());
    #[unroll]
    for j in 0..comptime!(scores.spread.len()) {
        if scores.has(unit, j) {
            let place = scores.place(unit, j);
            let mut score = scores.get(place, j) * factor;
            if comptime!(hide) {
                score = select(sees(queries + place.0, keys + place.1, sizes), score, sizes.hidden);
            }
            scores.set(place, j, score);
        }
    }
}

/// Multiplies, or divides, rows by numbers in shared memory or of this unit's own rows.
#[cube]
fn scale_rows(
    sums: &mut Sums,
    by_row: &Shared<[f32]>,
    own: &Array<f32>,
    #[comptime] divide: bool,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(sums.spread.len()) {
        if sums.has(unit, j) {
            let place = sums.place(unit, j);
            let by = if comptime!(b.by_plane()) { own[sums.row_of(comptime!(j / 2))] } else { by_row[place.0] };
            let value = sums.get(place, j);
            sums.set(place, j, if comptime!(divide) { value / by } else { value * by });
        }
    }
}

/// Of each row the maximum and the sum of exponentials so far, and by what the last block made the latter shrink. In shared
/// memory; or, where [`Blueprint::by_plane`], of the rows of this unit in registers.
#[derive(CubeType)]
pub(crate) struct Softmax {
    most: Shared<[f32]>,
    sum: Shared<[f32]>,
    shrink: Shared<[f32]>,
    /// By unit, what its share of a row gives.
    partial: Shared<[f32]>,
    own: OwnRows,
}

#[derive(CubeType)]
struct OwnRows {
    most: Array<f32>,
    sum: Array<f32>,
    shrink: Array<f32>,
}

#[cube]
impl Softmax {
    pub fn new(#[comptime] b: Blueprint) -> Softmax {
        let (rows, units) = comptime!(if b.by_plane() { (1, 1) } else { (b.chunk, b.units) });
        let own = comptime!(if b.by_plane() { 2 * b.spread(b.chunk).parts() } else { 1 });
        let mut softmax = Softmax {
            most: Shared::new_slice(rows),
            sum: Shared::new_slice(rows),
            shrink: Shared::new_slice(rows),
            partial: Shared::new_slice(units),
            own: OwnRows { most: Array::new(own), sum: Array::new(own), shrink: Array::new(own) },
        };
        #[unroll]
        for n in 0..own {
            softmax.own.most[n] = f32::new(LOWEST);
            softmax.own.sum[n] = f32::new(0.0);
        }
        if unit() < rows {
            softmax.most[unit()] = f32::new(LOWEST);
            softmax.sum[unit()] = f32::new(0.0);
        }
        softmax
    }

    /// Takes a block of scores, and leaves exponentials in `weights`. Synchronises before it ends.
    pub fn take<E: Float>(
        &mut self,
        scores: &mut Sums,
        tile: &mut Tile<f32>,
        weights: &mut Tile<E>,
        #[comptime] b: Blueprint,
    ) {
        if comptime!(b.by_plane()) {
            self.take_rows(scores);
            scores.put::<E>(weights);
            sync_cube();
        } else {
            scores.put::<f32>(tile);
            sync_cube();
            self.take_shares::<E>(&*tile, weights, b);
        }
    }

    /// The elements of a row are in four units.
    fn take_rows(&mut self, scores: &mut Sums) {
        let rows = scores.rows();
        let mut most = Array::<f32>::new(rows);
        let mut sum = Array::<f32>::new(rows);
        #[unroll]
        for n in 0..rows {
            most[n] = self.own.most[n];
            sum[n] = f32::new(0.0);
        }
        let pairs = comptime!(scores.spread.len() / 2);
        #[unroll]
        for i in 0..pairs {
            let (row, pair) = (scores.row_of(i), scores.pair(i));
            most[row] = most[row].max(pair.extract(0usize).max(pair.extract(1usize)));
        }
        #[unroll]
        for n in 0..rows {
            let half = most[n].max(plane_shuffle_xor(most[n], 1u32));
            let all = half.max(plane_shuffle_xor(half, 2u32));
            self.own.shrink[n] = exp2(self.own.most[n] - all);
            self.own.most[n] = all;
        }
        #[unroll]
        for i in 0..pairs {
            let (row, pair) = (scores.row_of(i), scores.pair(i));
            let mut weights = Vector::<f32, Const<2>>::new(f32::new(0.0));
            #[unroll]
            for j in 0..2usize {
                weights.insert(j, exp2(pair.extract(j) - self.own.most[row]));
                sum[row] += weights.extract(j);
            }
            scores.set_pair(i, weights);
        }
        #[unroll]
        for n in 0..rows {
            self.own.sum[n] = self.own.sum[n] * self.own.shrink[n] + scores.over_row(sum[n]);
        }
    }

    /// Units take a row and a share of its columns each.
    fn take_shares<E: Float>(&mut self, scores: &Tile<f32>, weights: &mut Tile<E>, #[comptime] b: Blueprint) {
        let (row, share, shares) = (unit() % b.chunk, unit() / b.chunk, comptime!(b.shares()));
        let mut most = f32::new(LOWEST);
        for col in range_stepped(share, b.chunk, shares) {
            most = most.max(scores.get(row, col));
        }
        self.partial[unit()] = most;
        sync_cube();
        let before = self.most[row];
        let mut most = before;
        #[unroll]
        for other in 0..shares {
            most = most.max(self.partial[other * b.chunk + row]);
        }
        let mut sum = f32::new(0.0);
        for col in range_stepped(share, b.chunk, shares) {
            let weight = exponential(scores.get(row, col) - most, b.engine);
            sum += weight;
            weights.set(row, col, weight);
        }
        sync_cube();
        self.partial[unit()] = sum;
        sync_cube();
        if share == 0 {
            let mut sum = f32::new(0.0);
            #[unroll]
            for other in 0..shares {
                sum += self.partial[other * b.chunk + row];
            }
            let shrink = exponential(before - most, b.engine);
            self.sum[row] = self.sum[row] * shrink + sum;
            self.shrink[row] = shrink;
            self.most[row] = most;
        }
        sync_cube();
    }

    /// `sums *=` what the last block made their rows shrink by.
    pub fn shrink(&self, sums: &mut Sums, #[comptime] b: Blueprint) {
        scale_rows(sums, &self.shrink, &self.own.shrink, false, b);
    }

    /// `sums /=` the sum of their row's exponentials.
    pub fn divide(&self, sums: &mut Sums, #[comptime] b: Blueprint) {
        scale_rows(sums, &self.sum, &self.own.sum, true, b);
    }

    /// Writes the natural logarithm of each row's sum. After [`Softmax::take`], whose scores these are.
    pub fn leave(&self, scores: &Sums, out: &mut [f32], block: &Block, at: usize, #[comptime] b: Blueprint) {
        let unlog = comptime!(1.0 / b.engine.log_scale());
        if comptime!(b.by_plane()) {
            #[unroll]
            for n in 0..scores.rows() {
                let row = scores.first_of_row(unit(), n).0;
                if unit() % 4 < 1 && row < block.rows {
                    out[at + row] = self.own.most[n] * unlog + self.own.sum[n].ln();
                }
            }
        } else {
            let row = unit();
            if row < block.rows {
                out[at + row] = self.most[row] * unlog + self.sum[row].ln();
            }
        }
    }
}
