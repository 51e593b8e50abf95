//! Decay by a vector: one gate per token, head and key feature.
//!
//! The exponential sits inside the contraction over features, so a product of matrices needs it factored:
//! `e^{c_i - c_j} = e^{c_i - r} e^{r - c_j}`. With `r` between the two tokens both exponents are at most 0. So a block of
//! tokens is cut at its middle: the tokens after it meet those before it in one product that is safe for any gate, and
//! the two halves are cut again. A half in which no feature decays by more than `e^SPAN` from the middle to either end is
//! not cut: with `r` at its middle all its pairs fit one product, whose exponents stay below `SPAN`. Ordinary gates
//! need one product for the chunk; gates of -1e4 are cut down to pairs.

use super::super::gemm::{Lhs, Mode, gemm};
use super::super::simd::{exp, vectorize};
use super::super::tile::{Rows, Tile};
use super::decay::{Decay, Reads};
use super::lower;
use super::rows::{dot_rows, multiply_rows};

/// Largest exponent of a factor. `e^15 * e^15` is far from overflow, and the rounding of an exponent of 15 costs a
/// relative error of 15 * 2^-24.
const SPAN: f32 = 15.0;

/// Blocks of at most this many tokens are computed pair by pair.
const PAIRS: usize = 4;

pub(crate) struct KeyDecay<'a> {
    /// `[tokens, value_heads, key_dim]`.
    pub g: &'a [f32],
    pub value_heads: usize,
}

pub(crate) struct KeySums {
    rows: usize,
    g: Tile,
    /// `e^{c_i}` for `i` in `0..=n`, and `e^{c_n - c_{i+1}}`.
    from_start: Tile,
    to_end: Tile,
    /// `c_i - c_mid` of the block at hand, in rows `0..=len`.
    local: Tile,
    /// Whether one product covers the chunk, and the factors of tokens that read after their decay are up to date.
    whole: bool,
    /// Factors and scaled operands of the block.
    factor_x: Tile,
    factor_y: Tile,
    x: Tile,
    y: Tile,
    y_transposed: Tile,
    block: Tile,
    dots: Vec<f32>,
    row: Vec<f32>,
    pair: Vec<f32>,
    /// Of the sums `c_i`; and, in row `j + 1`, what all gates after token `j` get.
    gradient: Tile,
    ending: Tile,
}

