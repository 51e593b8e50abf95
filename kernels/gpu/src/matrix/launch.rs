//! Host side of the stages: which memory a launch reads and writes.

use crate::Client;
use cubecl::ir::{AddressType, ElemType};
use cubecl::prelude::{BufferArg, CubeCount, CubeDim};

use super::blueprint::{Blueprint, ReadBlueprint, WalkBlueprint};
use super::output::Direction;
use super::place::SizesLaunch;
use super::step::{COLUMNS, LowRankLaunch, StepBlueprint, StepSizesLaunch, step_kernel};
use super::{Inputs, Outputs, Write};
use crate::buffer::{Buffer, Storage};
use crate::chunks::Chunks;
use crate::device::{address_type, grid, vector};
use crate::engine::{launch, operands};
use crate::reduce::{sum_all_rows, sum_rows};
use thalweg_kernels::Error;
use thalweg_kernels::Sequences;
use thalweg_kernels::matrix::{GateKind, MatrixProblem};

use super::{Gate, Gradients, ahead, chunk_backward, output, scores, scores_backward};
use super::{panel_state::panel_state_kernel, panel_state_backward::panel_state_backward_kernel};
use super::{state::state_kernel, state_backward::state_backward_kernel};

/// Stage 2 reversed.
pub(crate) struct WalkBack {
    /// Gradient of the values, for the delta rule.
    pub z: Buffer,
    /// Of the state that leaves each chunk.
    pub dstates: Buffer,
    pub d_initial_state: Buffer,
}

/// Launches one of two kernels of the same arguments.
macro_rules! launch_either {
    ($on:ident, $blueprint:expr, $first:expr, $kernel:ident, $other:ident, $($rest:tt)+) => {
        if $first {
            launch!($on, $blueprint, $kernel, $($rest)+);
        } else {
            launch!($on, $blueprint, $other, $($rest)+);
        }
    };
}

/// One operation's launches share this.
pub(crate) struct Launch<'a> {
    client: &'a Client,
    pub p: &'a MatrixProblem,
    x: &'a Inputs<'a>,
    /// Keys of the delta rule that read the state in the place of `x.k`, before their token decays it.
    reads: Option<&'a Buffer>,
    b: Blueprint,
    gradients: Blueprint,
    w: WalkBlueprint,
    r: ReadBlueprint,
    chunks: Chunks,
    sequences: usize,
    /// Stands for tensors that are absent, and is never read.
    nothing: Buffer,
    address: AddressType,
    /// Elements that are read and written at a time.
    vector: usize,
    types: [ElemType; 2],
}

/// Stage 1.
pub(crate) struct Scores {
    pub a: Buffer,
    pub t: Buffer,
    /// Queries and keys for the other launches: weighted, or as they are.
    q_start: Buffer,
    k_start: Buffer,
    k_end: Buffer,
    ends: Buffer,
}

/// Stage 2.
pub(crate) struct Walk {
    /// What the tokens want to write: `v`, or for the delta rule what of it is new.
    pub x: Buffer,
    pub states: Buffer,
    pub final_state: Buffer,
}

impl<'a> Launch<'a> {
    /// Of inputs that have been checked.
    pub fn new(
        client: &'a Client,
        p: &'a MatrixProblem,
        sequences: &Sequences,
        x: &'a Inputs<'a>,
        reads: Option<&'a Buffer>,
    ) -> Result<Self, Error> {
        let storage = x.q.storage;
        let delta = beta(x).is_some();
        let b = Blueprint::select(client, p, storage, kernel_gate(x), delta, reads.is_some());
        let Some((b, gradients)) = b.and_then(|b| Some((b, b.for_gradients(client)?))) else {
            let room = client.properties().hardware.max_shared_memory_size;
            let reason = format!("{room} bytes of shared memory are too few for `key_dim` {}", p.key_dim);
            return Err(Error::Device { reason });
        };
        let (chunks, sequences) = (Chunks::new(client, sequences, b.chunk), sequences.count());
        let (w, r) = (b.plain().walk(client, p, sequences), b.plain().read(p));
        let nothing = Buffer::absent(client);
        let chunk_heads = chunks.count * p.value_heads;
        let lengths = [
            chunk_heads * p.key_dim * p.value_dim,
            chunk_heads * b.chunk * b.chunk,
            p.batch * p.time * p.value_heads * p.key_dim,
            x.v.len,
        ];
        let address = address_type(client, storage, lengths)?;
        let types = [storage.elem_type(), operands(b.engine, storage).1];
        let vector = vector(b.operand_size, &[p.key_dim, p.value_dim]);
        Ok(Self { client, p, x, reads, b, gradients, w, r, chunks, sequences, nothing, address, vector, types })
    }

