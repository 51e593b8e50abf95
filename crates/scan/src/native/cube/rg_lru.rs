//! The RG-LRU: slots to the kernel's structs.

use thalweg_kernels::gpu::rg_lru::{self, RgLruGradients, RgLruInputs, RgLruOutputs};
use thalweg_kernels::gpu::{Buffer, Client};
use thalweg_kernels::{Error, ScanProblem};

use super::{Buffers, required};

fn inputs(x: &Buffers) -> RgLruInputs<'_> {
    RgLruInputs {
        x: required(x, 0),
        recurrent_gate: required(x, 1),
        input_gate: required(x, 2),
        a_param: required(x, 3),
        reset: x[4].as_ref(),
        initial_state: x[5].as_ref(),
    }
}

pub(super) fn forward(client: &Client, problem: &ScanProblem, x: &Buffers) -> Result<[Buffer; 2], Error> {
    let RgLruOutputs { o, final_state } = rg_lru::forward(client, problem, &inputs(x))?;
    Ok([o, final_state])
}

pub(super) fn backward(
    client: &Client,
    problem: &ScanProblem,
    x: &Buffers,
    o: &Buffer,
    d_o: &Buffer,
    d_final_state: &Buffer,
) -> Result<Buffers, Error> {
    let RgLruGradients { dx, d_recurrent_gate, d_input_gate, d_a_param, d_initial_state } =
        rg_lru::backward(client, problem, &inputs(x), o, d_o, Some(d_final_state))?;
    Ok([Some(dx), Some(d_recurrent_gate), Some(d_input_gate), Some(d_a_param), None, Some(d_initial_state), None])
}
