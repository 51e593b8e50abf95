//! The delta rule.

use burn::Tensor;

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions};

/// DeltaNet (Yang et al. 2024, arXiv 2406.06484):
///
/// `S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T`, `o_t = scale S_t^T q_t`
///
/// `q, k: [B, T, H, K]`, `v: [B, T, HV, V]`, `beta: [B, T, HV]` in `[0, 2)`; the keys should have
/// unit length (see [`MatrixOptions::qk_l2norm`]), or the state may grow without bound.
///
/// # Errors
/// A shape, element type, option or gate that does not fit; see [`Error`].
pub fn delta_rule(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    beta: Tensor<3>,
    options: MatrixOptions,
) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::None, Write::Delta { beta }, options)
}

/// One token of [`delta_rule`]: the same arguments without their time axis, and the state
/// `[B, HV, K, V]`. Returns the output `[B, HV, V]` and the new state.
///
/// # Errors
/// As [`delta_rule`].
pub fn delta_rule_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    beta: Tensor<2>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v] = [q, k, v].map(|x| x.unsqueeze_dim(1));
    let write = Write::Delta { beta: beta.unsqueeze_dim(1) };
    matrix::step(q, k, v, Decay::None, write, state, options)
}
