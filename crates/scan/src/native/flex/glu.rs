//! Gated units: slots to the kernel's slices.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::glu::{self, Activation};

use super::{Number, Operands, cotangent, gradient, optional, required, slice, stateless};
use crate::native::backend::Forward;

pub(super) fn forward<E: Number>(activation: Activation, operands: Operands) -> Result<Forward<Flex>, Error> {
    let y = glu::forward::<E>(activation, required(&operands, 0), optional(&operands, 1))?;
    Ok(stateless(y, &operands, None))
}

pub(super) fn backward<E: Number>(
    activation: Activation,
    operands: Operands,
    d_y: Option<FlexTensor>,
) -> Result<Operands, Error> {
    let x: &[E] = required(&operands, 0);
    let d_y = cotangent::<E>(d_y, x.len());
    let grads = glu::backward::<E>(activation, x, optional(&operands, 1), slice(&d_y))?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(grads.dx), &operands, 0);
    gradients[1] = gradient(grads.dz, &operands, 1);
    Ok(gradients)
}
