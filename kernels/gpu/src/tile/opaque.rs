//! Products on matrix units whose blocks are the driver's secret: sums go through shared memory.

use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::form::{Corner, Form, Mode};
use super::{BLOCK, Tile, unit, units};

#[cube]
pub(super) fn to_tile<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] plane: usize,
    #[comptime] tf32: bool,
) {
    let depth = comptime!(depth(tf32));
    comptime!(assert!(form.mode != Mode::SetNegative, "matrix units only add"));
    let (rows, cols) = comptime!((form.m / BLOCK, form.n / BLOCK));
    let (a_layout, b_layout) = comptime!((layout(form.a_transposed), layout(form.b_transposed)));
    let (a_stride, b_stride, out_stride) = comptime!((a.stride as u32, b.stride as u32, out.stride as u32));
    for block in range_stepped(unit() / plane, rows * cols, units() / plane) {
        let (row, col) = ((block / cols) * BLOCK, (block % cols) * BLOCK);
        let at = out.at(corner.out_row + row, col);
        let mut sum = cmma::Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            BLOCK,
            BLOCK,
            depth,
            MatrixLayout::Undefined,
            f32::new(0.0),
        );
        if comptime!(form.mode == Mode::Add) {
            cmma::load_with_layout(&mut sum, &out.data[at..out.data.len()], out_stride, MatrixLayout::RowMajor);
        }
        for k in range_stepped(0usize, form.depth, depth) {
            let x_at = if comptime!(form.a_transposed) {
                a.at(corner.a_row + k, corner.a_col + row)
            } else {
                a.at(corner.a_row + row, corner.a_col + k)
            };
            let y_at =
                if comptime!(form.b_transposed) { b.at(corner.b_row + col, k) } else { b.at(corner.b_row + k, col) };
            let x = cmma::Matrix::<A>::from_slice(
                MatrixIdent::A,
                BLOCK,
                BLOCK,
                depth,
                a_layout,
                &a.data[x_at..a.data.len()],
                a_stride,
            );
            let y = cmma::Matrix::<B>::from_slice(
                MatrixIdent::B,
                BLOCK,
                BLOCK,
                depth,
                b_layout,
                &b.data[y_at..b.data.len()],
                b_stride,
            );
            cmma::execute(&x, &y, &sum, &sum);
        }
        let end = out.data.len();
        cmma::store(&mut out.data[at..end], &sum, out_stride, MatrixLayout::RowMajor);
    }
}

/// Products of an element of a block that one instruction of a matrix unit sums.
pub(crate) const fn depth(tf32: bool) -> usize {
    if tf32 { BLOCK / 2 } else { BLOCK }
}

fn layout(transposed: bool) -> MatrixLayout {
    if transposed { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor }
}
