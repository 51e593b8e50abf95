//! The element-wise recurrence: slots to the kernel's structs.

use thalweg_kernels::gpu::elementwise_scan::{self, ScanGate, ScanGradients, ScanInputs, ScanOutputs};
use thalweg_kernels::gpu::{Buffer, Client};
use thalweg_kernels::{Error, ScanProblem};

use super::{Buffers, required};

/// Slot of the initial state.
const STATE: usize = 2;

fn inputs(x: &Buffers, log: bool) -> ScanInputs<'_> {
    let gate = required(x, 0);
    ScanInputs {
        gate: if log { ScanGate::Log(gate) } else { ScanGate::Linear(gate) },
        x: required(x, 1),
        initial_state: x[STATE].as_ref(),
    }
}

pub(super) fn forward(client: &Client, problem: &ScanProblem, log: bool, x: &Buffers) -> Result<[Buffer; 2], Error> {
    let ScanOutputs { o, final_state } = elementwise_scan::forward(client, problem, &inputs(x, log))?;
    Ok([o, final_state])
}

pub(super) fn backward(
    client: &Client,
    problem: &ScanProblem,
    log: bool,
    x: &Buffers,
    o: &Buffer,
    d_o: &Buffer,
    d_final_state: &Buffer,
) -> Result<Buffers, Error> {
    let ScanGradients { dgate, dx, d_initial_state } =
        elementwise_scan::backward(client, problem, &inputs(x, log), o, d_o, Some(d_final_state))?;
    Ok([Some(dgate), Some(dx), Some(d_initial_state), None, None, None, None])
}
