//! Depth-wise causal convolution as a sum of shifted products.

use burn::Tensor;

use super::{split, unbind};

/// `x: [B, T, D]`, `weight: [D, W]`, `state: [N, D, W - 1] -> y: [B, T, D]` and the new state.
pub(crate) fn forward(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    state: Option<Tensor<3>>,
    cu_seqlens: Option<&[usize]>,
) -> (Tensor<3>, Tensor<3>) {
    let [batch, time, d] = x.dims();
    if let Some(bounds) = cu_seqlens {
        let states: Vec<_> = match state {
            Some(state) => unbind(state, 0).into_iter().map(Some).collect(),
            None => vec![None; bounds.len() - 1],
        };
        let parts = split(x, 1, bounds).into_iter().zip(states);
        let (all, last) = parts.map(|(x, state)| forward(x, weight.clone(), bias.clone(), state, None)).unzip();
        return (Tensor::cat(all, 1), Tensor::cat(last, 0));
    }
    let width = weight.dims()[1];
    let before = match state {
        Some(state) => state.swap_dims(1, 2),
        None => Tensor::zeros([batch, width - 1, d], (&x.device(), x.dtype())),
    };
    let x = Tensor::cat(vec![before, x], 1);
    let mut y: Option<Tensor<3>> = bias.map(|bias| bias.reshape([1, 1, d]));
    for w in 0..width {
        let tap = weight.clone().narrow(1, w, 1).reshape([1, 1, d]);
        let term = x.clone().narrow(1, w, time) * tap;
        y = Some(match y {
            Some(y) => term + y,
            None => term,
        });
    }
    let state = x.clone().narrow(1, time, width - 1).swap_dims(1, 2);
    (y.unwrap_or(x), state)
}
