//! Products by CUDA's `mma.sync`, 16 x 8 x 16, with operands of 16 bits, fetched from shared memory by `ldmatrix`.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::form::{Corner, Form};
use super::sums::{NARROW, Spread};
use super::{BLOCK, Tile, WARP, unit};

/// Adds `a b` to what each unit holds of it. Lane `l` holds of a block of 16 x 8 the rows `l / 4` and `l / 4 + 8`, of each
/// the columns `2 (l % 4)` and the next.
#[cube]
pub(super) fn add<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    sums: &mut Array<Vector<f32, Const<2>>>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] spread: Spread,
) {
    let (strip, across) = comptime!((spread.strip(), spread.cols / NARROW / spread.strip()));
    let (plane, lane) = (unit() / WARP, unit() % WARP);
    #[unroll]
    for part in 0..comptime!(spread.parts()) {
        let at = plane + comptime!(part * (spread.units / WARP));
        let (row, col) = (at / across * BLOCK, at % across * comptime!(strip * NARROW));
        let mut here = true.runtime();
        if comptime!(!spread.even()) {
            here = at < comptime!(spread.all());
        }
        if comptime!(form.m < spread.rows) {
            here = here && row >= corner.out_row && row < corner.out_row + form.m;
        }
        let whole = comptime!(spread.even() && form.m == spread.rows);
        if comptime!(whole) {
            strips::<A, B>(a, b, sums, corner, row, col, lane, comptime!(part * strip), strip, form);
        } else {
            if here {
                let row = if comptime!(form.m < spread.rows) { row - corner.out_row } else { row };
                strips::<A, B>(a, b, sums, corner, row, col, lane, comptime!(part * strip), strip, form);
            }
        }
    }
}

/// `strip` blocks side by side, the first at `(row, col)` of the product and `first` in `sums`.
#[cube]
fn strips<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    sums: &mut Array<Vector<f32, Const<2>>>,
    corner: &Corner,
    row: usize,
    col: usize,
    lane: usize,
    #[comptime] first: usize,
    #[comptime] strip: usize,
    #[comptime] form: Form,
) {
    let unit = MmaDefinition::<A, B, f32>::new(16usize, 8usize, 16usize);
    let (half, quarter, eight) = (lane / 16 * 8, lane / 8 % 2 * 8, lane % 8);
    // Each lane says where one row of four matrices of 8 x 8 begins; from one product to the next that moves by a number
    // that is known, which is part of the instruction.
    let x_at = if comptime!(form.a_transposed) {
        a.at(corner.a_row + eight + half, corner.a_col + row + quarter)
    } else {
        a.at(corner.a_row + row + lane % 16, corner.a_col + half)
    };
    let y_at = if comptime!(form.b_transposed) {
        b.at(corner.b_row + col + eight + half, quarter)
    } else {
        b.at(corner.b_row + lane % 16, col + half)
    };
    let (x_from, y_from) = (a.from(x_at), b.from(y_at));
    #[unroll]
    for step in 0..comptime!(form.depth / BLOCK) {
        let k = comptime!(step * BLOCK);
        let x_off = comptime!(if form.a_transposed { k * a.stride } else { k });
        let mut x = Array::<Vector<A, Const<2>>>::new(4usize);
        unit.load_matrix_inplace::<A, Const<2>>(
            &x_from[x_off..x_from.len()],
            &mut x,
            MatrixIdent::A,
            4usize,
            form.a_transposed,
        );
        #[unroll]
        for pair in 0..comptime!(strip.div_ceil(2)) {
            let count = comptime!((strip - 2 * pair).min(2));
            let n = comptime!(pair * BLOCK);
            let y_off = comptime!(if form.b_transposed { n * b.stride + k } else { k * b.stride + n });
            let mut y = Array::<Vector<B, Const<2>>>::new(comptime!(2 * count));
            unit.load_matrix_inplace::<B, Const<2>>(
                &y_from[y_off..y_from.len()],
                &mut y,
                MatrixIdent::B,
                comptime!(2 * count),
                comptime!(!form.b_transposed),
            );
            #[unroll]
            for j in 0..count {
                let mut operand = Array::<Vector<B, Const<2>>>::new(2usize);
                operand[0] = y[comptime!(2 * j)];
                operand[1] = y[comptime!(2 * j + 1)];
                let at = comptime!(2 * (first + 2 * pair + j));
                let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
                sum[0] = sums[at];
                sum[1] = sums[comptime!(at + 1)];
                let sum = unit.execute::<Const<2>, Const<2>, Const<2>>(&x, &operand, &sum);
                sums[at] = sum[0];
                sums[comptime!(at + 1)] = sum[1];
            }
        }
    }
}
