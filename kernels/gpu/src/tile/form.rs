//! Products of tiles.

use cubecl::prelude::*;

use super::sums::{Spread, Sums};
use super::{Engine, Tile, opaque, registers};

/// What a product does with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    Set,
    Add,
    /// `out = -(a b)`; registers only.
    SetNegative,
}

/// Sizes and form of a product: `[m, depth] x [depth, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    pub m: usize,
    pub n: usize,
    pub depth: usize,
    /// `a` is stored as `[depth, m]`.
    pub a_transposed: bool,
    /// `b` is stored as `[n, depth]`.
    pub b_transposed: bool,
    pub mode: Mode,
}

impl Form {
    /// `a b`
    pub const fn ab(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { m, n, depth, a_transposed: false, b_transposed: false, mode }
    }

    /// `a b^T`
    pub const fn abt(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { b_transposed: true, ..Self::ab(m, n, depth, mode) }
    }

    /// `a^T b`
    pub const fn atb(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { a_transposed: true, ..Self::ab(m, n, depth, mode) }
    }
}

/// Where in the stored tiles a product begins.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Corner {
    pub a_row: usize,
    pub a_col: usize,
    pub b_row: usize,
    pub out_row: usize,
}

#[cube]
impl Corner {
    /// The first element.
    pub fn first() -> Corner {
        Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: 0usize }
    }
}

/// `out (+)= a b` of parts of tiles; of one element type on matrix units.
#[cube]
pub(crate) fn product_at<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] units: usize,
    #[comptime] engine: Engine,
) {
    match comptime!(engine) {
        Engine::Registers { side } => registers::to_tile::<A, B>(a, b, out, corner, form, side),
        Engine::Matrix { plane, tf32 } => opaque::to_tile::<A, B>(a, b, out, corner, form, plane, tf32),
        Engine::Mma => {
            comptime!(assert!(form.mode != Mode::SetNegative, "matrix units only add"));
            let mut sums = Sums::new(comptime!(Spread { rows: form.m, cols: form.n, units, engine }));
            if comptime!(form.mode == Mode::Add) {
                sums.take(&*out, corner.out_row);
            }
            let from = Corner { a_row: corner.a_row, a_col: corner.a_col, b_row: corner.b_row, out_row: 0usize };
            sums.product_at::<A, B>(a, b, &from, form);
            sums.put_at::<f32>(out, corner.out_row);
        }
    }
}
