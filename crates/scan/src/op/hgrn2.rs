//! HGRN2: gated linear attention whose key is what the gate forgets.

use burn::Tensor;

use crate::check::state_type;
use crate::{Error, MatrixOptions, Output, StepOptions, gla, gla_step};

/// HGRN2 (Qin et al. 2024, arXiv 2404.07904): [`gla`] with `k = 1 - exp(g)`.
///
/// `q, g: [B, T, H, K]` with `g` at most 0, `v: [B, T, H, V]`.
///
/// # Errors
/// As [`gla`].
pub fn hgrn2(q: Tensor<4>, v: Tensor<4>, g: Tensor<4>, options: MatrixOptions) -> Result<Output, Error> {
    let k = forgotten(g.clone()).cast(q.dtype());
    gla(q, k, v, g, options)
}

/// One token of [`hgrn2`]: `q, g: [B, H, K]`, `v: [B, H, V]`, state `[B, H, K, V]`.
///
/// # Errors
/// As [`gla`].
pub fn hgrn2_step(
    q: Tensor<3>,
    v: Tensor<3>,
    g: Tensor<3>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let k = forgotten(g.clone()).cast(q.dtype());
    gla_step(q, k, v, g, state, options)
}

/// `1 - exp(g)`, exact to rounding for small gates too.
fn forgotten<const D: usize>(g: Tensor<D>) -> Tensor<D> {
    let dtype = state_type(g.dtype());
    crate::portable::one_minus_exp(g.cast(dtype))
}
