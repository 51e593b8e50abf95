//! One gate per head: gated linear attention with a scalar gate, and retention with a constant one.

use burn::Tensor;

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions};

/// Linear attention with one gate per head and token (Mamba-2's SSD, Dao & Gu 2024, arXiv 2405.21060):
///
/// `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`
///
/// `q, k: [B, T, H, K]`, `v: [B, T, HV, V]`, `g: [B, T, HV]` at most 0.
///
/// # Errors
/// A shape, element type, option or gate that does not fit; see [`Error`].
pub fn simple_gla(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<3>,
    options: MatrixOptions,
) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::Head(g), Write::Additive, options)
}

/// One token of [`simple_gla`]: `q, k: [B, H, K]`, `v: [B, HV, V]`, `g: [B, HV]`, state `[B, HV, K, V]`.
/// Returns the output `[B, HV, V]` and the new state.
///
/// # Errors
/// As [`simple_gla`].
pub fn simple_gla_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    g: Tensor<2>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v] = [q, k, v].map(|x| x.unsqueeze_dim(1));
    matrix::step(q, k, v, Decay::Head(g.unsqueeze_dim(1)), Write::Additive, state, options)
}

/// Retention (Sun et al. 2023, arXiv 2307.08621) and Lightning Attention: [`simple_gla`] with a gate
/// that is constant in time, `g_gamma: [HV]` at most 0.
///
/// # Errors
/// As [`simple_gla`].
pub fn retention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g_gamma: Tensor<1>,
    options: MatrixOptions,
) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::Constant(g_gamma), Write::Additive, options)
}

/// One token of [`retention`]: as [`simple_gla_step`] with `g_gamma: [HV]`.
///
/// # Errors
/// As [`simple_gla`].
pub fn retention_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    g_gamma: Tensor<1>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v] = [q, k, v].map(|x| x.unsqueeze_dim(1));
    matrix::step(q, k, v, Decay::Constant(g_gamma), Write::Additive, state, options)
}