impl Decay for KeyDecay<'_> {
    type Sums = KeySums;

    fn sums(&self, chunk: usize, key_dim: usize) -> KeySums {
        let tile = |rows| Tile::new(rows, key_dim);
        KeySums {
            rows: 0,
            g: tile(chunk),
            from_start: tile(chunk + 1),
            to_end: tile(chunk),
            local: tile(chunk + 1),
            whole: false,
            factor_x: tile(chunk),
            factor_y: tile(chunk),
            x: tile(chunk),
            y: tile(chunk),
            y_transposed: Tile::new(key_dim, chunk),
            block: Tile::new(chunk, chunk),
            dots: vec![0.0; chunk],
            row: vec![0.0; key_dim],
            pair: vec![0.0; key_dim],
            gradient: tile(chunk + 1),
            ending: tile(chunk + 1),
        }
    }

    fn load(&self, s: &mut KeySums, token: usize, rows: usize, head: usize) {
        s.rows = rows;
        let key_dim = s.g.cols();
        let stride = self.value_heads * key_dim;
        s.g.load(self.g, Rows { offset: token * stride + head * key_dim, stride }, rows);
        let KeySums { g, from_start, to_end, local, factor_x, factor_y, whole, row, .. } = s;
        vectorize(
            #[inline(always)]
            || {
                let mid = rows / 2;
                sums(g, 0, rows, mid, local);
                *whole = steepest(local, rows) <= SPAN;
                if *whole {
                    // The usual case: the factors of the one product, times one row each, are the other two as well.
                    exp_rows(local, 1, 1.0, rows, factor_x);
                    for i in 0..rows {
                        factor_y.row_mut(i).iter_mut().zip(factor_x.row(i)).for_each(|(y, x)| *y = 1.0 / x);
                    }
                    from_start.row_mut(0).fill(1.0);
                    row.iter_mut().zip(local.row(0)).for_each(|(r, first)| *r = exp(-first));
                    for i in 0..rows {
                        let pairs = from_start.row_mut(i + 1).iter_mut().zip(factor_x.row(i)).zip(&*row);
                        pairs.for_each(|((f, x), r)| *f = x * r);
                    }
                    row.copy_from_slice(factor_x.row(rows - 1));
                    for i in 0..rows {
                        let pairs = to_end.row_mut(i).iter_mut().zip(factor_y.row(i)).zip(&*row);
                        pairs.for_each(|((f, y), r)| *f = y * r);
                    }
                } else {
                    sums(g, 0, rows, 0, local);
                    exp_rows(local, 0, 1.0, rows + 1, from_start);
                    sums(g, 0, rows, rows, local);
                    exp_rows(local, 1, -1.0, rows, to_end);
                }
            },
        );
    }

    fn scale_from_start(&self, s: &KeySums, reads: Reads, mode: Mode, src: &Tile, dst: &mut Tile) {
        multiply_rows(&s.from_start, reads.offset(), mode, s.rows, src, dst);
    }

    fn scale_to_end(&self, s: &KeySums, mode: Mode, src: &Tile, dst: &mut Tile) {
        multiply_rows(&s.to_end, 0, mode, s.rows, src, dst);
    }

    fn decay_state(&self, s: &KeySums, state: &mut Tile) {
        let end = s.from_start.row(s.rows);
        vectorize(
            #[inline(always)]
            || {
                for (k, &factor) in end.iter().enumerate() {
                    state.row_mut(k).iter_mut().for_each(|x| *x *= factor);
                }
            },
        );
    }

    fn scores(&self, s: &mut KeySums, (x, reads): (&Tile, Reads), y: &Tile, diagonal: bool, p: &mut Tile) {
        for i in 0..s.rows {
            p.row_mut(i)[i..].fill(0.0);
        }
        scores(s, 0, s.rows, (x, reads), y, p);
        if diagonal {
            dot_rows(x, y, &mut s.dots[..s.rows]);
            for i in 0..s.rows {
                p.row_mut(i)[i] = s.dots[i];
            }
        }
    }

    fn scores_backward(
        &self,
        s: &mut KeySums,
        dp: &mut Tile,
        (x, reads): (&Tile, Reads),
        y: &Tile,
        dx: &mut Tile,
        dy: &mut Tile,
    ) {
        scores_backward(s, 0, s.rows, dp, (x, reads), y, dx, dy);
    }

    fn gradient_of_state(&self, s: &mut KeySums, state: &Tile, dstate: &Tile) {
        let KeySums { gradient, ending, from_start, rows, .. } = s;
        gradient.fill(0.0);
        ending.fill(0.0);
        let last = gradient.row_mut(*rows);
        dot_rows(state, dstate, last);
        last.iter_mut().zip(from_start.row(*rows)).for_each(|(x, e)| *x *= e);
    }

    fn gradient_of_end(&self, s: &mut KeySums, x: &Tile, dx: &Tile) {
        add_products(1.0, s.rows, x, dx, 1, &mut s.ending);
    }

    fn gradient_of_rows(&self, s: &mut KeySums, reads: Reads, sign: f32, x: &Tile, dx: &Tile) {
        add_products(sign, s.rows, x, dx, reads.offset(), &mut s.gradient);
    }

    fn gate_gradient(&self, s: &mut KeySums, store: &mut dyn FnMut(usize, &[f32])) {
        let KeySums { gradient, ending, rows, .. } = s;
        vectorize(
            #[inline(always)]
            || {
                for i in 1..*rows {
                    let (row, earlier) = ending.two_rows(i, i - 1);
                    row.iter_mut().zip(earlier).for_each(|(x, e)| *x += e);
                }
                for i in (1..*rows).rev() {
                    let (row, later) = gradient.two_rows(i, i + 1);
                    row.iter_mut().zip(later).for_each(|(x, l)| *x += l);
                }
                for i in 0..*rows {
                    let row = gradient.row_mut(i + 1);
                    row.iter_mut().zip(ending.row(i)).for_each(|(x, e)| *x += e);
                }
            },
        );
        for i in 0..s.rows {
            store(i, s.gradient.row(i + 1));
        }
    }
}

