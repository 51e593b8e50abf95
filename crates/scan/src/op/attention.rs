//! Causal softmax attention: full or windowed, with grouped key and value heads.

use std::borrow::Cow;

use burn::Tensor;
use burn::backend::DispatchTensor;
use burn::tensor::Shape;
use burn_flex::{FlexTensor, Layout};
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::attention::{self as kernel, AttentionOutputs, AttentionProblem, StepProblem};

use crate::binding::cpu::{Number, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::check::state_type;
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
    let problem = validate(&q, &k, &v, &options)?;
    let operation = Attention(problem);
    if binding::available(&operation, options.path, &q) {
        let [o, _] = binding::run(operation, Operands::new(q, k, v))?;
        return Ok(Tensor::from_dispatch(o));
    }
    Ok(portable(q, k, v, &operation.0))
}

/// Attention of one new token over a cache that already holds it: `q: [B, H, D]`, `k: [B, S, HK, D]`,
/// `v: [B, S, HK, V]` `-> [B, H, V]`. The order of the cached tokens does not matter, so the slots of a
/// ring buffer may be passed as they lie; all of them are seen, whatever `options.window`.
///
/// # Errors
/// As [`attention`].
pub fn attention_step(q: Tensor<3>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Result<Tensor<3>, Error> {
    let options = AttentionOptions { window: None, cu_seqlens: None, ..options };
    let query = q.clone().unsqueeze_dim::<4>(1);
    let problem = validate(&query, &k, &v, &options)?;
    let operation = AttentionStep(problem);
    if binding::available(&operation, options.path, &q) {
        let [o] = binding::run(operation, Operands::new(q, k, v))?;
        return Ok(Tensor::from_dispatch(o));
    }
    Ok(portable(query, k, v, &operation.0).squeeze_dim(1))
}

/// Checks the arguments and finds their sizes.
fn validate(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    options: &AttentionOptions,
) -> Result<AttentionProblem, Error> {
    check::not_empty("q", q)?;
    check::not_empty("v", v)?;
    let [batch, time, heads, dim] = q.dims();
    let [_, source, kv_heads, value_dim] = v.dims();
    check::shape("k", k, [("batch", batch), ("time", source), ("kv_heads", kv_heads), ("head_dim", dim)])?;
    let axes = [("batch", batch), ("time", source), ("kv_heads", kv_heads), ("value_dim", value_dim)];
    check::shape("v", v, axes)?;
    check::same_type("k", k, "q", q.dtype())?;
    check::same_type("v", v, "q", q.dtype())?;
    check::grouped("q", q.dims().to_vec(), heads, kv_heads)?;
    check::positive("window", options.window)?;
    if source < time || (options.cu_seqlens.is_some() && source != time) {
        let found = k.dims().to_vec();
        return Err(Error::Shape { argument: "k", found, expected: format!("the {time} tokens of `q`") });
    }
    check::sequences(options.cu_seqlens.as_deref(), batch, time)?;

    let scale = options.scale.unwrap_or((dim as f64).powf(-0.5)) as f32;
    let (window, cu_seqlens) = (options.window, options.cu_seqlens.clone());
    Ok(AttentionProblem {
        batch,
        time,
        kv_time: source,
        heads,
        kv_heads,
        key_dim: dim,
        value_dim,
        scale,
        window,
        cu_seqlens,
    })
}

/// All scores in tensor operations.
fn portable(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, problem: &AttentionProblem) -> Tensor<4> {
    let (dtype, float) = (q.dtype(), state_type(q.dtype()));
    let q = q.cast(float).mul_scalar(problem.scale);
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
    o.cast(dtype)
}

operands! {
    /// The tensors of attention.
    struct Operands { q, k, v }
}

impl Operands<DispatchTensor> {
    fn new<const D: usize>(q: Tensor<D>, k: Tensor<4>, v: Tensor<4>) -> Self {
        Self { q: q.into_dispatch(), k: k.into_dispatch(), v: v.into_dispatch() }
    }
}

/// Attention of all queries; the second output is the log-sum-exp of the scores, for the backward pass alone.
#[derive(Debug, Clone)]
struct Attention(AttentionProblem);

/// Attention of the last token of each sequence, which sees all keys.
#[derive(Debug, Clone)]
struct AttentionStep(AttentionProblem);

impl Attention {
    fn cpu_outputs<E: Number>(&self, x: &Operands<FlexTensor>) -> KernelResult<[FlexTensor; 2]> {
        let out = kernel::forward::<E>(&self.0, slice(&x.q), slice(&x.k), slice(&x.v))?;
        Ok([values(out.o), values(out.lse)])
    }
}

impl Operation for Attention {
    type Operands = Operands<()>;

    const SAVED: &'static [usize] = &[0, 1];

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.q
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        let p = &self.0;
        vec![OutputSpec::typed([p.batch, p.time, p.heads, p.value_dim]), OutputSpec::f32([p.batch, p.heads, p.time])]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        Ok(Forward::of(self.cpu_outputs::<E>(&x)?))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let outputs = AttentionOutputs { o: slice::<E>(&saved[0]).to_vec(), lse: slice(&saved[1]).to_vec() };
        let (q, k, v) = (slice(&x.q), slice(&x.k), slice(&x.v));
        let grads = kernel::backward(&self.0, q, k, v, &outputs, slice(&d[0]))?;
        Ok(Operands { q: Some(values(grads.dq)), k: Some(values(grads.dk)), v: Some(values(grads.dv)) })
    }

    /// For devices with shared memory enough, and unless there are too few queries: a block of them would be mostly empty,
    /// and too few cubes would walk all of the keys.
    #[cfg(feature = "cube")]
    fn on_gpu(&self, client: &Client, storage: Storage) -> bool {
        const FEWEST_QUERIES: usize = 16;
        self.0.time >= FEWEST_QUERIES && gpu::attention::fits(client, &self.0, storage)
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::attention::forward(client, &self.0, &gpu_inputs(x))?;
        Ok(vec![out.o, out.lse])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        saved: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        let outputs = gpu::attention::Outputs { o: saved[0].clone(), lse: saved[1].clone() };
        let grads = gpu::attention::backward(client, &self.0, &gpu_inputs(x), &outputs, &d[0])?;
        Ok(Operands { q: Some(grads.dq), k: Some(grads.dk), v: Some(grads.dv) })
    }
}

