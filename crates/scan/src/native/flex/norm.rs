//! Norms: slots to the kernel's slices.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::glu::Activation;
use thalweg_kernels::norm::{self, NormInputs, NormProblem};

use super::{Number, Operands, cotangent, gradient, optional, required, slice, stateless};
use crate::native::backend::Forward;

fn inputs<E: Number>(gate: Activation, operands: &Operands) -> NormInputs<'_, E> {
    NormInputs {
        x: required(operands, 0),
        weight: optional(operands, 1),
        gate: optional(operands, 2).map(|z| (gate, z)),
    }
}

pub(super) fn forward<E: Number>(
    problem: &NormProblem,
    gate: Activation,
    operands: Operands,
) -> Result<Forward<Flex>, Error> {
    let y = norm::forward::<E>(problem, &inputs(gate, &operands))?;
    Ok(stateless(y, &operands, None))
}

pub(super) fn backward<E: Number>(
    problem: &NormProblem,
    gate: Activation,
    operands: Operands,
    d_y: Option<FlexTensor>,
) -> Result<Operands, Error> {
    let inputs = inputs::<E>(gate, &operands);
    let d_y = cotangent::<E>(d_y, inputs.x.len());
    let grads = norm::backward(problem, &inputs, slice(&d_y))?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(grads.dx), &operands, 0);
    gradients[1] = gradient(grads.d_weight, &operands, 1);
    gradients[2] = gradient(grads.dz, &operands, 2);
    Ok(gradients)
}