/// `out_{offset + i} += sign x_i (.) y_i`.
fn add_products(sign: f32, rows: usize, x: &Tile, y: &Tile, offset: usize, out: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..rows {
                let row = out.row_mut(offset + i).iter_mut().zip(x.row(i)).zip(y.row(i));
                row.for_each(|((sum, x), y)| *sum += sign * x * y);
            }
        },
    );
}

/// `local[i - lo] = c_i - c_mid` for `i` in `lo..=hi`: running sums away from `mid`, to both sides.
#[inline(always)]
fn sums(g: &Tile, lo: usize, hi: usize, mid: usize, local: &mut Tile) {
    local.row_mut(mid - lo).fill(0.0);
    for i in mid..hi {
        let (next, here) = local.two_rows(i + 1 - lo, i - lo);
        for ((n, h), g) in next.iter_mut().zip(here).zip(g.row(i)) {
            *n = h + g;
        }
    }
    for i in (lo..mid).rev() {
        let (here, next) = local.two_rows(i - lo, i + 1 - lo);
        for ((h, n), g) in here.iter_mut().zip(next).zip(g.row(i)) {
            *h = n - g;
        }
    }
}

/// Largest exponent of the `len` tokens around their middle; the sums are monotone, so it is at one of the ends.
#[inline(always)]
fn steepest(local: &Tile, len: usize) -> f32 {
    local.row(0).iter().chain(local.row(len)).fold(0.0f32, |m, v| m.max(v.abs()))
}

/// `dst[i] = e^{sign * src[offset + i]}`.
#[inline(always)]
fn exp_rows(src: &Tile, offset: usize, sign: f32, rows: usize, dst: &mut Tile) {
    for i in 0..rows {
        for (d, s) in dst.row_mut(i).iter_mut().zip(src.row(offset + i)) {
            *d = exp(sign * s);
        }
    }
}

/// A block of pairs of tokens that one product covers: left tokens `x.0..x.1`, right tokens `y.0..y.1`.
#[derive(Clone, Copy)]
struct Block {
    x: (usize, usize),
    y: (usize, usize),
    /// The same tokens left and right: only pairs below the diagonal count.
    triangular: bool,
}

/// Prepares the factors of the tokens `lo..hi`: as one triangular block if every exponent stays within `SPAN`, else
/// as the rectangle of the tokens after the middle against those before it.
fn factor(s: &mut KeySums, lo: usize, hi: usize, (x, reads): (&Tile, Reads), y: &Tile) -> Block {
    let mid = lo + (hi - lo) / 2;
    let all = lo == 0 && hi == s.rows;
    let KeySums { g, local, factor_x, factor_y, x: xs, y: ys, whole, .. } = s;
    vectorize(
        #[inline(always)]
        || {
            let ready = *whole && all && reads == Reads::Decayed;
            if !ready {
                sums(g, lo, hi, mid, local);
                // The factors are about to be overwritten.
                *whole = false;
            }
            let block = if ready || steepest(local, hi - lo) <= SPAN {
                Block { x: (lo, hi), y: (lo, hi), triangular: true }
            } else {
                Block { x: (mid, hi), y: (lo, mid), triangular: false }
            };
            if !ready {
                exp_rows(local, block.x.0 - lo + reads.offset(), 1.0, block.x.1 - block.x.0, factor_x);
                exp_rows(local, block.y.0 - lo + 1, -1.0, block.y.1 - block.y.0, factor_y);
            }
            for (range, src, factor, dst) in [(block.x, x, factor_x, xs), (block.y, y, factor_y, ys)] {
                for i in 0..range.1 - range.0 {
                    for ((d, s), f) in dst.row_mut(i).iter_mut().zip(src.row(range.0 + i)).zip(factor.row(i)) {
                        *d = s * f;
                    }
                }
            }
            block
        },
    )
}

