//! Stage 3: the unit lower-triangular solve behind the WY form of the delta rule, by forward
//! substitution on blocks of 16 (Yang et al. 2024, "Parallelizing linear transformers with the delta
//! rule", section 3.2). A Neumann series by doubling would need fewer steps, but loses all digits for
//! correlated keys.

use burn::Tensor;

use super::SUB_BLOCK;

/// Solves `(I + L) X = R`; only the part of `lower` below the diagonal is read.
/// `lower: [M, N, C, C]`, `right: [M, N, C, R]` `-> [M, N, C, R]`
pub(crate) fn solve(lower: Tensor<4>, right: Tensor<4>) -> Tensor<4> {
    let [_, _, c, _] = lower.dims();
    let inverses = invert_diagonal(&lower);
    let mut solved: Option<Tensor<4>> = None;
    for (block, start) in (0..c).step_by(SUB_BLOCK).enumerate() {
        let mut rest = right.clone().narrow(2, start, SUB_BLOCK);
        if let Some(before) = &solved {
            let row = lower.clone().narrow(2, start, SUB_BLOCK).narrow(3, 0, start);
            rest = rest - row.matmul(before.clone());
        }
        let rows = inverses[block].clone().matmul(rest);
        solved = Some(match solved {
            None => rows,
            Some(before) => Tensor::cat(vec![before, rows], 2),
        });
    }
    solved.unwrap_or(right)
}

/// `(I + L_bb)^-1` for every diagonal block `b`, row by row: row `i` of the inverse is
/// `e_i - sum_{j<i} L_ij row_j`. One `[M, N, 16, 16]` per block.
fn invert_diagonal(lower: &Tensor<4>) -> Vec<Tensor<4>> {
    let [m, n, c, _] = lower.dims();
    let blocks = c / SUB_BLOCK;
    let p = m * n;
    let options = (&lower.device(), lower.dtype());
    let diagonal: Vec<_> =
        (0..c).step_by(SUB_BLOCK).map(|s| lower.clone().narrow(2, s, SUB_BLOCK).narrow(3, s, SUB_BLOCK)).collect();
    let diagonal = Tensor::cat(diagonal, 0).reshape([blocks * p, SUB_BLOCK, SUB_BLOCK]);

    let unit = |i: usize| {
        let zero = |size| Tensor::<3>::zeros([blocks * p, 1, size], options);
        let one = Tensor::<3>::ones([blocks * p, 1, 1], options);
        match i {
            0 => Tensor::cat(vec![one, zero(SUB_BLOCK - 1)], 2),
            _ if i + 1 == SUB_BLOCK => Tensor::cat(vec![zero(i), one], 2),
            _ => Tensor::cat(vec![zero(i), one, zero(SUB_BLOCK - 1 - i)], 2),
        }
    };
    let mut inverse = unit(0);
    for i in 1..SUB_BLOCK {
        let row = diagonal.clone().narrow(1, i, 1).narrow(2, 0, i);
        let row = unit(i) - row.matmul(inverse.clone());
        inverse = Tensor::cat(vec![inverse, row], 1);
    }
    let inverse = inverse.reshape([blocks, m, n, SUB_BLOCK * SUB_BLOCK]);
    (0..blocks).map(|b| inverse.clone().narrow(0, b, 1).reshape([m, n, SUB_BLOCK, SUB_BLOCK])).collect()
}
