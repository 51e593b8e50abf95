//! Stage 1: sums of gates inside a chunk. All are sums of numbers at most 0, never differences of
//! sums, so a gate of `-1e4` neither overflows nor swallows the small gates after it.

use burn::Tensor;
use burn::tensor::Bool;

/// Sum of the gates from the first token to this one, both included. `[M, N, C, D] -> same`
pub(crate) fn prefix(g: Tensor<4>) -> Tensor<4> {
    g.cumsum(2)
}

/// Sum of the gates of the tokens before this one. `[M, N, C, D] -> same`
pub(crate) fn prefix_exclusive(g: Tensor<4>) -> Tensor<4> {
    shift_down(g).cumsum(2)
}

/// Sum of the gates of the tokens after this one. `[M, N, C, D] -> same`
pub(crate) fn suffix_exclusive(g: Tensor<4>) -> Tensor<4> {
    shift_up(g).flip([2]).cumsum(2).flip([2])
}

/// `exp(g_{j+1} + ... + g_i)` for `i >= j`, else 0, for every feature. `[P, C, D] -> [P, C, C, D]`
pub(crate) fn segments(g: Tensor<3>) -> Tensor<4> {
    let [p, c, d] = g.dims();
    let device = g.device();
    let mask =
        |diagonal| Tensor::<2, Bool>::tril_mask([c, c], diagonal, &device).reshape([1, c, c, 1]).expand([p, c, c, d]);
    // Masked before the sum and before the exponential: neither the value nor its gradient ever sees
    // an exponent above 0.
    let steps: Tensor<4> = g.reshape([p, c, 1, d]).expand([p, c, c, d]);
    steps.mask_fill(mask(-1), 0.0).cumsum(1).mask_fill(mask(0), f32::NEG_INFINITY).exp()
}

/// Row `i` becomes row `i + 1`; row 0 is zero. `[M, N, C, D] -> same`
pub(crate) fn shift_down(x: Tensor<4>) -> Tensor<4> {
    let [m, n, c, d] = x.dims();
    let zero = Tensor::zeros([m, n, 1, d], (&x.device(), x.dtype()));
    Tensor::cat(vec![zero, x.narrow(2, 0, c - 1)], 2)
}

/// Row `i` becomes row `i - 1`; the last row is zero. `[M, N, C, D] -> same`
pub(crate) fn shift_up(x: Tensor<4>) -> Tensor<4> {
    let [m, n, c, d] = x.dims();
    let zero = Tensor::zeros([m, n, 1, d], (&x.device(), x.dtype()));
    Tensor::cat(vec![x.narrow(2, 1, c - 1), zero], 2)
}
