//! Lower triangles: what pairs of a chunk's tokens have in common, times the decay between them. Scalar gates, or none.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::decay::Decay;
use crate::tile::{BLOCK, Sums, Tile, exponential, unit, units};

/// The log-decay between the tokens of each sub-block, `[chunk, 16]`, where scores are weighed in registers.
#[derive(CubeType)]
pub(crate) struct Between {
    sums: Tile<f32>,
}

#[cube]
impl Between {
    /// If it is `wanted`.
    pub fn new(#[comptime] wanted: bool, #[comptime] b: Blueprint) -> Between {
        let (rows, cols) = comptime!(if wanted && b.sums_between() { (b.chunk, BLOCK) } else { (1, 1) });
        Between { sums: Tile::<f32>::new(rows, cols, comptime!(b.padding())) }
    }

    /// Adds up the gates that a chunk has begun with. They are there after the next barrier.
    pub fn load(&mut self, decay: &Decay, #[comptime] b: Blueprint) {
        if comptime!(b.sums_between()) {
            let i = unit();
            if i < b.chunk {
                let (first, own) = (i / BLOCK * BLOCK, i % BLOCK);
                let mut sum = f32::new(0.0);
                #[unroll]
                for back in 0..BLOCK {
                    let j = comptime!(BLOCK - 1 - back);
                    self.sums.set(i, j, sum);
                    sum += select(j.runtime() <= own, decay.g[first + j], f32::new(0.0));
                }
            }
        }
    }
}

/// `p_ij *= scale e^{c_i - c_j}` for `i >= j`, and zero for all others; with the delta rule `r_ij *= factor e^{c_i - c_j}`
/// for `i > j`. In registers, on [`crate::tile::Engine::Mma`], whose blocks have the rows of a sub-block.
#[cube]
pub(crate) fn weigh_lower(
    p: &mut Sums,
    scale: f32,
    r: &mut Sums,
    factor: f32,
    decay: &Decay,
    between: &Between,
    #[comptime] b: Blueprint,
) {
    comptime!(assert!(p.spread.even(), "each unit has as many elements of a square"));
    let unit = unit();
    let (part, blocks) = comptime!((p.spread.part(), p.spread.strip()));
    #[unroll]
    for n in 0..comptime!(p.spread.parts()) {
        let segment = p.place(unit, comptime!(n * part)).0 / BLOCK;
        #[unroll]
        for block in 0..blocks {
            let first = comptime!(n * part + block * (part / blocks));
            // All units of a plane have their elements in one block of 16 x 8.
            let own = p.place(unit, first).1 / BLOCK;
            if own <= segment {
                #[unroll]
                for j in first..comptime!(first + part / blocks) {
                    let place = p.place(unit, j);
                    let (row, col) = place;
                    let mut weight = f32::new(1.0);
                    if comptime!(b.gate == GateKind::HEAD) {
                        let near = between.sums.get(row, col % BLOCK);
                        let far = decay.so_far[row] + until(decay, col, segment, b);
                        weight = exponential(select(own == segment, near, far), b.engine);
                    }
                    p.set(place, j, select(row >= col, p.get(place, j) * weight * scale, f32::new(0.0)));
                    if comptime!(b.delta) {
                        r.set(place, j, select(row > col, r.get(place, j) * weight * factor, f32::new(0.0)));
                    }
                }
            } else {
                #[unroll]
                for j in first..comptime!(first + part / blocks) {
                    let place = p.place(unit, j);
                    p.set(place, j, f32::new(0.0));
                    if comptime!(b.delta) {
                        r.set(place, j, f32::new(0.0));
                    }
                }
            }
        }
    }
}

/// The log-decay after token `j` to the start of a later sub-block.
#[cube]
fn until(decay: &Decay, j: usize, segment: usize, #[comptime] b: Blueprint) -> f32 {
    let own = j / BLOCK;
    let mut sum = decay.later[j];
    #[unroll]
    for s in 1..comptime!(b.segments() - 1) {
        sum += select(s.runtime() > own && s.runtime() < segment, decay.totals[s], f32::new(0.0));
    }
    sum
}

/// `p_ij *= e^{c_i - c_j}` for `i >= j`, and zero above the diagonal; with the delta rule the same of `r`, which is zero
/// from the diagonal on. Scalar gates, or none.
#[cube]
pub(crate) fn multiply_lower(p: &mut Tile<f32>, r: &mut Tile<f32>, decay: &Decay, #[comptime] b: Blueprint) {
    for item in range_stepped(unit(), comptime!(b.segments() * b.chunk), units()) {
        let (segment, j) = (item / b.chunk, item % b.chunk);
        let first = segment * BLOCK;
        let mut sum = f32::new(0.0);
        if comptime!(b.gate == GateKind::HEAD) {
            if j < first {
                sum = decay.later[j];
            }
            for s in 1..comptime!(b.segments()) {
                sum += select(s > j / BLOCK && s < segment, decay.totals[s], f32::new(0.0));
            }
        }
        for i in first..first + BLOCK {
            let mut weight = f32::new(1.0);
            if comptime!(b.gate == GateKind::HEAD) {
                if i > j {
                    sum += decay.g[i];
                }
                weight = exponential(sum, b.engine);
            }
            p.set(i, j, select(i >= j, p.get(i, j) * weight, f32::new(0.0)));
            if comptime!(b.delta) {
                r.set(i, j, select(i > j, r.get(i, j) * weight, f32::new(0.0)));
            }
        }
    }
}
