//! Stage 2: scores inside a chunk, `A_ij = sum_d x_i[d] y_j[d] exp(c_i[d] - c_j[d])` for `j <= i`,
//! where `c` are the gate sums.

use burn::Tensor;
use burn::tensor::Bool;

use super::SUB_BLOCK;
use super::decay::{prefix, segments, suffix_exclusive};

/// Scores of rows `x` against columns `y`, zero above the diagonal.
/// `x, y: [M, N, C, K]`, `g: [M, N, C, 1]` or `[M, N, C, K]` `-> [M, N, C, C]`
pub(crate) fn scores(x: Tensor<4>, y: Tensor<4>, g: Option<&Tensor<4>>) -> Tensor<4> {
    let [m, n, c, _] = x.dims();
    match g {
        None => {
            let mask = Tensor::<4, Bool>::tril_mask([1, 1, c, c], 0, &x.device()).expand([m, n, c, c]);
            x.matmul(y.transpose()).mask_fill(mask, 0.0)
        }
        Some(g) if g.dims()[3] == 1 => {
            let decay = segments(g.clone().reshape([m * n, c, 1])).reshape([m, n, c, c]);
            x.matmul(y.transpose()) * decay
        }
        Some(g) => vector(x, y, g.clone()),
    }
}

/// A gate per key feature: block rows of 16 tokens. Inside the diagonal block the exponential is
/// formed directly; before it, rows and columns both refer to the row's first boundary.
fn vector(x: Tensor<4>, y: Tensor<4>, g: Tensor<4>) -> Tensor<4> {
    let [m, n, c, k] = x.dims();
    let diagonal = diagonal(x.clone(), y.clone(), g.clone());
    let mut rows = Vec::with_capacity(c / SUB_BLOCK);
    for (block, start) in (0..c).step_by(SUB_BLOCK).enumerate() {
        let mut row = Vec::with_capacity(3);
        if start > 0 {
            let decay = prefix(g.clone().narrow(2, start, SUB_BLOCK)).exp();
            let left = x.clone().narrow(2, start, SUB_BLOCK) * decay;
            let decay = suffix_exclusive(g.clone().narrow(2, 0, start)).exp();
            let right = y.clone().narrow(2, 0, start) * decay;
            row.push(left.matmul(right.transpose()));
        }
        row.push(diagonal.clone().narrow(2, block, 1).reshape([m, n, SUB_BLOCK, SUB_BLOCK]));
        let rest = c - start - SUB_BLOCK;
        if rest > 0 {
            row.push(Tensor::zeros([m, n, SUB_BLOCK, rest], (&x.device(), x.dtype())));
        }
        rows.push(Tensor::cat(row, 3));
    }
    debug_assert_eq!(y.dims(), [m, n, c, k]);
    Tensor::cat(rows, 2)
}

/// The diagonal blocks, flattened. `[M, N, C, K] -> [M, N, C / 16, 16 * 16]`
fn diagonal(x: Tensor<4>, y: Tensor<4>, g: Tensor<4>) -> Tensor<4> {
    let [m, n, c, k] = x.dims();
    let p = m * n * c / SUB_BLOCK;
    let decay = segments(g.reshape([p, SUB_BLOCK, k]));
    let x = x.reshape([p, SUB_BLOCK, 1, k]);
    let y = y.reshape([p, 1, SUB_BLOCK, k]);
    (x * y * decay).sum_dim(3).reshape([m, n, c / SUB_BLOCK, SUB_BLOCK * SUB_BLOCK])
}
