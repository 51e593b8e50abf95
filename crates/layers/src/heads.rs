//! Cutting features into heads and back.

use burn::tensor::{DType, Tensor};

/// `[B, T, H * D]` to `[B, T, H, D]`.
pub(crate) fn split(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, time, features] = x.dims();
    x.reshape([batch, time, heads, features / heads])
}

/// `[B, T, H, D]` to `[B, T, H * D]`.
pub(crate) fn merge(x: Tensor<4>) -> Tensor<3> {
    let [batch, time, heads, features] = x.dims();
    x.reshape([batch, time, heads * features])
}

/// `[B, T, H, D]` to `[B, T, H * groups, D]`, each head repeated `groups` times in a row.
pub(crate) fn repeat(x: Tensor<4>, groups: usize) -> Tensor<4> {
    if groups == 1 {
        return x;
    }
    let [batch, time, heads, features] = x.dims();
    x.unsqueeze_dim::<5>(3).expand([batch, time, heads, groups, features]).reshape([
        batch,
        time,
        heads * groups,
        features,
    ])
}

/// The only token of `[B, 1, ..]`.
pub(crate) fn token<const D: usize, const E: usize>(x: Tensor<D>) -> Tensor<E> {
    x.squeeze_dim(1)
}

/// At least f32: gates and statistics are never bf16 or f16.
pub(crate) fn full_precision<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::BF16 | DType::F16 => x.cast(DType::F32),
        _ => x,
    }
}
