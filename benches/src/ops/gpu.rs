//! The operations that have GPU kernels, on the first GPU, without Burn.

use super::channels::{Channels, Conv, Scan};
use super::gated::{ComplexScan, RgLru};
use super::{Input, Op, attention, cotangent, matrix, with_tolerance};
use crate::gpu::{client, download, upload, wait};
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass};
use cubecl::MemoryScope;
use thalweg_gpu::{Buffer, Client};
use thalweg_kernels::cost::Cost;

/// Calls are launched one after the other until they have at least these bytes to move: waiting for the device once per
/// run is then nothing.
const BYTES: u64 = 1 << 30;

/// Results by name.
pub(super) type Found = Vec<(&'static str, Buffer)>;

/// What an operation launches.
pub(super) trait GpuOp: Op {
    /// Launches a pass on the inputs, in the order of [`Op::inputs`]; on a state if it is a step, and with the gradients if
    /// there are cotangents. Returns what [`Op::expected`] does, the main output first.
    fn launch(
        &self,
        client: &Client,
        x: &[Buffer],
        d_o: &[Buffer],
        state: Option<&Buffer>,
    ) -> Result<Found, thalweg_kernels::Error>;

    /// The cotangents of all outputs, given that of the main one.
    fn cotangents(&self, d_o: &[f32]) -> Vec<Vec<f32>> {
        vec![d_o.to_vec()]
    }
}

pub(super) fn build(case: &Case) -> Result<Box<dyn Workload>, Error> {
    Ok(match case.name.as_str() {
        "scan" | "hgrn" => Box::new(OnGpu::new(Scan::new(case), case)?),
        "short_conv" => Box::new(OnGpu::new(Conv::new(case), case)?),
        "complex_scan" => Box::new(OnGpu::new(ComplexScan::new(case), case)?),
        "rg_lru" => Box::new(OnGpu::new(RgLru::new(case), case)?),
        "attention" => Box::new(OnGpu::new(attention::data(case), case)?),
        _ => Box::new(OnGpu::new(matrix::data(case)?, case)?),
    })
}

struct OnGpu<O> {
    op: O,
    case: Case,
    client: Client,
    inputs: Vec<Buffer>,
    d_o: Vec<f32>,
    cotangents: Vec<Buffer>,
    /// Of a step; each goes on from the one before.
    state: Option<Buffer>,
    results: Option<Found>,
}

impl<O: GpuOp> OnGpu<O> {
    fn new(op: O, case: &Case) -> Result<Self, Error> {
        let client = client()?;
        // What an earlier benchmark left in the pools is not this one's memory.
        let _ = client.memory_cleanup();
        let upload = |dtype, x: &[f32]| upload(&client, dtype, x);
        let input = |x: Input| upload(if x.stored { case.dtype } else { Dtype::F32 }, &x.values);
        let train = case.pass == Pass::Train;
        let d_o = if train { cotangent(case, &op.output()) } else { Vec::new() };
        let cotangents = if train { op.cotangents(&d_o) } else { Vec::new() };
        let state = if case.pass == Pass::Step { op.state() } else { None };
        Ok(Self {
            inputs: op.inputs().into_iter().map(input).collect(),
            cotangents: cotangents.iter().map(|x| upload(case.dtype, x)).collect(),
            state: state.map(|state| upload(Dtype::F32, &state.values)),
            case: case.clone(),
            results: None,
            client: client.clone(),
            d_o,
            op,
        })
    }

    fn call(&mut self) -> Result<(), Error> {
        // Its memory serves again.
        self.results = None;
        let found = self.op.launch(&self.client, &self.inputs, &self.cotangents, self.state.as_ref())?;
        if let Some(state) = &mut self.state
            && let Some((_, next)) = found.iter().find(|(name, _)| *name == "state")
        {
            *state = next.clone();
        }
        self.results = Some(found);
        Ok(())
    }
}

impl<O: GpuOp> Workload for OnGpu<O> {
    fn run(&mut self) -> Result<(), Error> {
        // The first run is the one that is compared, and steps go on from each other.
        let calls = if self.results.is_some() { self.calls() } else { 1 };
        for _ in 0..calls {
            self.call()?;
        }
        wait(&self.client)
    }

    fn found(&self) -> Vec<Named> {
        // A device that cannot be read has failed: nothing of it is then as expected.
        let read = |buffer| download(&self.client, buffer).unwrap_or_default();
        let found = self.results.iter().flatten();
        found.map(|(name, buffer)| Named { name, values: read(buffer) }).collect()
    }

    fn head(&self, len: usize) -> Vec<f64> {
        let Some((_, o)) = self.results.iter().flatten().next() else { return Vec::new() };
        let mut o = download(&self.client, o).unwrap_or_default();
        o.truncate(len);
        o
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        Ok(with_tolerance(&self.case, self.op.expected(self.case.pass, &self.d_o)))
    }

    fn cost(&self) -> Cost {
        self.op.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.op.tokens()
    }

    fn device_bytes(&self) -> Option<u64> {
        Some(self.client.memory_report(MemoryScope::Device).usage().bytes_reserved)
    }

    fn calls(&self) -> usize {
        (BYTES / self.cost().bytes.max(1)).clamp(1, 64) as usize
    }
}
