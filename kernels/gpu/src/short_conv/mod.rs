//! The short convolution on a GPU: what [`thalweg_kernels::short_conv`] computes, on tensors in a device's memory.
//!
//! One launch forward and one backward, which read every input and write every output once, but for the few tokens that
//! neighbouring segments share; backwards two more sum the gradients of the weights over the segments, in a fixed order.

mod kernels;

use crate::Client;
use cubecl::ir::AddressType;
use cubecl::prelude::CubeDim;

use crate::buffer::{Buffer, Storage};
use crate::chunks::Chunks;
use crate::device::{address_type, grid};
use crate::reduce::sum_all_rows;
use crate::scan::CheckBuffers;
use kernels::{GradientsLaunch, InputsLaunch, Plan};
use thalweg_kernels::Error;
use thalweg_kernels::Sequences;
use thalweg_kernels::short_conv::ConvProblem;

const UNITS: usize = 64;

/// Tokens of a segment.
const SEGMENT: usize = 32;

/// The tensors that go in; all but `x` are f32.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[batch, time, channels]`.
    pub x: &'a Buffer,
    /// `[channels, width]`.
    pub weight: &'a Buffer,
    /// `[channels]`.
    pub bias: Option<&'a Buffer>,
    /// The inputs before the first token, `[sequences, channels, width - 1]`, oldest first; zero where absent.
    pub state: Option<&'a Buffer>,
}

/// The tensors that come out.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// `[batch, time, channels]`.
    pub y: Buffer,
    /// The new state, `[sequences, channels, width - 1]`, f32.
    pub state: Buffer,
}

/// Gradients of [`Inputs`], each of the shape of its input; of bias and state also where there are none.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Gradients {
    pub dx: Buffer,
    pub dweight: Buffer,
    pub dbias: Buffer,
    pub dstate: Buffer,
}

/// The convolution over every sequence, and the state for going on.
///
/// # Errors
/// As [`thalweg_kernels::short_conv::forward`]; [`Error::Device`] if the device has not the element type.
pub fn forward(client: &Client, problem: &ConvProblem, inputs: &Inputs) -> Result<Outputs, Error> {
    let launch = Launch::new(client, problem, inputs)?;
    let y = Buffer::output(client, inputs.x.storage, inputs.x.len);
    let state = Buffer::output(client, Storage::F32, launch.state_len());
    // Safety: the kernel stays within the tokens of the table and the channels, and the buffers have been checked.
    unsafe {
        kernels::forward_kernel::launch_unchecked(
            client,
            grid(client, launch.units().div_ceil(UNITS))?,
            CubeDim::new_1d(UNITS as u32),
            launch.address,
            launch.vector,
            launch.inputs(),
            y.arg(),
            state.arg(),
            Plan::new(problem.width, problem.activation, [inputs.bias.is_some(), inputs.state.is_some(), false]),
            inputs.x.storage.elem_type(),
        );
    }
    Ok(Outputs { y, state })
}

/// Gradients of everything that [`forward`] takes, given the cotangents of `y` and of the new state (zero where absent).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &ConvProblem,
    inputs: &Inputs,
    dy: &Buffer,
    d_new_state: Option<&Buffer>,
) -> Result<Gradients, Error> {
    let launch = Launch::new(client, problem, inputs)?;
    problem.shape.check_buffer("dy", dy, inputs.x.storage)?;
    launch.check_state("d_new_state", d_new_state)?;
    let (channels, width) = (problem.shape.channels, problem.width);
    let sums = |inner: usize| Buffer::output(client, Storage::F32, launch.segments.count * inner);
    let (dweight, dbias) = (sums(channels * width), sums(channels));
    let dx = Buffer::output(client, inputs.x.storage, inputs.x.len);
    let dstate = Buffer::output(client, Storage::F32, launch.state_len());
    let there = [inputs.bias.is_some(), inputs.state.is_some(), d_new_state.is_some()];
    // Safety: as in `forward`.
    unsafe {
        kernels::backward_kernel::launch_unchecked(
            client,
            grid(client, launch.units().div_ceil(UNITS))?,
            CubeDim::new_1d(UNITS as u32),
            launch.address,
            launch.vector,
            launch.inputs(),
            dy.arg(),
            d_new_state.unwrap_or(inputs.weight).arg(),
            GradientsLaunch::new(dx.arg(), dweight.arg(), dbias.arg(), dstate.arg()),
            Plan::new(width, problem.activation, there),
            inputs.x.storage.elem_type(),
        );
    }
    let dweight = sum_all_rows(client, dweight, channels * width)?;
    Ok(Gradients { dx, dweight, dbias: sum_all_rows(client, dbias, channels)?, dstate })
}

/// What both passes launch.
struct Launch<'a> {
    problem: &'a ConvProblem,
    x: &'a Inputs<'a>,
    sequences: Sequences,
    segments: Chunks,
    address: AddressType,
    /// Channels that a unit computes: two, with which a warp reads whole lines of 16-bit elements. Windows and sums of more would
    /// take the registers of other warps.
    vector: usize,
}

impl<'a> Launch<'a> {
    fn new(client: &Client, problem: &'a ConvProblem, x: &'a Inputs<'a>) -> Result<Self, Error> {
        let sequences = problem.check_sizes()?;
        let (channels, storage) = (problem.shape.channels, x.x.storage);
        problem.shape.check_buffer("x", x.x, storage)?;
        x.weight.check("weight", Storage::F32, &[channels, problem.width])?;
        if let Some(bias) = x.bias {
            bias.check("bias", Storage::F32, &[channels])?;
        }
        let segments = Chunks::new(client, &sequences, SEGMENT);
        let address = address_type(client, storage, [x.x.len, segments.count * channels * problem.width])?;
        let vector = if channels.is_multiple_of(2) { 2 } else { 1 };
        let launch = Self { problem, x, sequences, segments, address, vector };
        launch.check_state("state", x.state)?;
        Ok(launch)
    }

    fn state_len(&self) -> usize {
        self.sequences.count() * self.problem.shape.channels * (self.problem.width - 1)
    }

    fn check_state(&self, argument: &'static str, x: Option<&Buffer>) -> Result<(), Error> {
        let shape = [self.sequences.count(), self.problem.shape.channels, self.problem.width - 1];
        x.map_or(Ok(()), |x| x.check(argument, Storage::F32, &shape))
    }

    fn units(&self) -> usize {
        self.segments.count * (self.problem.shape.channels / self.vector)
    }

    fn inputs<I: cubecl::prelude::Float, N: cubecl::prelude::Size>(&self) -> InputsLaunch<I, N> {
        let or = |x: Option<&Buffer>| x.unwrap_or(self.x.weight).arg();
        let (weight, bias, state) = (self.x.weight.arg(), or(self.x.bias), or(self.x.state));
        InputsLaunch::new(
            self.x.x.arg(),
            weight,
            bias,
            state,
            self.segments.table.arg(),
            self.segments.cut(),
            self.problem.shape.channels,
        )
    }
}
