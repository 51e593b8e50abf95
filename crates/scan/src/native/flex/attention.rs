//! Softmax attention: slots to the kernel's structs.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::attention::{self, AttentionGradients, AttentionOutputs, AttentionProblem, StepProblem};

use super::{Number, Operands, gradient, required, slice, tensor};
use crate::native::backend::Forward;

pub(super) fn forward<E: Number>(
    problem: &AttentionProblem,
    operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    let p = problem;
    let (q, k, v) = (required::<E>(&operands, 0), required(&operands, 1), required(&operands, 2));
    let shape = [p.batch, p.time, p.heads, p.value_dim];
    if p.time == 1 && !keep && p.window.is_none_or(|window| window >= p.kv_time) {
        let step = StepProblem {
            batch: p.batch,
            capacity: p.kv_time,
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