/// Scores of the pairs `i > j` within `lo..hi`.
fn scores(s: &mut KeySums, lo: usize, hi: usize, x: (&Tile, Reads), y: &Tile, p: &mut Tile) {
    if hi - lo <= PAIRS {
        let KeySums { g, row, pair, .. } = s;
        return pairs(g, (row, pair), lo, hi, x.1, |i, j, w| {
            let sum = x.0.row(i).iter().zip(y.row(j)).zip(w).map(|((x, y), w)| x * y * w).sum();
            p.row_mut(i)[j] = sum;
        });
    }
    let block = factor(s, lo, hi, x, y);
    let (m, n) = (block.x.1 - block.x.0, block.y.1 - block.y.0);
    s.y_transposed.transpose_from(&s.y, n);
    if block.triangular {
        lower::outer(m, &s.x, &s.y_transposed, &mut s.block);
    } else {
        gemm(Mode::Set, [m, n, s.x.cols()], Lhs::of(&s.x, 0, 0), (&s.y_transposed, 0, 0), (&mut s.block, 0, 0));
    }
    for i in 0..m {
        let n = if block.triangular { i } else { n };
        p.row_mut(block.x.0 + i)[block.y.0..block.y.0 + n].copy_from_slice(&s.block.row(i)[..n]);
    }
    if !block.triangular {
        scores(s, lo, block.y.1, x, y, p);
        scores(s, block.y.1, hi, x, y, p);
    }
}

#[allow(clippy::too_many_arguments)]
fn scores_backward(
    s: &mut KeySums,
    lo: usize,
    hi: usize,
    dp: &Tile,
    x: (&Tile, Reads),
    y: &Tile,
    dx: &mut Tile,
    dy: &mut Tile,
) {
    if hi - lo <= PAIRS {
        let KeySums { g, row, pair, .. } = s;
        return pairs(g, (row, pair), lo, hi, x.1, |i, j, w| {
            let d = dp.row(i)[j];
            dx.row_mut(i).iter_mut().zip(y.row(j)).zip(w).for_each(|((dx, y), w)| *dx += d * y * w);
            dy.row_mut(j).iter_mut().zip(x.0.row(i)).zip(w).for_each(|((dy, x), w)| *dy += d * x * w);
        });
    }
    let block = factor(s, lo, hi, x, y);
    let (m, n) = (block.x.1 - block.x.0, block.y.1 - block.y.0);
    for i in 0..m {
        let row = s.block.row_mut(i);
        row[..n].copy_from_slice(&dp.row(block.x.0 + i)[block.y.0..block.y.0 + n]);
    }
    // The gradient of the scaled operands goes to `y_transposed`-sized scratch: the operands themselves, once used.
    let KeySums { block: d, x: xs, y: ys, factor_x, factor_y, local, .. } = s;
    let k = xs.cols();
    if block.triangular {
        lower::apply(Mode::Set, m, d, ys, local);
        lower::apply_transposed(Mode::Set, m, d, xs, ys);
    } else {
        gemm(Mode::Set, [m, k, n], Lhs::of(d, 0, 0), (&*ys, 0, 0), (&mut *local, 0, 0));
        gemm(Mode::Set, [n, k, m], Lhs::transposed(d, 0, 0), (&*xs, 0, 0), (&mut *ys, 0, 0));
    }
    vectorize(
        #[inline(always)]
        || {
            for (range, src, factor, dst) in
                [(block.x, &*local, factor_x, &mut *dx), (block.y, &*ys, factor_y, &mut *dy)]
            {
                for i in 0..range.1 - range.0 {
                    for ((d, s), f) in dst.row_mut(range.0 + i).iter_mut().zip(src.row(i)).zip(factor.row(i)) {
                        *d += s * f;
                    }
                }
            }
        },
    );
    if !block.triangular {
        scores_backward(s, lo, block.y.1, dp, x, y, dx, dy);
        scores_backward(s, block.y.1, hi, dp, x, y, dx, dy);
    }
}

/// Calls `pair(i, j, w)` with the decay `w` from `j` to `i`, for all `i > j` in `lo..hi`.
fn pairs(
    g: &Tile,
    (sum, w): (&mut [f32], &mut [f32]),
    lo: usize,
    hi: usize,
    reads: Reads,
    mut pair: impl FnMut(usize, usize, &[f32]),
) {
    for j in lo..hi {
        sum.fill(0.0);
        for i in j + 1..hi {
            if reads == Reads::Decayed {
                sum.iter_mut().zip(g.row(i)).for_each(|(s, g)| *s += g);
            }
            vectorize(
                #[inline(always)]
                || w.iter_mut().zip(&*sum).for_each(|(w, s)| *w = exp(*s)),
            );
            pair(i, j, w);
            if reads == Reads::Before {
                sum.iter_mut().zip(g.row(i)).for_each(|(s, g)| *s += g);
            }
        }
    }
}
