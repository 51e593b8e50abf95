//! Softmax attention: slots to the kernels' structs.

use burn::tensor::DType;
use thalweg_kernels::Error;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_kernels::gpu::attention::{self, Gradients, Inputs, Outputs};
use thalweg_kernels::gpu::{Buffer, Client};

use super::{Buffers, required, storage};

/// Queries below which a block of them would be mostly empty, and too few cubes would walk all of the keys.
const FEWEST: usize = 16;

/// Whether the kernels are for this problem on this device.
pub(in crate::native) fn suits(client: &Client, problem: &AttentionProblem, dtype: DType) -> bool {
    problem.time >= FEWEST && attention::fits(client, problem, storage(dtype))
}

fn inputs(x: &Buffers) -> Inputs<'_> {
    Inputs { q: required(x, 0), k: required(x, 1), v: required(x, 2) }
}

pub(super) fn forward(client: &Client, problem: &AttentionProblem, x: &Buffers) -> Result<[Buffer; 2], Error> {
    let Outputs { o, lse } = attention::forward(client, problem, &inputs(x))?;
    Ok([o, lse])
}

pub(super) fn backward(
    client: &Client,
    problem: &AttentionProblem,
    x: &Buffers,
    [o, lse]: [&Buffer; 2],
    d_o: &Buffer,
) -> Result<Buffers, Error> {
    let outputs = Outputs { o: o.clone(), lse: lse.clone() };
    let Gradients { dq, dk, dv } = attention::backward(client, problem, &inputs(x), &outputs, d_o)?;
    Ok([Some(dq), Some(dk), Some(dv), None, None, None, None])
}
