//! Kimi delta attention: the delta rule with a gate per key feature.

use burn::Tensor;

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions};

/// Kimi delta attention (Kimi team 2025, arXiv 2510.26692): the state decays per key feature, then the
/// delta rule writes.
///
/// `S' = Diag(exp g_t) S_{t-1}`, `S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T`, `o_t = scale S_t^T q_t`
///
/// `q, k: [B, T, H, K]`, `v: [B, T, HV, V]`, `g: [B, T, HV, K]` at most 0, `beta: [B, T, HV]` in `[0, 2)`; the keys should have
/// unit length (see [`MatrixOptions::qk_l2norm`]), or the state may grow without bound.
///
/// # Errors
/// A shape, element type, option or gate that does not fit; see [`Error`].
pub fn kda(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    beta: Tensor<3>,
    options: MatrixOptions,
) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::Key(g), Write::Delta { beta }, options)
}

/// One token of [`kda`]: the same arguments without their time axis, and the state
/// `[B, HV, K, V]`. Returns the output `[B, HV, V]` and the new state.
///
/// # Errors
/// As [`kda`].
pub fn kda_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    g: Tensor<3>,
    beta: Tensor<2>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v] = [q, k, v].map(|x| x.unsqueeze_dim(1));
    let write = Write::Delta { beta: beta.unsqueeze_dim(1) };
    matrix::step(q, k, v, Decay::Key(g.unsqueeze_dim(1)), write, state, options)
}
