//! The matrix-state recurrences: slots to the kernels' structs.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::Error;
use thalweg_kernels::matrix::{
    self, Gate, KeepStates, MatrixGradients, MatrixInputs, MatrixOutputs, MatrixProblem, Write,
};

use super::{Number, Operands, gradient, optional, required, slice, tensor};
use crate::native::backend::Forward;
use crate::native::operation::{GateKind, WriteKind};

/// Slot of the initial state.
const STATE: usize = 6;

fn inputs<E: Number>(operands: &Operands, gate: GateKind, write: WriteKind) -> MatrixInputs<'_, E> {
    MatrixInputs {
        q: required(operands, 0),
        k: required(operands, 1),
        v: required(operands, 2),
        gate: match gate {
            GateKind::None => Gate::None,
            GateKind::Constant => Gate::Constant(required(operands, 3)),
            GateKind::Head => Gate::Head(required(operands, 3)),
            GateKind::Key => Gate::Key(required(operands, 3)),
        },
        write: match write {
            WriteKind::Additive => Write::Additive,
            WriteKind::Delta => Write::Delta { beta: required(operands, 4) },
            WriteKind::LowRank => Write::LowRank { a: required(operands, 4), b: required(operands, 5) },
        },
        initial_state: optional(operands, STATE),
    }
}

pub(super) fn forward<E: Number>(
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    mut operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    if problem.time == 1 && problem.cu_seqlens.is_none() && !keep {
        let state = operands[STATE].take();
        return step::<E>(problem, gate, write, &operands, state);
    }
    let keep = if keep { KeepStates::Yes } else { KeepStates::No };
    let MatrixOutputs { o, final_state, chunk_states } =
        matrix::forward::<E>(problem, &inputs(&operands, gate, write), keep)?;
    let saved = chunk_states.map(|states| {
        let length = states.len();
        tensor(states, [length])
    });
    Ok(Forward {
        o: tensor(o, problem.value_shape()),
        final_state: tensor(final_state, problem.state_shape()),
        saved: saved.into_iter().collect(),
    })
}

/// One token: the state is advanced in place if nobody else holds it.
fn step<E: Number>(
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    operands: &Operands,
    state: Option<FlexTensor>,
) -> Result<Forward<Flex>, Error> {
    let inputs = inputs::<E>(operands, gate, write);
    let shape = problem.state_shape();
    let length: usize = shape.iter().product();
    let mut state = match state {
        // A part of a larger buffer is copied: its storage is not the state alone.
        Some(state) if state.bytes().len() == length * size_of::<f32>() => state,
        Some(state) => tensor(slice::<f32>(&state).to_vec(), shape),
        None => tensor(vec![0f32; length], shape),
    };
    let o = matrix::step(problem, &inputs, state.storage_mut::<f32>())?;
    Ok(Forward { o: tensor(o, problem.value_shape()), final_state: state, saved: Vec::new() })
}

pub(super) fn backward<E: Number>(
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    operands: Operands,
    saved: Vec<FlexTensor>,
    d_o: Option<FlexTensor>,
    d_final_state: FlexTensor,
) -> Result<Operands, Error> {
    let d_o = d_o.unwrap_or_else(|| FlexTensor::zeros(problem.value_shape().into(), E::dtype()));
    let MatrixGradients { dq, dk, dv, dg, dbeta, da, db, d_initial_state } = matrix::backward::<E>(
        problem,
        &inputs(&operands, gate, write),
        slice(&d_o),
        Some(slice(&d_final_state)),
        saved.first().map(slice),
    )?;
    let fourth = match write {
        WriteKind::LowRank => gradient(da, &operands, 4),
        _ => gradient(dbeta, &operands, 4),
    };
    Ok([
        gradient(Some(dq), &operands, 0),
        gradient(Some(dk), &operands, 1),
        gradient(Some(dv), &operands, 2),
        gradient(dg, &operands, 3),
        fourth,
        gradient(db, &operands, 5),
        gradient(d_initial_state, &operands, STATE),
    ])
}
