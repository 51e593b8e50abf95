//! Causal softmax attention: full or windowed, with grouped key and value heads.

use burn::Tensor;
use thalweg_kernels::attention::AttentionProblem;

use crate::matrix::state_type;
use crate::native::{self, Operation, Written};
use crate::{AttentionOptions, Error, check, portable};

/// Causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762):
///
/// `o_i = sum_j softmax_j(scale q_i . k_j) v_j` over the tokens `j <= i`, or with a window
/// `i - window < j <= i`.
///
/// | argument | shape |
/// |---|---|
/// | `q` | `[B, T, H, D]` |
/// | `k` | `[B, S, HK, D]`, `H` a multiple of `HK` |
/// | `v` | `[B, S, HK, V]` |
///
/// Query head `h` uses key head `h / (H / HK)`. `S` may exceed `T`: the queries are then the last `T` of
/// `S` tokens, as when a prompt or a single token continues a cache. Returns `[B, T, H, V]`. The memory of the native
/// kernels, on CPUs and on GPUs, is linear in `T` and `S`, forward and backward; the portable path, which also runs on GPUs
/// with less shared memory than a block of such heads needs, keeps all scores for its backward pass.
///
/// # Errors
/// A shape, element type or option that does not fit; see [`Error`].
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Result<Tensor<4>, Error> {
    check::not_empty("q", &q)?;
    check::not_empty("v", &v)?;
    let [batch, time, heads, dim] = q.dims();
    let [_, source, kv_heads, value_dim] = v.dims();
    check::shape("k", &k, [("batch", batch), ("time", source), ("kv_heads", kv_heads), ("head_dim", dim)])?;
    let axes = [("batch", batch), ("time", source), ("kv_heads", kv_heads), ("value_dim", value_dim)];
    check::shape("v", &v, axes)?;
    check::same_type("k", &k, "q", q.dtype())?;
    check::same_type("v", &v, "q", q.dtype())?;
    check::grouped("q", q.dims().to_vec(), heads, kv_heads)?;
    check::positive("window", options.window)?;
    if source < time || (options.cu_seqlens.is_some() && source != time) {
        let found = k.dims().to_vec();
        return Err(Error::Shape { argument: "k", found, expected: format!("the {time} tokens of `q`") });
    }
    check::sequences(options.cu_seqlens.as_deref(), batch, time)?;

    let (dtype, float) = (q.dtype(), state_type(q.dtype()));
    let scale = options.scale.unwrap_or((dim as f64).powf(-0.5));
    let problem = AttentionProblem {
        batch,
        time,
        kv_time: source,
        heads,
        kv_heads,
        key_dim: dim,
        value_dim,
        scale: scale as f32,
        window: options.window,
        cu_seqlens: options.cu_seqlens,
    };
    if native::available(options.path, Written::Attention(&problem), &q) {
        let rest = [Some(k.into()), Some(v.into()), None, None, None, None];
        let (o, _): (_, Tensor<3>) = native::run(Operation::Attention { problem }, q, rest)?;
        return Ok(o);
    }
    let q = q.cast(float).mul_scalar(scale);
    let (k, v) = (k.cast(float), v.cast(float));
    let o = match &problem.cu_seqlens {
        None => portable::attention::forward(q, k, v, problem.window),
        Some(bounds) => {
            let part = |x| portable::split(x, 1, bounds).into_iter();
            let parts = part(q).zip(part(k)).zip(part(v));
            let parts = parts.map(|((q, k), v)| portable::attention::forward(q, k, v, problem.window));
            Tensor::cat(parts.collect(), 1)
        }
    };
    Ok(o.cast(dtype))
}

/// Attention of one new token over a cache that already holds it: `q: [B, H, D]`, `k: [B, S, HK, D]`,
/// `v: [B, S, HK, V]` `-> [B, H, V]`. The order of the cached tokens does not matter, so the slots of a
/// ring buffer may be passed as they lie; all of them are seen, whatever `options.window`.
///
/// # Errors
/// As [`attention`].
pub fn attention_step(q: Tensor<3>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Result<Tensor<3>, Error> {
    let options = AttentionOptions { window: None, cu_seqlens: None, ..options };
    Ok(attention(q.unsqueeze_dim(1), k, v, options)?.squeeze_dim(1))
}
