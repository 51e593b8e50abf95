//! Causal softmax attention, one block of queries after the other, so that the scores of a forward
//! pass take memory linear in time. Burn's autodiff keeps every block's scores for the backward pass:
//! there memory is linear only with a window.

use burn::Tensor;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Int};

/// Queries per block.
const BLOCK: usize = 256;

/// Scaled queries `[B, T, H, D]`, keys `[B, S, HK, D]`, values `[B, S, HK, V]`, where query `i` is token
/// `S - T + i` `-> [B, T, H, V]`
pub(crate) fn forward(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, window: Option<usize>) -> Tensor<4> {
    let [batch, time, heads, d] = q.dims();
    let [_, source, kv_heads, value_dim] = v.dims();
    let group = heads / kv_heads;
    let window = window.unwrap_or(source);
    let device = q.device();
    let q = q.permute([0, 2, 1, 3]);
    let k = k.permute([0, 2, 3, 1]);
    let v = v.permute([0, 2, 1, 3]);
    let mut blocks = Vec::with_capacity(time.div_ceil(BLOCK));
    for start in (0..time).step_by(BLOCK) {
        let rows = BLOCK.min(time - start);
        let first = source - time + start;
        let from = (first + 1).saturating_sub(window);
        let columns = first + rows - from;

        // The query heads of one key head are rows of one product.
        let q = q.clone().narrow(2, start, rows).reshape([batch, kv_heads, group * rows, d]);
        let scores = q.matmul(k.clone().narrow(3, from, columns));
        let scores = scores.reshape([batch * kv_heads, group, rows, columns]);
        let row: Tensor<4, Int> = Tensor::arange(first as i64..(first + rows) as i64, &device).reshape([1, 1, rows, 1]);
        let column: Tensor<4, Int> =
            Tensor::arange(from as i64..(from + columns) as i64, &device).reshape([1, 1, 1, columns]);
        let behind = row - column;
        let hidden: Tensor<4, Bool> =
            behind.clone().lower_scalar(0).bool_or(behind.greater_equal_scalar(window as i64));
        let hidden = hidden.expand([batch * kv_heads, group, rows, columns]);
        let weights = softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3);
        let o = weights.reshape([batch, kv_heads, group * rows, columns]).matmul(v.clone().narrow(2, from, columns));
        blocks.push(o.reshape([batch, heads, rows, value_dim]));
    }
    Tensor::cat(blocks, 2).permute([0, 2, 1, 3])
}
