//! The chunked algorithms in plain Burn tensor operations: they run on every backend, are
//! differentiated by Burn, and read like the equations. Every exponential has an argument of at most
//! 0, whatever the gates.

use burn::Tensor;

pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod decay;
pub(crate) mod matrix;
pub(crate) mod scan;
mod scores;
pub(crate) mod step;
mod wy;

/// Tokens per sub-block. Gate sums with a vector gate sit inside the contraction, so they cannot be
/// factored over a whole chunk without overflow; over 16 tokens they are formed directly, and from
/// block to block they are referred to the boundary between.
pub(crate) const SUB_BLOCK: usize = 16;

/// `1 - exp(x)` for `x <= 0` without cancellation near 0, as `-tanh(x / 2) (1 + exp x)`.
pub(crate) fn one_minus_exp<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone().div_scalar(-2.0).tanh() * x.exp().add_scalar(1.0)
}
