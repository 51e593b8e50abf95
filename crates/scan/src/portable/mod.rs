//! The chunked algorithms in plain Burn tensor operations: they run on every backend, are
//! differentiated by Burn, and read like the equations. Every exponential has an argument of at most
//! 0, whatever the gates.

use burn::Tensor;

pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod decay;
mod lower;
pub(crate) mod matrix;
pub(crate) mod scan;
pub(crate) mod step;

/// `1 - exp(x)` for `x <= 0` without cancellation near 0, as `-tanh(x / 2) (1 + exp x)`.
pub(crate) fn one_minus_exp<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let value = x.clone().detach();
    let value = value.clone().div_scalar(-2.0).tanh() * value.exp().add_scalar(1.0);
    // The difference is zero and carries the gradient: that of the product above has the wrong sign from x = -17 on,
    // where tanh is 1 to rounding.
    let exp = x.exp();
    value - (exp.clone() - exp.detach())
}

/// The parts of a tensor between consecutive bounds, which start at 0 and end at the axis' size.
///
/// By halves, because Burn's gradient of a slice is a zero tensor of the size of the whole with the slice
/// written into it: slicing `n` parts off the whole would cost `n` times its size, halving costs `log n`.
pub(crate) fn split<const D: usize>(x: Tensor<D>, dim: usize, bounds: &[usize]) -> Vec<Tensor<D>> {
    let parts = bounds.len() - 1;
    if parts <= 1 {
        return vec![x];
    }
    let (from, middle, to) = (bounds[0], bounds[parts / 2], bounds[parts]);
    let left = x.clone().narrow(dim, 0, middle - from);
    let right = x.narrow(dim, middle - from, to - middle);
    let mut all = split(left, dim, &bounds[..=parts / 2]);
    all.extend(split(right, dim, &bounds[parts / 2..]));
    all
}

/// The slices of size 1 along an axis; see [`split`].
pub(crate) fn unbind<const D: usize>(x: Tensor<D>, dim: usize) -> Vec<Tensor<D>> {
    let bounds: Vec<usize> = (0..=x.dims()[dim]).collect();
    split(x, dim, &bounds)
}
