//! The short convolution: slots to the kernels' structs.

use thalweg_kernels::Error;
use thalweg_kernels::gpu::short_conv::{self, Gradients, Inputs, Outputs};
use thalweg_kernels::gpu::{Buffer, Client};
use thalweg_kernels::short_conv::ConvProblem;

use super::{Buffers, required};

fn inputs(x: &Buffers) -> Inputs<'_> {
    Inputs { x: required(x, 0), weight: required(x, 1), bias: x[2].as_ref(), state: x[3].as_ref() }
}

pub(super) fn forward(client: &Client, problem: &ConvProblem, x: &Buffers) -> Result<[Buffer; 2], Error> {
    let Outputs { y, state } = short_conv::forward(client, problem, &inputs(x))?;
    Ok([y, state])
}

pub(super) fn backward(
    client: &Client,
    problem: &ConvProblem,
    x: &Buffers,
    d_y: &Buffer,
    d_state: &Buffer,
) -> Result<Buffers, Error> {
    let Gradients { dx, dweight, dbias, dstate } =
        short_conv::backward(client, problem, &inputs(x), d_y, Some(d_state))?;
    Ok([Some(dx), Some(dweight), Some(dbias), Some(dstate), None, None, None])
}