    fn sizes(&self, b: &Blueprint) -> SizesLaunch {
        let gate_stride = if let Gate::Constant(_) = self.x.gate { 0 } else { self.p.value_heads };
        SizesLaunch::new(
            self.chunks.cut(),
            self.sequences,
            self.p.heads,
            self.p.value_heads,
            gate_stride,
            self.p.key_dim,
            self.p.value_dim,
            self.p.key_dim.div_ceil(b.block),
            self.p.value_dim.div_ceil(b.block),
            self.p.scale,
        )
    }

    fn operand(&self) -> Storage {
        operands(self.b.engine, self.x.q.storage).0
    }

    /// An output that only exists if `wanted`.
    fn output_if(&self, wanted: bool, storage: Storage, len: usize) -> Buffer {
        if wanted { Buffer::output(self.client, storage, len) } else { Buffer::absent(self.client) }
    }

    fn tensor(&self, optional: Option<&Buffer>) -> BufferArg {
        optional.unwrap_or(&self.nothing).arg()
    }

    fn cubes(&self, count: usize) -> Result<CubeCount, Error> {
        grid(self.client, count)
    }

    fn walks(&self) -> Result<CubeCount, Error> {
        let key_parts = self.p.key_dim.div_ceil(self.b.block) / self.w.state_blocks;
        let parts = key_parts * self.p.value_dim.div_ceil(self.w.value_block);
        self.cubes(self.sequences * self.p.value_heads * parts)
    }

    fn chunk_heads(&self) -> usize {
        self.chunks.count * self.p.value_heads
    }

    /// A state for each chunk, as the products read it.
    fn states(&self) -> Buffer {
        Buffer::output(self.client, self.operand(), self.chunk_heads() * self.p.key_dim * self.p.value_dim)
    }

    fn scores(&self) -> Result<Scores, Error> {
        if self.r.scores {
            let [q, k, none] = [self.x.q, self.x.k, &self.nothing].map(Clone::clone);
            let (k_start, a, t, ends) = (k.clone(), none.clone(), none.clone(), none);
            return Ok(Scores { a, t, q_start: q, k_start, k_end: k, ends });
        }
        let squares = self.chunk_heads() * self.b.chunk * self.b.chunk;
        let a = Buffer::output(self.client, self.operand(), squares);
        let t = self.output_if(self.b.delta, self.operand(), squares);
        let (key_wise, storage) = (self.b.gate == GateKind::KEY, self.x.q.storage);
        let weighted =
            |wanted| self.output_if(wanted, storage, self.p.batch * self.p.time * self.p.value_heads * self.p.key_dim);
        let (q_start, k_start, k_end) = (weighted(key_wise), weighted(key_wise && self.b.delta), weighted(key_wise));
        let ends = self.output_if(key_wise, Storage::F32, self.chunk_heads() * self.p.key_dim);
        launch!(
            self,
            self.b,
            scores::scores_kernel,
            self.cubes(self.chunk_heads())?,
            self.x.q.arg(),
            self.x.k.arg(),
            self.tensor(self.reads),
            self.tensor(self.x.gate.tensor()),
            self.tensor(beta(self.x)),
            self.chunks.table.arg(),
            a.arg(),
            t.arg(),
            scores::WeightedLaunch::new(q_start.arg(), k_start.arg(), k_end.arg(), ends.arg()),
            self.sizes(&self.b),
            self.b,
            self.types,
        );
        let or = |weighted, plain: &Buffer| if key_wise { weighted } else { plain.clone() };
        let (q_start, k_start, k_end) = (or(q_start, self.x.q), or(k_start, self.x.k), or(k_end, self.x.k));
        Ok(Scores { a, t, q_start, k_start, k_end, ends })
    }

    fn state(&self, scores: &Scores) -> Result<Walk, Error> {
        let storage = self.x.q.storage;
        let x = self.output_if(self.b.delta, storage, self.x.v.len);
        let states = self.states();
        let final_state = Buffer::output(self.client, Storage::F32, self.p.state_shape().iter().product());
        launch_either!(
            self,
            self.w.chunk,
            self.w.panels,
            panel_state_kernel,
            state_kernel,
            self.walks()?,
            ahead::WalkedKeysLaunch::new(scores.k_start.arg(), scores.k_end.arg(), scores.ends.arg()),
            self.x.v.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(beta(self.x)),
            scores.t.arg(),
            self.tensor(self.x.initial_state),
            self.chunks.table.arg(),
            x.arg(),
            states.arg(),
            final_state.arg(),
            self.sizes(&self.b),
            self.x.initial_state.is_some(),
            self.w,
            self.types,
        );
        let x = if self.b.delta { x } else { self.x.v.clone() };
        Ok(Walk { x, states, final_state })
    }

