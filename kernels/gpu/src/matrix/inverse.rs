//! The inverse of a chunk's system, `(I + L)^-1` for strictly lower-triangular `L`: forward substitution, which stays
//! accurate when keys are nearly equal, in the sub-blocks on the diagonal. Then two solved blocks side by side make one of
//! twice the size: below its diagonal stands `-T_11 (L_10 T_00)`.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use crate::tile::{BLOCK, Tile, unit, units, zero};

/// `t = (I + l)^-1`. Synchronises.
#[cube]
pub(super) fn invert(l: &Tile<f32>, t: &mut Tile<f32>, #[comptime] b: Blueprint) {
    zero(t, b.units);
    sync_cube();
    for j in range_stepped(unit(), b.chunk, units()) {
        let first = (j / BLOCK) * BLOCK;
        let x = column(l, first, j);
        #[unroll]
        for i in 0..BLOCK {
            t.set(first + i, j, x[i]);
        }
    }
    sync_cube();
    let side = comptime!((b.chunk / 2).max(1));
    let mut w = Tile::<f32>::new(side, side, comptime!(b.padding()));
    #[unroll]
    for level in 0..comptime!(b.segments().ilog2()) {
        let half = comptime!(BLOCK << level);
        let columns = comptime!(half / COLUMNS);
        let items = comptime!(b.chunk / 2 * columns);
        for item in range_stepped(unit(), items, units()) {
            let (row, col) = (item / columns, item % columns * COLUMNS);
            let first = row / half * (2 * half);
            let (left, right) = (l.from(l.at(first + half + row % half, first)), t.from(t.at(first, first + col)));
            let sum = row_times(left, right, 1.0, half, t.stride, b);
            // The blocks of a level lie below each other, so that they fit.
            w.set_many::<f32, Const<COLUMNS>>(row, col, sum);
        }
        sync_cube();
        for item in range_stepped(unit(), items, units()) {
            let (row, col) = (item / columns, item % columns * COLUMNS);
            let (block, first) = (row / half * half, row / half * (2 * half));
            let (left, right) = (t.from(t.at(first + half + row % half, first + half)), w.from(w.at(block, col)));
            let sum = row_times(left, right, -1.0, half, w.stride, b);
            t.set_many::<f32, Const<COLUMNS>>(first + half + row % half, first + col, sum);
        }
        sync_cube();
    }
}

/// Column `j` of the inverse of the sub-block on the diagonal that begins at token `first`.
#[cube]
fn column(l: &Tile<f32>, first: usize, j: usize) -> Array<f32> {
    let mut x = Array::<f32>::new(BLOCK);
    #[unroll]
    for i in 0..BLOCK {
        let mut sum = f32::new(0.0);
        #[unroll]
        for earlier in 0..i {
            sum += l.get(first + i, first + earlier) * x[earlier];
        }
        x[i] = -sum;
        if first + i < j {
            x[i] = f32::new(0.0);
        }
        if first + i == j {
            x[i] = f32::new(1.0);
        }
    }
    x
}

/// Four columns of `sum_k factor left_k right_k`, where the rows of `right` are `stride` apart.
#[cube]
fn row_times(
    left: &[f32],
    right: &[f32],
    factor: f32,
    #[comptime] depth: usize,
    #[comptime] stride: usize,
    #[comptime] b: Blueprint,
) -> Vector<f32, Const<COLUMNS>> {
    let mut sum = Vector::<f32, Const<COLUMNS>>::new(f32::new(0.0));
    #[unroll(!b.engine.in_software())]
    for k in 0..depth {
        let mut values = Vector::<f32, Const<COLUMNS>>::new(f32::new(0.0));
        #[unroll]
        for j in 0..COLUMNS {
            values.insert(j, right[k * stride + j]);
        }
        sum += Vector::new(left[k]) * values;
    }
    sum * Vector::new(factor)
}

/// Columns of a product that a unit computes at a time.
const COLUMNS: usize = 4;
