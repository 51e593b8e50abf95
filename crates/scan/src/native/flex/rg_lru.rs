//! The RG-LRU: slots to the kernel's structs.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::rg_lru::{self, RgLruGradients, RgLruInputs, RgLruOutputs};
use thalweg_kernels::{Error, ScanProblem};

use super::{Number, Operands, gradient, optional, required, slice, tensor};
use crate::native::backend::Forward;

/// Slot of the initial state.
const STATE: usize = 5;

fn inputs<'a, E: Number>(operands: &'a Operands, reset: Option<&'a [bool]>) -> RgLruInputs<'a, E> {
    RgLruInputs {
        x: required(operands, 0),
        recurrent_gate: required(operands, 1),
        input_gate: required(operands, 2),
        a_param: required(operands, 3),
        reset,
        initial_state: optional(operands, STATE),
    }
}

/// The resets as the kernel wants them: one byte per token, few beside the channels.
fn resets(operands: &Operands) -> Option<Vec<bool>> {
    optional::<f32>(operands, 4).map(|reset| reset.iter().map(|&x| x != 0.0).collect())
}

fn shape(problem: &ScanProblem) -> [usize; 3] {
    [problem.batch, problem.time, problem.channels]
}

pub(super) fn forward<E: Number>(
    problem: &ScanProblem,
    operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    let reset = resets(&operands);
    let RgLruOutputs { o, final_state } = rg_lru::forward::<E>(problem, &inputs(&operands, reset.as_deref()))?;
    let sequences = final_state.len() / problem.channels;
    let o = tensor(o, shape(problem));
    let saved = if keep { vec![o.clone()] } else { Vec::new() };
    Ok(Forward { o, final_state: tensor(final_state, [sequences, problem.channels]), saved })
}

pub(super) fn backward<E: Number>(
    problem: &ScanProblem,
    operands: Operands,
    saved: Vec<FlexTensor>,
    d_o: Option<FlexTensor>,
    d_final_state: FlexTensor,
) -> Result<Operands, Error> {
    let d_o = d_o.unwrap_or_else(|| FlexTensor::zeros(shape(problem).into(), E::dtype()));
    let [o] = &saved[..] else { unreachable!("the forward pass saves its output") };
    let reset = resets(&operands);
    let RgLruGradients { dx, d_recurrent_gate, d_input_gate, d_a_param, d_initial_state } = rg_lru::backward::<E>(
        problem,
        &inputs(&operands, reset.as_deref()),
        slice(o),
        slice(&d_o),
        Some(slice(&d_final_state)),
    )?;
    Ok([
        gradient(Some(dx), &operands, 0),
        gradient(Some(d_recurrent_gate), &operands, 1),
        gradient(Some(d_input_gate), &operands, 2),
        gradient(Some(d_a_param), &operands, 3),
        None,
        gradient(Some(d_initial_state), &operands, STATE),
        None,
    ])
}
