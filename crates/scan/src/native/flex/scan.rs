//! The element-wise recurrence: slots to the kernel's structs.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::elementwise_scan::{self, ScanGate, ScanGradients, ScanInputs, ScanOutputs};
use thalweg_kernels::{Error, ScanProblem};

use super::{Number, Operands, gradient, optional, required, slice, tensor};
use crate::native::backend::Forward;

/// Slot of the initial state.
const STATE: usize = 2;

fn inputs<E: Number>(operands: &Operands, log: bool) -> ScanInputs<'_, E> {
    let gate = required(operands, 0);
    ScanInputs {
        gate: if log { ScanGate::Log(gate) } else { ScanGate::Linear(gate) },
        x: required(operands, 1),
        initial_state: optional(operands, STATE),
    }
}

pub(super) fn forward<E: Number>(
    problem: &ScanProblem,
    log: bool,
    operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    let ScanOutputs { o, final_state } = elementwise_scan::forward::<E>(problem, &inputs(&operands, log))?;
    let sequences = final_state.len() / problem.channels;
    let o = tensor(o, [problem.batch, problem.time, problem.channels]);
    let saved = if keep { vec![o.clone()] } else { Vec::new() };
    Ok(Forward { o, final_state: tensor(final_state, [sequences, problem.channels]), saved })
}

pub(super) fn backward<E: Number>(
    problem: &ScanProblem,
    log: bool,
    operands: Operands,
    saved: Vec<FlexTensor>,
    d_o: Option<FlexTensor>,
    d_final_state: FlexTensor,
) -> Result<Operands, Error> {
    let shape = [problem.batch, problem.time, problem.channels];
    let d_o = d_o.unwrap_or_else(|| FlexTensor::zeros(shape.into(), E::dtype()));
    let [o] = &saved[..] else { unreachable!("the forward pass saves its output") };
    let ScanGradients { dgate, dx, d_initial_state } = elementwise_scan::backward::<E>(
        problem,
        &inputs(&operands, log),
        slice(o),
        slice(&d_o),
        Some(slice(&d_final_state)),
    )?;
    let mut gradients: Operands = Default::default();
    gradients[0] = gradient(Some(dgate), &operands, 0);
    gradients[1] = gradient(Some(dx), &operands, 1);
    gradients[STATE] = gradient(Some(d_initial_state), &operands, STATE);
    Ok(gradients)
}