#[cfg(feature = "cube")]
fn gpu_inputs(x: &Operands<Buffer>) -> gpu::attention::Inputs<'_> {
    gpu::attention::Inputs { q: &x.q, k: &x.k, v: &x.v }
}

impl Operation for AttentionStep {
    type Operands = Operands<()>;

    const SAVED: &'static [usize] = &[0];

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.q
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        let p = &self.0;
        vec![OutputSpec::typed([p.batch, p.heads, p.value_dim])]
    }

    /// The filled slots of a cache are read where they lie in it; they need not be copied for every token.
    fn cpu_layout(&self, x: &mut Operands<FlexTensor>, keep: bool) -> Cow<'_, Self> {
        if !keep
            && let (Some(k), Some(v)) = (cache(&x.k), cache(&x.v))
            && capacity(&k) == capacity(&v)
        {
            (x.k, x.v) = (k, v);
        }
        Cow::Borrowed(self)
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, keep: bool) -> KernelResult<Forward<FlexTensor>> {
        let p = &self.0;
        if keep {
            let [o, lse] = Attention(p.clone()).cpu_outputs::<E>(&x)?;
            return Ok(Forward { outputs: vec![o], kept: vec![lse] });
        }
        let step = StepProblem {
            batch: p.batch,
            capacity: capacity(&x.k),
            heads: p.heads,
            kv_heads: p.kv_heads,
            key_dim: p.key_dim,
            value_dim: p.value_dim,
            scale: p.scale,
        };
        let lengths = vec![p.kv_time; p.batch];
        Ok(Forward::of([values(kernel::step::<E>(&step, slice(&x.q), slice(&x.k), slice(&x.v), &lengths)?)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        Attention(self.0.clone()).cpu_backward::<E>(x, saved, d)
    }
}

/// The `[batch, capacity, heads, features]` of which a tensor is the first slots.
fn cache(part: &FlexTensor) -> Option<FlexTensor> {
    let layout = part.layout();
    let &[batch, slots, heads, features] = layout.shape().as_slice() else { return None };
    let between = usize::try_from(*layout.strides().first()?).ok()?;
    let capacity = between / (heads * features);
    let whole = Layout::contiguous(Shape::from([batch, capacity, heads, features]));
    let inside = layout.start_offset() == 0
        && slots <= capacity
        && whole.strides() == layout.strides()
        && whole.num_elements() * part.dtype().size() <= part.bytes().len();
    (inside && !part.is_contiguous()).then(|| part.clone().with_layout(whole))
}

fn capacity(cache: &FlexTensor) -> usize {
    cache.layout().shape()[1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::DType;

    #[test]
    fn the_first_slots_of_a_cache_are_found_in_it() {
        let whole = FlexTensor::zeros([2, 16, 3, 4].into(), DType::F32);
        let found = cache(&whole.narrow(1, 0, 9)).expect("a part of a cache");
        assert_eq!((found.layout().shape().as_slice(), found.is_contiguous()), (&[2, 16, 3, 4][..], true));
        // All of it, other slots, and a part of something else go their usual way.
        assert!(cache(&whole).is_none());
        assert!(cache(&whole.narrow(1, 4, 9)).is_none());
        assert!(cache(&whole.narrow(2, 0, 2)).is_none());
        assert!(cache(&whole.transpose(1, 2)).is_none());
    }
}