    fn output(&self, scores: &Scores, walk: &Walk) -> Result<Buffer, Error> {
        self.read_out([&scores.q_start, self.x.k], &walk.x, &scores.a, &walk.states, Direction::Forward)
    }

    /// `dv` of the additive write.
    fn values(&self, scores: &Scores, back: &WalkBack, d_o: &Buffer) -> Result<Buffer, Error> {
        self.read_out([&scores.k_end, self.x.q], d_o, &scores.a, &back.dstates, Direction::Backward)
    }

    fn read_out(
        &self,
        [reading, other]: [&Buffer; 2],
        x: &Buffer,
        a: &Buffer,
        states: &Buffer,
        direction: Direction,
    ) -> Result<Buffer, Error> {
        let o = Buffer::output(self.client, self.x.q.storage, self.x.v.len);
        launch!(
            self,
            self.b,
            output::output_kernel,
            self.cubes(self.chunk_heads() * self.p.value_dim.div_ceil(self.r.value_block))?,
            reading.arg(),
            other.arg(),
            x.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(beta(self.x)),
            a.arg(),
            states.arg(),
            self.chunks.table.arg(),
            o.arg(),
            self.sizes(&self.b),
            direction,
            self.r,
            self.types,
        );
        Ok(o)
    }

    fn state_backward(&self, scores: &Scores, d_o: &Buffer, d_final_state: Option<&Buffer>) -> Result<WalkBack, Error> {
        let storage = self.x.q.storage;
        let z = self.output_if(self.b.delta, storage, self.x.v.len);
        let dstates = self.states();
        let d_initial_state = Buffer::output(self.client, Storage::F32, self.p.state_shape().iter().product());
        launch_either!(
            self,
            self.w.chunk,
            self.w.panels,
            panel_state_backward_kernel,
            state_backward_kernel,
            self.walks()?,
            scores.q_start.arg(),
            ahead::WalkedKeysLaunch::new(scores.k_end.arg(), scores.k_start.arg(), scores.ends.arg()),
            self.tensor(self.x.gate.tensor()),
            self.tensor(beta(self.x)),
            scores.a.arg(),
            scores.t.arg(),
            d_o.arg(),
            self.tensor(d_final_state),
            self.chunks.table.arg(),
            z.arg(),
            dstates.arg(),
            d_initial_state.arg(),
            self.sizes(&self.b),
            d_final_state.is_some(),
            self.w,
            self.types,
        );
        Ok(WalkBack { z, dstates, d_initial_state })
    }

    pub fn forward(&self) -> Result<Outputs, Error> {
        let scores = self.scores()?;
        let walk = self.state(&scores)?;
        let o = self.output(&scores, &walk)?;
        Ok(Outputs { o, final_state: walk.final_state })
    }

    /// `da` is the gradient of keys that only read.
    pub fn backward(&self, d_o: Option<&Buffer>, d_final_state: Option<&Buffer>) -> Result<Gradients, Error> {
        let zeros;
        let d_o = match d_o {
            Some(d_o) => d_o,
            None => {
                zeros = self.zeros(self.x.v);
                &zeros
            }
        };
        let scores = self.scores()?;
        let walk = self.state(&scores)?;
        let back = self.state_backward(&scores, d_o, d_final_state)?;
        self.chunk_backward(&scores, &walk, back, d_o)
    }

    /// The gradients of the scores, as `A` and `T` are.
    fn scores_backward(&self, walk: &Walk, back: &WalkBack, d_o: &Buffer) -> Result<[Buffer; 2], Error> {
        let squares = self.chunk_heads() * self.b.chunk * self.b.chunk;
        let p = Buffer::output(self.client, self.operand(), squares);
        let r = self.output_if(self.b.delta, self.operand(), squares);
        launch!(
            self,
            self.b,
            scores_backward::scores_backward_kernel,
            self.cubes(self.chunk_heads())?,
            walk.x.arg(),
            self.tensor(self.x.gate.tensor()),
            d_o.arg(),
            back.z.arg(),
            self.chunks.table.arg(),
            p.arg(),
            r.arg(),
            self.sizes(&self.b),
            self.b.plain(),
            self.types,
        );
        Ok([p, r])
    }

