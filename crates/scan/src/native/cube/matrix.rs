//! The matrix-state recurrences: slots to the kernels' structs.

use thalweg_kernels::Error;
use thalweg_kernels::gpu::matrix::{self, Gate, Gradients, Inputs, Outputs, Write};
use thalweg_kernels::gpu::{Buffer, Client};
use thalweg_kernels::matrix::MatrixProblem;

use super::{Buffers, required};
use crate::native::operation::{GateKind, WriteKind};

/// Slot of the initial state.
pub(super) const STATE: usize = 6;

fn inputs(x: &Buffers, gate: GateKind, write: WriteKind) -> Inputs<'_> {
    Inputs {
        q: required(x, 0),
        k: required(x, 1),
        v: required(x, 2),
        gate: match gate {
            GateKind::None => Gate::None,
            GateKind::Constant => Gate::Constant(required(x, 3)),
            GateKind::Head => Gate::Head(required(x, 3)),
            GateKind::Key => Gate::Key(required(x, 3)),
        },
        write: match write {
            WriteKind::Additive => Write::Additive,
            WriteKind::Delta => Write::Delta { beta: required(x, 4) },
            WriteKind::LowRank => Write::LowRank { a: required(x, 4), b: required(x, 5) },
        },
        initial_state: x[STATE].as_ref(),
    }
}

pub(super) fn forward(
    client: &Client,
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    x: &Buffers,
) -> Result<[Buffer; 2], Error> {
    let Outputs { o, final_state } = matrix::forward(client, problem, &inputs(x, gate, write))?;
    Ok([o, final_state])
}

pub(super) fn step(
    client: &Client,
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    x: &Buffers,
    state: &Buffer,
) -> Result<Buffer, Error> {
    matrix::step(client, problem, &inputs(x, gate, write), state)
}

pub(super) fn backward(
    client: &Client,
    problem: &MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    x: &Buffers,
    d_o: Option<&Buffer>,
    d_final_state: &Buffer,
) -> Result<Buffers, Error> {
    let Gradients { dq, dk, dv, dg, dbeta, da, db, d_initial_state } =
        matrix::backward(client, problem, &inputs(x, gate, write), d_o, Some(d_final_state))?;
    Ok([Some(dq), Some(dk), Some(dv), dg, dbeta.or(da), db, d_initial_state])
}
