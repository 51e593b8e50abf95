//! The element-wise scans: one engine, and for each recurrence what it makes of its inputs.

mod carry;
pub mod complex_scan;
pub mod elementwise_scan;
mod engine;
pub(super) mod functions;
mod map;
pub mod rg_lru;

use cubecl::ir::{AddressType, ElemType, UIntKind};
use cubecl::prelude::*;

use super::{Buffer, Client, Storage};
use crate::device::{address_type, grid};
use map::{ElementMap, InputsLaunch, OutputsLaunch, Plan};
use thalweg_kernels::Error;
use thalweg_kernels::ScanProblem;
use thalweg_kernels::Sequences;

/// Units of a cube that has a processor to itself, where the device allows as many: a processor has registers for so many
/// of 128 each. Where there are more cubes than processors, two of half the units share one: one computes while the other
/// waits for its lanes.
const UNITS: usize = 512;
/// Units that hold more than this in registers, which have addresses and intermediate results to hold besides, are half
/// as many: they would spill. So are single channels of HGRN, the map with one constant: at its 80 registers
/// three cubes of half the units fit a processor, but only one of all.
const REGISTERS: usize = 90;

/// A scan to be launched: its tensors, in the order of [`map::Inputs`], and what its map needs.
struct Scan<'a> {
    inputs: Vec<&'a Buffer>,
    constants: Vec<&'a Buffer>,
    parameters: Vec<&'a Buffer>,
    reset: Option<&'a Buffer>,
    initial: Vec<&'a Buffer>,
    before: Vec<&'a Buffer>,
    outputs: usize,
    plan: Plan,
}

/// What a scan has written.
struct Scanned {
    outputs: Vec<Buffer>,
    last: Vec<Buffer>,
    sums: Vec<Buffer>,
}

fn args<'a, T: LaunchArg<RuntimeArg = BufferArg>>(buffers: impl IntoIterator<Item = &'a Buffer>) -> SequenceArg<T> {
    buffers.into_iter().map(Buffer::arg).collect()
}

impl Scan<'_> {
    fn run<M: ElementMap>(
        self,
        client: &Client,
        problem: &ScanProblem,
        sequences: &Sequences,
    ) -> Result<Scanned, Error> {
        let storage = self.inputs[0].storage;
        let address = address_type(client, storage, self.inputs.iter().map(|x| x.len))?;
        let (count, states) = (sequences.count(), sequences.count() * problem.channels);
        let buffers = |n: usize, storage, len| (0..n).map(|_| Buffer::output(client, storage, len)).collect::<Vec<_>>();
        let outputs = buffers(self.outputs, storage, sequences.tokens() * problem.channels);
        let last = buffers(self.plan.planes, Storage::F32, states);
        let sums = buffers(self.plan.sums, Storage::F32, states);
        // 16-bit elements in pairs, which are words of u32 where the device takes them for such: a warp reads 128 bytes at
        // once.
        let words = client.properties().features.memory_reinterpret;
        let vector = if words && storage.size() == 2 && problem.channels.is_multiple_of(2) { 2 } else { 1 };
        let longest = (0..count).map(|n| sequences.range(n).len()).max().unwrap_or(1);
        let packed = problem.cu_seqlens.is_some();
        let extra = if packed { 8 } else { 0 } + if address == AddressType::U64 { 16 } else { 0 };
        let large = self.plan.registers(vector, storage.size()) + extra > REGISTERS;
        let few = large || (vector == 1 && self.plan.constants == 1);
        let shape = Shape::new(client, count, problem.channels / vector, longest.div_ceil(self.plan.tokens), few);
        let plan = Plan { packed, units: shape.units, ..self.plan };
        let cubes = grid(client, count * (problem.channels / vector).div_ceil(shape.width))?;
        let bounds = problem.cu_seqlens.as_deref().map(|bounds| upload(client, bounds)).transpose()?;
        // Safety: every index is below the lengths that the callers have checked.
        unsafe {
            engine::scan::launch_unchecked::<M>(
                client,
                cubes,
                CubeDim::new_1d(shape.units as u32),
                address,
                vector,
                InputsLaunch::new(
                    self.inputs.iter().map(|x| x.words(vector)).collect(),
                    args(self.constants.iter().copied()),
                    args(self.parameters.iter().copied()),
                    args(self.reset),
                    args(self.initial.iter().copied()),
                    args(self.before.iter().copied()),
                    bounds.into_iter().collect(),
                ),
                OutputsLaunch::new(args(&outputs), args(&last), args(&sums)),
                count,
                problem.time,
                problem.channels / vector,
                shape.lanes,
                shape.width,
                plan,
                if vector == 2 { ElemType::UInt(UIntKind::U32) } else { storage.elem_type() },
                storage.elem_type(),
            );
        }
        Ok(Scanned { outputs, last, sums })
    }
}

