//! Gated linear attention: a gate per key feature.

use burn::Tensor;

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions};

/// Gated linear attention (Yang et al. 2024, arXiv 2312.06635, section 4):
///
/// `S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`
///
/// | argument | shape | range |
/// |---|---|---|
/// | `q`, `k` | `[B, T, H, K]` | |
/// | `v` | `[B, T, HV, V]`, `HV` a multiple of `H` | |
/// | `g` | `[B, T, HV, K]`, natural-log decay | at most 0 |
///
/// # Errors
/// A shape, element type, option or gate that does not fit; see [`Error`].
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{MatrixOptions, gla};
///
/// let device = Device::default();
/// let ones = Tensor::<4>::ones([1, 3, 1, 1], &device);
/// let g = Tensor::<4>::full([1, 3, 1, 1], -(2f32.ln()), &device);
/// // Halved at each token: 1, 1.5, 1.75.
/// let out = gla(ones.clone(), ones.clone(), ones, g, MatrixOptions::new())?;
/// let last: f32 = out.final_state.into_scalar();
/// assert!((last - 1.75).abs() < 1e-6);
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn gla(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, g: Tensor<4>, options: MatrixOptions) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::Key(g), Write::Additive, options)
}

/// One token of [`gla`]: `q, k: [B, H, K]`, `v: [B, HV, V]`, `g: [B, HV, K]`, state `[B, HV, K, V]`.
/// Returns the output `[B, HV, V]` and the new state.
///
/// # Errors
/// As [`gla`].
pub fn gla_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    g: Tensor<3>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v, g] = [q, k, v, g].map(|x| x.unsqueeze_dim(1));
    matrix::step(q, k, v, Decay::Key(g), Write::Additive, state, options)
}
