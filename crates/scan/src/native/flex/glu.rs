//! Gated units: slots to the kernel's slices.

use burn::backend::Flex;
use burn::tensor::DType;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::glu::{self, Activation};

use super::{Number, Operands, gradient, required, slice, tensor};
use crate::native::backend::Forward;

fn gate<E: Number>(operands: &Operands) -> Option<&[E]> {
    operands[1].as_ref().map(slice)
}

pub(super) fn forward<E: Number>(activation: Activation, operands: Operands) -> Result<Forward<Flex>, Error> {
    let y = glu::forward::<E>(activation, required(&operands, 0), gate(&operands))?;
    Ok(Forward {
        o: gradient(Some(y), &operands, 0).unwrap_or_else(|| FlexTensor::zeros([1].into(), E::dtype())),
        // There is no state; the operation's second result is a placeholder.
        final_state: FlexTensor::zeros([1].into(), DType::F32),
        saved: Vec::new(),
    })
}

pub(super) fn backward<E: Number>(
    activation: Activation,
    operands: Operands,
    d_y: Option<FlexTensor>,
) -> Result<Operands, Error> {
    let x: &[E] = required(&operands, 0);
    let d_y = d_y.unwrap_or_else(|| tensor(vec![E::default(); x.len()], [x.len()]));
    let grads = glu::backward::<E>(activation, x, gate(&operands), slice(&d_y))?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(grads.dx), &operands, 0);
    gradients[1] = gradient(grads.dz, &operands, 1);
    Ok(gradients)
}
