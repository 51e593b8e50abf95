//! Softmax attention: slots to the kernel's structs.

use burn::backend::Flex;
use burn::tensor::Shape;
use burn_flex::{FlexTensor, Layout};
use thalweg_kernels::Error;
use thalweg_kernels::attention::{self, AttentionGradients, AttentionOutputs, AttentionProblem, StepProblem};

use super::{Number, Operands, gradient, required, slice, tensor};
use crate::native::backend::Forward;

/// One query of each sequence, which sees all keys.
fn is_step(p: &AttentionProblem) -> bool {
    p.time == 1 && p.window.is_none_or(|window| window >= p.kv_time)
}

/// Where a step is given the filled slots of a cache, puts the whole cache in their place: the kernel reads them where they
/// lie, and they need not be copied for every token.
pub(super) fn as_stored(problem: &AttentionProblem, operands: &mut Operands) {
    if !is_step(problem) {
        return;
    }
    let [k, v] = [1, 2].map(|slot| operands[slot].as_ref().and_then(cache));
    if let (Some(k), Some(v)) = (k, v)
        && capacity(&k) == capacity(&v)
    {
        (operands[1], operands[2]) = (Some(k), Some(v));
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

pub(super) fn forward<E: Number>(
    problem: &AttentionProblem,
    operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    let p = problem;
    let (q, k, v) = (required::<E>(&operands, 0), required(&operands, 1), required(&operands, 2));
    let shape = [p.batch, p.time, p.heads, p.value_dim];
    if is_step(p) && !keep {
        let step = StepProblem {
            batch: p.batch,
            capacity: operands[1].as_ref().map_or(p.kv_time, capacity),
            heads: p.heads,
            kv_heads: p.kv_heads,
            key_dim: p.key_dim,
            value_dim: p.value_dim,
            scale: p.scale,
        };
        let o = attention::step(&step, q, k, v, &vec![p.kv_time; p.batch])?;
        return Ok(Forward { o: tensor(o, shape), final_state: tensor(vec![0f32], [1]), saved: Vec::new() });
    }
    let AttentionOutputs { o, lse } = attention::forward(problem, q, k, v)?;
    let (o, lse) = (tensor(o, shape), tensor(lse, [p.batch, p.heads, p.time]));
    let saved = if keep { vec![o.clone(), lse.clone()] } else { Vec::new() };
    Ok(Forward { o, final_state: lse, saved })
}

pub(super) fn backward<E: Number>(
    problem: &AttentionProblem,
    operands: Operands,
    saved: Vec<FlexTensor>,
    d_o: Option<FlexTensor>,
) -> Result<Operands, Error> {
    let (Some(d_o), [o, lse]) = (d_o, &saved[..]) else { unreachable!("attention has one output, which it saves") };
    let outputs = AttentionOutputs { o: slice::<E>(o).to_vec(), lse: slice(lse).to_vec() };
    let (q, k, v) = (required::<E>(&operands, 0), required(&operands, 1), required(&operands, 2));
    let AttentionGradients { dq, dk, dv } = attention::backward(problem, q, k, v, &outputs, slice(&d_o))?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(dq), &operands, 0);
    gradients[1] = gradient(Some(dk), &operands, 1);
    gradients[2] = gradient(Some(dv), &operands, 2);
    Ok(gradients)
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
