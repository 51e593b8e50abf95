//! Linear attention: no gate, with or without its normaliser.

use burn::Tensor;
use burn::tensor::{DType, FloatDType};

use crate::op::matrix::{self, Decay, Write};
use crate::{Error, MatrixOptions, Output, StepOptions, check};

/// Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) without its normaliser:
///
/// `S_t = S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`
///
/// `q, k: [B, T, H, K]`, `v: [B, T, HV, V]`.
///
/// # Errors
/// A shape, element type or option that does not fit; see [`Error`].
pub fn linear_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: MatrixOptions) -> Result<Output, Error> {
    matrix::forward(q, k, v, Decay::None, Write::Additive, options)
}

/// One token of [`linear_attention`]: `q, k: [B, H, K]`, `v: [B, HV, V]`, state `[B, HV, K, V]`.
///
/// # Errors
/// As [`linear_attention`].
pub fn linear_attention_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let [q, k, v] = [q, k, v].map(|x| x.unsqueeze_dim(1));
    matrix::step(q, k, v, Decay::None, Write::Additive, state, options)
}

/// What [`normalized_linear_attention`] returns.
#[derive(Debug, Clone)]
pub struct NormalizedOutput {
    /// Outputs per token, `[B, T, HV, V]`.
    pub o: Tensor<4>,
    /// State after the last token, `[N, HV, K, V]`.
    pub final_state: Tensor<4>,
    /// Normaliser after the last token, `[N, 1, H, K]`.
    pub final_normalizer: Tensor<4>,
}

/// Added to the normaliser's inner product.
const EPSILON: f64 = 1e-10;

/// Linear attention divided by its normaliser:
///
/// `z_t = z_{t-1} + k_t`, `o_t = scale S_t^T q_t / (scale z_t . q_t + 1e-10)`
///
/// for feature maps that keep `q` and `k` positive, or 0. f16 inputs are computed in f32: in f16 the 1e-10 is 0 and its
/// inverse, a factor of gradients, infinite. `initial_normalizer` is `z_0`, `[N, 1, H, K]`, zero
/// if absent.
///
/// # Errors
/// As [`linear_attention`].
pub fn normalized_linear_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    initial_normalizer: Option<Tensor<4>>,
    options: MatrixOptions,
) -> Result<NormalizedOutput, Error> {
    check::not_empty("q", &q)?;
    check::not_empty("v", &v)?;
    if let Some([q, k, v]) = widened([&q, &k, &v]) {
        let out = normalized_linear_attention(q, k, v, initial_normalizer, options)?;
        return Ok(NormalizedOutput { o: out.o.cast(DType::F16), ..out });
    }
    let [batch, time, heads, key_dim] = q.dims();
    let value_heads = v.dims()[2];
    let count = check::sequences(options.cu_seqlens.as_deref(), batch, time)?;
    check::shape("k", &k, [("batch", batch), ("time", time), ("heads", heads), ("key_dim", key_dim)])?;
    if let Some(z) = &initial_normalizer {
        let axes = [("sequences", count), ("one", 1), ("heads", heads), ("key_dim", key_dim)];
        check::shape("initial_normalizer", z, axes)?;
    }
    let group = check::grouped("v", v.dims().to_vec(), value_heads, heads)?;
    // The normaliser is the same recurrence with a value of 1.
    let ones = Tensor::ones([batch, time, heads, 1], (&v.device(), v.dtype()));
    let normalizer = MatrixOptions {
        initial_state: initial_normalizer.map(|z| z.reshape([count, heads, key_dim, 1])),
        ..options.clone()
    };
    let Output { o: weight, final_state: z } = linear_attention(q.clone(), k.clone(), ones, normalizer)?;
    let Output { o, final_state } = linear_attention(q, k, v, options)?;
    let weight = repeat_heads(weight.add_scalar(EPSILON), group);
    Ok(NormalizedOutput { o: o / weight, final_state, final_normalizer: z.reshape([count, 1, heads, key_dim]) })
}

/// One token of [`normalized_linear_attention`]: `q, k: [B, H, K]`, `v: [B, HV, V]`, state
/// `[B, HV, K, V]`, normaliser `[B, 1, H, K]`. Returns the output and both new states.
///
/// # Errors
/// As [`linear_attention`].
pub fn normalized_linear_attention_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    state: Tensor<4>,
    normalizer: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>, Tensor<4>), Error> {
    check::not_empty("q", &q)?;
    if let Some([q, k, v]) = widened([&q, &k, &v]) {
        let (o, state, normalizer) = normalized_linear_attention_step(q, k, v, state, normalizer, options)?;
        return Ok((o.cast(DType::F16), state, normalizer));
    }
    let [batch, heads, key_dim] = q.dims();
    let [_, value_heads, value_dim] = v.dims();
    let axes = [("batch", batch), ("one", 1), ("heads", heads), ("key_dim", key_dim)];
    check::shape("normalizer", &normalizer, axes)?;
    let group = check::grouped("v", v.dims().to_vec(), value_heads, heads)?;
    let ones = Tensor::ones([batch, heads, 1], (&v.device(), v.dtype()));
    let z = normalizer.reshape([batch, heads, key_dim, 1]);
    let (weight, z) = linear_attention_step(q.clone(), k.clone(), ones, z, options)?;
    let (o, state) = linear_attention_step(q, k, v, state, options)?;
    let weight = repeat_heads(weight.add_scalar(EPSILON).unsqueeze_dim(1), group);
    let weight = weight.reshape([batch, value_heads, 1]).expand([batch, value_heads, value_dim]);
    Ok((o / weight, state, z.reshape([batch, 1, heads, key_dim])))
}

/// f16 tensors in f32.
fn widened<const D: usize>(inputs: [&Tensor<D>; 3]) -> Option<[Tensor<D>; 3]> {
    let narrow = inputs.iter().all(|x| x.dtype() == DType::F16);
    narrow.then(|| inputs.map(|x| x.clone().cast(FloatDType::F32)))
}

/// `[B, T, H, 1] -> [B, T, H * group, 1]`, each head `group` times in a row.
fn repeat_heads(x: Tensor<4>, group: usize) -> Tensor<4> {
    let [batch, time, heads, _] = x.dims();
    x.expand([batch, time, heads, group]).reshape([batch, time, heads * group, 1])
}
