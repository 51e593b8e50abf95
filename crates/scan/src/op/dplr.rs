//! Diagonal plus low rank: the general form of the delta rules.

use burn::Tensor;

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions};

/// Diagonal-plus-low-rank recurrence (RWKV-7, Peng et al. 2025, arXiv 2503.14456, is `a = -kappa`,
/// `b = kappa * a_in`):
///
/// `S_t = (Diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`
///
/// `q, k, a, b, g: [B, T, H, K]` with `g` at most 0, `v: [B, T, H, V]`.
///
/// # Errors
/// A shape, element type, option or gate that does not fit; see [`Error`].
pub fn dplr(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    a: Tensor<4>,
    b: Tensor<4>,
    g: Tensor<4>,
    options: MatrixOptions,
) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::Key(g), Write::LowRank { a, b }, options)
}

/// One token of [`dplr`]: the same arguments without their time axis, and the state `[B, H, K, V]`.
/// Returns the output `[B, H, V]` and the new state.
///
/// # Errors
/// As [`dplr`].
pub fn dplr_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    a: Tensor<3>,
    b: Tensor<3>,
    g: Tensor<3>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v, a, b, g] = [q, k, v, a, b, g].map(|x| x.unsqueeze_dim(1));
    matrix::step(q, k, v, Decay::Key(g), Write::LowRank { a, b }, state, options)
}
