//! The short convolution: slots to the kernel's structs.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::short_conv::{self, ConvGradients, ConvInputs, ConvOutputs, ConvProblem};

use super::{Number, Operands, gradient, optional, required, slice, tensor};
use crate::native::backend::Forward;

/// Slot of the state.
const STATE: usize = 3;

fn inputs<E: Number>(operands: &Operands) -> ConvInputs<'_, E> {
    ConvInputs {
        x: required(operands, 0),
        weight: required(operands, 1),
        bias: optional(operands, 2),
        state: optional(operands, STATE),
    }
}

fn shape(problem: &ConvProblem) -> [usize; 3] {
    [problem.shape.batch, problem.shape.time, problem.shape.channels]
}

pub(super) fn forward<E: Number>(problem: &ConvProblem, operands: Operands) -> Result<Forward<Flex>, Error> {
    let ConvOutputs { y, state } = short_conv::forward::<E>(problem, &inputs(&operands))?;
    let (channels, reach) = (problem.shape.channels, problem.width - 1);
    let sequences = state.len() / (channels * reach);
    Ok(Forward {
        o: tensor(y, shape(problem)),
        final_state: tensor(state, [sequences, channels, reach]),
        saved: Vec::new(),
    })
}

pub(super) fn backward<E: Number>(
    problem: &ConvProblem,
    operands: Operands,
    d_y: Option<FlexTensor>,
    d_state: FlexTensor,
) -> Result<Operands, Error> {
    let d_y = d_y.unwrap_or_else(|| FlexTensor::zeros(shape(problem).into(), E::dtype()));
    let ConvGradients { dx, dweight, dbias, dstate } =
        short_conv::backward::<E>(problem, &inputs(&operands), slice(&d_y), Some(slice(&d_state)))?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(dx), &operands, 0);
    gradients[1] = gradient(Some(dweight), &operands, 1);
    gradients[2] = gradient(Some(dbias), &operands, 2);
    gradients[STATE] = gradient(Some(dstate), &operands, STATE);
    Ok(gradients)
}
