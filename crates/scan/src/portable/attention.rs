//! Causal softmax attention, one block of queries after the other, so that the scores of a forward
//! pass take memory linear in time. Burn's autodiff keeps every block's scores for the backward pass:
//! there memory is linear only with a window.
//!
//! Only pairs of a query and a key that it sees are multiplied ([`Lower`]): a score of minus infinity, and so a weight of 0,
//! does not hide an infinite value or cotangent.

use burn::Tensor;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Int};

use super::lower::{Lower, Reads};

/// Queries per block.
const BLOCK: usize = 256;

/// Scaled queries `[B, T, H, D]`, keys `[B, S, HK, D]`, values `[B, S, HK, V]`, where query `i` is token
/// `S - T + i` `-> [B, T, H, V]`
pub(crate) fn forward(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, window: Option<usize>) -> Tensor<4> {
    let ([_, time, ..], [_, source, ..]) = (q.dims(), v.dims());
    let [q, k, v] = [q, k, v].map(|x| x.permute([0, 2, 1, 3]));
    let blocks = (0..time).step_by(BLOCK).map(|start| {
        let (rows, first) = (BLOCK.min(time - start), source - time + start);
        let q = q.clone().narrow(2, start, rows);
        match window {
            Some(window) if window < first + rows => windowed(q, &k, &v, first, window),
            _ => causal(q, &k, &v, first),
        }
    });
    Tensor::cat(blocks.collect(), 2).permute([0, 2, 1, 3])
}

/// `[B, H, R, D]` as `[B H, N, C, D]`, with zeros in place of missing rows.
fn chunks(x: Tensor<4>, n: usize, c: usize) -> Tensor<4> {
    let [batch, heads, rows, d] = x.dims();
    let x = padded(x, 0, n * c - rows);
    x.reshape([batch * heads, n, c, d])
}

/// `[B, H, R, D]` with rows of zeros before and after.
fn padded(x: Tensor<4>, before: usize, after: usize) -> Tensor<4> {
    let [batch, heads, _, d] = x.dims();
    let zeros = |rows| Tensor::zeros([batch, heads, rows, d], (&x.device(), x.dtype()));
    match (before, after) {
        (0, 0) => x,
        (0, _) => Tensor::cat(vec![x.clone(), zeros(after)], 2),
        (_, 0) => Tensor::cat(vec![zeros(before), x.clone()], 2),
        _ => Tensor::cat(vec![zeros(before), x.clone(), zeros(after)], 2),
    }
}

/// `[B, HK, R, D] -> [B, H, R, D]`
fn repeated(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, rows, d] = x.dims();
    let group = heads / kv_heads;
    if group == 1 {
        return x;
    }
    x.unsqueeze_dim::<5>(2).expand([batch, kv_heads, group, rows, d]).reshape([batch, heads, rows, d])
}

/// Queries from token `first` on, which see all that is before them.
fn causal(q: Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, first: usize) -> Tensor<4> {
    let ([batch, heads, rows, d], [_, kv_heads, _, value_dim]) = (q.dims(), v.dims());
    // A single query sees its own token like the others.
    let (seen, own) = if rows == 1 { (first + 1, 0) } else { (first, rows) };
    let c = rows.next_power_of_two();
    let (mut scores, mut triangle) = (Vec::with_capacity(2), None);
    let q = padded(q, 0, c - rows);
    if seen > 0 {
        // The query heads of one key head are rows of one product.
        let q = q.clone().reshape([batch, kv_heads, heads / kv_heads * c, d]);
        let all = q.matmul(k.clone().narrow(2, 0, seen).transpose());
        scores.push(all.reshape([batch * heads, 1, c, seen]));
    }
    if own > 0 {
        let own = |x: &Tensor<4>| chunks(repeated(x.clone().narrow(2, first, rows), heads), 1, c);
        let q = q.reshape([batch * heads, 1, c, d]);
        let lower = Lower::scores(&q, &own(k), None, Reads::Decayed);
        scores.push(lower.filled(&q, f32::NEG_INFINITY));
        triangle = Some(own(v));
    }
    let weights = softmax(Tensor::cat(scores, 3), 3);
    let mut o = triangle.map(|v| Lower::of(weights.clone().narrow(3, seen, c), true).apply(&v));
    if seen > 0 {
        let weights = weights.narrow(3, 0, seen).reshape([batch, kv_heads, heads / kv_heads * c, seen]);
        let all = weights.matmul(v.clone().narrow(2, 0, seen)).reshape([batch * heads, 1, c, value_dim]);
        o = Some(match o {
            Some(o) => o + all,
            None => all,
        });
    }
    let o = o.unwrap_or_else(|| v.clone().narrow(2, 0, 0));
    o.reshape([batch, heads, c, value_dim]).narrow(2, 0, rows)
}

