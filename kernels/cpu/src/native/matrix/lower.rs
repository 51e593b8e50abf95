//! Products with lower-triangular matrices, in row blocks that skip the zero half, and the triangular solve.

use super::super::gemm::{Lhs, Mode, Out, Rhs, gemm};
use super::super::simd::vectorize;
use super::super::tile::{LINE, Tile};

/// Rows of a block. The diagonal blocks are computed whole, so smaller blocks waste less; 16 is one cache line of
/// columns and two register blocks of rows.
const BLOCK: usize = LINE;

fn blocks(rows: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
    (0..rows).step_by(BLOCK).map(move |lo| (lo, rows.min(lo + BLOCK)))
}

/// The lower triangle of `p = x yt`, `yt` being `[features, rows]`. Elements above the diagonal are arbitrary.
pub(crate) fn outer(rows: usize, x: &Tile, yt: &Tile, p: &mut Tile) {
    for (lo, hi) in blocks(rows) {
        gemm(Mode::Set, [hi - lo, hi, x.cols()], Lhs::of(x, lo, 0), (yt, 0, 0), (&mut *p, lo, 0));
    }
}

/// `out (=, +=, -=) p y` for lower-triangular `p`, whose elements above the diagonal are zero.
pub(crate) fn apply(mode: Mode, rows: usize, p: &Tile, y: &Tile, out: &mut Tile) {
    for (lo, hi) in blocks(rows) {
        gemm(mode, [hi - lo, y.cols(), hi], Lhs::of(p, lo, 0), (y, 0, 0), (&mut *out, lo, 0));
    }
}

/// `out (=, +=, -=) p^T x` for lower-triangular `p`, whose elements above the diagonal are zero.
pub(crate) fn apply_transposed(mode: Mode, rows: usize, p: &Tile, x: &Tile, out: &mut Tile) {
    for (lo, hi) in blocks(rows) {
        gemm(mode, [hi - lo, x.cols(), rows - lo], Lhs::transposed(p, lo, lo), (x, lo, 0), (&mut *out, lo, 0));
    }
}

/// Solves `(I + l) u = x` in place, `l` strictly lower-triangular: substitution within blocks of 16 rows, products
/// between them. Substitution, unlike a series for the inverse, stays accurate when the keys are nearly equal.
pub(crate) fn solve(rows: usize, l: &Tile, u: &mut Tile) {
    for (lo, hi) in blocks(rows) {
        if lo > 0 {
            let (stride, cols) = (u.stride(), u.cols());
            let (solved, rest) = u.split(lo);
            let (b, c) = (Rhs::strided(solved, stride), Out::initialised(rest, stride));
            gemm(Mode::Sub, [hi - lo, cols, lo], Lhs::of(l, lo, 0), b, c);
        }
        vectorize(
            #[inline(always)]
            || {
                for i in lo + 1..hi {
                    for j in lo..i {
                        let f = l.row(i)[j];
                        let (row, earlier) = u.two_rows(i, j);
                        row.iter_mut().zip(earlier).for_each(|(x, y)| *x -= f * y);
                    }
                }
            },
        );
    }
}

/// Solves `(I + l)^T u = x` in place.
pub(crate) fn solve_transposed(rows: usize, l: &Tile, u: &mut Tile) {
    for (lo, hi) in blocks(rows).rev() {
        if hi < rows {
            let (stride, cols) = (u.stride(), u.cols());
            let (rest, solved) = u.split(hi);
            let (b, c) = (Rhs::strided(solved, stride), Out::initialised(&mut rest[lo * stride..], stride));
            gemm(Mode::Sub, [hi - lo, cols, rows - hi], Lhs::transposed(l, hi, lo), b, c);
        }
        vectorize(
            #[inline(always)]
            || {
                for i in (lo..hi).rev() {
                    for j in i + 1..hi {
                        let f = l.row(j)[i];
                        let (row, later) = u.two_rows(i, j);
                        row.iter_mut().zip(later).for_each(|(x, y)| *x -= f * y);
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_are_inverse_to_products() {
        for rows in [1, 5, 16, 17, 64] {
            let mut l = Tile::new(rows, rows);
            let mut x = Tile::new(rows, 20);
            for i in 0..rows {
                for j in 0..i {
                    l.row_mut(i)[j] = ((i * 7 + j * 13) as f32).sin() * 0.3;
                }
                for j in 0..20 {
                    x.row_mut(i)[j] = ((i * 3 + j * 5) as f32).cos();
                }
            }
            for transposed in [false, true] {
                let mut u = x.clone();
                if transposed {
                    solve_transposed(rows, &l, &mut u)
                } else {
                    solve(rows, &l, &mut u)
                }
                let mut back = u.clone();
                if transposed {
                    apply_transposed(Mode::Add, rows, &l, &u, &mut back);
                } else {
                    apply(Mode::Add, rows, &l, &u, &mut back);
                }
                for i in 0..rows {
                    for j in 0..20 {
                        assert!((back.row(i)[j] - x.row(i)[j]).abs() < 2e-4, "{rows} {transposed} {i} {j}");
                    }
                }
            }
        }
    }
}
