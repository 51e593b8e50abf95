//! Sums of gates inside a chunk or a part of it. All are sums of numbers at most 0, never differences of
//! sums, so a gate of `-1e4` neither overflows nor swallows the small gates after it.

use burn::Tensor;

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

/// Row `i` becomes row `i + 1`; row 0 is zero. `[M, N, C, D] -> same`
fn shift_down(x: Tensor<4>) -> Tensor<4> {
    let [m, n, c, d] = x.dims();
    if c == 1 {
        return x.zeros_like();
    }
    let zero = Tensor::zeros([m, n, 1, d], (&x.device(), x.dtype()));
    Tensor::cat(vec![zero, x.narrow(2, 0, c - 1)], 2)
}

/// Row `i` becomes row `i - 1`; the last row is zero. `[M, N, C, D] -> same`
fn shift_up(x: Tensor<4>) -> Tensor<4> {
    let [m, n, c, d] = x.dims();
    if c == 1 {
        return x.zeros_like();
    }
    let zero = Tensor::zeros([m, n, 1, d], (&x.device(), x.dtype()));
    Tensor::cat(vec![x.narrow(2, 1, c - 1), zero], 2)
}