/// Queries from token `first` on, which see `window` tokens each, in blocks of at most so many: of the keys before a block,
/// those after the first `c` of the window are seen by all of it, and the first `c` by fewer and fewer.
fn windowed(q: Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, first: usize, window: usize) -> Tensor<4> {
    let ([batch, heads, rows, _], value_dim) = (q.dims(), v.dims()[3]);
    let c = (1 << window.ilog2()).min(rows.next_power_of_two());
    let n = rows.div_ceil(c);
    let (from, missing) = (first.saturating_sub(window), window.saturating_sub(first));
    // The keys from `window` before the first query on, and what each block finds `skip` after its first of these.
    let near = |x: &Tensor<4>| {
        let x = x.clone().narrow(2, from, first + rows - from);
        padded(repeated(x, heads), missing, n * c - rows)
    };
    let (k, v) = (near(k), near(v));
    let at =
        |x: &Tensor<4>, skip: usize, cols: usize| chunks(x.clone().narrow(2, skip, n * c), n, c).narrow(2, 0, cols);
    let whole: Vec<_> = (c..window).step_by(c).map(|skip| (skip, c.min(window - skip))).collect();

    let q = chunks(q, n, c);
    let flipped = |x: Tensor<4>| x.flip([2]);
    let first_keys = Lower::scores(&flipped(q.clone()), &flipped(at(&k, 0, c)), None, Reads::Below);
    let own = Lower::scores(&q, &at(&k, window, c), None, Reads::Decayed);
    let mut scores = vec![first_keys.filled(&q, f32::NEG_INFINITY).flip([2, 3])];
    scores.extend(whole.iter().map(|&(skip, cols)| q.clone().matmul(at(&k, skip, cols).transpose())));
    if missing > 0 {
        let before = Tensor::cat(scores, 3);
        let block: Tensor<4, Int> = Tensor::arange(0..n as i64, &q.device()).reshape([1, n, 1, 1]).mul_scalar(c as i64);
        let column: Tensor<4, Int> = Tensor::arange(0..window as i64, &q.device()).reshape([1, 1, 1, window]);
        let absent: Tensor<4, Bool> = (block + column).lower_scalar(missing as i64);
        scores = vec![before.clone().mask_fill(absent.expand(before.dims()), f32::NEG_INFINITY)];
    }
    scores.push(own.filled(&q, f32::NEG_INFINITY));
    let weights = softmax(Tensor::cat(scores, 3), 3);

    let part = |from, cols| weights.clone().narrow(3, from, cols);
    let first_values = Lower::of(part(0, c).flip([2, 3]), false).apply(&flipped(at(&v, 0, c)));
    let mut o = Lower::of(part(window, c), true).apply(&at(&v, window, c)) + flipped(first_values);
    for (skip, cols) in whole {
        o = o + part(skip, cols).matmul(at(&v, skip, cols));
    }
    o.reshape([batch, heads, n * c, value_dim]).narrow(2, 0, rows)
}