    fn chunk_backward(&self, scores: &Scores, walk: &Walk, back: WalkBack, d_o: &Buffer) -> Result<Gradients, Error> {
        let (storage, p, tokens) = (self.x.q.storage, self.p, self.p.batch * self.p.time);
        let (delta, gate) = (self.b.delta, self.b.gate);
        let group = p.value_heads / p.heads;
        // Heads that share queries and keys leave their parts side by side, in f32.
        let part = if group > 1 { Storage::F32 } else { storage };
        let by_key = tokens * p.value_heads * p.key_dim;
        let by_head = tokens * p.value_heads;
        let dq = Buffer::output(self.client, part, by_key);
        let dk = Buffer::output(self.client, part, by_key);
        let dreads = self.output_if(self.b.low_rank, part, by_key);
        let dv = if delta { back.z.clone() } else { self.values(scores, &back, d_o)? };
        let [p_pairs, r_pairs] = self.scores_backward(walk, &back, d_o)?;
        let dg_len = if gate == GateKind::KEY { by_key } else { by_head };
        let dg = self.output_if(gate != GateKind::None, Storage::F32, dg_len);
        let dbeta = self.output_if(self.b.steps(), Storage::F32, by_head);
        launch!(
            self,
            self.gradients,
            chunk_backward::chunk_backward_kernel,
            self.cubes(self.chunk_heads())?,
            chunk_backward::OperandsLaunch::new(
                self.x.q.arg(),
                self.x.k.arg(),
                self.tensor(self.reads),
                self.tensor(self.x.gate.tensor()),
                self.tensor(beta(self.x)),
                walk.x.arg(),
                walk.states.arg(),
            ),
            p_pairs.arg(),
            r_pairs.arg(),
            d_o.arg(),
            back.z.arg(),
            back.dstates.arg(),
            self.chunks.table.arg(),
            chunk_backward::GradientsLaunch::new(dq.arg(), dk.arg(), dreads.arg(), dg.arg(), dbeta.arg()),
            self.sizes(&self.gradients),
            self.gradients,
            [self.types[0], self.types[1], part.elem_type()],
        );
        let ungroup = |x: Buffer| match group {
            1 => Ok(x),
            _ => sum_rows(self.client, &x, group, p.key_dim, storage),
        };
        let dg = match self.x.gate {
            Gate::None => None,
            Gate::Constant(_) => Some(sum_all_rows(self.client, dg, p.value_heads)?),
            Gate::Head(_) | Gate::Key(_) => Some(dg),
        };
        Ok(Gradients {
            dq: ungroup(dq)?,
            dk: ungroup(dk)?,
            dv,
            dg,
            dbeta: self.b.steps().then_some(dbeta),
            da: self.reads.map(|_| dreads),
            db: None,
            d_initial_state: self.x.initial_state.map(|_| back.d_initial_state),
        })
    }

    /// A tensor of zeros for a gradient that does not exist.
    fn zeros(&self, like: &Buffer) -> Buffer {
        let handle = self.client.create_from_slice(&vec![0; like.len * like.storage.size()]);
        Buffer { handle, ..*like }
    }
}

/// What the decay of a kernel depends on: to the kernels a constant gate is one per head that every token reads.
fn kernel_gate(x: &Inputs) -> GateKind {
    match x.gate.kind() {
        GateKind::CONSTANT => GateKind::HEAD,
        other => other,
    }
}

/// The step sizes of the delta rule.
fn beta<'a>(x: &Inputs<'a>) -> Option<&'a Buffer> {
    match x.write {
        Write::Delta { beta } => Some(beta),
        Write::Additive | Write::LowRank { .. } => None,
    }
}

/// One token of each sequence, in one launch; `state` is updated in place.
pub(crate) fn step(client: &Client, p: &MatrixProblem, x: &Inputs, state: &Buffer) -> Result<Buffer, Error> {
    let o = Buffer::output(client, x.q.storage, x.v.len);
    let units = client.properties().hardware.max_units_per_cube as usize;
    let nothing = Buffer::absent(client);
    let tensor = |x: Option<&Buffer>| x.unwrap_or(&nothing).arg();
    let (a, b) = match x.write {
        Write::LowRank { a, b } => (Some(a), Some(b)),
        _ => (None, None),
    };
    let low_rank = LowRankLaunch::new(tensor(a), tensor(b));
    let b = StepBlueprint::new(kernel_gate(x), x.write.kind(), p.key_dim, units);
    let cubes = p.batch * p.value_heads * p.value_dim.div_ceil(COLUMNS);
    let gate_stride = if let Gate::Constant(_) = x.gate { 0 } else { p.value_heads };
    // Safety: the kernel stays within the rows and features that the sizes describe, and the buffers have those sizes.
    unsafe {
        step_kernel::launch_unchecked(
            client,
            grid(client, cubes)?,
            CubeDim::new_1d((b.groups * COLUMNS) as u32),
            address_type(client, x.q.storage, [state.len])?,
            x.q.arg(),
            x.k.arg(),
            x.v.arg(),
            tensor(x.gate.tensor()),
            tensor(beta(x)),
            low_rank,
            state.arg(),
            o.arg(),
            StepSizesLaunch::new(p.batch, p.heads, p.value_heads, p.key_dim, p.value_dim, gate_stride, p.scale),
            b,
            x.q.storage.elem_type(),
        );
    }
    Ok(o)
}
