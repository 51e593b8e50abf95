//! Element-wise passes over the rows of tiles.

use super::super::gemm::Mode;
use super::super::simd::{dot, vectorize};
use super::super::tile::Tile;

/// `dst_i (=, +=, -=) factors[i] * src_i` for each factor.
pub(crate) fn scale_rows(factors: &[f32], mode: Mode, src: &Tile, dst: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for (i, &f) in factors.iter().enumerate() {
                let pairs = dst.row_mut(i).iter_mut().zip(src.row(i));
                match mode {
                    Mode::Set => pairs.for_each(|(d, s)| *d = f * s),
                    Mode::Add => pairs.for_each(|(d, s)| *d += f * s),
                    Mode::Sub => pairs.for_each(|(d, s)| *d -= f * s),
                }
            }
        },
    );
}

/// `dst_i (=, +=, -=) factors_{offset + i} (.) src_i` for `rows` rows.
pub(crate) fn multiply_rows(factors: &Tile, offset: usize, mode: Mode, rows: usize, src: &Tile, dst: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..rows {
                let pairs = dst.row_mut(i).iter_mut().zip(src.row(i)).zip(factors.row(offset + i));
                match mode {
                    Mode::Set => pairs.for_each(|((d, s), f)| *d = f * s),
                    Mode::Add => pairs.for_each(|((d, s), f)| *d += f * s),
                    Mode::Sub => pairs.for_each(|((d, s), f)| *d -= f * s),
                }
            }
        },
    );
}

/// `dst_i += src_i` for `rows` rows.
pub(crate) fn add_rows(rows: usize, src: &Tile, dst: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..rows {
                dst.row_mut(i).iter_mut().zip(src.row(i)).for_each(|(d, s)| *d += s);
            }
        },
    );
}

/// `dots[i] = <a_i, b_i>`.
pub(crate) fn dot_rows(a: &Tile, b: &Tile, dots: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (i, d) in dots.iter_mut().enumerate() {
                *d = dot(a.row(i), b.row(i));
            }
        },
    );
}
