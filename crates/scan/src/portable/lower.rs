//! Lower-triangular matrices over the tokens of a chunk, by halves: the pairs of a token in the second half of a block and one
//! in the first half are a full square, for blocks of 2, 4, 8, .. tokens. No pair of a token and a later one is ever formed,
//! neither forward nor in the gradient: what is infinite or NaN reaches no token that does not depend on it, as it would if
//! such pairs were multiplied by 0.
//!
//! Axes: `M` = sequences x heads, `N` = chunks, `C` = tokens of a chunk, a power of two.

use burn::Tensor;

use super::decay::{prefix, prefix_exclusive, suffix_exclusive};
use super::unbind;

/// Which gates stand between a column's token and a row's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Up to the row's own; with the diagonal.
    Decayed,
    /// Up to the row's own; without the diagonal.
    Below,
    /// Up to that before the row's; without the diagonal.
    Before,
}

/// A matrix `[C, C]` for each of `M x N` chunks.
pub(crate) struct Lower {
    /// Of blocks of `2h` tokens, `h` = 1, 2, 4, ..: `[M, N C / 2h, h, h]`.
    below: Vec<Tensor<4>>,
    /// `[M, N, C, 1]`
    diagonal: Option<Tensor<4>>,
}

/// The first and the second halves of the blocks of `2h` tokens. `[M, N, C, D] -> [M, N C / 2h, h, D]` each
fn halves(x: &Tensor<4>, h: usize) -> [Tensor<4>; 2] {
    let [m, n, c, d] = x.dims();
    let blocks = x.clone().reshape([m, n * c / (2 * h), 2 * h, d]);
    [blocks.clone().narrow(2, 0, h), blocks.narrow(2, h, h)]
}

/// `A B`, for matrices of one element without the cost of a product of matrices.
fn product(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    if a.dims()[2..] == [1, 1] { a * b } else { a.matmul(b) }
}

impl Lower {
    /// `A_ij = sum_d x_i[d] y_j[d] exp(c_i[d] - c_j[d])` for `j <= i` or `j < i`, where `c` are the gate sums. Both sides refer
    /// to the boundary between the halves, so that no exponent is above 0.
    /// `x, y: [M, N, C, K]`, `g: [M, N, C, 1]` or `[M, N, C, K]`
    pub fn scores(x: &Tensor<4>, y: &Tensor<4>, g: Option<&Tensor<4>>, reads: Reads) -> Self {
        let c = x.dims()[2];
        let levels = (0..c.ilog2()).map(|level| 1 << level);
        let below = levels.map(|h| {
            let ([first, _], [_, second]) = (halves(y, h), halves(x, h));
            let (first, second) = match g.map(|g| halves(g, h)) {
                None => (first, second),
                Some([before, after]) => {
                    let after = if reads == Reads::Before { prefix_exclusive(after) } else { prefix(after) };
                    (first * suffix_exclusive(before).exp(), second * after.exp())
                }
            };
            if h == 1 { (second * first).sum_dim(3) } else { second.matmul(first.transpose()) }
        });
        let below = below.collect();
        let diagonal = (reads == Reads::Decayed).then(|| (x.clone() * y.clone()).sum_dim(3));
        Self { below, diagonal }
    }

    /// The part of matrices `[M, N, C, C]` on and below the diagonal, or below it.
    pub fn of(x: Tensor<4>, diagonal: bool) -> Self {
        let [m, n, c, _] = x.dims();
        let (mut rest, mut below) = (x, Vec::new());
        for level in (0..c.ilog2()).rev() {
            let h = 1 << level;
            let [_, blocks, ..] = rest.dims();
            let square = |row, col| rest.clone().narrow(2, row, h).narrow(3, col, h);
            below.push(square(h, 0));
            rest = Tensor::stack::<5>(vec![square(0, 0), square(h, h)], 2).reshape([m, 2 * blocks, h, h]);
        }
        below.reverse();
        Self { below, diagonal: diagonal.then(|| rest.reshape([m, n, c, 1])) }
    }

    /// The matrices `[M, N, C, C]` of the rows `x`, with `fill` where there is nothing. `x: [M, N, C, K]`
    pub fn filled(&self, x: &Tensor<4>, fill: f32) -> Tensor<4> {
        let [m, n, c, _] = x.dims();
        let full = |shape: [usize; 4]| Tensor::full(shape, fill, (&x.device(), x.dtype()));
        let diagonal = self.diagonal.clone().unwrap_or_else(|| full([m, n, c, 1]));
        let mut all = diagonal.reshape([m, n * c, 1, 1]);
        for below in &self.below {
            let [_, blocks, h, _] = below.dims();
            let pairs: Tensor<5> = all.reshape([m, blocks, 2, h, h]);
            let half = |i| pairs.clone().narrow(2, i, 1).squeeze_dim::<4>(2);
            let first = Tensor::cat(vec![half(0), full([m, blocks, h, h])], 3);
            all = Tensor::cat(vec![first, Tensor::cat(vec![below.clone(), half(1)], 3)], 2);
        }
        all.reshape([m, n, c, c])
    }

    /// The product with `v`, `[M, N, C, V] -> same`.
    pub fn apply(&self, v: &Tensor<4>) -> Tensor<4> {
        let mut sum = match &self.diagonal {
            Some(diagonal) => diagonal.clone() * v.clone(),
            None => v.zeros_like(),
        };
        for below in &self.below {
            let [first, _] = halves(v, below.dims()[2]);
            let second = product(below.clone(), first);
            sum = sum + Tensor::cat(vec![second.zeros_like(), second], 2).reshape(v.shape());
        }
        sum
    }

    /// Solves `(I + L) X = R` for the part `L` below the diagonal: the first half of a block, then what is left of the second
    /// (substitution, as in the WY form of the delta rule, Yang et al. 2024, section 3.2; a Neumann series by doubling would
    /// need fewer steps, but loses all digits for correlated keys). `[M, N, C, R] -> same`
    pub fn solve(&self, right: Tensor<4>) -> Tensor<4> {
        let [m, n, c, _] = right.dims();
        let squares = self.below.iter().map(|below| {
            let [_, blocks, h, _] = below.dims();
            unbind(below.clone().reshape([m * n, blocks / n, h, h]), 1)
        });
        let squares: Vec<_> = squares.collect();
        let shape = right.shape();
        let width = right.dims()[3];
        let right = right.reshape([m * n, 1, c, width]);
        solve_block(&squares, 0, right).reshape(shape)
    }
}

/// Block `index` of its size. `[M N, 1, 2h, R] -> same`
fn solve_block(squares: &[Vec<Tensor<4>>], index: usize, right: Tensor<4>) -> Tensor<4> {
    let Some((own, smaller)) = squares.split_last() else { return right };
    let [first, second] = halves(&right, right.dims()[2] / 2);
    let first = solve_block(smaller, 2 * index, first);
    let second = solve_block(smaller, 2 * index + 1, second - product(own[index].clone(), first.clone()));
    Tensor::cat(vec![first, second], 2)
}
