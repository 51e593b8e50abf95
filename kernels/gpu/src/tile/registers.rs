//! Products in the registers of units, in f32.

use cubecl::prelude::*;

use super::form::{Corner, Form, Mode};
use super::sums::Spread;
use super::{Tile, unit, units};

#[cube]
pub(super) fn to_tile<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] side: usize,
) {
    // The rows of a block lie `rows` apart, its columns `cols`: neighbouring units read neighbouring columns.
    let (rows, cols) = comptime!((form.m / side, form.n / side));
    for block in range_stepped(unit(), rows * cols, units()) {
        let (row, col) = (block / cols, block % cols);
        let mut sum = Array::<f32>::new(comptime!(side * side));
        #[unroll]
        for i in 0..comptime!(side * side) {
            sum[i] = f32::new(0.0);
        }
        for k in 0..form.depth {
            let mut x = Array::<f32>::new(side);
            let mut y = Array::<f32>::new(side);
            #[unroll]
            for i in 0..side {
                let (r, c) = (row + i * rows, col + i * cols);
                if comptime!(form.a_transposed) {
                    x[i] = a.get(corner.a_row + k, corner.a_col + r);
                } else {
                    x[i] = a.get(corner.a_row + r, corner.a_col + k);
                }
                if comptime!(form.b_transposed) {
                    y[i] = b.get(corner.b_row + c, k);
                } else {
                    y[i] = b.get(corner.b_row + k, c);
                }
            }
            #[unroll]
            for i in 0..side {
                #[unroll]
                for j in 0..side {
                    sum[i * side + j] += x[i] * y[j];
                }
            }
        }
        #[unroll]
        for i in 0..side {
            #[unroll]
            for j in 0..side {
                let at = out.at(corner.out_row + row + i * rows, col + j * cols);
                match comptime!(form.mode) {
                    Mode::Set => out.data[at] = sum[i * side + j],
                    Mode::Add => out.data[at] += sum[i * side + j],
                    Mode::SetNegative => out.data[at] = -sum[i * side + j],
                }
            }
        }
    }
}

/// Adds `a b` to what each unit holds of it.
#[cube]
pub(super) fn add<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    sums: &mut Array<Vector<f32, Const<2>>>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] side: usize,
    #[comptime] spread: Spread,
) {
    let (rows, cols) = comptime!((spread.rows / side, spread.cols / side));
    let first = unit();
    #[unroll]
    for n in 0..comptime!(spread.parts()) {
        let block = first + n * spread.units;
        let (row, col) = (block / cols, block % cols);
        if comptime!(spread.even()) || block < rows * cols {
            for k in 0..form.depth {
                let mut x = Array::<f32>::new(side);
                let mut y = Array::<Vector<f32, Const<2>>>::new(comptime!(side / 2));
                #[unroll]
                for i in 0..side {
                    let (mut r, c) = (row + i * rows, col + i * cols);
                    let mut inside = true.runtime();
                    if comptime!(form.m < spread.rows) {
                        inside = r >= corner.out_row && r < corner.out_row + form.m;
                        r = select(inside, r - corner.out_row, 0usize.runtime());
                    }
                    let left = if comptime!(form.a_transposed) {
                        a.get(corner.a_row + k, corner.a_col + r)
                    } else {
                        a.get(corner.a_row + r, corner.a_col + k)
                    };
                    x[i] = select(inside, left, f32::new(0.0));
                    let value = if comptime!(form.b_transposed) {
                        b.get(corner.b_row + c, k)
                    } else {
                        b.get(corner.b_row + k, c)
                    };
                    let mut pair = y[comptime!(i / 2)];
                    pair.insert(comptime!(i % 2), value);
                    y[comptime!(i / 2)] = pair;
                }
                #[unroll]
                for i in 0..side {
                    #[unroll]
                    for j in 0..comptime!(side / 2) {
                        let at = comptime!((n * side + i) * (side / 2) + j);
                        sums[at] += Vector::new(x[i]) * y[j];
                    }
                }
            }
        }
    }
}
