//! One token of a matrix-state recurrence: the definition itself, bound by the bytes of the state.

use burn::Tensor;

use crate::check::state_type;
use crate::op::matrix::{Decay, Problem, Write};

/// Advances the state by one token (time axis of length 1); returns `o: [B, HV, V]` and the state.
pub(crate) fn step(problem: Problem) -> (Tensor<3>, Tensor<4>) {
    let [batch, _, _, key_dim] = problem.q.dims();
    let [_, _, heads, value_dim] = problem.v.dims();
    let dtype = problem.q.dtype();
    let float = state_type(dtype);
    let state = problem
        .initial_state
        .unwrap_or_else(|| Tensor::zeros([batch, heads, key_dim, value_dim], (&problem.q.device(), float.into())));
    // [B, 1, H, K] -> [B, HV, 1, K]
    let row = |x: Tensor<4>| {
        let [_, _, own, d] = x.dims();
        let x: Tensor<4> = x.cast(float).reshape([batch, own, 1, d]);
        x.expand([batch, own, heads / own, d]).reshape([batch, heads, 1, d])
    };
    let (q, k, v) = (row(problem.q), row(problem.k), row(problem.v));
    // [B, HV, 1, K] -> [B, HV, K, 1], by no transposition: its gradient is one of a sum, and Burn's fusion (0.22.1) reads
    // `(sum.transpose() + product) * scale` with the strides of another tensor.
    let column = |x: Tensor<4>| x.reshape([batch, heads, key_dim, 1]);
    let decayed = match problem.decay {
        Decay::None => state.clone(),
        Decay::Constant(g) => state.clone() * g.exp().reshape([1, heads, 1, 1]),
        Decay::Head(g) => state.clone() * g.exp().reshape([batch, heads, 1, 1]),
        Decay::Key(g) => state.clone() * g.exp().reshape([batch, heads, key_dim, 1]),
    };
    let state = match problem.write {
        Write::Additive => decayed + column(k) * v,
        Write::Delta { beta } => {
            let u = (v - k.clone().matmul(decayed.clone())) * beta.reshape([batch, heads, 1, 1]);
            decayed + column(k) * u
        }
        Write::LowRank { a, b } => {
            let u = row(a).matmul(state);
            decayed + column(row(b)) * u + column(k) * v
        }
    };
    let o = q.mul_scalar(problem.scale).matmul(state.clone()).reshape([batch, heads, value_dim]);
    (o.cast(dtype), state)
}
