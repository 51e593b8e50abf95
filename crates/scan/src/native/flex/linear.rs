//! Linear layers: slots to the kernel's slices.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::linear::{self, LinearProblem};

use super::{Number, Operands, cotangent, gradient, optional, required, slice, stateless};
use crate::native::backend::Forward;

/// A weight that is a view of its transpose is taken as that lies.
pub(super) fn as_stored(problem: &LinearProblem, operands: &mut Operands) -> LinearProblem {
    let turned =
        operands[1].as_ref().filter(|w| problem.blocks == 1 && w.layout().num_dims() == 2 && !w.is_contiguous());
    match turned.map(|w| w.transpose(0, 1)).filter(FlexTensor::is_contiguous) {
        Some(weight) => {
            operands[1] = Some(weight);
            problem.with_transposed_weight()
        }
        None => *problem,
    }
}

pub(super) fn forward<E: Number>(problem: &LinearProblem, operands: Operands) -> Result<Forward<Flex>, Error> {
    let (x, weight) = (required::<E>(&operands, 0), required(&operands, 1));
    let y = linear::forward(problem, x, weight, optional(&operands, 2))?;
    Ok(stateless(y, &operands, Some(problem.blocks * problem.outputs)))
}

pub(super) fn backward<E: Number>(
    problem: &LinearProblem,
    operands: Operands,
    d_y: Option<FlexTensor>,
) -> Result<Operands, Error> {
    let (x, weight) = (required::<E>(&operands, 0), required(&operands, 1));
    let d_y = cotangent::<E>(d_y, problem.rows * problem.blocks * problem.outputs);
    let grads = linear::backward(problem, x, weight, slice(&d_y), operands[2].is_some())?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(grads.dx), &operands, 0);
    let d_weight = gradient(Some(grads.d_weight), &operands, 1);
    gradients[1] = d_weight.map(|d| if problem.transposed { d.transpose(0, 1) } else { d });
    gradients[2] = gradient(grads.d_bias, &operands, 2);
    Ok(gradients)
}
