//! Lower triangles: what pairs of a chunk's tokens have in common, times the decay between them. Scalar gates, or none.

use cubecl::prelude::*;

use super::super::tile::{BLOCK, Sums, Tile, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, exponential};

/// `p_ij *= scale e^{c_i - c_j}` for `i >= j`, and zero for all others; with the delta rule `r_ij *= factor e^{c_i - c_j}`
/// for `i > j`. In registers, on [`super::super::tile::Engine::Mma`], whose blocks have the rows of a sub-block.
///
/// Between sub-blocks the exponent is a sum over the tokens between. Within one it is the difference of two sums of at
/// most 16 gates: where gates are as strong as they count, it errs by less than the 16-bit operand that it goes into.
#[cube]
pub(crate) fn weigh_lower(
    p: &mut Sums,
    scale: f32,
    r: &mut Sums,
    factor: f32,
    decay: &Decay,
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
            if p.place(unit, first).1 / BLOCK <= segment {
                #[unroll]
                for j in first..comptime!(first + part / blocks) {
                    let place = p.place(unit, j);
                    let (row, col) = place;
                    let mut weight = f32::new(1.0);
                    if comptime!(b.gate == GateKind::Head) {
                        weight = exponential(decay.so_far[row] + until(decay, col, segment, b), b);
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

/// The log-decay after token `j` to the start of a sub-block; if that is its own, what undoes the decay since.
#[cube]
fn until(decay: &Decay, j: usize, segment: usize, #[comptime] b: Blueprint) -> f32 {
    let own = j / BLOCK;
    let mut sum = select(own == segment, -decay.so_far[j], decay.later[j]);
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
        if comptime!(b.gate == GateKind::Head) {
            if j < first {
                sum = decay.later[j];
            }
            for s in 1..comptime!(b.segments()) {
                sum += select(s > j / BLOCK && s < segment, decay.totals[s], f32::new(0.0));
            }
        }
        for i in first..first + BLOCK {
            let mut weight = f32::new(1.0);
            if comptime!(b.gate == GateKind::Head) {
                if i > j {
                    sum += decay.g[i];
                }
                weight = exponential(sum, b);
            }
            p.set(i, j, select(i >= j, p.get(i, j) * weight, f32::new(0.0)));
            if comptime!(b.delta) {
                r.set(i, j, select(i > j, r.get(i, j) * weight, f32::new(0.0)));
            }
        }
    }
}
