//! The matrix-state recurrences on the first GPU.

use super::{Data, cotangent, with_tolerance};
use crate::gpu::{client, download, upload, wait};
use crate::ops::Op;
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass};
use cubecl::MemoryScope;
use thalweg_kernels::cost::{Cost, GateKind, WriteKind};
use thalweg_kernels::gpu::matrix::{self, Gate, Gradients, Inputs, Outputs, Write};
use thalweg_kernels::gpu::{Buffer, Client};

/// Calls are launched one after the other until they have at least these bytes to move: waiting for the device once per
/// run is then nothing.
const BYTES: u64 = 1 << 30;

pub(super) struct Gpu {
    data: Data,
    case: Case,
    client: Client,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    g: Buffer,
    beta: Buffer,
    d_o: Option<Vec<f32>>,
    cotangent: Option<Buffer>,
    /// Of a step, advanced in place.
    state: Option<Buffer>,
    results: Option<(Outputs, Option<Gradients>)>,
}

impl Gpu {
    pub(super) fn new(data: Data, case: &Case) -> Result<Self, Error> {
        let client = client()?;
        // What an earlier benchmark left in the pools is not this one's memory.
        let _ = client.memory_cleanup();
        let d_o = (case.pass == Pass::Train).then(|| cotangent(case, &data.output()));
        let [q, k, v] = [&data.q, &data.k, &data.v].map(|x| upload(&client, case.dtype, x));
        let [g, beta] =
            [&data.g, &data.beta].map(|x| upload(&client, Dtype::F32, if x.is_empty() { &[0.0] } else { x }));
        let cotangent = d_o.as_deref().map(|x| upload(&client, case.dtype, x));
        let state = (case.pass == Pass::Step).then(|| upload(&client, Dtype::F32, &data.state));
        Ok(Self { case: case.clone(), client, q, k, v, g, beta, d_o, cotangent, state, results: None, data })
    }

    fn call(&mut self) -> Result<(), Error> {
        let Data { problem, gate, write, .. } = &self.data;
        let inputs = Inputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            gate: match gate {
                GateKind::None => Gate::None,
                GateKind::Constant => Gate::Constant(&self.g),
                GateKind::Head => Gate::Head(&self.g),
                GateKind::Key => Gate::Key(&self.g),
            },
            write: match write {
                WriteKind::Delta => Write::Delta { beta: &self.beta },
                _ => Write::Additive,
            },
            initial_state: None,
        };
        if let Some(state) = &self.state {
            let o = matrix::step(&self.client, problem, &inputs, state)?;
            self.results = Some((Outputs { o, final_state: state.clone() }, None));
            return Ok(());
        }
        let out = matrix::forward(&self.client, problem, &inputs)?;
        let gradients = match &self.cotangent {
            Some(d_o) => Some(matrix::backward(&self.client, problem, &inputs, Some(d_o), None)?),
            None => None,
        };
        self.results = Some((out, gradients));
        Ok(())
    }
}

impl Workload for Gpu {
    fn run(&mut self) -> Result<(), Error> {
        // The first run is the one that is compared, and steps go on from each other.
        let calls = if self.results.is_some() { self.calls() } else { 1 };
        for _ in 0..calls {
            self.call()?;
        }
        wait(&self.client)
    }

    fn found(&self) -> Vec<Named> {
        let Some((out, gradients)) = &self.results else { return Vec::new() };
        let mut found = vec![("o", &out.o), ("state", &out.final_state)];
        if let Some(d) = gradients {
            found.extend([("dq", &d.dq), ("dk", &d.dk), ("dv", &d.dv)]);
            found.extend(d.dg.iter().map(|x| ("dg", x)));
            found.extend(d.dbeta.iter().map(|x| ("dbeta", x)));
        }
        // A device that cannot be read has failed: nothing of it is then as expected.
        let read = |buffer| download(&self.client, buffer).unwrap_or_default();
        found.into_iter().map(|(name, buffer)| Named { name, values: read(buffer) }).collect()
    }

    fn head(&self, len: usize) -> Vec<f64> {
        let Some((out, _)) = &self.results else { return Vec::new() };
        let mut o = download(&self.client, &out.o).unwrap_or_default();
        o.truncate(len);
        o
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let d_o = self.d_o.as_deref().unwrap_or_default();
        Ok(with_tolerance(&self.case, self.data.expected(self.case.pass, d_o)))
    }

    fn cost(&self) -> Cost {
        self.data.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.data.tokens()
    }

    fn device_bytes(&self) -> Option<u64> {
        Some(self.client.memory_report(MemoryScope::Device).usage().bytes_reserved)
    }

    fn calls(&self) -> usize {
        (BYTES / self.cost().bytes.max(1)).clamp(1, 64) as usize
    }
}