/// Units of a cube, `lanes * width`. Rounding does not depend on them.
struct Shape {
    units: usize,
    lanes: usize,
    width: usize,
}

impl Shape {
    /// 32 channels are a full line of memory; where sequences are few, fewer channels a cube make more cubes, down to a
    /// sector of 32 bytes of 16-bit pairs; also where that leaves fewer channels to the processor that has most. Lanes need
    /// not exceed the segments of the longest sequence; what is left over goes to channels.
    fn new(client: &Client, sequences: usize, channels: usize, segments: usize, few: bool) -> Self {
        let hardware = &client.properties().hardware;
        let processors = hardware.num_streaming_multiprocessors.unwrap_or(32) as usize;
        let cubes = |width| sequences * channels.div_ceil(width);
        let most = |width: &usize| cubes(*width).div_ceil(processors) * width;
        let enough = |width: &usize| *width == 8 || 2 * cubes(*width) >= 3 * processors;
        let width = [32, 16, 8].into_iter().filter(enough).min_by_key(most).unwrap_or(8);
        let shared = few || cubes(width) > processors;
        let units = if shared { UNITS / 2 } else { UNITS }.min(1 << hardware.max_units_per_cube.ilog2());
        let lanes = (units / width).min(segments.next_power_of_two()).max(carry::GROUP);
        Self { units, lanes, width: units / lanes }
    }
}

/// Where packed sequences begin, as a table of u32.
fn upload(client: &Client, bounds: &[usize]) -> Result<BufferArg, Error> {
    let bounds: Result<Vec<u32>, _> = bounds.iter().map(|&b| u32::try_from(b)).collect();
    let bounds = bounds.map_err(|_| Error::Sequences { reason: "must fit into 32 bits on a device".into() })?;
    let handle = client.create_from_slice(bytemuck::cast_slice(&bounds));
    // Safety: the handle holds as many elements.
    Ok(unsafe { BufferArg::from_raw_parts(handle, bounds.len()) })
}

/// Sums over the sequences of `[sequences, channels]`.
fn total(client: &Client, sums: &Buffer, sequences: usize, channels: usize, storage: Storage) -> Result<Buffer, Error> {
    let out = Buffer::output(client, storage, channels);
    let units = 64;
    // Safety: `sums` holds sequences * channels elements, and the kernel writes only the first `channels`.
    unsafe {
        engine::total::launch_unchecked(
            client,
            grid(client, channels.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            address_type(client, Storage::F32, [sums.len])?,
            sums.arg(),
            out.arg(),
            sequences,
            channels,
            storage.elem_type(),
        );
    }
    Ok(out)
}

/// Checks of tensors on a device against the sizes of a scan.
pub(crate) trait CheckBuffers {
    /// Checks a `[batch, time, channels]` argument.
    fn check_buffer(&self, argument: &'static str, x: &Buffer, storage: Storage) -> Result<(), Error>;

    /// Checks an optional f32 `[sequences, channels]` state.
    fn check_state_buffer(&self, argument: &'static str, sequences: usize, x: Option<&Buffer>) -> Result<(), Error>;
}

impl CheckBuffers for ScanProblem {
    fn check_buffer(&self, argument: &'static str, x: &Buffer, storage: Storage) -> Result<(), Error> {
        x.check(argument, storage, &self.token_shape())
    }

    fn check_state_buffer(&self, argument: &'static str, sequences: usize, x: Option<&Buffer>) -> Result<(), Error> {
        x.map_or(Ok(()), |x| x.check(argument, Storage::F32, &[sequences, self.channels]))
    }
}
